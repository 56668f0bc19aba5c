//! Huge pages that come and go under the device.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Result, bail, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::sys::prctl::set_thp_disable;

use crate::area_unsafe::{Area, HUGE, PAGE, Shape};
use crate::proc_fs::{Backed, drain_lists, eventually, frames, moved, smaps_kib, write};
use crate::rows::{reclaim::page_out, unmap::nothing};
use crate::sys_unsafe::{Child, memory_file};
use crate::trial::{Access, Trial, pattern};

const KHUGEPAGED: &str = "/sys/kernel/mm/transparent_hugepage/khugepaged";

/// Expects so many huge pages in the mapping at the area's start.
pub fn expect(area: &Area, huge: u64) -> Result<()> {
    let kib = smaps_kib(area, 0, "AnonHugePages")?;
    ensure!(
        kib == huge * 2048,
        "{kib} KiB of huge pages, not {}",
        huge * 2048
    );
    Ok(())
}

/// An area that is one huge page.
pub fn backed_by_huge_page() -> Result<Area> {
    let area = Area::aligned(HUGE)?;
    area.advise(0..HUGE, libc::MADV_HUGEPAGE)?;
    area.store(0, 1);
    if expect(&area, 1).is_err() {
        // None was free: it is put together from small ones.
        area.store_all(0..HUGE, 1);
        area.advise(0..HUGE, libc::MADV_COLLAPSE)?;
        expect(&area, 1)?;
    }
    Ok(area)
}

fn word(area: &Area, page: usize) -> u64 {
    pattern(area.addrs(page..page + 1).start.0)
}

fn same_content(t: &Trial, area: &Area) -> Result<()> {
    t.reads(area, 2, word(area, 2))?;
    t.writes(area, 3, 4)
}

pub fn dont_need(t: &mut Trial) -> Result<()> {
    let area = backed_by_huge_page()?;
    t.give(&area, Access::Write)?;
    t.change(HUGE, || {
        area.advise(0..HUGE, libc::MADV_DONTNEED)?;
        nothing(&area, 0..HUGE)
    })?;
    t.reads(&area, 1, 0)
}

/// Cleaned, and dropped whole when memory is short.
pub fn free(t: &mut Trial) -> Result<()> {
    let area = backed_by_huge_page()?;
    t.give(&area, Access::Write)?;
    drain_lists()?;
    t.change(HUGE, || Ok(area.advise(0..HUGE, libc::MADV_FREE)?))?;
    drain_lists()?;
    if t.is_broken() {
        return Ok(());
    }
    t.reads(&area, 1, word(&area, 1))?;
    let gone = |_, backed| backed == Backed::Nothing;
    t.change(1, || page_out(&area, 0..HUGE, gone))?;
    t.reads(&area, 1, 0)
}

/// Part of a huge page goes: the rest is mapped by small pages then.
pub fn unmap_part(t: &mut Trial) -> Result<()> {
    let area = backed_by_huge_page()?;
    t.give(&area, Access::Write)?;
    t.change(16, || {
        area.unmap(16..32)?;
        nothing(&area, 16..32)?;
        expect(&area, 0)
    })?;
    t.faults(&area, 16)?;
    same_content(t, &area)
}

pub fn protect(t: &mut Trial) -> Result<()> {
    let area = backed_by_huge_page()?;
    t.give(&area, Access::Write)?;
    t.change(HUGE, || {
        area.protect(0..HUGE, libc::PROT_READ)?;
        expect(&area, 1)
    })?;
    t.write_faults(&area, 0)?;
    t.reads(&area, 7, word(&area, 7))
}

pub fn protect_part(t: &mut Trial) -> Result<()> {
    let area = backed_by_huge_page()?;
    t.give(&area, Access::Write)?;
    t.change(16, || {
        area.protect(16..32, libc::PROT_READ)?;
        expect(&area, 0)
    })?;
    t.write_faults(&area, 16)?;
    same_content(t, &area)
}

/// The page itself is split, by way of migration entries; the same pages come back.
pub fn split(t: &mut Trial) -> Result<()> {
    let area = backed_by_huge_page()?;
    t.give(&area, Access::Write)?;
    let before = frames(&area, 0..HUGE)?;
    let addrs = area.addrs(0..HUGE);
    let pid = std::process::id();
    let words = format!("{pid},{:#x},{:#x},0", addrs.start.0, addrs.end.0);
    t.change(HUGE, || {
        write("/sys/kernel/debug/split_huge_pages", &words)?;
        expect(&area, 0)?;
        ensure!(moved(&area, 0..HUGE, &before)? == 0, "the pages are others");
        Ok(())
    })?;
    same_content(t, &area)
}

/// Small pages, and the wish for a huge one.
fn small_pages(t: &mut Trial) -> Result<(Area, Vec<u64>)> {
    let area = Area::aligned(HUGE)?;
    t.give(&area, Access::Write)?;
    expect(&area, 0)?;
    let before = frames(&area, 0..HUGE)?;
    Ok((area, before))
}

fn collapsed(area: &Area, before: &[u64]) -> Result<()> {
    expect(area, 1)?;
    let moved = moved(area, 0..HUGE, before)?;
    ensure!(moved == HUGE, "{moved} pages are others, not {HUGE}");
    Ok(())
}

pub fn collapse(t: &mut Trial) -> Result<()> {
    let (area, before) = small_pages(t)?;
    t.change(HUGE, || {
        collapse_now(&area)?;
        collapsed(&area, &before)
    })?;
    same_content(t, &area)
}

/// The kernel's own thread does it.
pub fn khugepaged(t: &mut Trial) -> Result<()> {
    let (area, before) = small_pages(t)?;
    t.change(HUGE, || {
        area.advise(0..HUGE, libc::MADV_HUGEPAGE)?;
        write(format!("{KHUGEPAGED}/scan_sleep_millisecs"), "10")?;
        let done = eventually("khugepaged comes by", || Ok(expect(&area, 1).is_ok()));
        write(format!("{KHUGEPAGED}/scan_sleep_millisecs"), "10000")?;
        done?;
        collapsed(&area, &before)
    })?;
    same_content(t, &area)
}

/// A shared mapping of a file in memory, as long as a huge page.
fn shared(file: &OwnedFd) -> Result<Area> {
    let shape = Shape {
        flags: libc::MAP_SHARED,
        file: Some(file.as_fd()),
        align: HUGE,
        ..Shape::default()
    };
    Area::new(HUGE, shape)
}

fn collapse_now(area: &Area) -> Result<()> {
    eventually("the pages collapse", || {
        match area.advise(0..HUGE, libc::MADV_COLLAPSE) {
            Ok(()) => Ok(true),
            Err(Errno::EAGAIN | Errno::EBUSY) => Ok(false),
            Err(errno) => bail!("MADV_COLLAPSE: {errno}"),
        }
    })
}

fn expect_shared(area: &Area, huge: u64) -> Result<()> {
    let kib = smaps_kib(area, 0, "ShmemPmdMapped")?;
    ensure!(kib == huge * 2048, "{kib} KiB mapped by huge pages");
    Ok(())
}

/// Pages of a file in memory; the page table is taken away whole, from whoever maps the file.
pub fn collapse_shared(t: &mut Trial) -> Result<()> {
    let file = memory_file(HUGE)?;
    let (area, other) = (shared(&file)?, shared(&file)?);
    t.give(&area, Access::Write)?;
    t.give(&other, Access::Read)?;
    let before = frames(&area, 0..HUGE)?;
    t.change(2 * HUGE, || {
        collapse_now(&area)?;
        expect_shared(&area, 1)?;
        let moved = moved(&area, 0..HUGE, &before)?;
        ensure!(moved == HUGE, "{moved} pages are others");
        nothing(&other, 0..HUGE)
    })?;
    same_content(t, &area)?;
    t.reads(&other, 2, word(&area, 2))
}

/// A huge page that is mapped by small ptes gets a large one.
pub fn collapse_mapped(t: &mut Trial) -> Result<()> {
    let file = memory_file(HUGE)?;
    let whole = shared(&file)?;
    whole.store_all(0..HUGE, 1);
    collapse_now(&whole)?;
    let area = shared(&file)?;
    set_thp_disable(true)?;
    let given = t.give(&area, Access::Write);
    set_thp_disable(false)?;
    given?;
    expect_shared(&area, 0)?;
    let before = frames(&area, 0..HUGE)?;
    t.change(HUGE, || {
        collapse_now(&area)?;
        expect_shared(&area, 1)?;
        ensure!(moved(&area, 0..HUGE, &before)? == 0, "the pages are others");
        Ok(())
    })?;
    same_content(t, &area)
}

/// The huge page of zeros, until somebody writes.
pub fn zero(t: &mut Trial) -> Result<()> {
    let area = Area::aligned(HUGE)?;
    area.advise(0..HUGE, libc::MADV_HUGEPAGE)?;
    t.give(&area, Access::Read)?;
    let before = frames(&area, 0..HUGE)?;
    ensure!(
        before.windows(2).all(|pair| pair[0] + 1 == pair[1]),
        "no huge page of zeros"
    );
    t.change(HUGE, || {
        area.store(0, 5);
        let moved = moved(&area, 0..HUGE, &before)?;
        ensure!(moved == HUGE, "{moved} pages are others");
        Ok(())
    })?;
    ensure!(area.load(PAGE) == 0, "no zeros any more");
    t.writes(&area, 3, 4)
}

/// A huge page that a child has, too, is split when its parent writes, and one page of it copied.
pub fn copy(t: &mut Trial) -> Result<()> {
    let area = backed_by_huge_page()?;
    area.store_all(0..HUGE, 6);
    let child = Child::fork(|| (0..HUGE).all(|page| area.load(page * PAGE) == 6))?;
    t.give(&area, Access::Read)?;
    let before = frames(&area, 0..HUGE)?;
    t.change(1, || {
        area.store(0, 7);
        ensure!(
            moved(&area, 0..1, &before[..1])? == 1,
            "the page was not copied"
        );
        Ok(())
    })?;
    t.writes(&area, 0, 8)?;
    ensure!(
        child.verdict()?,
        "the child sees what its parent has written"
    );
    Ok(())
}

/// The fork takes the right to write from all of it.
pub fn fork(t: &mut Trial) -> Result<()> {
    let area = backed_by_huge_page()?;
    t.give(&area, Access::Write)?;
    let child = || (0..HUGE).all(|page| area.load(page * PAGE) == word(&area, page));
    let child = t.change(HUGE, || Child::fork(child))?;
    t.writes(&area, 0, 8)?;
    ensure!(
        child.verdict()?,
        "the child sees what the device wrote for its parent"
    );
    Ok(())
}
