//! Memory whose mapping is changed on purpose.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use anyhow::{Context as _, Result, ensure};
use extlb_driver::spec::work::Descriptor;
use extlb_driver::{Iova, Kernel, Pending, Queue, Raw};
use nix::errno::Errno;
use nix::libc;

/// Size of a page, in bytes.
pub const PAGE: usize = 4096;
/// Pages of a huge page.
pub const HUGE: usize = 512;

/// Addresses that hold no Rust object: pages that are mapped, unmapped and moved at will, and that
/// the device works on. Accessed by whole words only, volatile.
///
/// To touch a page that is not mapped, or to write to one that is read-only, ends the program. All
/// panic if a range is not within.
#[derive(Debug)]
pub struct Area {
    start: usize,
    pages: usize,
    /// All that was reserved for it; unmapped in the end.
    reserved: Range<usize>,
    /// It has holes now, where something else may be mapped meanwhile: it stays as it is.
    holes: Cell<bool>,
}

/// What an area is to be.
#[derive(Clone, Copy, Debug)]
pub struct Shape<'a> {
    /// Protection, as for `mmap`.
    pub prot: i32,
    /// Flags besides `MAP_FIXED`; `MAP_ANONYMOUS` if there is no file.
    pub flags: i32,
    /// The file, mapped from its start.
    pub file: Option<BorrowedFd<'a>>,
    /// Where it starts: a multiple of so many pages.
    pub align: usize,
}

/// For `mmap` and `mprotect`.
pub const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

impl Default for Shape<'_> {
    fn default() -> Self {
        Self {
            prot: READ_WRITE,
            flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            file: None,
            align: 1,
        }
    }
}

fn checked(result: *mut libc::c_void, what: &str) -> Result<usize> {
    match result == libc::MAP_FAILED {
        true => Err(Errno::last()).context(what.to_owned()),
        false => Ok(result.addr()),
    }
}

fn pointer(addr: usize) -> *mut libc::c_void {
    std::ptr::with_exposed_provenance_mut(addr)
}

impl Area {
    /// Fresh private memory.
    pub fn anonymous(pages: usize) -> Result<Self> {
        Self::new(pages, Shape::default())
    }

    /// Fresh private memory that huge pages fit into.
    pub fn aligned(pages: usize) -> Result<Self> {
        Self::new(
            pages,
            Shape {
                align: HUGE,
                ..Shape::default()
            },
        )
    }

    /// A mapping of a file, shared or private.
    pub fn of(file: BorrowedFd<'_>, pages: usize, flags: i32) -> Result<Self> {
        Self::new(
            pages,
            Shape {
                flags,
                file: Some(file),
                ..Shape::default()
            },
        )
    }

    /// Any mapping. One page on either side is not accessible, so that it is not merged with others.
    pub fn new(pages: usize, shape: Shape<'_>) -> Result<Self> {
        ensure!(pages > 0, "an area of no pages");
        let len = (pages + shape.align + 2) * PAGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let reserved = unsafe { libc::mmap(pointer(0), len, libc::PROT_NONE, flags, -1, 0) };
        let reserved = checked(reserved, "mmap")?;
        let area = Self {
            start: (reserved + PAGE).next_multiple_of(shape.align * PAGE),
            pages,
            reserved: reserved..reserved + len,
            holes: Cell::new(false),
        };
        area.map(0..pages, shape)?;
        Ok(area)
    }

    /// Memory that is there already, and goes by ways of its own.
    pub fn adopt(start: usize, pages: usize) -> Self {
        Self {
            start,
            pages,
            reserved: start..start + pages * PAGE,
            holes: Cell::new(true),
        }
    }

    /// Maps pages in place of what is there.
    pub fn map(&self, pages: Range<usize>, shape: Shape<'_>) -> Result<()> {
        let (start, len) = self.at(&pages);
        let fd = shape.file.map_or(-1, |file| file.as_raw_fd());
        let flags = shape.flags | libc::MAP_FIXED;
        // SAFETY: replaces pages of this area only, which hold no Rust objects.
        let got = unsafe { libc::mmap(pointer(start), len, shape.prot, flags, fd, 0) };
        checked(got, "mmap").map(drop)
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The address of a byte.
    pub fn addr(&self, offset: usize) -> Iova {
        assert!(offset <= self.pages * PAGE);
        Iova((self.start + offset) as u64)
    }

    /// The addresses of pages.
    pub fn addrs(&self, pages: Range<usize>) -> Range<Iova> {
        self.addr(pages.start * PAGE)..self.addr(pages.end * PAGE)
    }

    fn at(&self, pages: &Range<usize>) -> (usize, usize) {
        assert!(
            pages.start < pages.end && pages.end <= self.pages,
            "{pages:?}"
        );
        (self.start + pages.start * PAGE, pages.len() * PAGE)
    }

    /// Unmaps pages.
    pub fn unmap(&self, pages: Range<usize>) -> Result<()> {
        let (start, len) = self.at(&pages);
        self.holes.set(true);
        // SAFETY: pages of this area only, which hold no Rust objects.
        Errno::result(unsafe { libc::munmap(pointer(start), len) }).context("munmap")?;
        Ok(())
    }

    /// `madvise`.
    pub fn advise(&self, pages: Range<usize>, advice: i32) -> Result<(), Errno> {
        let (start, len) = self.at(&pages);
        // SAFETY: pages of this area only, which hold no Rust objects.
        Errno::result(unsafe { libc::madvise(pointer(start), len, advice) }).map(drop)
    }

    /// `mprotect`.
    pub fn protect(&self, pages: Range<usize>, prot: i32) -> Result<()> {
        let (start, len) = self.at(&pages);
        // SAFETY: pages of this area only, which hold no Rust objects.
        Errno::result(unsafe { libc::mprotect(pointer(start), len, prot) }).context("mprotect")?;
        Ok(())
    }

    /// Moves pages to another area, in place of what is there.
    pub fn move_to(&self, pages: Range<usize>, to: &Area, page: usize, flags: i32) -> Result<()> {
        let (from, len) = self.at(&pages);
        let (target, _) = to.at(&(page..page + pages.len()));
        self.holes.set(true);
        let flags = flags | libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: pages of these two areas only, which hold no Rust objects.
        let got = unsafe { libc::mremap(pointer(from), len, len, flags, pointer(target)) };
        checked(got, "mremap").map(drop)
    }

    /// Makes pages at the end go.
    pub fn shrink(&self, pages: usize) -> Result<()> {
        assert!(0 < pages && pages < self.pages);
        let (old, new) = (self.pages * PAGE, pages * PAGE);
        self.holes.set(true);
        // SAFETY: pages of this area only, which hold no Rust objects.
        let got = unsafe { libc::mremap(pointer(self.start), old, new, 0) };
        checked(got, "mremap").map(drop)
    }

    /// Reads a word at `offset`, a multiple of 8.
    pub fn load(&self, offset: usize) -> u64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.pages * PAGE);
        // SAFETY: aligned and within the area.
        unsafe { pointer(self.start + offset).cast::<u64>().read_volatile() }
    }

    /// Writes a word at `offset`, a multiple of 8.
    pub fn store(&self, offset: usize, word: u64) {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.pages * PAGE);
        // SAFETY: aligned and within the area; no Rust object is there.
        unsafe {
            pointer(self.start + offset)
                .cast::<u64>()
                .write_volatile(word)
        }
    }

    /// Writes a word all over pages.
    pub fn store_all(&self, pages: Range<usize>, word: u64) {
        (pages.start * PAGE..pages.end * PAGE)
            .step_by(8)
            .for_each(|at| self.store(at, word));
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        if !self.holes.get() {
            // SAFETY: the area holds no Rust objects, and nobody uses the addresses any more. If
            // the device still has pages, the kernel takes them from it first.
            let _ = unsafe { libc::munmap(pointer(self.reserved.start), self.reserved.len()) };
        }
    }
}

/// Submits an operation on areas.
///
/// The descriptor's operands must lie in areas (those who make it take them from
/// [`Area::addr`]), which hold no Rust objects at any time.
pub fn submit(to: &Queue<Kernel>, descriptor: Descriptor) -> Result<Pending<Kernel, Raw, ()>> {
    // SAFETY: as said above; where the areas are unmapped, the device faults.
    Ok(unsafe { to.submit_raw(descriptor) }?)
}
