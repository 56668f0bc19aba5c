//! Pages that go.

use std::os::fd::AsFd;

use anyhow::{Context as _, Result, ensure};
use nix::libc;

use crate::area_unsafe::{Area, Shape};
use crate::proc_fs::{Backed, backing, drain_lists};
use crate::sys_unsafe::{attach, detach, grow_heap, memory_file, punch, shrink_heap};
use crate::trial::{Access, Trial, Way, pattern};

const PAGES: usize = 16;

/// Expects that nothing is behind these pages.
pub fn nothing(area: &Area, pages: std::ops::Range<usize>) -> Result<()> {
    let left = backing(area, pages)?;
    ensure!(left.iter().all(|b| *b == Backed::Nothing), "{left:?}");
    Ok(())
}

pub fn munmap(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    t.give(&area, Access::Write)?;
    t.change(PAGES, || {
        area.unmap(0..PAGES)?;
        nothing(&area, 0..PAGES)
    })?;
    t.faults(&area, 0)
}

pub fn hole(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    t.give(&area, Access::Write)?;
    t.change(4, || {
        area.unmap(4..8)?;
        nothing(&area, 4..8)
    })?;
    t.faults(&area, 4)?;
    // What is left on either side is still the device's.
    for page in [3, 8] {
        t.reads(&area, page, pattern(area.addrs(page..page + 1).start.0))?;
        t.writes(&area, page, 5)?;
    }
    Ok(())
}

pub fn map_fixed(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    t.give(&area, Access::Write)?;
    t.change(PAGES, || {
        area.map(0..PAGES, Shape::default())?;
        nothing(&area, 0..PAGES)
    })?;
    // What is there now was not registered, if the driver hears of unmapping.
    if t.way == Way::Pte {
        t.faults(&area, 0)?;
        t.register(&area)?;
    }
    t.reads(&area, 0, 0)
}

pub fn dont_need(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    t.give(&area, Access::Write)?;
    t.change(PAGES, || {
        area.advise(0..PAGES, libc::MADV_DONTNEED)?;
        nothing(&area, 0..PAGES)
    })?;
    t.reads(&area, 1, 0)?;
    t.writes(&area, 2, 7)
}

pub fn brk(t: &mut Trial) -> Result<()> {
    let area = grow_heap(PAGES)?;
    t.give(&area, Access::Write)?;
    t.change(PAGES, || {
        shrink_heap(&area)?;
        nothing(&area, 0..PAGES)
    })?;
    t.faults(&area, 0)
}

pub fn shmdt(t: &mut Trial) -> Result<()> {
    let area = attach(PAGES)?;
    t.give(&area, Access::Write)?;
    t.change(PAGES, || {
        detach(&area)?;
        nothing(&area, 0..PAGES)
    })?;
    t.faults(&area, 0)
}

/// What `MADV_FREE` leaves is clean: it may go without a word. What the device writes afterwards
/// must stay.
pub fn free(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    t.give(&area, Access::Write)?;
    drain_lists()?;
    t.change(PAGES, || Ok(area.advise(0..PAGES, libc::MADV_FREE)?))?;
    drain_lists()?;
    if t.is_broken() {
        return Ok(());
    }
    t.writes(&area, 3, 8)?;
    super::reclaim::page_out(&area, 0..PAGES, |page, backed| match page {
        3 => backed == Backed::Swap,
        _ => backed == Backed::Nothing,
    })?;
    t.reads(&area, 3, 8)?;
    t.reads(&area, 4, 0)
}

pub fn truncate(t: &mut Trial) -> Result<()> {
    let file = memory_file(PAGES)?;
    let area = Area::of(file.as_fd(), PAGES, libc::MAP_SHARED)?;
    t.give(&area, Access::Write)?;
    t.change(PAGES, || {
        nix::unistd::ftruncate(&file, 0).context("ftruncate")?;
        nothing(&area, 0..PAGES)
    })?;
    t.faults(&area, 0)
}

/// The copies of a private mapping go with the file's end, too.
pub fn truncate_copies(t: &mut Trial) -> Result<()> {
    let file = memory_file(PAGES)?;
    let area = Area::of(file.as_fd(), PAGES, libc::MAP_PRIVATE)?;
    t.give(&area, Access::Write)?;
    t.change(PAGES, || {
        nix::unistd::ftruncate(&file, 0).context("ftruncate")?;
        nothing(&area, 0..PAGES)
    })?;
    t.faults(&area, 0)
}

pub fn punch_hole(t: &mut Trial) -> Result<()> {
    let file = memory_file(PAGES)?;
    let area = Area::of(file.as_fd(), PAGES, libc::MAP_SHARED)?;
    t.give(&area, Access::Write)?;
    t.change(4, || {
        punch(file.as_fd(), 4..8)?;
        nothing(&area, 4..8)
    })?;
    t.reads(&area, 3, pattern(area.addrs(3..4).start.0))?;
    t.reads(&area, 4, 0)?;
    t.writes(&area, 5, 3)
}

pub fn remove(t: &mut Trial) -> Result<()> {
    let file = memory_file(PAGES)?;
    let area = Area::of(file.as_fd(), PAGES, libc::MAP_SHARED)?;
    t.give(&area, Access::Write)?;
    t.change(4, || {
        area.advise(4..8, libc::MADV_REMOVE)?;
        nothing(&area, 4..8)
    })?;
    t.reads(&area, 4, 0)
}
