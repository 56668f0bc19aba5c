//! Pages that are replaced by a copy when somebody writes, and pages that become one.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context as _, Result, ensure};
use nix::libc;

use crate::area_unsafe::{Area, PAGE, Shape};
use crate::proc_fs::{eventually, frames, moved, write};
use crate::sys_unsafe::{Child, memory_file};
use crate::trial::{Access, Trial};

const PAGES: usize = 16;

/// Writes to each page, and expects that each is another then.
fn write_to_all(t: &mut Trial, area: &Area) -> Result<()> {
    let before = frames(area, 0..PAGES)?;
    t.change(PAGES, || {
        (0..PAGES).for_each(|page| area.store_all(page..page + 1, 7));
        let moved = moved(area, 0..PAGES, &before)?;
        ensure!(moved == PAGES, "{moved} pages were copied, not {PAGES}");
        Ok(())
    })?;
    t.reads(area, 0, 7)?;
    t.writes(area, 1, 8)
}

/// The parent writes to what a child has, too.
pub fn after_fork(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    area.store_all(0..PAGES, 6);
    let child = Child::fork(|| (0..PAGES).all(|page| area.load(page * PAGE) == 6))?;
    t.give(&area, Access::Read)?;
    write_to_all(t, &area)?;
    ensure!(
        child.verdict()?,
        "the child sees what its parent has written"
    );
    Ok(())
}

/// Pages that nobody has written to yet.
pub fn zero_page(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    t.give(&area, Access::Read)?;
    let zeros = frames(&area, 0..PAGES)?;
    ensure!(zeros.iter().all(|f| *f == zeros[0]), "not the zero page");
    write_to_all(t, &area)
}

pub fn private_file(t: &mut Trial) -> Result<()> {
    let file = memory_file(PAGES)?;
    let area = Area::of(file.as_fd(), PAGES, libc::MAP_PRIVATE)?;
    t.give(&area, Access::Read)?;
    write_to_all(t, &area)
}

/// A debugger's way to write, past the protection.
pub fn forced(t: &mut Trial) -> Result<()> {
    let file = memory_file(PAGES)?;
    let shape = Shape {
        prot: libc::PROT_READ,
        flags: libc::MAP_PRIVATE,
        file: Some(file.as_fd()),
        align: 1,
    };
    let area = Area::new(PAGES, shape)?;
    t.give(&area, Access::Read)?;
    let before = frames(&area, 0..1)?;
    t.change(1, || {
        let memory = std::fs::OpenOptions::new()
            .write(true)
            .open("/proc/self/mem")?;
        memory
            .write_all_at(&[7; PAGE], area.addr(0).0)
            .context("/proc/self/mem")?;
        ensure!(moved(&area, 0..1, &before)? == 1, "the page was not copied");
        Ok(())
    })?;
    t.reads(&area, 0, 0x0707_0707_0707_0707)
}

const KSM: &str = "/sys/kernel/mm/ksm";

/// Two areas of the same content; each page is with the device.
fn twins(t: &mut Trial) -> Result<[Area; 2]> {
    let areas = [Area::anonymous(PAGES)?, Area::anonymous(PAGES)?];
    for area in &areas {
        for page in 0..PAGES {
            area.store_all(page..page + 1, 0x5a5a_0000 + page as u64);
        }
        t.give(area, Access::Read)?;
    }
    Ok(areas)
}

fn merge(areas: &[Area; 2]) -> Result<()> {
    write(format!("{KSM}/sleep_millisecs"), "5")?;
    write(format!("{KSM}/pages_to_scan"), "1000")?;
    for area in areas {
        area.advise(0..PAGES, libc::MADV_MERGEABLE)?;
    }
    write(format!("{KSM}/run"), "1")?;
    let merged = eventually("KSM merges the pages", || {
        let [one, other] = areas;
        Ok(frames(one, 0..PAGES)? == frames(other, 0..PAGES)?)
    });
    write(format!("{KSM}/run"), "0")?;
    merged
}

/// Of both of a pair, one is replaced by the other, and both can only be read.
pub fn ksm(t: &mut Trial) -> Result<()> {
    let areas = twins(t)?;
    t.change(2 * PAGES, || merge(&areas))?;
    let [one, other] = &areas;
    t.writes(one, 0, 3)?;
    t.reads(other, 0, 0x5a5a_0000)
}

/// And back: each gets a page of its own.
pub fn ksm_unmerge(t: &mut Trial) -> Result<()> {
    let areas = twins(t)?;
    merge(&areas)?;
    let [one, _] = &areas;
    let before = frames(one, 0..PAGES)?;
    for page in 0..PAGES {
        t.reads(one, page, 0x5a5a_0000 + page as u64)?;
    }
    t.change(PAGES, || {
        one.advise(0..PAGES, libc::MADV_UNMERGEABLE)?;
        let moved = moved(one, 0..PAGES, &before)?;
        ensure!(moved == PAGES, "{moved} pages are others");
        Ok(())
    })?;
    t.writes(one, 0, 3)
}
