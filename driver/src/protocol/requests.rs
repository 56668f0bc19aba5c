//! The owner's end of the page request ring.

use std::mem::offset_of;
use std::sync::atomic::{Ordering, fence};

use extlb_spec::invalidation::KernelShadow;
use extlb_spec::page_request::PageRequest;
use extlb_spec::{Gpa, PAGE_SIZE};

use super::{BusMemory as _, Port};
use crate::error::{Error, Nonsense, Result};

/// The ring, from the consumer's side.
#[derive(Debug)]
pub(crate) struct Requests {
    ring: Gpa,
    shadow: Gpa,
    /// Index after the last record taken.
    head: u32,
}

impl Requests {
    /// log2 of the number of records. Small, so that it runs full in tests.
    pub(crate) const LOG2: u32 = 4;
    /// Pages that the ring takes.
    pub(crate) const PAGES: u64 = ((PageRequest::SIZE as u64) << Self::LOG2).div_ceil(PAGE_SIZE);
    pub(crate) const ENTRIES: u32 = 1 << Self::LOG2;

    /// An empty ring of a device that was reset; the memory is zeroed.
    pub(crate) fn new(ring: Gpa, shadow: Gpa) -> Self {
        Self {
            ring,
            shadow,
            head: 0,
        }
    }

    /// Takes the next record, if there is one.
    ///
    /// # Errors
    /// [`Nonsense::RequestTail`] for a tail that is further ahead than the ring is long.
    pub(crate) fn next(&mut self, port: &impl Port) -> Result<Option<PageRequest>> {
        let memory = port.memory();
        let word = |offset: usize| Gpa(self.shadow.0 + offset as u64);
        // Acquire: the record was written before the tail.
        let tail = memory.load_u32(word(offset_of!(KernelShadow, prq_tail)), Ordering::Acquire)?;
        let ahead = tail.wrapping_sub(self.head);
        if ahead == 0 {
            return Ok(None);
        }
        if ahead > Self::ENTRIES {
            let head = self.head;
            return Err(Error::Protocol(Nonsense::RequestTail { tail, head }));
        }
        let slot = u64::from(self.head & (Self::ENTRIES - 1)) * PageRequest::SIZE as u64;
        let mut bytes = [0; PageRequest::SIZE];
        memory.read(Gpa(self.ring.0 + slot), &mut bytes)?;
        self.head = self.head.wrapping_add(1);
        // The slot is free as soon as it was read, before the request is served. The head, a full
        // fence, then need_kick: the mirror image of what the device does when the ring is full.
        memory.store_u32(
            word(offset_of!(KernelShadow, prq_head)),
            self.head,
            Ordering::Release,
        )?;
        fence(Ordering::SeqCst);
        let need_kick = word(offset_of!(KernelShadow, prq_need_kick));
        if memory.load_u32(need_kick, Ordering::Relaxed)? != 0 {
            port.kick();
        }
        Ok(Some(PageRequest::from_bytes(&bytes)))
    }
}
