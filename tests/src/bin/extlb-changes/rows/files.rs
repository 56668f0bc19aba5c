//! Pages of files on a disk.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use nix::mount::{MsFlags, mount};

use crate::area_unsafe::{Area, HUGE, PAGE, Shape};
use crate::proc_fs::{
    Backed, busybox, drain_lists, eventually, frames, moved, needs, number, smaps_kib, write,
};
use crate::rows::{reclaim::page_out, unmap::nothing};
use crate::sys_unsafe::{self, sync_mapping, write_page};
use crate::trial::{Access, Accessed, Skip, Trial};

const PAGES: usize = 16;
const FOLDER: &str = "/mnt/changes";

/// A fresh file of so many pages on a disk of its own, written back.
pub fn file(name: &str, pages: usize) -> Result<File> {
    if !Path::new(FOLDER).exists() {
        let disk = number("/sys/class/zram-control/hot_add")?;
        write(format!("/sys/block/zram{disk}/disksize"), "128M")?;
        let disk = format!("/dev/zram{disk}");
        busybox(&["mke2fs", "-b", "4096", &disk])?;
        std::fs::create_dir_all(FOLDER).context(FOLDER)?;
        mount(
            Some(disk.as_str()),
            FOLDER,
            Some("ext4"),
            MsFlags::empty(),
            None::<&str>,
        )
        .context("mount")?;
    }
    let path = format!("{FOLDER}/{name}");
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)?;
    for page in 0..pages {
        file.write_all_at(&[byte(page); PAGE], (page * PAGE) as u64)?;
    }
    file.sync_all()?;
    Ok(file)
}

/// What a page of a fresh file is full of.
fn byte(page: usize) -> u8 {
    (page % 251) as u8 + 1
}

fn word(page: usize) -> u64 {
    u64::from_ne_bytes([byte(page); 8])
}

/// Writeback cleans ptes. What the device writes afterwards is written back again.
pub fn written_back(t: &mut Trial) -> Result<()> {
    let file = file("written-back", PAGES)?;
    let area = Area::of(file.as_fd(), PAGES, libc::MAP_SHARED)?;
    t.give(&area, Access::Write)?;
    let dirty = || Ok::<_, anyhow::Error>(smaps_kib(&area, 0, "Private_Dirty")? as usize * 1024);
    ensure!(dirty()? == PAGES * PAGE, "not all pages are dirty");
    t.change(PAGES, || {
        sync_mapping(&area)?;
        ensure!(dirty()? == 0, "some pages are still dirty");
        Ok(())
    })?;
    if t.is_broken() {
        return Ok(());
    }
    t.writes(&area, 3, 4)?;
    ensure!(dirty()? == PAGE, "the device's write makes no page dirty");
    sync_mapping(&area)?;
    area.unmap(0..PAGES)?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, (3 * PAGE) as u64)?;
    ensure!(
        u64::from_ne_bytes(bytes) == 4,
        "the device's write is not on the disk"
    );
    Ok(())
}

pub fn truncate(t: &mut Trial) -> Result<()> {
    let file = file("truncate", PAGES)?;
    let area = Area::of(file.as_fd(), PAGES, libc::MAP_SHARED)?;
    t.give(&area, Access::Write)?;
    t.change(PAGES - 4, || {
        file.set_len(4 * PAGE as u64)?;
        nothing(&area, 4..PAGES)
    })?;
    t.faults(&area, 4)?;
    t.writes(&area, 3, 1)
}

/// Clean pages go without being written anywhere.
pub fn pageout(t: &mut Trial) -> Result<()> {
    let file = file("pageout", PAGES)?;
    let area = Area::of(file.as_fd(), PAGES, libc::MAP_SHARED)?;
    t.give(&area, Access::Read)?;
    drain_lists()?;
    t.change(PAGES, || {
        page_out(&area, 0..PAGES, |_, backed| backed == Backed::Nothing)
    })?;
    t.reads(&area, 3, word(3))
}

/// A write past the page cache takes its pages away.
pub fn direct_write(t: &mut Trial) -> Result<()> {
    let file = file("direct", PAGES)?;
    let area = Area::of(file.as_fd(), PAGES, libc::MAP_SHARED)?;
    let buffer = Area::anonymous(1)?;
    buffer.store_all(0..1, 9);
    let mut options = OpenOptions::new();
    let direct = options.write(true).custom_flags(libc::O_DIRECT);
    let direct = direct.open(format!("{FOLDER}/direct"))?;
    t.give(&area, Access::Read)?;
    t.change(1, || {
        write_page(direct.as_fd(), &buffer, 3)?;
        nothing(&area, 3..4)
    })?;
    t.reads(&area, 3, 9)
}

/// Pages of a file that nobody writes to become a huge one.
pub fn collapse(t: &mut Trial) -> Result<()> {
    drop(file("collapse", HUGE)?);
    let file = File::open(format!("{FOLDER}/collapse"))?;
    let shape = Shape {
        prot: libc::PROT_READ,
        flags: libc::MAP_PRIVATE,
        file: Some(file.as_fd()),
        align: HUGE,
    };
    let area = Area::new(HUGE, shape)?;
    t.give(&area, Access::Read)?;
    let before = frames(&area, 0..HUGE)?;
    t.change(HUGE, || {
        eventually("the pages collapse", || {
            match area.advise(0..HUGE, libc::MADV_COLLAPSE) {
                Ok(()) => Ok(true),
                Err(Errno::EAGAIN | Errno::EBUSY) => Ok(false),
                Err(Errno::EINVAL) => bail!(Skip("this kernel has no huge pages of files".into())),
                Err(errno) => bail!("MADV_COLLAPSE: {errno}"),
            }
        })?;
        ensure!(
            smaps_kib(&area, 0, "FilePmdMapped")? == 2048,
            "no huge page is mapped"
        );
        let moved = moved(&area, 0..HUGE, &before)?;
        ensure!(moved == HUGE, "{moved} pages are others");
        Ok(())
    })?;
    t.reads(&area, 3, word(3))
}

/// A breakpoint is written to a copy of the page of the program's text; taken out, the file's own
/// page comes back.
pub fn uprobe(t: &mut Trial) -> Result<()> {
    const KIND: &str = "/sys/bus/event_source/devices/uprobe/type";
    const PATH: &CStr = c"/dev/shm/changes-text";
    const NOP: u8 = 0x90;
    needs(KIND, "uprobes")?;
    let kind = number(KIND)? as u32;
    let path = PATH.to_str()?;
    std::fs::write(path, [NOP; PAGES * PAGE]).context(path)?;
    let file = File::open(path)?;
    let shape = Shape {
        prot: libc::PROT_READ | libc::PROT_EXEC,
        flags: libc::MAP_PRIVATE,
        file: Some(file.as_fd()),
        align: 1,
    };
    let area = Area::new(PAGES, shape)?;
    t.give(&area, Access::Read)?;
    let before = frames(&area, 0..PAGES)?;
    let at = 3 * PAGE + 16;
    let probe = t.change(1, || {
        let probe = sys_unsafe::uprobe(kind, PATH, at as u64)?;
        ensure!(moved(&area, 0..PAGES, &before)? == 1, "no page was copied");
        ensure!(area.load(at) & 0xff == 0xcc, "there is no breakpoint");
        Ok(probe)
    })?;
    let Accessed::Words(words) = t.read(area.addrs(3..4))? else {
        bail!("the device cannot read the text any more");
    };
    ensure!(
        words[2] & 0xff == 0xcc,
        "the device does not see the breakpoint"
    );
    t.change(1, || {
        drop(probe);
        ensure!(
            area.load(at) & 0xff == u64::from(NOP),
            "the breakpoint is still there"
        );
        Ok(())
    })?;
    t.reads(&area, 3, u64::from_ne_bytes([NOP; 8]))?;
    std::fs::remove_file(path)?;
    Ok(())
}
