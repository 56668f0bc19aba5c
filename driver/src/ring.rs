//! The ring and the completion records: memory that the device works on at the same time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use extlb_spec::Iova;
use extlb_spec::work::{Completion, Descriptor, Status, flags};

use crate::error::Result;
use crate::memory_unsafe::{Backing, words};
use crate::region::{Mapping, Region};

const DESCRIPTOR_WORDS: usize = Descriptor::SIZE / 4;
const RECORD_WORDS: usize = Completion::SIZE / 4;
/// Where a record's status and a descriptor's flags are.
const STATUS_WORD: usize = 0;

/// Memory for a ring of descriptors and as many completion records. Both use the same slot.
pub(crate) struct Rings<B: Backing> {
    descriptors: Arc<Region<B>>,
    records: Arc<Region<B>>,
    entries: u32,
}

impl<B: Backing> Rings<B> {
    /// `descriptors` is where the context was told that its ring is.
    pub(crate) fn register(
        context: &Arc<B::Context>,
        descriptors: Mapping<B>,
        records: Mapping<B>,
        ring_log2: u32,
    ) -> Result<Self> {
        let entries = 1 << ring_log2;
        assert!(descriptors.len() >= Descriptor::SIZE << ring_log2);
        assert!(records.len() >= Completion::SIZE << ring_log2);
        Ok(Self {
            descriptors: Region::register(context.clone(), descriptors)?,
            records: Region::register(context.clone(), records)?,
            entries,
        })
    }

    pub(crate) fn entries(&self) -> u32 {
        self.entries
    }

    fn slot(&self, index: u32) -> usize {
        (index & (self.entries - 1)) as usize
    }

    fn descriptor(&self, index: u32) -> &[AtomicU32] {
        let start = self.slot(index) * DESCRIPTOR_WORDS;
        &words(self.descriptors.memory())[start..start + DESCRIPTOR_WORDS]
    }

    fn record(&self, index: u32) -> &[AtomicU32] {
        let start = self.slot(index) * RECORD_WORDS;
        &words(self.records.memory())[start..start + RECORD_WORDS]
    }

    /// Writes a descriptor into its slot, with its completion record, which becomes pending.
    /// The device must not own the slot. What is written is seen with the tail (a release).
    pub(crate) fn write(&self, index: u32, mut descriptor: Descriptor) {
        let record = self.slot(index) * Completion::SIZE;
        descriptor.completion = Iova(self.records.addr().0 + record as u64).0;
        self.record(index)[STATUS_WORD].store(Status::Pending as u32, Ordering::Relaxed);
        for (word, bytes) in self
            .descriptor(index)
            .iter()
            .zip(descriptor.to_bytes().chunks(4))
        {
            let bytes = bytes.try_into().expect("chunks of 4");
            word.store(u32::from_le_bytes(bytes).to_le(), Ordering::Relaxed);
        }
    }

    /// Lets a descriptor that the device does not own yet ask for an interrupt.
    pub(crate) fn ask_for_interrupt(&self, index: u32) {
        // Byte 1 of the first word.
        let word = u32::from(flags::INTERRUPT) << 8;
        self.descriptor(index)[0].fetch_or(word.to_le(), Ordering::Relaxed);
    }

    /// The completion of an operation that the device owns or owned; `None` while it is pending.
    pub(crate) fn completion(&self, index: u32) -> Option<Completion> {
        let record = self.record(index);
        // The device writes the status last (release): what it wrote before, other fields and
        // data, is seen after this acquire.
        let status = u32::from_le(record[STATUS_WORD].load(Ordering::Acquire));
        if status == Status::Pending as u32 {
            return None;
        }
        let mut bytes = [0; Completion::SIZE];
        for (chunk, word) in bytes.chunks_mut(4).zip(record) {
            let word = u32::from_le(word.load(Ordering::Relaxed));
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        Some(Completion {
            status,
            ..Completion::from_bytes(&bytes)
        })
    }
}

const _: () = {
    assert!(std::mem::offset_of!(Descriptor, flags) == 1);
    assert!(std::mem::offset_of!(Completion, status) == 4 * STATUS_WORD);
};
