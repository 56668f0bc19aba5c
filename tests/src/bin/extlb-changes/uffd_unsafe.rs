//! Userfaultfd, and the ioctl of pagemap that goes with it.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};

use anyhow::{Context as _, Result, ensure};
use extlb_driver::Iova;
use nix::errno::Errno;
use nix::libc;

// From <linux/userfaultfd.h> and <linux/fs.h>.
const API: u64 = 0xaa;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_MOVE: u64 = 0xc028_aa05;
const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;
const PAGEMAP_SCAN: u64 = 0xc060_6610;
const EVENT_PAGEFAULT: u8 = 0x12;

/// What a userfaultfd is to do beyond faults on missing pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Nothing.
    Plain = 0,
    /// The kernel lifts write protection by itself.
    Async = 1 << 15,
    /// Pages can be moved.
    Move = 1 << 16,
}

/// For [`Uffd::register`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faults {
    /// On pages that are not there.
    Missing = 1,
    /// On writes to protected pages.
    Protected = 2,
}

/// A userfaultfd.
pub struct Uffd(File);

impl Uffd {
    /// Opens one; the errno of the kernel if it has not got the feature.
    pub fn new(feature: Feature) -> Result<Self, Errno> {
        // SAFETY: opens a file, which is nobody else's.
        let file = unsafe {
            let fd = Errno::result(libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC))?;
            File::from_raw_fd(fd as i32)
        };
        let uffd = Self(file);
        uffd.call(UFFDIO_API, [API, feature as u64, 0])?;
        Ok(uffd)
    }

    /// All arguments are structures of 64-bit fields, none of them a pointer to anything but areas.
    fn call<const N: usize>(&self, request: u64, mut fields: [u64; N]) -> Result<(), Errno> {
        assert_eq!(request >> 16 & 0x3fff, 8 * N as u64);
        // SAFETY: the structure has the size that the number carries. The callers pass addresses of
        // areas, which hold no Rust objects.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request, fields.as_mut_ptr()) };
        Errno::result(result).map(drop)
    }

    /// Takes the faults of a range.
    pub fn register(&self, range: Range<Iova>, faults: Faults) -> Result<()> {
        let len = range.end.0 - range.start.0;
        self.call(UFFDIO_REGISTER, [range.start.0, len, faults as u64, 0])
            .context("UFFDIO_REGISTER")
    }

    /// Forbids writing, or allows it again and wakes who waits.
    pub fn protect(&self, range: Range<Iova>, on: bool) -> Result<()> {
        let len = range.end.0 - range.start.0;
        self.call(UFFDIO_WRITEPROTECT, [range.start.0, len, u64::from(on)])
            .context("UFFDIO_WRITEPROTECT")
    }

    /// Moves pages.
    pub fn move_pages(&self, from: Range<Iova>, to: Iova) -> Result<()> {
        let len = from.end.0 - from.start.0;
        self.call(UFFDIO_MOVE, [to.0, from.start.0, len, 0, 0])
            .context("UFFDIO_MOVE")
    }

    /// Waits for a fault; its address.
    pub fn fault(&self) -> Result<Iova> {
        let mut message = [0; 32];
        (&self.0).read_exact(&mut message).context("userfaultfd")?;
        ensure!(message[0] == EVENT_PAGEFAULT, "event {:#x}", message[0]);
        let addr = message[16..24].try_into().context("8 bytes")?;
        Ok(Iova(u64::from_ne_bytes(addr)))
    }
}

/// Write-protects the pages of a range that were written to.
pub fn scan_and_protect(range: Range<Iova>) -> Result<(), Errno> {
    const WP_MATCHING: u64 = 1;
    const CHECK_WPASYNC: u64 = 2;
    const PAGE_IS_WRITTEN: u64 = 2;
    let file = File::open("/proc/self/pagemap").map_err(|_| Errno::ENOENT)?;
    let mut fields = [
        96,
        WP_MATCHING | CHECK_WPASYNC,
        range.start.0,
        range.end.0,
        0,
        0,
        0,
        0,
        0,
        PAGE_IS_WRITTEN,
        0,
        0,
    ];
    // SAFETY: the structure of 12 fields; it names no buffer.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), PAGEMAP_SCAN, fields.as_mut_ptr()) };
    Errno::result(result).map(drop)
}
