//! Memory whose mapping changes under a working device, and other things Rust has no types for.
#![allow(unsafe_code)]

use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result, bail, ensure};
use extlb_driver::spec::work::Descriptor;
use extlb_driver::{Backing, Iova, Pending, Raw, Submitter};
use nix::libc;
use nix::sys::mman::{
    MRemapFlags, MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, mprotect, mremap, munmap,
};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

/// Size of a page, in bytes.
pub const PAGE: usize = 4096;

/// Where areas lie: far below all that the kernel places by itself. It takes the highest gap that
/// suffices (`vm_unmapped_area()` in `mm/mmap.c`), so that a thread's new stack or the allocator's
/// new memory does not end in a hole of an area, which its owner is about to fill again.
const LOWEST: usize = 1 << 44;
/// Areas begin at multiples of a huge page, and lie as far from each other at least.
const APART: usize = 2 << 20;
/// Where the next area lies. No address is used twice.
static NEXT: AtomicUsize = AtomicUsize::new(LOWEST);

/// Addresses that hold no Rust object: pages that are mapped, unmapped and moved at will, and that
/// the device works on meanwhile. Accessed by whole words only, volatile.
///
/// To touch a page that is not mapped, or to write to one that is read-only, ends the program
/// (SIGSEGV). All panic if a range is not within.
#[derive(Debug)]
pub struct Area {
    start: NonNull<u8>,
    pages: usize,
}

// SAFETY: an address; all accesses are volatile words, and races between them are intended.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);
const ANONYMOUS: MapFlags = MapFlags::MAP_PRIVATE;

impl Area {
    /// Reserves addresses; nothing is accessible there yet.
    pub fn reserve(pages: usize) -> Result<Self> {
        let len = NonZeroUsize::new(pages * PAGE).context("an area of no pages")?;
        let room = len.get().next_multiple_of(APART) + APART;
        let addr = NonZeroUsize::new(NEXT.fetch_add(room, Ordering::Relaxed));
        let flags = ANONYMOUS | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED_NOREPLACE;
        // SAFETY: a new mapping where nothing is, or the kernel refuses it.
        let start = unsafe { mmap_anonymous(addr, len, ProtFlags::PROT_NONE, flags) };
        Ok(Self {
            start: start.with_context(|| format!("mmap at {addr:x?}"))?.cast(),
            pages,
        })
    }

    /// Fresh zeroed memory.
    pub fn fresh(pages: usize) -> Result<Self> {
        let area = Self::reserve(pages)?;
        area.map(0..pages)?;
        Ok(area)
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The address of a byte.
    pub fn addr(&self, offset: usize) -> Iova {
        assert!(offset <= self.pages * PAGE);
        Iova((self.start.as_ptr().addr() + offset) as u64)
    }

    /// The addresses of pages.
    pub fn addrs(&self, pages: &Range<usize>) -> Range<Iova> {
        self.addr(pages.start * PAGE)..self.addr(pages.end * PAGE)
    }

    fn at(&self, pages: &Range<usize>) -> (NonNull<libc::c_void>, usize) {
        assert!(
            pages.start < pages.end && pages.end <= self.pages,
            "{pages:?}"
        );
        // SAFETY: within the area, as asserted.
        let start = unsafe { self.start.add(pages.start * PAGE) };
        (start.cast(), pages.len() * PAGE)
    }

    /// Maps fresh pages in place of whatever is there.
    pub fn map(&self, pages: Range<usize>) -> Result<()> {
        self.map_with(&pages, MapFlags::MAP_FIXED)
    }

    /// Maps fresh pages where nothing is.
    pub fn map_hole(&self, pages: Range<usize>) -> Result<()> {
        self.map_with(&pages, MapFlags::MAP_FIXED_NOREPLACE)
    }

    fn map_with(&self, pages: &Range<usize>, how: MapFlags) -> Result<()> {
        let (start, len) = self.at(pages);
        let (addr, len) = (start.addr(), NonZeroUsize::new(len).context("no pages")?);
        // SAFETY: replaces pages of this area only, which hold no Rust objects.
        let got = unsafe { mmap_anonymous(Some(addr), len, READ_WRITE, ANONYMOUS | how) };
        let got = got.with_context(|| format!("mmap of pages {pages:?}"))?;
        ensure!(got == start, "mmap put pages {pages:?} elsewhere");
        Ok(())
    }

    /// Unmaps pages. The hole is to be filled again before the area is used there.
    pub fn unmap(&self, pages: Range<usize>) -> Result<()> {
        let (start, len) = self.at(&pages);
        // SAFETY: pages of this area only, which hold no Rust objects.
        unsafe { munmap(start, len) }.with_context(|| format!("munmap of pages {pages:?}"))
    }

    /// Gives the content up: the pages are zero when they are touched next.
    pub fn dont_need(&self, pages: Range<usize>) -> Result<()> {
        let (start, len) = self.at(&pages);
        // SAFETY: pages of this area only, which hold no Rust objects.
        unsafe { madvise(start, len, MmapAdvise::MADV_DONTNEED) }
            .with_context(|| format!("MADV_DONTNEED of pages {pages:?}"))
    }

    /// Has the pages reclaimed.
    pub fn page_out(&self, pages: Range<usize>) -> Result<()> {
        let (start, len) = self.at(&pages);
        // SAFETY: pages of this area only, whose content stays.
        unsafe { madvise(start, len, MmapAdvise::MADV_PAGEOUT) }
            .with_context(|| format!("MADV_PAGEOUT of pages {pages:?}"))
    }

    /// Lets children not have the area, so that a fork leaves its pages where they are.
    pub fn keep_from_children(&self) -> Result<()> {
        let (start, len) = self.at(&(0..self.pages));
        // SAFETY: pages of this area only; this process sees no difference.
        unsafe { madvise(start, len, MmapAdvise::MADV_DONTFORK) }.context("MADV_DONTFORK")
    }

    /// Forbids or allows writing.
    pub fn protect(&self, pages: Range<usize>, write: bool) -> Result<()> {
        let (start, len) = self.at(&pages);
        let prot = if write {
            READ_WRITE
        } else {
            ProtFlags::PROT_READ
        };
        // SAFETY: pages of this area only, which hold no Rust objects.
        unsafe { mprotect(start, len, prot) }.with_context(|| format!("mprotect of {pages:?}"))
    }

    /// Moves pages to another area, in place of what is there, and leaves a hole.
    pub fn move_to(&self, pages: Range<usize>, to: &Area, page: usize) -> Result<()> {
        let (from, len) = self.at(&pages);
        let (target, _) = to.at(&(page..page + pages.len()));
        let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED;
        // SAFETY: pages of these two areas only, which hold no Rust objects.
        unsafe { mremap(from, len, len, flags, Some(target)) }
            .with_context(|| format!("mremap of pages {pages:?}"))?;
        Ok(())
    }

    /// Reads a word at `offset`, a multiple of 8.
    pub fn load(&self, offset: usize) -> u64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.pages * PAGE);
        // SAFETY: aligned and within the area.
        unsafe { self.start.add(offset).cast::<u64>().read_volatile() }
    }

    /// Writes a word at `offset`, a multiple of 8.
    pub fn store(&self, offset: usize, word: u64) {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.pages * PAGE);
        // SAFETY: aligned and within the area; no Rust object is there.
        unsafe { self.start.add(offset).cast::<u64>().write_volatile(word) }
    }

    /// Writes one word all over some pages.
    pub fn store_all(&self, pages: Range<usize>, word: u64) {
        (pages.start * PAGE..pages.end * PAGE)
            .step_by(8)
            .for_each(|at| self.store(at, word));
    }

    /// A checksum of some pages.
    pub fn checksum(&self, pages: Range<usize>) -> u64 {
        let words = (pages.start * PAGE..pages.end * PAGE).step_by(8);
        words.fold(0, |sum: u64, at| {
            sum.rotate_left(5).wrapping_add(self.load(at))
        })
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the area holds no Rust objects, and whoever used it borrowed it. If the device
        // still works on it, the kernel takes the pages from it first.
        let _ = unsafe { munmap(self.start.cast(), self.pages * PAGE) };
    }
}

/// Submits an operation on areas.
///
/// The descriptor's operands must lie in areas (asserted by those who make it from
/// [`Area::addr`]), which hold no Rust objects at any time.
pub fn submit<B: Backing>(
    to: &Submitter<'_, B>,
    descriptor: Descriptor,
) -> Result<Pending<B, Raw, ()>> {
    // SAFETY: as said above; where the areas are unmapped, the device faults.
    Ok(unsafe { to.submit_raw(descriptor) }?)
}

/// How much of some memory is resident, in bytes.
pub fn resident(addr: Iova, len: usize) -> Result<usize> {
    let pages = len.div_ceil(PAGE);
    let mut map = vec![0u8; pages];
    let start = std::ptr::without_provenance_mut::<libc::c_void>(addr.0 as usize);
    // SAFETY: looks at the page tables only; `map` has a byte for each page.
    let result = unsafe { libc::mincore(start, len, map.as_mut_ptr()) };
    nix::errno::Errno::result(result).context("mincore")?;
    Ok(map.iter().filter(|page| **page & 1 != 0).count() * PAGE)
}

/// Forks; the child runs `child` and ends with what it says. Returns the child's verdict after
/// `parent` has run beside it.
///
/// The child is a copy of a process with several threads: `child` must not allocate or lock.
pub fn in_child(child: impl FnOnce() -> bool, parent: impl FnOnce()) -> Result<bool> {
    // SAFETY: the child only reads memory and ends, as the callers promise.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Child => {
            let code = i32::from(!child());
            // SAFETY: ends the child without running anything else of this program.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => {
            parent();
            match waitpid(child, None).context("waitpid")? {
                WaitStatus::Exited(_, code) => Ok(code == 0),
                other => bail!("a child ended with {other:?}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hole_is_not_taken_by_what_the_kernel_places() {
        const PAGES: usize = 64;
        let area = Area::fresh(PAGES).unwrap();
        area.unmap(3..PAGES).unwrap();
        let len = NonZeroUsize::new(PAGE).unwrap();
        // SAFETY: a new mapping at an address of the kernel's choice, whose content nobody uses.
        let others = std::array::from_fn::<_, 1000, _>(|_| unsafe {
            mmap_anonymous(None, len, ProtFlags::PROT_NONE, ANONYMOUS).unwrap()
        });
        area.map_hole(3..PAGES).unwrap();
        for other in others {
            // SAFETY: mapped above, and not used.
            unsafe { munmap(other, PAGE) }.unwrap();
        }
    }
}
