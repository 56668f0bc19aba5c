//! Mapped memory of this process, where large pieces begin at 2 MiB boundaries.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::num::NonZeroUsize;
#[cfg(feature = "socket")]
use std::os::fd::AsFd;
use std::ptr::NonNull;

use extlb_spec::PAGE_SIZE;
use nix::errno::Errno;
#[cfg(feature = "socket")]
use nix::sys::mman::mmap;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, mprotect, munmap};

use crate::error::{Error, Result};

/// From here on memory is aligned to as much, so that it can be mapped by large leaves.
pub(super) const LARGE: usize = 2 << 20;

/// A mapping that ends when the value is dropped.
#[derive(Debug)]
pub(super) struct Pages {
    addr: NonNull<c_void>,
    len: usize,
}

pub(super) fn failed(call: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Call { call, errno }
}

fn read_write() -> ProtFlags {
    ProtFlags::PROT_READ | ProtFlags::PROT_WRITE
}

impl Pages {
    /// Address space for `len` bytes, whole pages, with nothing accessible there yet.
    fn reserve(len: usize) -> Result<Self> {
        let whole = len > 0 && len.is_multiple_of(PAGE_SIZE as usize);
        let spare = if len >= LARGE { LARGE } else { 0 };
        let total = len.checked_add(spare).and_then(NonZeroUsize::new);
        let (true, Some(total)) = (whole, total) else {
            return Err(Error::Argument("memory is allocated in whole pages"));
        };
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let addr = unsafe { mmap_anonymous(None, total, ProtFlags::PROT_NONE, flags) };
        let addr = addr.map_err(failed("mmap"))?;
        let start = addr.as_ptr() as usize;
        let before = match spare {
            0 => 0,
            _ => start.next_multiple_of(LARGE) - start,
        };
        // SAFETY: `before <= spare`, so the sum is within the mapping.
        let aligned = unsafe { addr.byte_add(before) };
        for (addr, len) in [
            (addr, before),
            // SAFETY: `before + len <= total`: at most one past the end of the mapping.
            (unsafe { aligned.byte_add(len) }, spare - before),
        ] {
            if len > 0 {
                // SAFETY: a part of the mapping made above that nobody knows of; page-aligned, as
                // start, `before` and `len` are.
                unsafe { munmap(addr, len) }.map_err(failed("munmap"))?;
            }
        }
        Ok(Self { addr: aligned, len })
    }

    #[cfg_attr(not(feature = "vfio"), allow(dead_code, reason = "the tests use it"))]
    /// Fresh zeroed memory, by large pages where the kernel has them.
    pub(super) fn anonymous(len: usize) -> Result<Self> {
        let pages = Self::reserve(len)?;
        // SAFETY: the mapping is new: nothing relies on its being inaccessible.
        unsafe { mprotect(pages.addr, pages.len, read_write()) }.map_err(failed("mprotect"))?;
        if len >= LARGE {
            // A kernel without them says EINVAL; small pages do as well.
            let _ = pages.advise(MmapAdvise::MADV_HUGEPAGE);
        }
        Ok(pages)
    }

    /// `len` bytes of a memory file, shared with whoever else has it.
    #[cfg(feature = "socket")]
    pub(super) fn shared(file: impl AsFd, offset: u64, len: usize) -> Result<Self> {
        let offset = nix::libc::off_t::try_from(offset);
        let offset = offset.map_err(|_| Error::Argument("beyond the end of all files"))?;
        let pages = Self::reserve(len)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        let size = NonZeroUsize::new(len).expect("`reserve` refuses none");
        let at = NonZeroUsize::new(pages.addr.as_ptr() as usize);
        // SAFETY: takes the place of the reservation, which is exactly as long and ours.
        unsafe { mmap(at, size, read_write(), flags, file, offset) }.map_err(failed("mmap"))?;
        Ok(pages)
    }

    /// A child process gets nothing of it.
    pub(super) fn not_for_children(&self) -> Result<()> {
        self.advise(MmapAdvise::MADV_DONTFORK)
            .map_err(failed("madvise"))
    }

    fn advise(&self, advice: MmapAdvise) -> Result<(), Errno> {
        // SAFETY: our own mapping; none of the kinds of advice used here changes its content.
        unsafe { madvise(self.addr, self.len, advice) }
    }

    pub(super) fn addr(&self) -> NonNull<u8> {
        self.addr.cast()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: made by `reserve`, exactly as long; users of it borrow `self`.
        let _ = unsafe { munmap(self.addr, self.len) };
    }
}

// SAFETY: an address and a length; access to the content is the business of the holder.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_memory_is_aligned_and_all_of_it_is_there() {
        for len in [4096, LARGE - 4096, LARGE, LARGE + 4096, 3 * LARGE] {
            let pages = Pages::anonymous(len).expect("memory");
            let start = pages.addr().as_ptr() as usize;
            assert_eq!(pages.len(), len);
            assert!(len < LARGE || start.is_multiple_of(LARGE));
            for at in (0..len).step_by(4096) {
                // SAFETY: within the mapping, which is ours alone.
                unsafe {
                    assert_eq!(pages.addr().add(at).read(), 0);
                    pages.addr().add(at).write(1);
                }
            }
        }
        assert!(Pages::anonymous(0).is_err());
        assert!(Pages::anonymous(5).is_err());
        assert!(Pages::anonymous(usize::MAX - 4095).is_err());
    }
}
