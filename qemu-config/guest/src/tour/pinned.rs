//! The same work with pinned memory, in a process of its own, which may be killed for it.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use extlb_driver::{Device, Error, Follow, Kernel, Options};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

use super::procfs;

/// The child's way of saying that it failed as it should.
pub const OUT_OF_MEMORY: u8 = 3;
/// For kernels that check all that they do; others need less than a second.
const PATIENCE: Duration = Duration::from_secs(120);
/// The size of the pieces in which memory is registered, in MiB: about half of the guest's. The
/// first is pinned for real; by the second the driver says no. Smaller ones would find the end of
/// memory through the OOM killer, after up to half a minute of thrashing.
fn piece_mib() -> Result<u64> {
    Ok(((procfs::meminfo_kib("MemTotal")? >> 10) * 9 / 256 * 16).max(16))
}

/// Registers so much memory, pinned; what happened. Fails if it does not fail.
pub fn must_fail(mib: u64) -> Result<String> {
    run_child(&["pinned-child", &mib.to_string()])?.must_have_failed(mib)
}

/// How a child ended.
pub struct Ended {
    status: ExitStatus,
    /// All that it printed.
    pub said: String,
    /// The most that it had locked (VmLck and VmPin), as far as it was seen.
    pub locked_kib: u64,
    /// The least that was available to everybody else meanwhile.
    pub available_kib: u64,
}

/// Runs this program with other arguments, and watches it.
pub fn run_child(arguments: &[&str]) -> Result<Ended> {
    let program = std::env::current_exe().context("the path of this program")?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start a child")?;
    let (mut locked_kib, mut available_kib) = (0, u64::MAX);
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if begun.elapsed() > PATIENCE {
            child.kill()?;
            child.wait()?;
            bail!(
                "pinning neither failed nor ended within {} s",
                PATIENCE.as_secs()
            );
        }
        let pid = child.id().to_string();
        let field = |name| procfs::status_kib_of(&pid, name).unwrap_or(0);
        locked_kib = locked_kib.max(field("VmLck") + field("VmPin"));
        available_kib = available_kib.min(procfs::meminfo_kib("MemAvailable")?);
        std::thread::sleep(Duration::from_millis(20));
    };
    let mut said = String::new();
    if let Some(mut output) = child.stdout.take() {
        output.read_to_string(&mut said)?;
    }
    Ok(Ended {
        status,
        said,
        locked_kib,
        available_kib,
    })
}

impl Ended {
    /// What happened, if it is what has to happen: the child was refused, or killed for its greed.
    pub fn must_have_failed(&self, mib: u64) -> Result<String> {
        let last = self.said.trim().lines().next_back().unwrap_or_default();
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) if code == i32::from(OUT_OF_MEMORY) => Ok(last.to_owned()),
            // The kernel's own verdict: the child told it that it is the one to go.
            (None, Some(nix::libc::SIGKILL)) => Ok(format!(
                "killed for lack of memory with {} MiB pinned",
                self.locked_kib >> 10
            )),
            (Some(0), _) => {
                bail!("{mib} MiB were pinned: the guest has too much memory for this step")
            }
            _ => bail!("the child ended with {}: {last}", self.status),
        }
    }
}

/// If somebody has to die for lack of memory, it is this process; and no limit saves it from that.
pub fn be_the_one_to_go() -> Result<()> {
    std::fs::write("/proc/self/oom_score_adj", "1000").context("oom_score_adj")?;
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).context("RLIMIT_MEMLOCK")
}

/// The child.
pub fn child(mib: u64) -> ExitCode {
    tell(pin(mib))
}

/// What a child says of how it ended: nothing if all memory was had, else why not.
pub fn tell(outcome: Result<Option<String>>) -> ExitCode {
    match outcome {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(said)) => {
            println!("{said}");
            ExitCode::from(OUT_OF_MEMORY)
        }
        Err(error) => {
            println!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn pin(mib: u64) -> Result<Option<String>> {
    be_the_one_to_go()?;
    let device = Device::open(Kernel::new())?;
    let context = device.context(Options {
        follow: Follow::PINNED,
        ..Options::default()
    })?;
    // A piece at a time: memory is really used up, and not refused from the start.
    let mut pinned = Vec::new();
    let piece = piece_mib()?;
    for done in (0..mib).step_by(piece as usize) {
        let mapping = device.map_anonymous((piece as usize) << 20)?;
        match context.register(mapping) {
            Ok(piece) => pinned.push(piece),
            Err(refused) => {
                let Error::Call { call, errno } = &refused.error else {
                    return Err(refused.error.into());
                };
                ensure!(
                    *errno == nix::errno::Errno::ENOMEM,
                    "{call} failed with {errno}"
                );
                return Ok(Some(format!("{call} fails with {errno} after {done} MiB")));
            }
        }
    }
    Ok(None)
}
