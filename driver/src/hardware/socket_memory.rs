//! Memory that can be sent over the socket: pieces of one memory file, which a server maps once.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use extlb_spec::{Gpa, Iova, PAGE_SIZE};
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};

use super::pages_unsafe::{LARGE, Pages, failed};
use crate::error::{Error, Result};

/// Size of the file. It is sparse: only what is written to takes memory.
const SIZE: u64 = 1 << 40;

/// The memory file, and what of it is free.
#[derive(Debug)]
pub(super) struct MemoryFile {
    fd: OwnedFd,
    free: Mutex<AddressAllocator>,
}

/// A range of the file. It becomes free when neither the program nor the server has it any more:
/// a device that still had it would reach what it was never given.
#[derive(Debug)]
struct Extent {
    file: Arc<MemoryFile>,
    range: RangeInclusive,
}

/// Who has what of the file.
#[derive(Debug)]
pub(super) struct Pieces {
    file: Arc<MemoryFile>,
    holders: Mutex<Holders>,
}

#[derive(Debug, Default)]
struct Holders {
    /// What the program has, by addresses.
    owned: BTreeMap<u64, Arc<Extent>>,
    /// What the server may have: bus addresses, lengths.
    mapped: Vec<(Gpa, u64, Arc<Extent>)>,
}

/// A piece, mapped here.
#[derive(Debug)]
pub(super) struct Owned {
    pub(super) pages: Pages,
    /// Where it begins in the file.
    offset: u64,
    pieces: Arc<Pieces>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MemoryFile {
    fn new() -> Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let fd = memfd_create(c"extlb-memory", flags).map_err(failed("memfd_create"))?;
        nix::unistd::ftruncate(&fd, SIZE as i64).map_err(failed("ftruncate"))?;
        // It stays as long as it is: for the server an access beyond its end would be death.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(failed("fcntl"))?;
        let free = AddressAllocator::new(0, SIZE).expect("not empty, and does not wrap");
        let free = Mutex::new(free);
        Ok(Self { fd, free })
    }
}

impl Drop for Extent {
    fn drop(&mut self) {
        // Gives the memory back, and makes the range zero for the next.
        let len = self.range.end() - self.range.start() + 1;
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let start = self.range.start() as i64;
        if fallocate(&self.file.fd, punch, start, len as i64).is_ok() {
            // An error would mean that it was free; then it still is.
            let _ = lock(&self.file.free).free(&self.range);
        }
    }
}

impl Pieces {
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            file: Arc::new(MemoryFile::new()?),
            holders: Mutex::default(),
        })
    }

    /// The file.
    pub(super) fn fd(&self) -> &OwnedFd {
        &self.file.fd
    }

    /// Fresh zeroed memory: `len` bytes, whole pages.
    pub(super) fn allocate(self: &Arc<Self>, len: usize) -> Result<Owned> {
        if len == 0 || !len.is_multiple_of(PAGE_SIZE as usize) {
            return Err(Error::Argument("memory is allocated in whole pages"));
        }
        // Large pages in the file begin where large pages in memory do.
        let align = if len < LARGE { PAGE_SIZE } else { LARGE as u64 };
        let range = lock(&self.file.free).allocate(len as u64, align, AllocPolicy::FirstMatch);
        let range = range.map_err(|_| Error::Argument("more memory than a socket's file has"))?;
        let offset = range.start();
        let file = self.file.clone();
        let extent = Arc::new(Extent { file, range });
        let pages = Pages::shared(&self.file.fd, offset, len)?;
        // A child that had it too would share it, and nobody but the holder may change it.
        pages.not_for_children()?;
        let addr = pages.addr().as_ptr() as u64;
        lock(&self.holders).owned.insert(addr, extent);
        Ok(Owned {
            pages,
            offset,
            pieces: self.clone(),
        })
    }

    /// Says that the server gets `[addr, addr + len)` at a bus address; returns where the range is
    /// in the file. `None` if it is not part of one piece that the program has.
    pub(super) fn lend(&self, addr: Iova, len: u64, bus: Gpa) -> Option<u64> {
        let mut holders = lock(&self.holders);
        let (start, extent) = holders.owned.range(..=addr.0).next_back()?;
        let offset = extent.range.start().checked_add(addr.0 - start)?;
        let last = offset.checked_add(len.checked_sub(1)?)?;
        if last > extent.range.end() {
            return None;
        }
        let extent = extent.clone();
        holders.mapped.push((bus, len, extent));
        Some(offset)
    }

    /// Says that the server has nothing at `[bus, bus + len)` any more.
    pub(super) fn take_back(&self, bus: Gpa, len: u64) {
        let end = u128::from(bus.0) + u128::from(len);
        let within = |(at, len, _): &mut (Gpa, u64, Arc<Extent>)| {
            *at >= bus && u128::from(at.0) + u128::from(*len) <= end
        };
        // Extents are freed when the lock is not held.
        let gone: Vec<_> = {
            let mut holders = lock(&self.holders);
            holders.mapped.extract_if(.., within).collect()
        };
        drop(gone);
    }
}

impl Owned {
    /// Where it begins in the file.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // Before the pages are unmapped: afterwards the address may be somebody else's.
        let start = self.pages.addr().as_ptr() as u64;
        let extent = lock(&self.pieces.holders).owned.remove(&start);
        drop(extent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_used_again_when_nobody_has_it() {
        let pieces = Arc::new(Pieces::new().expect("a file"));
        let first = pieces.allocate(8192).expect("memory");
        let addr = Iova(first.pages.addr().as_ptr() as u64);
        let at = first.offset();
        assert_eq!(pieces.lend(addr, 4096, Gpa(0x7000)), Some(at));
        let second = Iova(addr.0 + 4096);
        assert_eq!(pieces.lend(second, 4096, Gpa(0x9000)), Some(at + 4096));
        assert_eq!(pieces.lend(second, 8192, Gpa(0xb000)), None);
        assert_eq!(pieces.lend(addr, 0, Gpa(0xb000)), None);
        drop(first);
        assert_eq!(pieces.lend(addr, 4096, Gpa(0xb000)), None, "it is gone");
        pieces.take_back(Gpa(0x7000), 4096);
        // A part of a mapping is not the mapping.
        pieces.take_back(Gpa(0x9000), 2048);
        let other = pieces.allocate(8192).expect("memory");
        assert_ne!(other.offset(), at, "the server may still have it");
        pieces.take_back(Gpa(0x9000), 4096);
        assert_eq!(pieces.allocate(8192).expect("memory").offset(), at);
    }

    #[test]
    fn memory_is_zero_also_the_second_time() {
        let pieces = Arc::new(Pieces::new().expect("a file"));
        let file = std::fs::File::from(pieces.fd().try_clone().expect("a copy"));
        let read = |at| {
            let mut byte = [9];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, at).expect("read");
            byte[0]
        };
        let piece = pieces.allocate(4096).expect("memory");
        let at = piece.offset();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7], at).expect("written");
        assert_eq!(read(at), 7);
        drop(piece);
        let piece = pieces.allocate(4096).expect("memory");
        assert_eq!((piece.offset(), read(at)), (at, 0));
    }
}
