//! Memory for the driver's own structures, by bus address.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use extlb_spec::{Gpa, PAGE_SIZE};
use nix::errno::Errno;

use super::bus_space::Slot;
use crate::error::{Error, Result};
use crate::memory_unsafe::{Memory, Shadow, double_words, shadow_page, words};
use crate::protocol::BusMemory;

/// A piece of memory that the device reaches as long as the driver is there.
#[derive(Debug)]
pub(super) struct Chunk<M> {
    pub(super) memory: M,
    pub(super) slot: Slot,
}

impl<M: Memory> Chunk<M> {
    fn offset(&self, at: Gpa) -> Option<usize> {
        let offset = usize::try_from(at.0.checked_sub(self.slot.start.0)?).ok()?;
        (offset < self.memory.len()).then_some(offset)
    }
}

/// All pieces, and which of their pages are free.
#[derive(Debug)]
pub(super) struct Arena<M> {
    chunks: RwLock<Vec<Arc<Chunk<M>>>>,
    free: Mutex<Vec<Gpa>>,
}

/// A page that program and device share.
#[derive(Debug)]
pub(super) struct SharedPage<M> {
    chunk: Arc<Chunk<M>>,
    page: usize,
}

impl<M: Memory> SharedPage<M> {
    /// The page as a context's shadow page.
    pub(super) fn shadow(&self) -> &Shadow {
        shadow_page(&self.chunk.memory, self.page)
    }
}

impl<M: Memory> Arena<M> {
    pub(super) fn new() -> Self {
        Self {
            chunks: RwLock::default(),
            free: Mutex::default(),
        }
    }

    /// Adds mapped memory. Its first `taken` pages are not to be handed out.
    pub(super) fn add(&self, chunk: Chunk<M>, taken: u64) {
        let pages = taken..chunk.memory.len() as u64 / PAGE_SIZE;
        let start = chunk.slot.start.0;
        let pages = pages.map(|page| Gpa(start + page * PAGE_SIZE));
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.extend(pages.rev());
        drop(free);
        let mut chunks = self.chunks.write().unwrap_or_else(PoisonError::into_inner);
        chunks.push(Arc::new(chunk));
    }

    /// A free page, with whatever is in it.
    pub(super) fn take(&self) -> Option<Gpa> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.pop()
    }

    pub(super) fn give_back(&self, page: Gpa) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(page);
    }

    /// A page, to be looked at by its address in this process.
    pub(super) fn shared(&self, page: Gpa) -> Result<SharedPage<M>> {
        self.find(page, |chunk, offset| {
            Some(SharedPage {
                chunk: chunk.clone(),
                page: offset / PAGE_SIZE as usize,
            })
        })
    }

    /// Everything, at the end.
    pub(super) fn into_chunks(self) -> Vec<Arc<Chunk<M>>> {
        let chunks = self.chunks.into_inner();
        chunks.unwrap_or_else(PoisonError::into_inner)
    }

    fn find<R>(&self, at: Gpa, f: impl FnOnce(&Arc<Chunk<M>>, usize) -> Option<R>) -> Result<R> {
        let chunks = self.chunks.read().unwrap_or_else(PoisonError::into_inner);
        let mut chunks = chunks.iter();
        let found = chunks.find_map(|chunk| Some((chunk, chunk.offset(at)?)));
        found.and_then(|(chunk, at)| f(chunk, at)).ok_or(OUTSIDE)
    }

    fn word<R>(&self, at: Gpa, f: impl FnOnce(&AtomicU32) -> R) -> Result<R> {
        debug_assert!(at.is_aligned(4));
        self.find(at, |chunk, offset| {
            words(&chunk.memory).get(offset / 4).map(f)
        })
    }

    /// The double words of `[at, at + len)`.
    fn double<R>(&self, at: Gpa, len: usize, f: impl FnOnce(&[AtomicU64]) -> R) -> Result<R> {
        debug_assert!(at.is_aligned(8) && len.is_multiple_of(8));
        self.find(at, |chunk, offset| {
            let range = offset / 8..(offset + len) / 8;
            double_words(&chunk.memory).get(range).map(f)
        })
    }
}

/// A page table entry that the device has spoilt leads here, at the worst.
const OUTSIDE: Error = Error::Call {
    call: "access to the driver's structures",
    errno: Errno::EFAULT,
};

impl<M: Memory> BusMemory for Arena<M> {
    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32> {
        self.word(at, |word| u32::from_le(word.load(order)))
    }

    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<()> {
        self.word(at, |word| word.store(value.to_le(), order))
    }

    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64> {
        self.double(at, 8, |words| u64::from_le(words[0].load(order)))
    }

    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<()> {
        self.double(at, 8, |words| words[0].store(value.to_le(), order))
    }

    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<()> {
        self.double(from, to.len(), |words| {
            for (bytes, word) in to.chunks_exact_mut(8).zip(words) {
                bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
            }
        })
    }

    fn write(&self, to: Gpa, from: &[u8]) -> Result<()> {
        self.double(to, from.len(), |words| {
            for (bytes, word) in from.chunks_exact(8).zip(words) {
                let bytes = bytes.try_into().expect("chunks of 8");
                word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
            }
        })
    }
}
