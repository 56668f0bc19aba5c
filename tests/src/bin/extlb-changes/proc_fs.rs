//! What the kernel says about memory, and its knobs.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use crate::area_unsafe::{Area, PAGE};
use crate::trial::Skip;

/// What a page is backed by, as `/proc/self/pagemap` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backed {
    /// Nothing, or something that is no page.
    Nothing,
    /// Swap.
    Swap,
    /// The page with this number.
    Page(u64),
}

/// What is behind pages of an area.
pub fn backing(area: &Area, pages: Range<usize>) -> Result<Vec<Backed>> {
    let file = File::open("/proc/self/pagemap").context("pagemap")?;
    let first = area.addr(pages.start * PAGE).0 / PAGE as u64;
    let mut bytes = vec![0; pages.len() * 8];
    file.read_exact_at(&mut bytes, first * 8)
        .context("pagemap")?;
    let entries = bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|b| u64::from_le_bytes(*b));
    Ok(entries
        .map(|entry| match (entry >> 63 & 1, entry >> 62 & 1) {
            (1, _) => Backed::Page(entry & ((1 << 55) - 1)),
            (_, 1) => Backed::Swap,
            _ => Backed::Nothing,
        })
        .collect())
}

/// The numbers of pages that must be present.
pub fn frames(area: &Area, pages: Range<usize>) -> Result<Vec<u64>> {
    let frame = |backed| match backed {
        Backed::Page(frame) if frame != 0 => Ok(frame),
        other => Err(anyhow!("a page is not present: {other:?}")),
    };
    backing(area, pages)?.into_iter().map(frame).collect()
}

/// How many of these pages are others now.
pub fn moved(area: &Area, pages: Range<usize>, before: &[u64]) -> Result<usize> {
    let now = frames(area, pages)?;
    Ok(now.iter().zip(before).filter(|(a, b)| a != b).count())
}

/// A field of the mapping that holds an address, in KiB, from `/proc/self/smaps`.
pub fn smaps_kib(area: &Area, page: usize, field: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/self/smaps").context("smaps")?;
    let at = area.addr(page * PAGE).0;
    let mut inside = false;
    for line in text.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let bound = |text| u64::from_str_radix(text, 16);
            inside = (bound(start)?..bound(end)?).contains(&at);
        } else if inside && first.strip_suffix(':') == Some(field) {
            let value = line.split_whitespace().nth(1).context("smaps")?;
            return Ok(value.parse()?);
        }
    }
    bail!("no {field} for {at:#x} in smaps")
}

/// A counter of `/proc/vmstat`.
pub fn vmstat(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/vmstat").context("vmstat")?;
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
        .ok_or_else(|| anyhow!("no {name} in vmstat"))?
        .parse()
        .with_context(|| name.to_owned())
}

/// A number in a file.
pub fn number(path: impl AsRef<Path>) -> Result<u64> {
    let path = path.as_ref();
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    text.trim()
        .parse()
        .with_context(|| path.display().to_string())
}

/// Writes to one of the kernel's files.
pub fn write(path: impl AsRef<Path>, text: &str) -> Result<()> {
    let path = path.as_ref();
    fs::write(path, text).with_context(|| format!("write {text:?} to {}", path.display()))
}

/// The reason to skip if a file is not there.
pub fn needs(path: &str, what: &str) -> Result<()> {
    match Path::new(path).exists() {
        true => Ok(()),
        false => bail!(Skip(format!("this kernel has no {what}"))),
    }
}

/// Puts all pages on the kernel's lists. The driver's worker faults pages in on any processor, and
/// what a processor has not put there yet is left alone by some.
pub fn drain_lists() -> Result<()> {
    write("/proc/sys/vm/drop_caches", "1")
}

/// Waits for something that must come about by itself.
pub fn eventually(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(30);
    while !condition()? {
        ensure!(Instant::now() < end, "{what}: not within 30 s");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A control group of this process's own.
pub const CGROUP: &str = "/sys/fs/cgroup/changes";

/// Sets the guest up: swap, and a control group whose memory can be reclaimed.
pub fn prepare() -> Result<()> {
    let swaps = fs::read_to_string("/proc/swaps").context("swaps")?;
    if swaps.lines().count() < 2 && Path::new("/sys/block/zram0").exists() {
        write("/sys/block/zram0/disksize", "256M")?;
        busybox(&["mkswap", "/dev/zram0"])?;
        busybox(&["swapon", "/dev/zram0"])?;
    }
    if !Path::new(CGROUP).exists() {
        write("/sys/fs/cgroup/cgroup.subtree_control", "+memory")?;
        fs::create_dir(CGROUP).context(CGROUP)?;
    }
    write(
        format!("{CGROUP}/cgroup.procs"),
        &std::process::id().to_string(),
    )
}

/// Runs an applet of the guest's busybox; what it prints is not for the report.
pub fn busybox(arguments: &[&str]) -> Result<()> {
    let output = std::process::Command::new("/bin/busybox")
        .args(arguments)
        .output()
        .with_context(|| arguments.join(" "))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", arguments.join(" "));
    Ok(())
}
