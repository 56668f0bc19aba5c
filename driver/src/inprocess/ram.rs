//! Guest RAM, as the kernel in this process uses it.

use std::sync::atomic::Ordering;

use extlb_device::GuestRam;
use extlb_device::ports::{BusError, Dma};
use extlb_spec::{Gpa, PAGE_SIZE};

use super::frames::Frames;
use crate::error::{Error, Result};
use crate::protocol::{BusMemory, Pages};

/// The kernel's own structures are in RAM that it made itself.
pub(super) fn broken(_: BusError) -> Error {
    Error::Call {
        call: "access to guest RAM",
        errno: nix::errno::Errno::EFAULT,
    }
}

pub(super) fn zeroed(ram: &GuestRam, frames: &mut Frames) -> Result<Gpa> {
    Zeroed::new(ram, frames).zeroed()
}

/// Frames that are zeroed before they are handed out.
pub(super) struct Zeroed<'a> {
    ram: &'a GuestRam,
    frames: &'a mut Frames,
}

impl<'a> Zeroed<'a> {
    pub(super) fn new(ram: &'a GuestRam, frames: &'a mut Frames) -> Self {
        Self { ram, frames }
    }
}

impl Pages for Zeroed<'_> {
    fn zeroed(&mut self) -> Result<Gpa> {
        let frame = self.frames.take()?;
        BusMemory::write(self.ram, frame, &[0; PAGE_SIZE as usize])?;
        Ok(frame)
    }

    fn give_back(&mut self, page: Gpa) {
        self.frames.give_back(page);
    }
}

impl BusMemory for GuestRam {
    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32> {
        Dma::load_u32(self, at, order).map_err(broken)
    }

    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<()> {
        Dma::store_u32(self, at, value, order).map_err(broken)
    }

    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64> {
        Dma::load_u64(self, at, order).map_err(broken)
    }

    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<()> {
        Dma::store_u64(self, at, value, order).map_err(broken)
    }

    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<()> {
        Dma::read(self, from, to).map_err(broken)
    }

    fn write(&self, to: Gpa, from: &[u8]) -> Result<()> {
        Dma::write(self, to, from).map_err(broken)
    }
}
