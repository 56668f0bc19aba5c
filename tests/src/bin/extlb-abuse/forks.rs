//! Fork bombs of processes with contexts: programs without privileges that start themselves again
//! and again, and fork with work in flight, until there is no room for another; then all are killed
//! at once.

use std::fs;
use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use extlb_driver::{Device, Kernel, Options};
use nix::sys::resource::{Resource, setrlimit};

use crate::cgroup::Cgroup;
use crate::fuzz::NOBODY;
use crate::proc_fs::{contexts, eventually};
use crate::sys_unsafe::fork_for;
use crate::{Figures, Order, bystander, role};

/// Processes at a time.
const PROCESSES: u64 = 48;
/// Time that a bomb has at least.
const BURN: Duration = Duration::from_secs(4);
/// And at most, on a machine that is slow.
const BURN_MOST: Duration = Duration::from_secs(60);
const BYTES: usize = 1 << 20;

/// Sets off `count` bombs.
pub fn run(order: &Order) -> Result<Figures> {
    let mut figures = Figures::new();
    for _ in 0..order.count {
        order.watch.step("a bomb goes off");
        let forks = processes()?;
        let group = Cgroup::new("forks")?;
        let mut bomb = group.start(&["nobody", "bomb"])?;
        let begin = Instant::now();
        let mut most = 0;
        // Half of the processes that there may be.
        let enough = PROCESSES / 2;
        while begin.elapsed() < BURN || most < enough && begin.elapsed() < BURN_MOST {
            most = most.max(contexts()? as u64);
            std::thread::sleep(Duration::from_millis(20));
        }
        order.watch.step("all processes are killed at once");
        group.kill()?;
        let status = bomb.wait()?;
        ensure!(status.code().is_none(), "the bomb ended: {status}");
        eventually("the driver forgets killed processes", || {
            Ok(contexts()? == 1)
        })?;
        ensure!(most >= enough, "{most} contexts at a time only");
        let known = figures.entry("most_contexts".to_owned()).or_default();
        *known = most.max(*known);
        *figures.entry("forks".to_owned()).or_default() += processes()? - forks;
    }
    Ok(figures)
}

/// Processes and threads that have ever been started.
fn processes() -> Result<u64> {
    let text = fs::read_to_string("/proc/stat")?;
    text.lines()
        .find_map(|line| line.strip_prefix("processes ")?.parse().ok())
        .context("/proc/stat has no processes")
}

/// Gives all privileges up, and plays another role.
pub fn as_nobody(words: &[&str]) -> Result<()> {
    setrlimit(Resource::RLIMIT_NPROC, PROCESSES, PROCESSES)?;
    let error = role::command(words).uid(NOBODY).gid(NOBODY).exec();
    Err(error).context("exec")
}

/// Starts itself over and over, with a context of its own each.
pub fn bomb() -> Result<()> {
    let mut children = Vec::new();
    loop {
        // As many as there may be.
        if let Ok(child) = role::start(&["bomb"]) {
            children.push(child);
        }
        // All contexts may be taken, and memory may be short.
        let opened = Device::open(Kernel::new()).and_then(|d| d.context(Options::default()));
        let Ok(context) = opened else {
            std::thread::yield_now();
            continue;
        };
        for pattern in 1..4 {
            let memory = context.allocate(BYTES)?;
            let flying = context.queue().fill(memory, pattern)?;
            // The memory is copied as the device writes it. The child has no context.
            let _ = fork_for(|| {});
            let ((), memory) = flying.finish()?;
            let pattern = pattern.to_ne_bytes();
            let same = memory.chunks_exact(8).all(|word| word == pattern);
            ensure!(same, "the device's writes are lost");
        }
        bystander::round(&context, u64::from(std::process::id()))?;
        children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    }
}
