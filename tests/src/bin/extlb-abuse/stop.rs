//! Processes that are stopped (SIGSTOP) while they have a context: the memory that the device works
//! on is taken from them meanwhile, nobody else waits for them, and they go on as if nothing had
//! been, or are killed as they are.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use crate::cgroup::{Cgroup, Swap};
use crate::proc_fs::{contexts, eventually, vmstat};
use crate::{Figures, Order, bystander};

/// Processes at work, beside the bystander.
const PROCESSES: usize = 2;
/// For what a process had said before it was stopped.
const QUIET: Duration = Duration::from_millis(50);

/// Stops a process `count` times.
pub fn run(order: &Order) -> Result<Figures> {
    let mut rng = Pcg64::seed_from_u64(order.seed);
    let _swap = Swap::on()?;
    let group = Cgroup::new("stop")?;
    let swapped = vmstat("pswpout")?;
    let mut beats = Vec::new();
    let (mut continued, mut killed) = (0, 0);
    for _ in 0..order.count {
        order.watch.step("a process is stopped");
        while beats.len() < PROCESSES {
            beats.push(Beat::start(&group)?);
        }
        let i = rng.random_range(0..beats.len());
        std::thread::sleep(Duration::from_micros(rng.random_range(0..20_000)));
        let stopped = beats[i].stop()?;
        // The pages of all, while the device may be at work on them. It is an error if there are
        // not as many.
        let _ = group.set("memory.reclaim", "4M");
        std::thread::sleep(QUIET);
        ensure!(beats[i].count() == stopped, "a stopped process works");
        if rng.random() {
            order.watch.step("a stopped process goes on");
            beats[i].signal(Signal::SIGCONT)?;
            beats[i].wait_beyond(stopped + 1)?;
            continued += 1;
        } else {
            order.watch.step("a stopped process is killed");
            beats.swap_remove(i).end()?;
            eventually("the driver forgets the killed process", || {
                Ok(contexts()? == 1 + beats.len())
            })?;
            killed += 1;
        }
    }
    for beat in beats {
        beat.wait_beyond(beat.count())?;
        beat.end()?;
    }
    let swapped = vmstat("pswpout")? - swapped;
    ensure!(swapped > 0, "no page was taken from the processes");
    Ok(Figures::from([
        ("continued".to_owned(), continued),
        ("killed_stopped".to_owned(), killed),
        ("pages_swapped_out".to_owned(), swapped),
    ]))
}

/// A process that says when it has done something.
struct Beat {
    child: Child,
    count: Arc<AtomicU64>,
}

impl Beat {
    fn start(group: &Cgroup) -> Result<Self> {
        let mut child = group.start(&["beat"])?;
        let stdout = BufReader::new(child.stdout.take().context("a pipe")?);
        let count: Arc<AtomicU64> = Arc::default();
        let counted = count.clone();
        std::thread::spawn(move || {
            for _ in stdout.lines().map_while(Result::ok) {
                counted.fetch_add(1, Ordering::AcqRel);
            }
        });
        let beat = Self { child, count };
        beat.wait_beyond(0)?;
        Ok(beat)
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    fn wait_beyond(&self, count: u64) -> Result<()> {
        eventually("a process works", || Ok(self.count() > count))
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id() as i32), signal)?)
    }

    /// Stops it; how far it had come.
    fn stop(&self) -> Result<u64> {
        self.signal(Signal::SIGSTOP)?;
        let path = format!("/proc/{}/stat", self.child.id());
        eventually("a process is stopped", || {
            let stat = fs::read_to_string(&path).context("a process ended by itself")?;
            Ok(stat.rsplit(')').next().unwrap_or("").starts_with(" T"))
        })?;
        std::thread::sleep(QUIET);
        Ok(self.count())
    }

    fn end(mut self) -> Result<()> {
        self.child.kill()?;
        let status = self.child.wait()?;
        ensure!(status.code().is_none(), "a process ended: {status}");
        Ok(())
    }
}

/// Works until killed, and says so each time.
pub fn beat() -> Result<()> {
    let context = bystander::open(false)?;
    for seed in u64::from(std::process::id()).. {
        bystander::round(&context, seed)?;
        println!(".");
    }
    Ok(())
}
