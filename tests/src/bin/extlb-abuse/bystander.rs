//! Somebody else: a process with work for the device, who must not notice.
//!
//! Every result is verified, by the processor and by the device; memory is given back and taken
//! anew. An operation that fails, is lost or takes too long is an error, unless the device itself
//! goes away: then the bystander opens it again, and only the operation under way may fail.

use std::io::{BufRead, BufReader, Read};
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use extlb_driver::{Context, Device, Error, Kernel, Options};

use crate::proc_fs::PATIENCE;
use crate::{Figures, role};

const BYTES: usize = 128 << 10;

/// The process.
pub struct Bystander {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Bystander {
    /// Starts it, and waits until it works.
    pub fn start(device_goes: bool) -> Result<Self> {
        let mut child = role::start(&["bystander", &device_goes.to_string()])?;
        let mut lines = BufReader::new(child.stdout.take().context("a pipe")?);
        let mut line = String::new();
        lines.read_line(&mut line)?;
        ensure!(line == "working\n", "the bystander does not start");
        Ok(Self { child, lines })
    }

    /// Ends it; what it did.
    pub fn end(mut self) -> Result<Figures> {
        drop(self.child.stdin.take());
        let mut text = String::new();
        self.lines.read_to_string(&mut text)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "the bystander failed: {status}: {text}");
        let figures: Figures = serde_json::from_str(text.trim())?;
        let of = |name: &str| figures.get(name).copied().unwrap_or(0);
        ensure!(of("bystander_operations") > 0, "the bystander did nothing");
        Ok(figures)
    }
}

/// Works until standard input ends.
pub fn play(device_goes: bool) -> Result<()> {
    let over = Arc::new(AtomicBool::new(false));
    let seen = over.clone();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        seen.store(true, Ordering::Release);
    });
    let (mut operations, mut losses, mut seed) = (0u64, 0u64, 1u64);
    let mut context = open(device_goes)?;
    println!("working");
    while !over.load(Ordering::Acquire) {
        seed += 1;
        match round(&context, seed) {
            Ok(done) => operations += done,
            Err(error) => {
                ensure!(device_goes && is_loss(&error), error);
                losses += 1;
                drop(context);
                context = open(true)?;
            }
        }
    }
    let stale = context.stats().map_or(0, |stats| stats.oracle_stale);
    ensure!(stale == 0, "{stale} stale accesses");
    let figures = Figures::from([
        ("bystander_operations".to_owned(), operations),
        ("bystander_losses".to_owned(), losses),
    ]);
    println!("{}", serde_json::to_string(&figures)?);
    Ok(())
}

/// Opens the device; if it may be away, as soon as it is there.
pub fn open(may_be_away: bool) -> Result<Context<Kernel>> {
    let end = Instant::now() + PATIENCE;
    loop {
        let opened =
            Device::open(Kernel::new()).and_then(|device| device.context(Options::default()));
        match opened {
            Ok(context) => return Ok(context),
            Err(_) if may_be_away && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error).context("open the device"),
        }
    }
}

/// A few operations on fresh memory; how many.
pub fn round(context: &Context<Kernel>, seed: u64) -> Result<u64> {
    let queue = context.queue();
    let (mut src, dst) = (context.allocate(BYTES)?, context.allocate(BYTES)?);
    let mut word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for bytes in src.chunks_exact_mut(8) {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let sum = crc32c::crc32c(&src);
    let copy = queue.copy(src, dst)?;
    ensure!(
        copy.wait_for(PATIENCE)?,
        "a copy is not done in {PATIENCE:?}"
    );
    let ((), (src, dst)) = copy.finish()?;
    ensure!(src[..] == dst[..], "the copy differs");
    let check = queue.crc32c(dst, 0)?;
    ensure!(
        check.wait_for(PATIENCE)?,
        "a CRC is not done in {PATIENCE:?}"
    );
    let (found, dst) = check.finish()?;
    ensure!(
        found == sum,
        "the device finds CRC32C {found:08x}, not {sum:08x}"
    );
    // Pages are taken from the device before they are anybody else's.
    drop((src, dst));
    Ok(2)
}

/// Works until killed, on a device that comes and goes.
pub fn endure() -> Result<()> {
    let mut context = open(true)?;
    for seed in u64::from(std::process::id()).. {
        if let Err(error) = round(&context, seed) {
            ensure!(is_loss(&error), error);
            drop(context);
            context = open(true)?;
        }
    }
    Ok(())
}

/// Whether the device has gone.
pub fn is_loss(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<Error>();
    matches!(error, Some(Error::Dead { .. } | Error::Stopped { .. }))
}
