//! Objects that the kernel has allocated, counted to the one.
//!
//! Three things must not be counted: free objects of the slabs that processors hold for their next
//! allocation, objects that wait for a grace period of RCU before they are freed, and whatever the
//! counting itself allocates. The last is why all files are opened once: each time that one in sysfs
//! is closed, an object goes to RCU and stays for seconds.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::libc;

use crate::proc_fs::drop_caches;
use crate::sys_unsafe::call;

const CACHES: &str = "/sys/kernel/slab";
/// What the driver, its files and its processes are made of. Objects that go with files in memory
/// and with the kernel's own caches say nothing.
const KINDS: [&str; 12] = [
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
/// Where the kernel copies to what is written to a file in sysfs.
const COPIES: &str = "kmalloc-8";
/// Looks in a row at which nothing more was freed.
const STEADY: u32 = 3;

/// Objects in use, by the name of their cache.
pub type Objects = BTreeMap<String, u64>;

/// The kernel's caches of objects.
pub struct Slabs {
    /// To take the slabs from processors.
    shrink: Vec<File>,
    info: File,
}

impl Slabs {
    /// Those that count.
    pub fn open() -> Result<Self> {
        let mut shrink = Vec::new();
        for cache in fs::read_dir(CACHES).context(CACHES)? {
            let name = cache?.file_name().to_string_lossy().into_owned();
            if counts(&name) {
                let path = format!("{CACHES}/{name}/shrink");
                let file = OpenOptions::new().write(true).open(&path);
                shrink.push((name == COPIES, file.context(path)?));
            }
        }
        ensure!(!shrink.is_empty(), "{CACHES} is empty");
        // To shrink another one would take a slab of it again.
        shrink.sort_by_key(|(last, _)| *last);
        let path = "/proc/slabinfo";
        Ok(Self {
            shrink: shrink.into_iter().map(|(_, file)| file).collect(),
            info: File::open(path).context(path)?,
        })
    }

    /// What there is now.
    pub fn look(&self) -> Result<Objects> {
        drop_caches()?;
        // Two, since what was given to RCU within the first may wait for the next; and a moment for
        // the worker that frees then.
        for _ in 0..2 {
            call(libc::SYS_membarrier, [MEMBARRIER_GLOBAL, 0, 0, 0, 0, 0])
                .context("wait for a grace period")?;
        }
        std::thread::sleep(Duration::from_millis(10));
        let mut text = String::new();
        (&self.info).rewind()?;
        for shrink in &self.shrink {
            shrink.write_all_at(b"1", 0).context("shrink a cache")?;
        }
        (&self.info)
            .read_to_string(&mut text)
            .context("read /proc/slabinfo")?;
        let mut objects = Objects::new();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let name = words.next().unwrap_or_default();
            if let Some(count) = words.next().and_then(|word| word.parse().ok())
                && counts(name)
            {
                objects.insert(name.to_owned(), count);
            }
        }
        Ok(objects)
    }

    /// What there is when nothing more is freed: what an earlier abuse left would hide what the
    /// next one does.
    pub fn settle(&self) -> Result<Objects> {
        let mut least = self.look()?;
        let mut steady = 0;
        while steady < STEADY {
            steady += 1;
            for (name, now) in self.look()? {
                let known = least.entry(name).or_insert(now);
                if now < *known {
                    *known = now;
                    steady = 0;
                }
            }
        }
        Ok(least)
    }
}

const MEMBARRIER_GLOBAL: u64 = libc::MEMBARRIER_CMD_GLOBAL as u64;

fn counts(name: &str) -> bool {
    KINDS.iter().any(|kind| name.starts_with(kind))
}
