//! What is left behind: contexts, references, objects and pages of the kernel.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::Figures;
use crate::proc_fs::{available_kib, contexts, eventually, meminfo_kib};
use crate::slabs::{Objects, Slabs};

const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";
/// What may be missing of the memory: workers of the kernel, and their stacks.
const SLACK_KIB: u64 = 2 << 10;
/// Objects of one kind that may be left however little was done: the kernel makes workers, and names
/// of files, and keeps them.
const SLACK_OBJECTS: u64 = 150;
/// As many of what is made for a process, as are all objects of the driver that there can be many of.
const SLACK_OF_PROCESSES: u64 = 4;
const OF_PROCESSES: [&str; 4] = ["kmalloc-cg-", "mm_struct", "files_cache", "filp"];

/// The kernel's memory before the abuse.
pub struct Health {
    available_kib: u64,
    /// Page tables of devices.
    tables_kib: u64,
    slabs: Slabs,
    objects: Objects,
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
        let slabs = Slabs::open()?;
        let objects = slabs.settle()?;
        Ok(Self {
            available_kib: available_kib()?,
            tables_kib: tables_kib()?,
            slabs,
            objects,
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
        let allowed = |name: &str| {
            let strict = OF_PROCESSES.iter().any(|kind| name.starts_with(kind));
            if strict {
                SLACK_OF_PROCESSES
            } else {
                SLACK_OBJECTS + count / 20
            }
        };
        let (mut grown, mut lost) = (Vec::new(), 0);
        // Processes and pages that are freed by and by.
        let sound = eventually("the kernel's memory is as before", || {
            grown.clear();
            for (name, now) in self.slabs.look()? {
                let before = self.objects.get(&name).copied().unwrap_or(0);
                let more = now.saturating_sub(before);
                if more > allowed(&name) {
                    grown.push(format!("{more} more {name}"));
                }
            }
            lost = self.available_kib.saturating_sub(available_kib()?);
            Ok(grown.is_empty() && lost < SLACK_KIB)
        });
        sound.with_context(|| format!("lost {lost} KiB; {}", grown.join(", ")))?;
        leaks()?;
        Ok(Figures::from([("lost_kib".to_owned(), lost)]))
    }
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
