//! What other processes of this program do.

use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{bystander, cgroup, forks, fuzz, kill, offline, oom, share, stop, timeout, unload};

/// Plays the role that the words name.
pub fn play(words: &[&str]) -> Result<()> {
    match *words {
        ["bystander", device_goes] => bystander::play(device_goes == "true"),
        ["fuzz", seed, count, threads] => {
            fuzz::play(seed.parse()?, count.parse()?, threads.parse()?)
        }
        ["work"] => kill::work(),
        ["endure"] => bystander::endure(),
        ["sleep"] => unload::sleep(),
        ["victim"] => timeout::victim(),
        ["hog"] => oom::hog(),
        ["sweep"] => oom::sweep(),
        ["beat"] => stop::beat(),
        ["share"] => share::play(),
        ["hold"] => offline::hold(),
        ["bomb"] => forks::bomb(),
        ["in", group, ..] => {
            cgroup::enter(group)?;
            play(&words[2..])
        }
        ["nobody", ..] => forks::as_nobody(&words[1..]),
        _ => bail!("no such role: {words:?}"),
    }
}

/// This program in a role; its standard input and output are pipes.
pub fn command(words: &[&str]) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg("--as").args(words);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// Starts it.
pub fn start(words: &[&str]) -> Result<Child> {
    command(words)
        .spawn()
        .with_context(|| format!("start {words:?}"))
}

/// Processes that work until they are killed; a death of their own is an error.
pub struct Crew(Vec<Child>);

impl Crew {
    /// Nobody yet.
    pub fn new() -> Self {
        Self(Vec::new())
    }

    /// One more.
    pub fn start(&mut self, words: &[&str]) -> Result<u32> {
        let child = start(words)?;
        let id = child.id();
        self.0.push(child);
        Ok(id)
    }

    /// All are there.
    pub fn check(&mut self) -> Result<()> {
        for child in &mut self.0 {
            if let Some(status) = child.try_wait()? {
                bail!("a process ended by itself: {status}");
            }
        }
        Ok(())
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
