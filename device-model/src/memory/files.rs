//! Files that hold guest RAM: each is mapped once, as a whole, while any range of it is in use.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Weak};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::mman::{MapFlags, ProtFlags};
use vm_memory::mmap::MmapRegionError as Error;
use vm_memory::{FileOffset, MmapRegion};

/// Files in use at once.
const MAX_FILES: usize = 256;
/// Bytes of them together: an eighth of the address space of an x86-64 process.
const MAX_BYTES: u64 = 1 << 44;

/// Identity of a file, whatever descriptor it comes by: device and inode.
type Id = (u64, u64);

/// The files in use.
#[derive(Debug, Default)]
pub(crate) struct Files {
    known: Vec<(Id, Weak<MmapRegion>)>,
    unsealed: bool,
}

pub(super) fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what.to_owned())
}

impl Files {
    /// The mapping of a file, at least up to `end` bytes, and writable if asked for.
    pub(crate) fn open(
        &mut self,
        file: File,
        end: u64,
        write: bool,
    ) -> io::Result<Arc<MmapRegion>> {
        // Before the length is looked at, so that it stays true.
        let sealed = seal(&file);
        let meta = file.metadata()?;
        // Beyond the end of the file an access would kill this process.
        if end > meta.len() {
            return Err(invalid("the file is shorter than the range"));
        }
        let id = (meta.dev(), meta.ino());
        let known = self.known.iter().filter(|(known, _)| *known == id);
        let good =
            |region: &Arc<MmapRegion>| region.size() as u64 >= end && (!write || writable(region));
        // Of several the file has grown, or was read-only at first: any that is good enough.
        if let Some(region) = known.filter_map(|(_, r)| r.upgrade()).find(good) {
            return Ok(region);
        }
        self.known.retain(|(_, region)| region.strong_count() > 0);
        let used = self.known.iter().filter_map(|(_, r)| r.upgrade());
        let used: u64 = used.map(|region| region.size() as u64).sum();
        if self.known.len() >= MAX_FILES || meta.len() > MAX_BYTES - used.min(MAX_BYTES) {
            return Err(invalid("too many files of guest memory, or too large"));
        }
        self.unsealed |= !sealed;
        let region = Arc::new(map(file, meta.len(), write)?);
        self.known.push((id, Arc::downgrade(&region)));
        Ok(region)
    }

    /// Whether one of them can shrink, or could.
    pub(crate) fn can_shrink(&self) -> bool {
        self.unsealed
    }
}

/// Forbids that the file shrinks, if it can be. Whether it cannot shrink now.
pub(crate) fn seal(file: &File) -> bool {
    let sealed = || {
        let seals = fcntl(file, FcntlArg::F_GET_SEALS).ok()?;
        Some(SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK))
    };
    // Not a memfd, if it has none.
    match sealed() {
        None => false,
        Some(true) => true,
        Some(false) => fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).is_ok(),
    }
}

fn writable(region: &MmapRegion) -> bool {
    region.prot() & ProtFlags::PROT_WRITE.bits() != 0
}

/// Maps a file, writable if it can be.
fn map(file: File, len: u64, write: bool) -> io::Result<MmapRegion> {
    let len = usize::try_from(len).map_err(io::Error::other)?;
    let flags = (MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE).bits();
    let at = FileOffset::new(file, 0);
    let map = |prot: ProtFlags| MmapRegion::build(Some(at.clone()), len, prot.bits(), flags);
    match map(ProtFlags::PROT_READ | ProtFlags::PROT_WRITE) {
        // A ROM, for instance.
        Err(_) if !write => map(ProtFlags::PROT_READ),
        both => both,
    }
    .map_err(|error| match error {
        Error::Mmap(error) => error,
        error => io::Error::new(io::ErrorKind::InvalidInput, error),
    })
}
