//! Memory that can be sent over the socket: a memory file for each piece.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use extlb_spec::Iova;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::pages_unsafe::{Pages, failed};
use crate::error::{Error, Result};

/// The pieces there are, by their addresses.
#[derive(Debug, Default)]
pub(super) struct Pieces(Mutex<BTreeMap<u64, Piece>>);

#[derive(Clone, Debug)]
struct Piece {
    len: u64,
    file: Arc<OwnedFd>,
}

/// A piece, mapped here.
#[derive(Debug)]
pub(super) struct Owned {
    pub(super) pages: Pages,
    file: Arc<OwnedFd>,
    pieces: Arc<Pieces>,
}

impl Pieces {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Piece>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fresh zeroed memory.
    pub(super) fn allocate(self: &Arc<Self>, len: usize) -> Result<Owned> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = memfd_create(c"extlb-memory", flags).map_err(failed("memfd_create"))?;
        let size = i64::try_from(len).map_err(|_| Error::Argument("memory beyond all bounds"))?;
        nix::unistd::ftruncate(&file, size).map_err(failed("ftruncate"))?;
        // It will not shrink: for the server an access beyond its end would be death.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(failed("fcntl"))?;
        let pages = Pages::shared(&file, len)?;
        // A child that had it too would share it, and nobody but the holder may change it.
        pages.not_for_children()?;
        let file = Arc::new(file);
        let piece = Piece {
            len: len as u64,
            file: file.clone(),
        };
        self.lock().insert(pages.addr().as_ptr() as u64, piece);
        Ok(Owned {
            pages,
            file,
            pieces: self.clone(),
        })
    }

    /// The file that holds `[addr, addr + len)`, and where in it the range begins.
    pub(super) fn find(&self, addr: Iova, len: u64) -> Option<(Arc<OwnedFd>, u64)> {
        let pieces = self.lock();
        let (start, piece) = pieces.range(..=addr.0).next_back()?;
        let offset = addr.0 - start;
        let end = offset.checked_add(len)?;
        (end <= piece.len).then(|| (piece.file.clone(), offset))
    }
}

impl Owned {
    /// The file, to fill it before anybody looks.
    pub(super) fn file(&self) -> &OwnedFd {
        &self.file
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // Before the pages are unmapped: afterwards the address may be somebody else's.
        let start = self.pages.addr().as_ptr() as u64;
        self.pieces.lock().remove(&start);
    }
}
