//! Pages that go to swap, or back to their file.

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::libc;

use crate::area_unsafe::{Area, HUGE};
use crate::proc_fs::{Backed, CGROUP, backing, busybox, eventually};
use crate::rows::huge;
use crate::sys_unsafe::memory_file;
use crate::trial::{Access, Trial, pattern};

const PAGES: usize = 16;

/// Asks for pages to be reclaimed until they are as `wanted` says. Once is not enough for a page
/// that somebody else holds for a moment.
pub fn page_out(
    area: &Area,
    pages: Range<usize>,
    wanted: impl Fn(usize, Backed) -> bool,
) -> Result<()> {
    eventually("the pages are reclaimed", || {
        area.advise(pages.clone(), libc::MADV_PAGEOUT)?;
        gone(area, pages.clone(), &wanted)
    })
}

fn gone(area: &Area, pages: Range<usize>, wanted: impl Fn(usize, Backed) -> bool) -> Result<bool> {
    let found = backing(area, pages.clone())?;
    Ok(pages.zip(found).all(|(page, backed)| wanted(page, backed)))
}

fn is_swap(_: usize, backed: Backed) -> bool {
    backed == Backed::Swap
}

/// What the device wrote is there again.
pub fn comes_back(t: &Trial, area: &Area) -> Result<()> {
    if t.is_broken() {
        return Ok(());
    }
    t.reads(area, 2, pattern(area.addrs(2..3).start.0))?;
    t.writes(area, 3, 4)
}

pub fn pageout(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    t.give(&area, Access::Write)?;
    t.change(PAGES, || page_out(&area, 0..PAGES, is_swap))?;
    comes_back(t, &area)
}

pub fn pageout_huge(t: &mut Trial) -> Result<()> {
    let area = huge::backed_by_huge_page()?;
    t.give(&area, Access::Write)?;
    t.change(HUGE, || page_out(&area, 0..HUGE, is_swap))?;
    comes_back(t, &area)
}

/// Shared memory leaves nothing in the page table.
pub fn pageout_shared(t: &mut Trial) -> Result<()> {
    let file = memory_file(PAGES)?;
    let area = Area::of(file.as_fd(), PAGES, libc::MAP_SHARED)?;
    t.give(&area, Access::Write)?;
    t.change(PAGES, || {
        page_out(&area, 0..PAGES, |_, backed| backed == Backed::Nothing)
    })?;
    comes_back(t, &area)
}

/// Somebody else reclaims, while this process runs on another processor: flushes of CPUs are put
/// off to the end of a batch, the device's cannot.
pub fn by_cgroup(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    t.give(&area, Access::Write)?;
    let stop = AtomicBool::new(false);
    let reclaim = || {
        eventually("the pages are reclaimed", || {
            // It fails if it cannot have so much; what matters is whether the pages went.
            let line = format!("echo 4M > {CGROUP}/memory.reclaim");
            let _ = busybox(&["sh", "-c", &line]);
            gone(&area, 0..PAGES, is_swap)
        })
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let result = t.change(PAGES, reclaim);
        stop.store(true, Ordering::Relaxed);
        result
    })?;
    comes_back(t, &area)
}

/// Another process advises.
pub fn by_other_process(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    t.give(&area, Access::Write)?;
    let addrs = area.addrs(0..PAGES);
    t.change(PAGES, || {
        eventually("the pages are reclaimed", || {
            let status = std::process::Command::new(std::env::current_exe()?)
                .arg("--page-out")
                .args(
                    [u64::from(std::process::id()), addrs.start.0, addrs.end.0]
                        .map(|n| n.to_string()),
                )
                .status()
                .context("start another process")?;
            ensure!(status.success(), "the other process: {status}");
            gone(&area, 0..PAGES, is_swap)
        })
    })?;
    comes_back(t, &area)
}

/// What the other process does.
pub fn as_other_process(numbers: &[u64]) -> Result<()> {
    let [pid, start, end] = numbers else {
        anyhow::bail!("three numbers are needed");
    };
    match crate::sys_unsafe::advise_other(*pid as i32, *start..*end, libc::MADV_PAGEOUT) {
        // Not all of it was done: the caller looks, and asks again.
        Ok(()) | Err(Errno::EAGAIN) => Ok(()),
        Err(errno) => Err(errno).context("process_madvise"),
    }
}
