//! Pages that stay, with fewer rights.

use anyhow::{Result, ensure};
use nix::libc;

use crate::area_unsafe::{Area, PAGE, READ_WRITE};
use crate::proc_fs::frames;
use crate::sys_unsafe::Child;
use crate::trial::{Access, Trial, pattern};

const PAGES: usize = 16;

/// The word that the device wrote to a page.
fn word(area: &Area, page: usize) -> u64 {
    pattern(area.addrs(page..page + 1).start.0)
}

pub fn read_only(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    t.give(&area, Access::Write)?;
    t.change(PAGES, || area.protect(0..PAGES, libc::PROT_READ))?;
    t.write_faults(&area, 0)?;
    t.reads(&area, 0, word(&area, 0))?;
    area.protect(0..PAGES, READ_WRITE)?;
    t.writes(&area, 0, 9)
}

pub fn none(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    t.give(&area, Access::Read)?;
    t.change(PAGES, || area.protect(0..PAGES, libc::PROT_NONE))?;
    t.faults(&area, 3)?;
    area.protect(0..PAGES, READ_WRITE)?;
    t.writes(&area, 3, 9)
}

/// The parent's pages become read-only: the child has them, too.
pub fn fork(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    t.give(&area, Access::Write)?;
    let before = frames(&area, 0..PAGES)?;
    let child = || (0..PAGES).all(|page| area.load(page * PAGE) == word(&area, page));
    let child = t.change(PAGES, || Child::fork(child))?;
    ensure!(
        frames(&area, 0..PAGES)? == before,
        "the parent's pages moved"
    );
    // What the device writes is for the parent alone.
    t.writes(&area, 0, 1)?;
    ensure!(
        frames(&area, 0..1)? != before[..1],
        "the device wrote to a shared page"
    );
    ensure!(
        child.verdict()?,
        "the child sees what the device wrote for its parent"
    );
    Ok(())
}
