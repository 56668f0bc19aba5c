//! The bus between device and RAM, which may be slow.

use std::sync::atomic::Ordering;
use std::time::Duration;

use extlb_device::GuestRam;
use extlb_device::ports::{BusError, Dma};
use extlb_spec::Gpa;

/// Shorter accesses are descriptors, records and words, which are not delayed.
const DATA: usize = 65;

/// RAM behind a bus.
#[derive(Debug)]
pub(super) struct Bus {
    ram: GuestRam,
    delay: Duration,
}

impl Bus {
    pub(super) fn new(ram: GuestRam, delay: Duration) -> Self {
        Self { ram, delay }
    }

    /// The access is under way: the device has decided where it goes, and nothing has happened.
    fn delay(&self, len: usize) {
        if len >= DATA && !self.delay.is_zero() {
            std::thread::sleep(self.delay);
        }
    }
}

impl Dma for Bus {
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        self.delay(to.len());
        self.ram.read(from, to)
    }

    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        self.delay(from.len());
        self.ram.write(to, from)
    }

    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        self.delay(len);
        self.ram.copy(from, to, len)
    }

    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32, BusError> {
        self.ram.load_u32(at, order)
    }

    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<(), BusError> {
        self.ram.store_u32(at, value, order)
    }

    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64, BusError> {
        self.ram.load_u64(at, order)
    }

    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<(), BusError> {
        self.ram.store_u64(at, value, order)
    }

    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<bool, BusError> {
        self.ram.compare_exchange_u64(at, current, new)
    }
}
