//! Pages that are moved to other frames, or taken out of use.

use anyhow::{Result, bail, ensure};
use nix::libc;

use crate::area_unsafe::{Area, HUGE, PAGE};
use crate::proc_fs::{Backed, backing, eventually, frames, moved, write};
use crate::rows::huge;
use crate::sys_unsafe::{move_pages, survive_bus_errors};
use crate::trial::{Access, Skip, Trial, pattern};

const PAGES: usize = 16;

/// The device finds what it wrote, and can write again.
fn same_content(t: &Trial, area: &Area) -> Result<()> {
    t.reads(area, 2, pattern(area.addrs(2..3).start.0))?;
    t.writes(area, 3, 4)
}

/// Moves all pages to the other node.
fn to_other_node(t: &mut Trial, area: &Area) -> Result<()> {
    if !std::path::Path::new("/sys/devices/system/node/node1").exists() {
        bail!(Skip("the guest has one node only (numa=fake=2)".to_owned()));
    }
    t.give(area, Access::Write)?;
    let pages = area.pages();
    let before = frames(area, 0..pages)?;
    let here = move_pages(area, 0..1, None)?[0];
    t.change(pages, || {
        eventually("the pages move", || {
            move_pages(area, 0..pages, Some(1 - here))?;
            Ok(moved(area, 0..pages, &before)? == pages)
        })
    })?;
    same_content(t, area)
}

pub fn node(t: &mut Trial) -> Result<()> {
    to_other_node(t, &Area::anonymous(PAGES)?)
}

pub fn node_huge(t: &mut Trial) -> Result<()> {
    let area = huge::backed_by_huge_page()?;
    to_other_node(t, &area)?;
    huge::expect(&area, 1)
}

/// Fills memory with holes, and has it compacted.
pub fn compaction(t: &mut Trial) -> Result<()> {
    const MANY: usize = 2048;
    const ROUNDS: usize = 8;
    let area = Area::anonymous(MANY)?;
    let ballast = Area::anonymous(MANY * 8)?;
    for page in 0..MANY * 8 {
        ballast.store(page * PAGE, 1);
        if page % 8 == 0 {
            area.store(page / 8 * PAGE, 1);
        }
    }
    for page in (0..MANY * 8).filter(|page| page % 4 != 0) {
        ballast.advise(page..page + 1, libc::MADV_DONTNEED)?;
    }
    t.give(&area, Access::Write)?;
    let before = frames(&area, 0..MANY)?;
    t.change(1, || {
        for _ in 0..ROUNDS {
            write("/proc/sys/vm/compact_memory", "1")?;
            if moved(&area, 0..MANY, &before)? > 0 {
                return Ok(());
            }
        }
        // Which pages it takes is its own choice; `migrate` goes the same way.
        bail!(Skip("compaction moves none of the pages".to_owned()))
    })?;
    same_content(t, &area)
}

pub fn soft_offline(t: &mut Trial) -> Result<()> {
    const PAGES: usize = 2;
    let area = Area::anonymous(PAGES)?;
    t.give(&area, Access::Write)?;
    let before = frames(&area, 0..PAGES)?;
    t.change(PAGES, || {
        area.advise(0..PAGES, libc::MADV_SOFT_OFFLINE)?;
        ensure!(
            moved(&area, 0..PAGES, &before)? == PAGES,
            "the pages are the same"
        );
        Ok(())
    })?;
    t.reads(&area, 0, pattern(area.addrs(0..1).start.0))?;
    t.writes(&area, 1, 1)
}

/// A page that is found to be broken is gone, with its content.
pub fn hwpoison(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    t.give(&area, Access::Write)?;
    survive_bus_errors()?;
    t.change(1, || {
        area.advise(3..4, libc::MADV_HWPOISON)?;
        // Its pte holds a note in place of the page.
        let left = backing(&area, 3..4)?;
        ensure!(left == [Backed::Swap], "{left:?}");
        Ok(())
    })?;
    t.faults(&area, 3)?;
    t.reads(&area, 2, pattern(area.addrs(2..3).start.0))
}

/// A part of a huge page: the huge page is split first.
pub fn hwpoison_huge(t: &mut Trial) -> Result<()> {
    let area = huge::backed_by_huge_page()?;
    t.give(&area, Access::Write)?;
    survive_bus_errors()?;
    t.change(1, || {
        area.advise(3..4, libc::MADV_HWPOISON)?;
        huge::expect(&area, 0)?;
        ensure!(
            backing(&area, 3..4)? == [Backed::Swap],
            "the page is still there"
        );
        Ok(())
    })?;
    t.faults(&area, 3)?;
    t.reads(&area, HUGE - 1, pattern(area.addrs(HUGE - 1..HUGE).start.0))
}
