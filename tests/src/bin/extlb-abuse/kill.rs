//! Sudden death: processes are killed while the device works on their memory.

use std::collections::VecDeque;
use std::process::Child;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use extlb_driver::{Device, Kernel, Options};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use crate::proc_fs::{contexts, eventually};
use crate::{Figures, Order, role};

/// Memory that one worker gives the device.
const WORKER_BYTES: usize = 8 << 20;
const CHUNK: usize = 256 << 10;
/// Workers at a time: one dies while another begins.
const WORKERS: usize = 3;

/// Starts workers and kills each at a random moment.
pub fn run(order: &Order) -> Result<Figures> {
    let mut rng = Pcg64::seed_from_u64(order.seed);
    let mut workers: VecDeque<Child> = VecDeque::new();
    let (mut early, mut working) = (0u64, 0u64);
    for _ in 0..order.count {
        order.watch.alive();
        while workers.len() < WORKERS {
            workers.push_back(role::start(&["work"])?);
        }
        // Half of them while they set things up; half when all work, beside the bystander.
        if rng.random() {
            eventually("the workers work", || {
                for worker in &mut workers {
                    if let Some(status) = worker.try_wait()? {
                        bail!("a worker ended by itself: {status}");
                    }
                }
                Ok(contexts()? > WORKERS)
            })?;
            working += 1;
        } else {
            early += 1;
        }
        std::thread::sleep(Duration::from_micros(rng.random_range(0..20_000)));
        let victim = rng.random_range(0..workers.len());
        kill(workers.swap_remove_back(victim).context("a worker")?)?;
    }
    workers.into_iter().try_for_each(kill)?;
    eventually("the driver forgets killed processes", || {
        Ok(contexts()? == 1)
    })?;
    ensure!(
        order.count < 20 || working > 0,
        "none was killed in the midst of work"
    );
    Ok(Figures::from([
        ("killed_early".to_owned(), early),
        ("killed_working".to_owned(), working),
    ]))
}

fn kill(mut worker: Child) -> Result<()> {
    worker.kill()?;
    let status = worker.wait()?;
    ensure!(
        status.code().is_none(),
        "a worker ended by itself: {status}"
    );
    Ok(())
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
