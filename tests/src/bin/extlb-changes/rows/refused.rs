//! Memory that a device does not get, so that nothing of it can be taken away.

use std::os::fd::AsFd;

use anyhow::{Context as _, Result, bail, ensure};
use nix::libc;

use crate::area_unsafe::{Area, HUGE, Shape};
use crate::proc_fs::write;
use crate::sys_unsafe::secret_file;
use crate::trial::{Skip, Trial, Way};

/// Can be registered; the first access faults.
pub fn hugetlb(t: &mut Trial) -> Result<()> {
    write("/proc/sys/vm/nr_hugepages", "4")?;
    let shape = Shape {
        flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB,
        align: HUGE,
        ..Shape::default()
    };
    let area = match Area::new(HUGE, shape) {
        Ok(area) => area,
        Err(error) => bail!(Skip(format!("no huge page for hugetlb: {error:#}"))),
    };
    area.store(0, 1);
    t.register(&area)?;
    t.faults(&area, 0)?;
    drop(area);
    write("/proc/sys/vm/nr_hugepages", "0")
}

pub fn secret(t: &mut Trial) -> Result<()> {
    let Ok(file) = secret_file(1) else {
        bail!(Skip("this kernel has no secret memory".to_owned()));
    };
    let area = Area::of(file.as_fd(), 1, libc::MAP_SHARED)?;
    area.store(0, 1);
    let refused = t.register(&area);
    if t.way == Way::Pte {
        ensure!(refused.is_err(), "secret memory can be registered");
        return Ok(());
    }
    // A driver cannot tell, but does not get the pages.
    refused?;
    t.faults(&area, 0)
}

/// Pages that belong to nobody: those with the clock, which the kernel maps into every process.
pub fn no_pages(t: &mut Trial) -> Result<()> {
    let maps = std::fs::read_to_string("/proc/self/maps").context("maps")?;
    let line = maps.lines().find(|line| line.ends_with("[vvar]"));
    let start = line
        .and_then(|line| line.split_once('-'))
        .context("no [vvar]")?
        .0;
    let area = Area::adopt(usize::from_str_radix(start, 16)?, 1);
    let refused = t.register(&area);
    ensure!(refused.is_err(), "memory without pages can be registered");
    Ok(())
}
