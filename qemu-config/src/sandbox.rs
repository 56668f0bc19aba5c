//! Running a program with a toolbox as its root: for programs that start others (make).
//!
//! The rig starts itself with the hidden command `sandbox`, which makes namespaces, mounts what is
//! needed and runs the program. Root needs only mounts of its own; an ordinary user gets them inside
//! a user namespace. Where neither is allowed the caller is told, and finds another way.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, chroot, getgid, getuid};

use crate::spawn_unsafe::dies_with_us;

/// A folder of the machine seen inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// Outside.
    pub from: PathBuf,
    /// Inside; an absolute path. The folder is made in the root if it is absent.
    pub to: PathBuf,
}

/// What the hidden command is given.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The folder that becomes the root.
    #[arg(long)]
    root: PathBuf,
    /// Folders seen inside, as FROM and TO in turn.
    #[arg(long, num_args = 2, action = clap::ArgAction::Append)]
    mount: Vec<PathBuf>,
    /// Working directory inside.
    #[arg(long)]
    cwd: PathBuf,
    /// The program.
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// A command that will run `program` inside; its arguments and environment may be added as usual.
pub fn command(rig: &Path, root: &Path, binds: &[Bind], cwd: &str, program: &str) -> Command {
    let mut command = Command::new(rig);
    command
        .arg("sandbox")
        .arg("--root")
        .arg(root)
        .arg("--cwd")
        .arg(cwd);
    for bind in binds {
        command.arg("--mount").arg(&bind.from).arg(&bind.to);
    }
    command.arg("--").arg(program);
    command.env_clear();
    for (name, value) in [
        ("PATH", "/usr/bin:/usr/sbin"),
        ("HOME", "/"),
        ("LC_ALL", "C"),
    ] {
        command.env(name, value);
    }
    command
}

/// Whether programs can be run inside at all on this machine; the reason if not.
pub fn check(rig: &Path, root: &Path) -> Result<()> {
    crate::child::output(&mut command(rig, root, &[], "/", "true")).map(drop)
}

/// The hidden command: runs the program inside and ends with its code.
pub fn enter(arguments: &Arguments) -> Result<Infallible> {
    isolate()?;
    mount_at(None, Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    let root = &arguments.root;
    for name in ["proc", "dev"] {
        let from = Path::new("/").join(name);
        mount_at(
            Some(&from),
            &root.join(name),
            MsFlags::MS_BIND | MsFlags::MS_REC,
        )?;
    }
    let pairs = arguments.mount.chunks_exact(2);
    for (from, to) in pairs.map(|pair| (&pair[0], &pair[1])) {
        let to = root.join(
            to.strip_prefix("/")
                .context("a bind's target must be absolute")?,
        );
        fs::create_dir_all(&to).with_context(|| format!("cannot make {}", to.display()))?;
        mount_at(Some(from), &to, MsFlags::MS_BIND | MsFlags::MS_REC)?;
    }
    chroot(root.as_path()).with_context(|| format!("cannot change root to {}", root.display()))?;
    chdir(&arguments.cwd).with_context(|| format!("no {} inside", arguments.cwd.display()))?;
    let (program, rest) = arguments
        .command
        .split_first()
        .context("no program given")?;
    // The first process of the new process namespace: when it ends, all it started are killed.
    let status = dies_with_us(Command::new(program).args(rest))
        .status()
        .with_context(|| format!("cannot start {}", program.display()))?;
    use std::os::unix::process::ExitStatusExt;
    std::process::exit(
        status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
    );
}

/// New mount and process namespaces; for an ordinary user within a user namespace, as its root.
fn isolate() -> Result<()> {
    let spaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID;
    let (uid, gid) = (getuid(), getgid());
    if uid.is_root() {
        match unshare(spaces) {
            Ok(()) => return Ok(()),
            Err(Errno::EPERM) => {}
            Err(error) => return Err(error).context("cannot make a mount namespace"),
        }
    }
    if let Err(error) = unshare(spaces | CloneFlags::CLONE_NEWUSER) {
        bail!(
            "this machine allows no namespaces here ({error}): root lacks CAP_SYS_ADMIN, or user \
             namespaces are switched off"
        );
    }
    fs::write("/proc/self/setgroups", "deny").context("user namespace: groups")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1")).context("user namespace: user")?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1")).context("user namespace: group")?;
    Ok(())
}

fn mount_at(from: Option<&Path>, to: &Path, flags: MsFlags) -> Result<()> {
    mount(from, to, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("cannot mount at {}", to.display()))
}
