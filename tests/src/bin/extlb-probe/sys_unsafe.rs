//! The system calls that have no safe wrapper: raw ioctls, and mappings used as bare addresses.
#![allow(unsafe_code)]

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Pages that this process owns and never turns into a reference: only their address is used.
pub struct Pages {
    addr: usize,
    len: usize,
}

impl Pages {
    /// Maps `len` bytes of anonymous memory.
    pub fn anonymous(len: usize) -> nix::Result<Self> {
        let size = NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
        // SAFETY: the kernel picks the address, so no existing mapping is touched.
        let ptr = unsafe {
            mmap_anonymous(
                None,
                size,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE,
            )?
        };
        Ok(Self {
            addr: ptr.as_ptr() as usize,
            len,
        })
    }

    /// Maps a device node at a byte offset.
    pub fn of(file: impl AsFd, len: usize, offset: i64, write: bool) -> nix::Result<Self> {
        let size = NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
        let mut prot = ProtFlags::PROT_READ;
        prot.set(ProtFlags::PROT_WRITE, write);
        // SAFETY: the kernel picks the address, so no existing mapping is touched.
        let ptr = unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED, file, offset)? };
        Ok(Self {
            addr: ptr.as_ptr() as usize,
            len,
        })
    }

    /// Address of the first byte.
    pub fn addr(&self) -> u64 {
        self.addr as u64
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let Some(ptr) = std::ptr::NonNull::new(self.addr as *mut _) else {
            return;
        };
        // SAFETY: [addr, addr + len) was mapped by this value and no reference into it exists.
        let _ = unsafe { munmap(ptr, self.len) };
    }
}

/// Makes an ioctl with a buffer as argument and returns what the kernel said.
///
/// The buffer is 4 KiB, larger than any structure of the driver, so a driver that trusts the
/// size in `request` no more than it should cannot write outside it.
pub fn ioctl(file: impl AsFd, request: u64, buffer: &mut [u8; 4096]) -> Result<i32, Errno> {
    // SAFETY: the driver's structures fit the buffer, which lives across the call.
    let r = unsafe { nix::libc::ioctl(file.as_fd().as_raw_fd(), request, buffer.as_mut_ptr()) };
    Errno::result(r)
}

/// Makes an ioctl with an arbitrary number as argument, most likely a bad pointer.
///
/// `request` must not be one of the driver's with an argument that happens to be mapped.
pub fn ioctl_bad_pointer(file: impl AsFd, request: u64, addr: u64) -> Result<i32, Errno> {
    // SAFETY: callers pass addresses from the first page or the kernel's half, which a user
    // process cannot have mapped, so the kernel fails the copy.
    let r = unsafe { nix::libc::ioctl(file.as_fd().as_raw_fd(), request, addr) };
    Errno::result(r)
}
