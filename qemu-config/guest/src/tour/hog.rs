//! Somebody else who uses the pages that the process under fire gives back.
//!
//! Fills pages with a canary, holds them for a moment, looks at them again, frees them. A device
//! that writes to a page which was taken from it writes to one of these, sooner or later.

use std::time::Duration;

use anyhow::{Result, bail};

use super::memory_unsafe::{Area, PAGE};
use super::random::Random;
use super::traffic::Shared;

/// Pages at once, at most.
const PAGES: usize = 192;
/// Bytes from one canary to the next: smaller than nearly all that the device writes at once.
const STRIDE: usize = 64;
const CANARY: u64 = 0xc0ff_ee00_dead_beef;

/// Goes on until the traffic stops; the number of pages that were held.
pub fn run(shared: &Shared, seed: u64) -> u64 {
    match go_on(shared, seed) {
        Ok(pages) => pages,
        Err(error) => {
            shared.fail(format!("{error:#}"));
            0
        }
    }
}

fn go_on(shared: &Shared, seed: u64) -> Result<u64> {
    let mut random = Random::new(seed ^ 0x0906);
    let mut held = 0;
    // Addresses of its own: what it maps never lands in a hole of somebody else's.
    let area = Area::reserve(PAGES)?;
    while !shared.stopped() {
        let pages = 16 + random.below(PAGES as u64 - 15) as usize;
        let salt = random.next();
        area.map(0..pages)?;
        let words = || (0..pages * PAGE).step_by(STRIDE);
        let canary = |at: usize| CANARY ^ salt ^ at as u64;
        words().for_each(|at| area.store(at, canary(at)));
        std::thread::sleep(Duration::from_millis(2 + random.below(4)));
        if let Some(at) = words().find(|at| area.load(*at) != canary(*at)) {
            bail!(
                "a page of somebody else was written to: {:#x} instead of {:#x} at offset {at:#x}",
                area.load(at),
                canary(at)
            );
        }
        area.unmap(0..pages)?;
        held += pages as u64;
    }
    Ok(held)
}
