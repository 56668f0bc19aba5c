//! Pages that only look older: their accessed bits are cleared, and nobody loses access.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use nix::libc;

use crate::area_unsafe::{Area, PAGE};
use crate::proc_fs::{CGROUP, drain_lists, eventually, frames, needs, number, smaps_kib, write};
use crate::rows::{huge, reclaim::comes_back};
use crate::trial::{Access, Off, Skip, Trial, Way};

const PAGES: usize = 16;

/// How many pages of the area are young.
fn young(area: &Area) -> Result<usize> {
    Ok(smaps_kib(area, 0, "Referenced")? as usize * 1024 / PAGE)
}

/// An area that the device has, all of it young.
fn all_young(t: &mut Trial) -> Result<Area> {
    let area = Area::anonymous(PAGES)?;
    t.give(&area, Access::Write)?;
    drain_lists()?;
    ensure!(young(&area)? == PAGES, "not all pages are young");
    Ok(area)
}

/// Makes an area look as if nobody had used it.
fn make_cold(t: &mut Trial, area: &Area) -> Result<()> {
    let pages = area.pages();
    t.give(area, Access::Write)?;
    drain_lists()?;
    ensure!(young(area)? == pages, "not all pages are young");
    t.change(pages, || {
        area.advise(0..pages, libc::MADV_COLD)?;
        ensure!(young(area)? == 0, "some pages are still young");
        Ok(())
    })?;
    comes_back(t, area)
}

pub fn cold(t: &mut Trial) -> Result<()> {
    make_cold(t, &Area::anonymous(PAGES)?)
}

pub fn cold_huge(t: &mut Trial) -> Result<()> {
    make_cold(t, &huge::backed_by_huge_page()?)
}

/// The accessed bits of the whole process are cleared.
pub fn clear_references(t: &mut Trial) -> Result<()> {
    let area = all_young(t)?;
    t.change(0, || {
        write("/proc/self/clear_refs", "1")?;
        ensure!(young(&area)? == 0, "some pages are still young");
        Ok(())
    })?;
    comes_back(t, &area)
}

const BITMAP: &str = "/sys/kernel/mm/page_idle/bitmap";

/// Whether nobody has used a page since it was marked idle.
fn is_idle(frame: u64) -> Result<bool> {
    let file = File::open(BITMAP).context(BITMAP)?;
    let mut word = [0; 8];
    file.read_exact_at(&mut word, frame / 64 * 8)?;
    Ok(u64::from_le_bytes(word) >> (frame % 64) & 1 != 0)
}

/// Pages are marked idle, which looks at the accessed bits and clears them.
pub fn idle(t: &mut Trial) -> Result<()> {
    needs(BITMAP, "page idle tracking")?;
    let area = all_young(t)?;
    let frame = frames(&area, 0..1)?[0];
    t.change(0, || {
        let file = OpenOptions::new().write(true).open(BITMAP)?;
        let bit = 1u64 << (frame % 64);
        // Whoever still holds the page, and a device that uses it, keep it from being marked.
        eventually("the page is idle", || {
            file.write_all_at(&bit.to_le_bytes(), frame / 64 * 8)?;
            is_idle(frame)
        })
    })?;
    comes_back(t, &area)
}

/// The generational LRU walks page tables.
pub fn generations(t: &mut Trial) -> Result<()> {
    const ENABLED: &str = "/sys/kernel/mm/lru_gen/enabled";
    needs(ENABLED, "generational LRU")?;
    let before = fs::read_to_string(ENABLED)?;
    write(ENABLED, "0x7")?;
    let area = all_young(t)?;
    let aged = t.change(0, || {
        eventually("the pages are old", || {
            age_group()?;
            Ok(young(&area)? == 0)
        })
    });
    write(ENABLED, before.trim())?;
    aged?;
    comes_back(t, &area)
}

/// Begins a new generation in this process's control group, on each node.
fn age_group() -> Result<()> {
    const FILE: &str = "/sys/kernel/debug/lru_gen";
    let name = CGROUP
        .strip_prefix("/sys/fs/cgroup")
        .context("the group's path")?;
    let text = fs::read_to_string(FILE).context(FILE)?;
    // `memcg ID PATH`, ` node N`, and a line for each generation, the youngest last.
    let (mut group, mut node, mut youngest) = (None, None, Vec::new());
    for line in text.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            ["memcg", id, path] => group = (path == name).then_some(id),
            ["memcg", ..] => group = None,
            ["node", number] => node = Some(number),
            [generation, ..] => {
                if let (Some(group), Some(node)) = (group, node) {
                    youngest.retain(|(_, other, _)| *other != node);
                    youngest.push((group, node, generation));
                }
            }
            [] => {}
        }
    }
    ensure!(!youngest.is_empty(), "no generations of {name}: {text}");
    for (group, node, generation) in youngest {
        // With anonymous pages, and all page tables. Somebody may have done it just now.
        match fs::write(FILE, format!("+ {group} {node} {generation} 1 1")) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => bail!("{FILE}: {error}"),
            _ => {}
        }
    }
    Ok(())
}

/// DAMON samples pages of a range.
pub fn damon(t: &mut Trial) -> Result<()> {
    const ADMIN: &str = "/sys/kernel/mm/damon/admin/kdamonds";
    needs(ADMIN, "DAMON")?;
    let area = all_young(t)?;
    let pages = frames(&area, 0..PAGES)?;
    let addrs = area.addrs(0..PAGES);
    let daemon = format!("{ADMIN}/0");
    let context = format!("{daemon}/contexts/0");
    let target = format!("{context}/targets/0");
    let set = |path: String, value: String| write(Path::new(&path), &value);
    set(format!("{ADMIN}/nr_kdamonds"), "1".into())?;
    set(format!("{daemon}/contexts/nr_contexts"), "1".into())?;
    // As it is told, not as it finds the process to be.
    set(format!("{context}/operations"), "fvaddr".into())?;
    set(format!("{context}/targets/nr_targets"), "1".into())?;
    set(
        format!("{target}/pid_target"),
        std::process::id().to_string(),
    )?;
    set(format!("{target}/regions/nr_regions"), "1".into())?;
    set(
        format!("{target}/regions/0/start"),
        addrs.start.0.to_string(),
    )?;
    set(format!("{target}/regions/0/end"), addrs.end.0.to_string())?;
    t.change(0, || {
        set(format!("{daemon}/state"), "on".into())?;
        // It marks what it has looked at.
        let sampled = eventually("DAMON comes by", || {
            let idle: Result<Vec<_>> = pages.iter().map(|frame| is_idle(*frame)).collect();
            Ok(idle?.contains(&true))
        });
        set(format!("{daemon}/state"), "off".into())?;
        sampled
    })?;
    set(format!("{ADMIN}/nr_kdamonds"), "0".into())?;
    ensure!(
        number(format!("{ADMIN}/nr_kdamonds"))? == 0,
        "DAMON does not stop"
    );
    comes_back(t, &area)
}

/// Marks pages idle, lets the device alone use them, and counts those that are idle still.
fn idle_though_used(t: &Trial, area: &Area, frames: &[u64]) -> Result<usize> {
    let file = OpenOptions::new().write(true).open(BITMAP)?;
    for frame in frames {
        let bit = 1u64 << (frame % 64);
        eventually("the page is idle", || {
            file.write_all_at(&bit.to_le_bytes(), frame / 64 * 8)?;
            is_idle(*frame)
        })?;
    }
    // The device looks at the queue in order: what it was told of these pages it has done.
    t.audit()?;
    t.read_all(area.addrs(0..area.pages()))?;
    let idle: Result<Vec<_>> = frames.iter().map(|frame| is_idle(*frame)).collect();
    Ok(idle?.into_iter().filter(|idle| *idle).count())
}

fn must_be_asked(t: &Trial) -> Result<()> {
    match t.way {
        Way::Pte => Ok(()),
        _ => bail!(Skip(
            "the driver tells only pte notifiers which pages it has used".to_owned()
        )),
    }
}

/// A page that the device alone uses is not idle; unless the driver does not tell.
pub fn used(t: &mut Trial) -> Result<()> {
    must_be_asked(t)?;
    needs(BITMAP, "page idle tracking")?;
    let area = all_young(t)?;
    let frames = frames(&area, 0..PAGES)?;
    let before = t.stats()?.filled_pages;
    let idle = idle_though_used(t, &area, &frames)?;
    ensure!(
        idle == 0,
        "{idle} pages are idle, though the device used them"
    );
    let off = Off::new("age")?;
    let idle = idle_though_used(t, &area, &frames)?;
    drop(off);
    ensure!(
        idle == PAGES,
        "{idle} pages are idle if the driver does not tell, not {PAGES}"
    );
    let filled = t.stats()?.filled_pages - before;
    ensure!(filled == 0, "the device has lost {filled} pages meanwhile");
    Ok(())
}

/// Pages that the device uses between one round of reclaim and the next, and others that nobody
/// uses. How many of the former the device has to ask for again.
fn lost_under_pressure(t: &mut Trial) -> Result<u64> {
    const USED: usize = 1024;
    const UNUSED: usize = 4096;
    const ROUNDS: usize = 8;
    let used = Area::anonymous(USED)?;
    let unused = Area::anonymous(UNUSED)?;
    t.register(&used)?;
    let all = used.addrs(0..USED);
    t.write(all.clone(), 1)?;
    (0..UNUSED).for_each(|page| unused.store(page * PAGE, 1));
    drain_lists()?;
    let mut filled = Vec::new();
    for _ in 0..=ROUNDS {
        // 256 pages at a time, less than are unused. It fails if it finds fewer.
        let _ = write(format!("{CGROUP}/memory.reclaim"), "1M");
        let before = t.stats()?.filled_pages;
        t.read_all(all.clone())?;
        filled.push(t.stats()?.filled_pages - before);
    }
    // At first all pages have just been used: the first round goes over them twice, and to the
    // second time none of them has been used since.
    let lost = filled[1..].iter().sum();
    t.unregister_last();
    Ok(lost)
}

/// What the device uses is kept, and what nobody uses goes; unless the driver does not tell.
pub fn used_is_kept(t: &mut Trial) -> Result<()> {
    must_be_asked(t)?;
    let told = lost_under_pressure(t)?;
    let off = Off::new("age")?;
    let not_told = lost_under_pressure(t)?;
    drop(off);
    eprintln!("pages lost that the device uses: {told} if the driver tells, {not_told} if not");
    ensure!(
        not_told >= 256 && told * 4 <= not_told,
        "of the pages that the device uses, {told} were lost, and {not_told} if the driver does not tell"
    );
    Ok(())
}

/// The same for the generational LRU.
pub fn used_is_kept_by_generations(t: &mut Trial) -> Result<()> {
    must_be_asked(t)?;
    const ENABLED: &str = "/sys/kernel/mm/lru_gen/enabled";
    needs(ENABLED, "generational LRU")?;
    let before = fs::read_to_string(ENABLED)?;
    write(ENABLED, "0x7")?;
    let result = used_is_kept(t);
    write(ENABLED, before.trim())?;
    result
}
