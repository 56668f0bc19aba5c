//! Guest RAM: a memory file that the device sees as guest-physical memory, and pieces of which
//! are mapped at the process's own addresses.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use extlb_device::GuestRam;
use extlb_spec::{Gpa, Iova, PAGE_SIZE};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::error::{Error, Result};
use crate::memory_unsafe::Shadow;

/// Where RAM starts; not 0, so that an address of 0 is never good by chance.
pub(super) const RAM_BASE: Gpa = Gpa(1 << 32);

const PAGE: usize = PAGE_SIZE as usize;

/// The memory file.
#[derive(Debug)]
pub(super) struct MemoryFile {
    file: OwnedFd,
    len: u64,
}

fn failed(call: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Call { call, errno }
}

impl MemoryFile {
    /// Makes zeroed RAM of `len` bytes, and the device's view of it.
    pub(super) fn new(len: u64) -> Result<(Self, GuestRam)> {
        let file =
            memfd_create(c"extlb-ram", MFdFlags::MFD_CLOEXEC).map_err(failed("memfd_create"))?;
        let size = i64::try_from(len).map_err(|_| Error::Argument("more RAM than a file holds"))?;
        nix::unistd::ftruncate(&file, size).map_err(failed("ftruncate"))?;
        let view = file
            .try_clone()
            .map_err(|_| Error::Argument("no file descriptor left"))?;
        let ram = GuestRam::default();
        ram.map_file(RAM_BASE, len, view.into(), 0, true)
            .map_err(|_| Error::Argument("no room to map the RAM"))?;
        Ok((Self { file, len }, ram))
    }

    /// Reserves `pages` of address space, with nothing accessible there yet.
    pub(super) fn reserve(&self, pages: usize) -> Result<Window> {
        let len = NonZeroUsize::new(pages * PAGE).ok_or(Error::Argument("empty memory"))?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let addr = unsafe { mmap_anonymous(None, len, ProtFlags::PROT_NONE, flags) };
        Ok(Window {
            addr: addr.map_err(failed("mmap"))?.cast(),
            pages,
        })
    }

    /// Lets page `page` of a window show the frame at `frame`.
    pub(super) fn show(&self, window: &Window, page: usize, frame: Gpa) -> Result<()> {
        let offset = frame
            .0
            .checked_sub(RAM_BASE.0)
            .filter(|at| *at <= self.len - PAGE_SIZE);
        let offset = offset.ok_or(Error::Argument("a frame outside of RAM"))?;
        assert!(page < window.pages && frame.is_aligned(PAGE_SIZE));
        let at = NonZeroUsize::new(window.addr.as_ptr().addr() + page * PAGE);
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        let len = const { NonZeroUsize::new(PAGE).unwrap() };
        // SAFETY: replaces a page of the window, which belongs to nobody else (asserted above);
        // callers show frames before they hand the window out.
        unsafe { mmap(at, len, prot, flags, self.file.as_fd(), offset as i64) }
            .map_err(failed("mmap"))?;
        Ok(())
    }
}

/// A piece of the process's address space; unmapped when dropped.
#[derive(Debug)]
pub(super) struct Window {
    addr: NonNull<u8>,
    pages: usize,
}

impl Window {
    pub(super) fn addr(&self) -> NonNull<u8> {
        self.addr
    }

    pub(super) fn iova(&self) -> Iova {
        Iova(self.addr.as_ptr().addr() as u64)
    }

    pub(super) fn len(&self) -> usize {
        self.pages * PAGE
    }

    /// The first page as a shadow page. All pages must show frames by now.
    pub(super) fn shadow(&self) -> &Shadow {
        // SAFETY: mapped read-write until `self` is dropped; the device and the library access
        // it as atomics.
        unsafe { Shadow::at(self.addr) }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the window belongs to nobody else, and its users are gone.
        let _ = unsafe { munmap(self.addr.cast::<c_void>(), self.len()) };
    }
}

// SAFETY: an address of a mapping without any state of a thread.
unsafe impl Send for Window {}
// SAFETY: as above; access to the content is the business of those who hold the window.
unsafe impl Sync for Window {}
