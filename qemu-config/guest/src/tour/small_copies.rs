//! How many small copies the device does in a second.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::Result;
use extlb_driver::{Backing, Context};

/// Bytes of a copy.
pub const SMALL: usize = 4096;
/// Copies under way.
const DEPTH: usize = 64;
const HOW_LONG: Duration = Duration::from_millis(500);

/// Copies of 4 KiB a second, 64 under way, between pages that the device has seen before.
pub fn per_second<B: Backing>(context: &Context<B>) -> Result<f64> {
    let queue = context.queue();
    let mut src = context.allocate(SMALL * DEPTH)?;
    src.fill(1);
    let src = src.freeze();
    let mut free: Vec<_> = context.allocate(SMALL * DEPTH)?.chunks(SMALL).collect();
    let mut under_way = VecDeque::new();
    let (mut ended, mut begun) = (0, Instant::now());
    loop {
        let batch = queue.batch();
        for dst in free.drain(..) {
            let at = under_way.len() % DEPTH * SMALL;
            under_way.push_back(batch.copy(src.slice(at..at + SMALL), dst)?);
        }
        drop(batch);
        for pending in under_way.drain(..DEPTH / 2) {
            let ((), (_, dst)) = pending.finish()?;
            free.push(dst);
        }
        ended += DEPTH / 2;
        if ended == DEPTH {
            // All pages have been used once: from here on it counts.
            begun = Instant::now();
        } else if ended > DEPTH && begun.elapsed() > HOW_LONG {
            return Ok((ended - DEPTH) as f64 / begun.elapsed().as_secs_f64());
        }
    }
}
