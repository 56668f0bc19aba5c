//! A slow bus between device and RAM: makes accesses that are under way easy to meet.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use extlb_spec::Gpa;

use crate::ports::{BusError, Dma};

/// Shorter accesses are descriptors, records and words: those are not delayed.
pub const DATA: usize = 65;

/// Memory whose data accesses take long.
pub struct SlowBus {
    memory: Arc<dyn Dma>,
    delay: Duration,
}

impl SlowBus {
    /// Each access of at least [`DATA`] bytes reaches `memory` so much later.
    pub fn new(memory: Arc<dyn Dma>, delay: Duration) -> Self {
        Self { memory, delay }
    }

    /// The access is under way: the device has decided where it goes, and nothing has happened.
    fn travel(&self, len: usize) {
        if len >= DATA {
            std::thread::sleep(self.delay);
        }
    }
}

impl Dma for SlowBus {
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        self.travel(to.len());
        self.memory.read(from, to)
    }

    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        self.travel(from.len());
        self.memory.write(to, from)
    }

    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        self.travel(len);
        self.memory.copy(from, to, len)
    }

    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32, BusError> {
        self.memory.load_u32(at, order)
    }

    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<(), BusError> {
        self.memory.store_u32(at, value, order)
    }

    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64, BusError> {
        self.memory.load_u64(at, order)
    }

    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<(), BusError> {
        self.memory.store_u64(at, value, order)
    }

    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<u64, BusError> {
        self.memory.compare_exchange_u64(at, current, new)
    }

    fn fetch_add_u64(&self, at: Gpa, value: u64) -> Result<u64, BusError> {
        self.memory.fetch_add_u64(at, value)
    }
}

impl std::fmt::Debug for SlowBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SlowBus")
            .field("delay", &self.delay)
            .finish_non_exhaustive()
    }
}
