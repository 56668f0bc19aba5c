//! A context by hand: for what the library would not do.

use anyhow::{Context as _, Result};
use extlb_spec::uapi::{self, Create, IOC_TYPE, Ioctl};
use nix::errno::Errno;
use nix::libc;

use crate::sys_unsafe::{
    ARENA, ARENA_BYTES, ARGUMENTS, FILES, MAP_BYTES, MAPS, PAGE, call, memory_file, open_at, poke,
    reserve,
};

/// The device node.
pub const NODE: &std::ffi::CStr = c"/dev/extlb0";
/// Memory that can be written.
pub const READ_WRITE: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
/// Fresh private memory at an address.
pub const ANONYMOUS: u64 = (libc::MAP_FIXED | libc::MAP_ANONYMOUS | libc::MAP_PRIVATE) as u64;
/// No file.
pub const NO_FILE: u64 = u64::MAX;
const SHARED: u64 = (libc::MAP_FIXED | libc::MAP_SHARED) as u64;

/// Contexts of a process, all with their ring in the first page of the arena.
pub struct Contexts {
    memory_file: u64,
}

impl Contexts {
    /// Maps the arena and the page of arguments.
    pub fn new() -> Result<Self> {
        reserve()?;
        for (at, len) in [(ARENA, ARENA_BYTES), (ARGUMENTS, PAGE)] {
            call(libc::SYS_mmap, [at, len, READ_WRITE, ANONYMOUS, NO_FILE, 0]).context("mmap")?;
        }
        Ok(Self {
            memory_file: memory_file()?,
        })
    }

    /// Writes to memory.
    pub fn poke(&self, addr: u64, bytes: &[u8]) -> Result<(), Errno> {
        poke(self.memory_file, addr, bytes)
    }

    /// Makes an ioctl on a file.
    pub fn ioctl(&self, file: u64, ioctl: &Ioctl, argument: &[u8]) -> Result<(), Errno> {
        self.poke(ARGUMENTS, &[0; 2688])?;
        self.poke(ARGUMENTS, argument)?;
        call(libc::SYS_ioctl, [file, request(ioctl), ARGUMENTS, 0, 0, 0]).map(drop)
    }

    /// Opens the device as file number `n`.
    pub fn open(&self, n: u64, flags: i32) -> Result<u64, Errno> {
        open_at(NODE, libc::O_RDWR | flags, FILES + n)
    }

    /// Makes a file a context.
    pub fn create(&self, file: u64) -> Result<(), Errno> {
        let create = Create {
            ring: ARENA,
            ring_log2: 4,
            ..Create::default()
        };
        self.ioctl(file, &uapi::CREATE, &create.to_bytes())
    }

    /// Closes a file, and takes what is mapped of it away.
    pub fn close(&self, file: u64) -> Result<(), Errno> {
        let at = place(file);
        call(libc::SYS_munmap, [at, 2 * MAP_BYTES, 0, 0, 0, 0])?;
        call(libc::SYS_close, [file, 0, 0, 0, 0, 0]).map(drop)
    }

    /// Maps doorbell and shadow page of a file; where they are.
    pub fn map(&self, file: u64) -> Result<(u64, u64), Errno> {
        let at = place(file);
        for (at, offset) in [
            (at, uapi::MMAP_DOORBELL),
            (at + MAP_BYTES, uapi::MMAP_SHADOW),
        ] {
            call(libc::SYS_mmap, [at, PAGE, READ_WRITE, SHARED, file, offset])?;
        }
        Ok((at, at + MAP_BYTES))
    }
}

/// Where pages of a file are mapped.
fn place(file: u64) -> u64 {
    MAPS + (file - FILES) % 16 * 2 * MAP_BYTES
}

/// Number of an ioctl.
pub fn request(ioctl: &Ioctl) -> u64 {
    3 << 30 | (ioctl.size as u64) << 16 | u64::from(IOC_TYPE) << 8 | u64::from(ioctl.number)
}
