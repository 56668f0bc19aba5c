//! Work for the device, so that other programs can be run beside it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use extlb_driver::{Device, Kernel, Options};

use super::random::Random;

const LEN: usize = 8 << 20;
/// Copies between two looks at the result.
const ROUND: usize = 16;

/// Copies back and forth until killed, or for some time.
pub fn run(seconds: Option<u64>) -> Result<()> {
    let device = Device::open(Kernel::new())?;
    let context = device.context(Options::default())?;
    let queue = context.queue();
    let (mut a, mut b) = (context.allocate(LEN)?, context.allocate(LEN)?);
    let mut random = Random::new(u64::from(std::process::id()));
    for word in a.chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
    let sum = crc32c::crc32c(&a);
    let begun = Instant::now();
    let mut rounds = 0u64;
    println!("extlb-tour: the device is busy");
    while seconds.is_none_or(|seconds| begun.elapsed() < Duration::from_secs(seconds)) {
        for _ in 0..ROUND {
            ((), (a, b)) = queue.copy(a, b)?.finish()?;
            std::mem::swap(&mut a, &mut b);
        }
        let (crc, back) = queue.crc32c(a, 0)?.finish()?;
        a = back;
        ensure!(
            crc == sum,
            "the data changed: CRC32C {crc:08x} instead of {sum:08x}"
        );
        rounds += 1;
    }
    let stats = context.stats()?;
    println!(
        "extlb-tour: {} MiB copied in {:.1} s, {} page requests, {} shootdowns, {} stale accesses",
        rounds * ((ROUND * LEN) >> 20) as u64,
        begun.elapsed().as_secs_f64(),
        stats.page_requests,
        stats.shootdowns,
        stats.oracle_stale
    );
    Ok(())
}
