//! Sudden death: processes are killed while the device works on their memory.
//!
//! Afterwards nothing of them may be left: no context in the driver, no page, and the device
//! still serves others.

use std::collections::VecDeque;
use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use extlb_driver::{Device, Kernel, Options};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use crate::proc_fs::{drop_caches, meminfo_kib};

/// Where the driver lists its contexts, a line each.
const CONTEXTS: &str = "/sys/kernel/debug/extlb/extlb0/contexts";
/// Memory that one worker gives the device at least; a leak of one worker's is seen.
const WORKER_BYTES: usize = 8 << 20;
const CHUNK: usize = 256 << 10;

fn contexts() -> Result<usize> {
    Ok(fs::read_to_string(CONTEXTS)
        .with_context(|| format!("read {CONTEXTS}"))?
        .lines()
        .count())
}

/// Waits for a condition that must come true by itself, as the driver's own work ends.
fn eventually(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition()? {
        ensure!(Instant::now() < end, "{what}: not within 20 s");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Starts `processes` workers one after another and kills each at a random moment.
pub fn run(processes: u32, seed: u64) -> Result<()> {
    let mut rng = Pcg64::seed_from_u64(seed);
    let before = contexts()?;
    ensure!(before == 0, "{before} contexts exist already");

    // Once without counting: what the kernel allocates the first time and keeps is no leak.
    kill_one(&mut rng)?;
    eventually("the driver forgets a killed process", || {
        Ok(contexts()? == 0)
    })?;
    drop_caches()?;
    let free_before = meminfo_kib("MemAvailable")?;

    let mut caught_working = 0;
    for _ in 0..processes {
        caught_working += u32::from(kill_one(&mut rng)?);
    }
    eventually("the driver forgets killed processes", || {
        Ok(contexts()? == 0)
    })?;
    eventually("memory of killed processes is free again", || {
        drop_caches()?;
        let lost = free_before.saturating_sub(meminfo_kib("MemAvailable")?);
        Ok(lost < WORKER_BYTES as u64 / 1024)
    })?;
    ensure!(
        caught_working > 0,
        "no process was killed while it had a context"
    );

    let device = Device::open(Kernel::new())?;
    let context = device.context(Options::default())?;
    let (mut src, dst) = (context.allocate(CHUNK)?, context.allocate(CHUNK)?);
    src.fill(0x5a);
    let ((), (src, dst)) = context.queue().copy(src, dst)?.finish()?;
    ensure!(
        src[..] == dst[..],
        "the device copies wrongly after the killings"
    );
    let stale = context.stats()?.oracle_stale;
    ensure!(stale == 0, "{stale} stale accesses");
    println!(
        "{processes} processes killed, {caught_working} with a context; none left, 0 stale accesses"
    );
    Ok(())
}

/// Whether the worker had a context when it was killed.
fn kill_one(rng: &mut Pcg64) -> Result<bool> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("work")
        .stdout(Stdio::null())
        .spawn()
        .context("start a worker")?;
    // Half of them early, while they set things up; half when they work.
    if rng.random() {
        eventually("a worker starts", || {
            if let Some(status) = child.try_wait()? {
                bail!("the worker ended by itself: {status}");
            }
            Ok(contexts()? > 0)
        })?;
    }
    std::thread::sleep(Duration::from_micros(rng.random_range(0..60_000)));
    let had_context = contexts()? > 0;
    child.kill()?;
    let status = child.wait()?;
    ensure!(
        status.code().is_none(),
        "the worker ended by itself: {status}"
    );
    Ok(had_context)
}

/// Copies, and takes memory back from the device, until killed.
pub fn work() -> Result<()> {
    let device = Device::open(Kernel::new())?;
    let context = device.context(Options::default())?;
    let queue = context.queue();
    let mut pool = VecDeque::new();
    while pool.len() * 2 * CHUNK < WORKER_BYTES {
        pool.push_back((context.allocate(CHUNK)?, context.allocate(CHUNK)?));
    }
    let mut flying = VecDeque::new();
    for round in 0u64.. {
        if let Some((src, dst)) = pool.pop_front() {
            flying.push_back(queue.copy(src, dst)?);
            continue;
        }
        let Some(first) = flying.pop_front() else {
            break;
        };
        let ((), (src, dst)) = first.finish()?;
        if round % 3 == 0 {
            // Unregistered and unmapped: a shootdown while the others are copied.
            drop((src, dst));
            pool.push_back((context.allocate(CHUNK)?, context.allocate(CHUNK)?));
        } else {
            pool.push_back((src, dst));
        }
    }
    Ok(())
}
