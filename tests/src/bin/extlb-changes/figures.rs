//! How often the device is waited for when the kernel unmaps many pages, and what a page takes.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;

use crate::area_unsafe::{Area, PAGE};
use crate::proc_fs::{Backed, backing, drain_lists, frames, moved};
use crate::rows::files::file;
use crate::sys_unsafe::move_pages;
use crate::trial::{Ignored, Off, Trial};

/// A way in which the kernel unmaps many pages.
struct Way {
    name: &'static str,
    /// Makes memory that the device has, all of it.
    give: fn(&mut Trial, usize) -> Result<Area>,
    /// Unmaps all of it, or nearly so.
    take: fn(&Area) -> Result<()>,
}

const WAYS: &[Way] = &[
    Way {
        name: "migration, written by the device",
        give: |t, pages| anonymous(t, pages, true),
        take: migrate,
    },
    Way {
        name: "migration, read by the device",
        give: |t, pages| anonymous(t, pages, false),
        take: migrate,
    },
    Way {
        name: "reclaim of a file, read by the device",
        give: clean_file,
        take: page_out,
    },
    Way {
        name: "reclaim to swap, written by the device",
        give: |t, pages| anonymous(t, pages, true),
        take: page_out,
    },
    Way {
        name: "reclaim to swap, read by the device",
        give: |t, pages| anonymous(t, pages, false),
        take: page_out,
    },
    Way {
        name: "reclaim of lazily freed memory",
        give: lazily_freed,
        take: page_out,
    },
];

/// What was found for one of them.
struct Figures {
    /// Pages that were taken from the device.
    pages: u64,
    /// How often it was waited for.
    waits: u64,
    time: Duration,
}

/// Prints the figures of all.
pub fn print(pages: usize, json: bool) -> Result<()> {
    if !json {
        println!(
            "{:<40} {:>5} {:>7} {:>7} {:>8}",
            "", "batch", "pages", "waits", "us/page"
        );
    }
    for way in WAYS {
        for batch in [true, false] {
            let Figures { pages, waits, time } = measure(way, pages, batch)?;
            let name = way.name;
            let each = time.as_secs_f64() * 1e6 / pages as f64;
            match json {
                true => println!(
                    r#"{{"way":"{name}","batch":{batch},"pages":{pages},"waits":{waits},"us_per_page":{each:.2}}}"#
                ),
                false => {
                    let batch = if batch { "yes" } else { "no" };
                    println!("{name:<40} {batch:>5} {pages:>7} {waits:>7} {each:>8.1}");
                }
            }
        }
    }
    Ok(())
}

fn measure(way: &Way, pages: usize, batch: bool) -> Result<Figures> {
    let _off = (!batch).then(|| Off::new("batch")).transpose()?;
    let mut trial = Trial::new(crate::trial::Mode::Sound)?;
    let area = (way.give)(&mut trial, pages)?;
    let before = trial.stats()?;
    ensure!(
        before.mapped_pages >= pages as u64,
        "the device has not got all pages"
    );
    let begin = Instant::now();
    (way.take)(&area)?;
    let time = begin.elapsed();
    let after = trial.stats()?;
    let differ = trial.audit()?.mismatches;
    ensure!(differ == 0, "{}: {differ} translations differ", way.name);
    let figures = Figures {
        pages: after.shot_pages - before.shot_pages,
        waits: after.shootdowns - before.shootdowns,
        time,
    };
    // Somebody else may hold some of the pages for a moment.
    let enough = figures.pages * 10 >= pages as u64 * 9;
    ensure!(
        enough,
        "{}: only {} pages were taken",
        way.name,
        figures.pages
    );
    Ok(figures)
}

/// Migrates pages without completing the batch: that the device still has them must be found.
pub fn broken_batches() -> Result<()> {
    const PAGES: usize = 16;
    let mut trial = Trial::new(crate::trial::Mode::Sound)?;
    let area = anonymous(&mut trial, PAGES, true)?;
    let ignored = Ignored::ends_of_batches()?;
    let done = migrate(&area);
    let differ = trial.audit();
    drop(ignored);
    done?;
    let differ = differ?.mismatches;
    ensure!(differ == PAGES as u64, "only {differ} translations differ");
    println!("found: {differ} translations differ");
    Ok(())
}

fn anonymous(t: &mut Trial, pages: usize, write: bool) -> Result<Area> {
    let area = Area::anonymous(pages)?;
    // A page of zeros would be one page for all.
    (0..pages).for_each(|page| area.store(page * PAGE, page as u64 + 1));
    t.register(&area)?;
    let all = area.addrs(0..pages);
    match write {
        true => drop(t.write(all, 7)?),
        false => t.read_all(all)?,
    }
    drain_lists()?;
    Ok(area)
}

/// Read from the disk, and mapped; never written since.
fn clean_file(t: &mut Trial, pages: usize) -> Result<Area> {
    let file = file("figures", pages)?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    let area = Area::of(file.as_fd(), pages, libc::MAP_SHARED)?;
    t.register(&area)?;
    t.read_all(area.addrs(0..pages))?;
    drain_lists()?;
    Ok(area)
}

fn lazily_freed(t: &mut Trial, pages: usize) -> Result<Area> {
    let area = anonymous(t, pages, false)?;
    area.advise(0..pages, libc::MADV_FREE)?;
    // The device lost the pages when they were cleaned; it reads them again.
    t.read_all(area.addrs(0..pages))?;
    Ok(area)
}

fn migrate(area: &Area) -> Result<()> {
    let pages = area.pages();
    let before = frames(area, 0..pages)?;
    let here = move_pages(area, 0..1, None)?[0];
    move_pages(area, 0..pages, Some(1 - here))?;
    let moved = moved(area, 0..pages, &before)?;
    ensure!(moved * 10 >= pages * 9, "only {moved} pages have moved");
    Ok(())
}

fn page_out(area: &Area) -> Result<()> {
    let pages = area.pages();
    area.advise(0..pages, libc::MADV_PAGEOUT)?;
    let left = backing(area, 0..pages)?;
    let left = left.iter().filter(|b| matches!(b, Backed::Page(_))).count();
    ensure!(left * 10 <= pages, "{left} pages are still there");
    Ok(())
}
