//! Pages that are write-protected to see who writes, and pages that somebody else moves.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail, ensure};
use nix::errno::Errno;
use nix::libc;

use crate::area_unsafe::{Area, HUGE, PAGE};
use crate::proc_fs::{eventually, frames, needs, vmstat, write};
use crate::rows::{huge, unmap::nothing};
use crate::trial::{Access, Skip, Trial, pattern};
use crate::uffd_unsafe::{Faults, Feature, Uffd, scan_and_protect};

const PAGES: usize = 16;

/// Or the reason to skip.
fn uffd(feature: Feature) -> Result<Uffd> {
    match Uffd::new(feature) {
        Ok(uffd) => Ok(uffd),
        Err(errno @ (Errno::EINVAL | Errno::ENOSYS)) => {
            bail!(Skip(format!(
                "this kernel has no userfaultfd with {feature:?}: {errno}"
            )))
        }
        Err(errno) => bail!("userfaultfd: {errno}"),
    }
}

/// A write by the device waits until the program allows it.
pub fn write_protect(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    let uffd = uffd(Feature::Plain)?;
    uffd.register(area.addrs(0..PAGES), Faults::Protected)?;
    t.give(&area, Access::Write)?;
    t.change(PAGES, || uffd.protect(area.addrs(0..PAGES), true))?;
    if t.is_broken() {
        return Ok(());
    }
    t.reads(&area, 3, pattern(area.addrs(3..4).start.0))?;
    let pending = t.begin_write(area.addrs(3..4), 4)?;
    let at = uffd.fault()?;
    ensure!(
        at.0 / PAGE as u64 == area.addr(3 * PAGE).0 / PAGE as u64,
        "a fault at {at}"
    );
    ensure!(!pending.is_done()?, "the device wrote to a protected page");
    uffd.protect(area.addrs(0..PAGES), false)?;
    pending.finish()?;
    ensure!(area.load(3 * PAGE) == 4, "the device's write is lost");
    Ok(())
}

/// The kernel protects what was written to, and allows it again by itself.
pub fn pagemap_scan(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    let uffd = uffd(Feature::Async)?;
    uffd.register(area.addrs(0..PAGES), Faults::Protected)?;
    t.give(&area, Access::Write)?;
    t.change(PAGES, || Ok(scan_and_protect(area.addrs(0..PAGES))?))?;
    t.reads(&area, 3, pattern(area.addrs(3..4).start.0))?;
    t.writes(&area, 3, 4)
}

pub fn move_pages(t: &mut Trial) -> Result<()> {
    let (from, to) = (Area::anonymous(PAGES)?, Area::anonymous(PAGES)?);
    move_all(t, &from, &to)
}

pub fn move_huge(t: &mut Trial) -> Result<()> {
    let (from, to) = (huge::backed_by_huge_page()?, Area::aligned(HUGE)?);
    // Both have to be alike.
    to.advise(0..HUGE, libc::MADV_HUGEPAGE)?;
    move_all(t, &from, &to)?;
    huge::expect(&to, 1)
}

fn move_all(t: &mut Trial, from: &Area, to: &Area) -> Result<()> {
    let pages = from.pages();
    let uffd = uffd(Feature::Move)?;
    uffd.register(to.addrs(0..pages), Faults::Missing)?;
    t.give(from, Access::Write)?;
    let before = frames(from, 0..pages)?;
    t.change(pages, || {
        uffd.move_pages(from.addrs(0..pages), to.addr(0))?;
        ensure!(frames(to, 0..pages)? == before, "the pages are others");
        nothing(from, 0..pages)
    })?;
    t.reads(from, 0, 0)?;
    t.register(to)?;
    t.reads(to, 0, pattern(from.addr(0).0))
}

/// Whether a page was written to since the bits were cleared.
fn is_soft_dirty(area: &Area, page: usize) -> Result<bool> {
    let mut entry = [0; 8];
    let at = area.addr(page * PAGE).0 / PAGE as u64 * 8;
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, at)?;
    Ok(u64::from_ne_bytes(entry) >> 55 & 1 != 0)
}

pub fn soft_dirty(t: &mut Trial) -> Result<()> {
    let area = Area::anonymous(PAGES)?;
    t.give(&area, Access::Write)?;
    if !is_soft_dirty(&area, 3)? {
        bail!(Skip(
            "this kernel does not track soft-dirty pages".to_owned()
        ));
    }
    t.change(PAGES, || {
        write("/proc/self/clear_refs", "4")?;
        ensure!(!is_soft_dirty(&area, 3)?, "the page is dirty still");
        Ok(())
    })?;
    t.reads(&area, 3, pattern(area.addrs(3..4).start.0))?;
    t.writes(&area, 3, 4)?;
    ensure!(
        is_soft_dirty(&area, 3)?,
        "what the device writes is not tracked"
    );
    Ok(())
}

const BALANCING: &str = "/proc/sys/kernel/numa_balancing";
const TIMES: &str = "/sys/kernel/debug/sched/numa_balancing";

/// Pages are made inaccessible for a while, to see who uses them.
pub fn numa_hinting(t: &mut Trial) -> Result<()> {
    needs(BALANCING, "NUMA balancing")?;
    needs(
        "/sys/devices/system/node/node1",
        "second node (numa=fake=2)",
    )?;
    let area = Area::anonymous(PAGES + 1)?;
    t.register(&area)?;
    t.fill(&area, 0..PAGES, Access::Write)?;
    let stop = AtomicBool::new(false);
    // Nodes are of no interest to a process of one thread.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        let result = t.change(PAGES, || hint(&area));
        stop.store(true, Ordering::Relaxed);
        result
    })?;
    t.reads(&area, 3, pattern(area.addrs(3..4).start.0))?;
    t.writes(&area, 3, 4)
}

/// Waits until the scanner has come by the area: it goes by address, so a fault of the last page
/// tells that it has seen those before it.
fn hint(area: &Area) -> Result<()> {
    write(format!("{TIMES}/scan_delay_ms"), "1")?;
    write(format!("{TIMES}/scan_period_min_ms"), "10")?;
    write(BALANCING, "1")?;
    let last = PAGES * PAGE;
    let scanned = eventually("the scanner comes by", || {
        let before = vmstat("numa_hint_faults")?;
        area.store(last, 1);
        // It runs on behalf of who uses the processor.
        let spin = std::time::Instant::now();
        while spin.elapsed().as_millis() < 20 {
            std::hint::spin_loop();
        }
        let between = vmstat("numa_hint_faults")?;
        area.store(last, 2);
        let after = vmstat("numa_hint_faults")?;
        Ok(after > between && between >= before)
    });
    write(BALANCING, "0")?;
    scanned
}
