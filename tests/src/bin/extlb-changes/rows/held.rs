//! Pages that change while the driver is about to map them: it has looked them up and is held there.
//!
//! Only for ways to follow a process that look pages up first and map them later. The driver has to
//! notice, and look again. The pages that it had looked up stay in memory as long as it is held, with
//! the words that were in them: a device that gets them reads and writes those.

use std::fs;

use anyhow::{Context as _, Result, bail, ensure};
use nix::libc;

use crate::area_unsafe::{Area, READ_WRITE, Shape};
use crate::proc_fs::eventually;
use crate::rows::{Row, apart};
use crate::trial::{Access, Accessed, Trial};

const FOLDER: &str = "/sys/kernel/debug/extlb/extlb0";
const OLD: u64 = 0x01d0_01d0_01d0_01d0;
const NEW: u64 = 0x4e37_4e37_4e37_4e37;
const BY_DEVICE: u64 = 0xd0d0_d0d0_d0d0_d0d0;

const BY_WORDS: &str = "what is read and written tells, and how often the driver looked again";

/// The rows.
pub const HELD: &[Row] = &[
    apart("held-dontneed", dont_need, BY_WORDS),
    apart("held-dontneed-write", dont_need_written, BY_WORDS),
    apart("held-remap", remap, BY_WORDS),
    apart("held-unmap", unmap, BY_WORDS),
    apart("held-protect", protect, BY_WORDS),
    apart("held-elsewhere", elsewhere, BY_WORDS),
];

/// Fills stop before they map, for as long as this lives.
struct Held;

impl Held {
    fn new() -> Result<Self> {
        fs::write(format!("{FOLDER}/hold_fills"), "1").context("hold_fills")?;
        Ok(Self)
    }

    /// Waits until one has stopped.
    fn wait(&self) -> Result<()> {
        eventually("the driver stops before it maps pages", || {
            let text = fs::read_to_string(format!("{FOLDER}/held_fills"))?;
            Ok(text.trim() == "1")
        })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Err(error) = fs::write(format!("{FOLDER}/hold_fills"), "0") {
            eprintln!("fills are held for ever: {error}");
        }
    }
}

/// Lets the device access a page, and makes `change` while the driver is about to map it. How often
/// the driver looked again, and what became of the access.
fn during(
    t: &mut Trial,
    area: &Area,
    access: Access,
    change: impl FnOnce() -> Result<()>,
) -> Result<(u64, Accessed)> {
    area.store_all(0..area.pages(), OLD);
    t.register(area)?;
    let before = t.stats()?.retried_fills;
    let held = Held::new()?;
    let page = area.addrs(0..1);
    let pending = match access {
        Access::Read => t.begin_read(page)?,
        Access::Write => t.begin_write(page, BY_DEVICE)?,
    };
    held.wait()?;
    change()?;
    drop(held);
    let accessed = t.end(pending, access)?;
    let audit = t.audit()?;
    ensure!(
        audit.mismatches == 0,
        "{} translations differ: {:#x}: device {:#x}, process {:#x}",
        audit.mismatches,
        audit.iova,
        audit.device_gpa,
        audit.cpu_gpa
    );
    Ok((t.stats()?.retried_fills - before, accessed))
}

/// The driver looked again, and the access was done, on what is there now.
fn done((retried, accessed): (u64, Accessed)) -> Result<Vec<u64>> {
    let Accessed::Words(words) = accessed else {
        bail!("the access faulted");
    };
    ensure!(retried > 0, "the driver did not look again");
    Ok(words)
}

fn all(words: &[u64], word: u64) -> Result<()> {
    let wrong = words.iter().find(|w| **w != word);
    ensure!(
        wrong.is_none(),
        "the device reads {:#x}, not {word:#x}",
        wrong.copied().unwrap_or_default()
    );
    Ok(())
}

fn dont_need(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(1)?;
    let got = during(t, &area, Access::Read, || {
        area.advise(0..1, libc::MADV_DONTNEED)?;
        area.store_all(0..1, NEW);
        Ok(())
    })?;
    all(&done(got)?, NEW)
}

fn dont_need_written(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(1)?;
    let got = during(t, &area, Access::Write, || {
        area.advise(0..1, libc::MADV_DONTNEED)?;
        area.store_all(0..1, NEW);
        Ok(())
    })?;
    done(got)?;
    ensure!(area.load(0) == BY_DEVICE, "what the device wrote is lost");
    Ok(())
}

fn remap(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(1)?;
    let got = during(t, &area, Access::Read, || {
        area.map(0..1, Shape::default())?;
        area.store_all(0..1, NEW);
        Ok(())
    })?;
    all(&done(got)?, NEW)
}

/// The registration goes on, and is of use once something is mapped there again.
fn unmap(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(1)?;
    let (retried, accessed) = during(t, &area, Access::Read, || area.unmap(0..1))?;
    ensure!(accessed == Accessed::Fault, "the device reads what is gone");
    ensure!(retried > 0, "the driver did not look again");
    area.map(0..1, Shape::default())?;
    area.store_all(0..1, NEW);
    t.reads(&area, 0, NEW)?;
    ensure!(
        t.register(&area).is_err(),
        "what is registered can be registered once more"
    );
    Ok(())
}

fn protect(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(1)?;
    let (retried, accessed) = during(t, &area, Access::Write, || {
        area.protect(0..1, libc::PROT_READ)
    })?;
    ensure!(
        accessed == Accessed::Fault && area.load(0) == OLD,
        "the device writes to what is read-only"
    );
    ensure!(retried > 0, "the driver did not look again");
    area.protect(0..1, READ_WRITE)?;
    t.writes(&area, 0, NEW)
}

/// A change of other memory is none of this fill's business.
fn elsewhere(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(1)?;
    let other = Area::anonymous(16)?;
    other.store_all(0..16, NEW);
    let (retried, accessed) = during(t, &area, Access::Read, || {
        other.advise(0..16, libc::MADV_DONTNEED)?;
        Ok(())
    })?;
    let Accessed::Words(words) = accessed else {
        bail!("the access faulted");
    };
    ensure!(retried == 0, "the driver looked again, for nothing");
    all(&words, OLD)
}
