//! What the kernel says about itself.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

/// How long anything may take. Only a hang is worth it: machines differ by much.
pub const PATIENCE: Duration = Duration::from_secs(180);
/// Where the driver lists its contexts, a line each.
const CONTEXTS: &str = "/sys/kernel/debug/extlb/extlb0/contexts";

/// Number of contexts that the driver has.
pub fn contexts() -> Result<usize> {
    let text = fs::read_to_string(CONTEXTS).with_context(|| format!("read {CONTEXTS}"))?;
    Ok(text.lines().count())
}

/// One of the counters of the driver and its device.
pub fn counter(name: &str) -> Result<u64> {
    let path = "/sys/kernel/debug/extlb/extlb0/stats";
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        .ok_or_else(|| anyhow!("{path} has no {name}"))
}

/// One of the counters of the memory manager.
pub fn vmstat(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/vmstat").context("read /proc/vmstat")?;
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        .ok_or_else(|| anyhow!("/proc/vmstat has no {name}"))
}

/// A line `Name:   123 kB` of /proc/meminfo, in KiB.
pub fn meminfo_kib(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .ok_or_else(|| anyhow!("/proc/meminfo has no {name}"))
}

/// Memory that can be had: free, with the free pages that processors keep for themselves, or cached.
/// Not `MemAvailable`, which is less where the kernel keeps more in reserve, as it does after memory
/// was taken away and given back.
pub fn available_kib() -> Result<u64> {
    let text = fs::read_to_string("/proc/zoneinfo").context("read /proc/zoneinfo")?;
    let counts = text
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("count:"));
    let kept = counts
        .map(|count| count.trim().parse::<u64>())
        .sum::<Result<u64, _>>()?;
    let kinds = ["MemFree", "Active(file)", "Inactive(file)", "SReclaimable"];
    let had = kinds.iter().map(|kind| meminfo_kib(kind));
    Ok(had.sum::<Result<u64>>()? + kept * 4)
}

/// Gives clean caches back, so that readings of free memory compare.
pub fn drop_caches() -> Result<()> {
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("drop caches")
}

/// Waits for a condition that must come true by itself, as the kernel's own work ends.
pub fn eventually(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !condition()? {
        ensure!(
            Instant::now() < end,
            "{what}: not within {} s",
            PATIENCE.as_secs()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
