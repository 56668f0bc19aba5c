//! Control groups: processes whose memory is limited, and that can be killed all at once.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};

use anyhow::{Context, Result, ensure};

use crate::proc_fs::eventually;
use crate::role;

const ROOT: &str = "/sys/fs/cgroup";
const SWAP: &str = "/dev/zram0";

/// A group; ends with all its processes.
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// An empty group whose memory is counted.
    pub fn new(name: &str) -> Result<Self> {
        let control = format!("{ROOT}/cgroup.subtree_control");
        fs::write(&control, "+memory").context(control)?;
        let path = PathBuf::from(format!("{ROOT}/abuse-{name}"));
        fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self(path))
    }

    /// Writes a file of it.
    pub fn set(&self, file: &str, value: &str) -> Result<()> {
        let path = self.0.join(file);
        fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))
    }

    /// A file of it that is one number.
    pub fn number(&self, file: &str) -> Result<u64> {
        let path = self.0.join(file);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(text.trim().parse()?)
    }

    /// A number behind a name in one of its files.
    pub fn event(&self, file: &str, name: &str) -> Result<u64> {
        let path = self.0.join(file);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
            .with_context(|| format!("{} has no {name}", path.display()))
    }

    /// This program in a role, inside the group before it does anything.
    pub fn command(&self, words: &[&str]) -> Command {
        let path = self.0.to_string_lossy();
        role::command(&[&["in", &path], words].concat())
    }

    /// Starts it.
    pub fn start(&self, words: &[&str]) -> Result<Child> {
        self.command(words).spawn().context("start a process")
    }

    /// Kills all that is in it, and waits until nothing is.
    pub fn kill(&self) -> Result<()> {
        self.set("cgroup.kill", "1")?;
        eventually("all processes of the group are gone", || {
            Ok(self.event("cgroup.events", "populated")? == 0)
        })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = self.kill();
        let _ = fs::remove_dir(&self.0);
    }
}

/// Enters a group.
pub fn enter(path: &str) -> Result<()> {
    fs::write(format!("{path}/cgroup.procs"), "0").context("enter a group")
}

/// Somewhere to swap to, as long as it is there.
pub struct Swap;

impl Swap {
    /// Compressed memory.
    pub fn on() -> Result<Self> {
        fs::write("/sys/block/zram0/disksize", "128M").context("zram0")?;
        busybox(&["mkswap", SWAP])?;
        busybox(&["swapon", SWAP])?;
        Ok(Self)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let _ = busybox(&["swapoff", SWAP]);
        let _ = fs::write("/sys/block/zram0/reset", "1");
    }
}

fn busybox(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("/bin/busybox");
    let output = command.args(arguments).output();
    let output = output.with_context(|| arguments.join(" "))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", arguments.join(" "));
    Ok(())
}
