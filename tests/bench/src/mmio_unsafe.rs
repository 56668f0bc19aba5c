//! What a read across the bus costs, for any PCI device.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use memmap2::MmapOptions;

/// Reads timed together, as one is shorter than looking at the clock.
const READS: u32 = 64;

/// Median time of reading the first word of BAR 0 of a PCI device, in ns, as the kernel shows it in
/// sysfs. Reading it must have no effect, as with an identity register.
pub fn read_ns(device: &str, how_long: Duration) -> Result<u64> {
    let folder = format!("/sys/bus/pci/devices/{device}");
    // Nobody's driver has switched it on.
    let enable = format!("{folder}/enable");
    std::fs::write(&enable, "1").context(enable)?;
    let path = format!("{folder}/resource0");
    let file = OpenOptions::new().read(true).write(true).open(&path);
    let file = file.context(path)?;
    let map = MmapOptions::new().len(4096).map_raw(&file)?;
    let word = map.as_ptr().cast::<u32>();
    let mut times = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < how_long || times.len() < 10 {
        let start = Instant::now();
        for _ in 0..READS {
            // SAFETY: the first word of a mapped page of a BAR; page-aligned, mapped until `map`
            // goes.
            unsafe { word.read_volatile() };
        }
        times.push(start.elapsed().as_nanos() as u64 / u64::from(READS));
    }
    times.sort_unstable();
    Ok(times[times.len() / 2])
}
