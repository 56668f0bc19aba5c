//! Pages that go to other addresses.

use anyhow::{Result, ensure};
use nix::libc;

use crate::area_unsafe::{Area, HUGE, READ_WRITE, Shape};
use crate::proc_fs::frames;
use crate::rows::{huge, unmap::nothing};
use crate::trial::{Access, Trial, pattern};

const PAGES: usize = 16;

/// Moves the first pages of an area, of which the device has `given`, to another one, and sees that
/// the device knows.
fn move_all(t: &mut Trial, from: &Area, to: &Area, given: usize, flags: i32) -> Result<()> {
    let before = frames(from, 0..given)?;
    t.change(given, || {
        from.move_to(0..from.pages(), to, 0, flags)?;
        ensure!(frames(to, 0..given)? == before, "the pages are others");
        nothing(from, 0..given)
    })?;
    if flags & libc::MREMAP_DONTUNMAP == 0 {
        t.faults(from, 0)?;
    } else {
        t.reads(from, 0, 0)?;
    }
    t.faults(to, 0)?;
    t.register(to)?;
    t.reads(to, 1, pattern(from.addrs(1..2).start.0))?;
    t.writes(to, 2, 1)
}

pub fn ptes(t: &mut Trial) -> Result<()> {
    let (from, to) = (Area::anonymous(PAGES)?, Area::anonymous(PAGES)?);
    t.give(&from, Access::Write)?;
    move_all(t, &from, &to, PAGES, 0)
}

/// A page table's worth, aligned: the table itself is moved.
pub fn table(t: &mut Trial) -> Result<()> {
    let (from, to) = (Area::aligned(HUGE)?, Area::aligned(HUGE)?);
    t.register(&from)?;
    t.fill(&from, 0..PAGES, Access::Write)?;
    move_all(t, &from, &to, PAGES, 0)
}

/// Likewise one level up.
pub fn table_of_tables(t: &mut Trial) -> Result<()> {
    let pages = HUGE * HUGE;
    let shape = Shape {
        prot: READ_WRITE,
        flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        file: None,
        align: pages,
    };
    let (from, to) = (Area::new(pages, shape)?, Area::new(pages, shape)?);
    t.register(&from)?;
    t.fill(&from, 0..PAGES, Access::Write)?;
    move_all(t, &from, &to, PAGES, 0)
}

pub fn huge_page(t: &mut Trial) -> Result<()> {
    let (from, to) = (huge::backed_by_huge_page()?, Area::aligned(HUGE)?);
    t.give(&from, Access::Write)?;
    move_all(t, &from, &to, HUGE, 0)?;
    huge::expect(&to, 1)
}

pub fn dont_unmap(t: &mut Trial) -> Result<()> {
    let (from, to) = (Area::anonymous(PAGES)?, Area::anonymous(PAGES)?);
    t.give(&from, Access::Write)?;
    move_all(t, &from, &to, PAGES, libc::MREMAP_DONTUNMAP)
}

pub fn shrink(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    t.give(&area, Access::Write)?;
    t.change(PAGES - 4, || {
        area.shrink(4)?;
        nothing(&area, 4..PAGES)
    })?;
    t.faults(&area, 4)?;
    t.writes(&area, 3, 1)
}
