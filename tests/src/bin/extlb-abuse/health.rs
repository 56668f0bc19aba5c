//! What is left behind: contexts, references, objects and pages of the kernel.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::Figures;
use crate::proc_fs::{contexts, drop_caches, eventually, meminfo_kib, slab_objects};

const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";
/// What may be missing of the memory: caches of the kernel that do not shrink on demand.
const SLACK_KIB: u64 = 6 << 10;
/// Objects of one kind that may be left however little was done.
const SLACK_OBJECTS: u64 = 150;

/// The kernel's memory before the abuse.
pub struct Health {
    available_kib: u64,
    /// Page tables of devices.
    tables_kib: u64,
    objects: BTreeMap<String, u64>,
}

fn references() -> Result<u64> {
    let text = fs::read_to_string("/sys/module/extlb/refcnt").context("the module's references")?;
    Ok(text.trim().parse()?)
}

/// Exactly: what processors have counted for themselves is added up before.
fn tables_kib() -> Result<u64> {
    fs::write("/proc/sys/vm/stat_refresh", "1").context("refresh the kernel's counters")?;
    meminfo_kib("SecPageTables")
}

impl Health {
    /// Looks, when nobody uses the device.
    pub fn take() -> Result<Self> {
        ensure!(contexts()? == 0, "somebody uses the device already");
        if Path::new(KMEMLEAK).exists() {
            fs::write(KMEMLEAK, "clear").context(KMEMLEAK)?;
        }
        drop_caches()?;
        Ok(Self {
            available_kib: meminfo_kib("MemAvailable")?,
            tables_kib: tables_kib()?,
            objects: slab_objects()?,
        })
    }

    /// Compares with what there is now, after `count` times the same abuse: what is lost each time
    /// is found, and what the kernel allocates once and keeps is not.
    pub fn compare(self, count: u64) -> Result<Figures> {
        eventually("the driver has no context", || Ok(contexts()? == 0))?;
        eventually("nobody refers to the module", || Ok(references()? == 0))?;
        eventually("the page tables of contexts are freed", || {
            Ok(tables_kib()? == self.tables_kib)
        })?;
        let allowed = SLACK_OBJECTS + count / 20;
        let mut grown = Vec::new();
        let mut lost = 0;
        // Processes and pages that are freed by and by.
        let sound = eventually("the kernel's memory is as before", || {
            drop_caches()?;
            grown.clear();
            for (name, now) in slab_objects()? {
                let before = self.objects.get(&name).copied().unwrap_or(0);
                let more = now.saturating_sub(before);
                if more > allowed && counts(&name) {
                    grown.push(format!("{more} more {name}"));
                }
            }
            lost = self
                .available_kib
                .saturating_sub(meminfo_kib("MemAvailable")?);
            Ok(grown.is_empty() && lost < SLACK_KIB)
        });
        sound.with_context(|| format!("lost {lost} KiB; {}", grown.join(", ")))?;
        leaks()?;
        Ok(Figures::from([("lost_kib".to_owned(), lost)]))
    }
}

/// Objects that go with files in memory and with the kernel's own caches say nothing.
fn counts(name: &str) -> bool {
    let kinds = [
        "kmalloc",
        "maple",
        "radix",
        "mm_struct",
        "filp",
        "files_cache",
        "task_struct",
        "vm_area",
        "signal_cache",
        "pid",
        "cred",
        "anon_vma",
    ];
    kinds.iter().any(|kind| name.starts_with(kind))
}

/// What kmemleak finds that nobody refers to, if the kernel has it.
fn leaks() -> Result<()> {
    if !Path::new(KMEMLEAK).exists() {
        return Ok(());
    }
    // It does not look at what is younger than five seconds, and what is found once may be a
    // pointer that was on its way.
    for _ in 0..2 {
        std::thread::sleep(Duration::from_secs(5));
        fs::write(KMEMLEAK, "scan").context(KMEMLEAK)?;
    }
    let found = fs::read_to_string(KMEMLEAK).context(KMEMLEAK)?;
    if !found.is_empty() {
        found.lines().for_each(|line| println!("# {line}"));
        bail!("kmemleak found leaks");
    }
    Ok(())
}
