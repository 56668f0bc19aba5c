//! Not enough memory: a process whose memory the device fills is killed for it, by its group's limit
//! or because the machine has no more; and a group's limit makes the kernel take pages from the
//! device all the time.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::cgroup::{Cgroup, Swap};
use crate::proc_fs::{contexts, counter, eventually, meminfo_kib, vmstat};
use crate::{Figures, Order, bystander, role};

const CHUNK: usize = 1 << 20;
/// Memory of the group whose member is killed, in MiB.
const SMALL_MIB: u64 = 24;
/// Memory that is left to the process that takes all of the machine's, in MiB.
const LEFT_MIB: u64 = 64;
/// Memory that the device works on in turn, in MiB, and how much of it may be there at a time.
const SWEPT_MIB: u64 = 48;
const LIMIT_MIB: u64 = 20;
/// A charge that cannot fail may be beyond the limit for a moment, on each processor.
const EXCESS_MIB: u64 = 1;

/// Lets `count` processes take more than their group may have.
pub fn run(order: &Order) -> Result<Figures> {
    for _ in 0..order.count {
        order
            .watch
            .step("a process of a group is killed for lack of memory");
        let kills = vmstat("oom_kill")?;
        let requests = counter("page_requests")?;
        let group = Cgroup::new("oom")?;
        group.set("memory.max", &format!("{SMALL_MIB}M"))?;
        group.set("memory.swap.max", "0")?;
        is_killed(group.start(&["hog"])?)?;
        let events = group.event("memory.events", "oom_kill")?;
        let kills = vmstat("oom_kill")? - kills;
        ensure!(
            events == 1 && kills == 1,
            "{events} processes of the group and {kills} in all were killed for lack of memory"
        );
        let requests = counter("page_requests")? - requests;
        ensure!(requests > 10, "the device did not take the memory");
        eventually("the driver forgets the killed process", || {
            Ok(contexts()? == 1)
        })?;
    }
    Ok(Figures::from([("killed".to_owned(), order.count)]))
}

/// Lets `count` processes take all memory of the machine: each is killed for it, and nobody else is.
pub fn exhaust(order: &Order) -> Result<Figures> {
    // Pages that can neither be swapped out nor dropped, and are nobody's whom it would help to kill.
    let ballast = File::from(memfd_create(c"ballast", MFdFlags::MFD_CLOEXEC)?);
    for _ in 0..order.count {
        order.watch.step("leave little memory");
        let mut bytes = ballast.metadata()?.len();
        while meminfo_kib("MemAvailable")? > LEFT_MIB << 10 {
            order.watch.alive();
            ballast.write_all_at(&[1; CHUNK], bytes)?;
            bytes += CHUNK as u64;
        }
        order
            .watch
            .step("a process is killed for lack of memory of the machine");
        let kills = vmstat("oom_kill")?;
        is_killed(role::start(&["hog"])?)?;
        eventually("the driver forgets the killed process", || {
            Ok(contexts()? == 1)
        })?;
        // Who is killed in place of the first, is killed soon after.
        std::thread::sleep(Duration::from_millis(500));
        let kills = vmstat("oom_kill")? - kills;
        ensure!(kills == 1, "{kills} processes were killed, not only one");
    }
    Ok(Figures::from([("killed".to_owned(), order.count)]))
}

fn is_killed(mut hog: Child) -> Result<()> {
    let status = hog.wait()?;
    let killed = status.signal() == Some(nix::libc::SIGKILL);
    ensure!(killed, "the process that takes all memory ended: {status}");
    Ok(())
}

/// Lets the device fill memory until killed.
pub fn hog() -> Result<()> {
    fs::write("/proc/self/oom_score_adj", "1000").context("oom_score_adj")?;
    let context = bystander::open(false)?;
    let mut taken = Vec::new();
    for pattern in 1.. {
        let Ok(memory) = context.allocate(CHUNK) else {
            // No memory for the driver's own tables: it is nearly over.
            continue;
        };
        match context.queue().fill(memory, pattern)?.finish() {
            Ok(((), memory)) => taken.push(memory),
            // A page that cannot be had is a fault. Whoever loses the device otherwise, says so.
            Err(extlb_driver::Error::Fault { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Works on more memory than its group may have, `count` times.
pub fn limit(order: &Order) -> Result<Figures> {
    let _swap = Swap::on()?;
    let mut figures = Figures::new();
    for _ in 0..order.count {
        order.watch.step("work on more than the group may have");
        let group = Cgroup::new("limit")?;
        group.set("memory.max", &format!("{LIMIT_MIB}M"))?;
        let (shootdowns, swapped) = (counter("shootdowns")?, vmstat("pswpout")?);
        let status = group.start(&["sweep"])?.wait()?;
        ensure!(status.success(), "work within a limit: {status}");
        let peak = group.number("memory.peak")?;
        let most = (LIMIT_MIB + EXCESS_MIB) << 20;
        ensure!(peak <= most, "{peak} bytes in a group of {LIMIT_MIB} MiB");
        let killed = group.event("memory.events", "oom_kill")?;
        ensure!(killed == 0, "killed instead of swapped out");
        let mut add = |name: &str, value| *figures.entry(name.to_owned()).or_default() += value;
        add("hit_the_limit", group.event("memory.events", "max")?);
        add("pages_swapped_out", vmstat("pswpout")? - swapped);
        add("shootdowns", counter("shootdowns")? - shootdowns);
    }
    let swapped = figures["pages_swapped_out"];
    let least = order.count * (SWEPT_MIB - LIMIT_MIB) * 256;
    ensure!(swapped >= least, "{swapped} pages swapped out, of {least}");
    Ok(figures)
}

/// Fills memory by the device, and looks at it when all is filled; twice.
pub fn sweep() -> Result<()> {
    let context = bystander::open(false)?;
    let chunks = (0..SWEPT_MIB).map(|_| context.allocate(CHUNK));
    let mut chunks = chunks.collect::<extlb_driver::Result<Vec<_>>>()?;
    for round in [1, 2] {
        let pattern = |i: usize| (i as u64 + 1) << 32 | round;
        for (i, chunk) in std::mem::take(&mut chunks).into_iter().enumerate() {
            let ((), chunk) = context.queue().fill(chunk, pattern(i))?.finish()?;
            chunks.push(chunk);
        }
        for (i, chunk) in chunks.iter().enumerate() {
            let wanted = pattern(i).to_ne_bytes();
            let same = chunk.chunks_exact(8).all(|word| word == wanted);
            ensure!(same, "MiB {i} is not what the device wrote");
        }
    }
    Ok(())
}
