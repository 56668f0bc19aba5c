//! Readings from proc and debugfs.

use std::fs;

use anyhow::{Context, Result, anyhow};

/// A line `Name:   123 kB` of /proc/meminfo, in KiB.
pub fn meminfo_kib(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .ok_or_else(|| anyhow!("/proc/meminfo has no {name}"))
}

/// Gives clean caches back, so that readings of free memory compare.
pub fn drop_caches() -> Result<()> {
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("drop caches")
}
