//! Where this driver lets the device act: registers, doorbells, mappings.
//!
//! # Why that is sound
//! The device reaches what is mapped, and of that what its registers, its commands and the ptes of
//! a context lead to. Registers name the structures of [`super::core`], whose memory nobody else
//! has; commands are written by this driver alone. A context's ptes lead to what was registered with
//! it, and operations name addresses: those of slices, which are handed over until the device is
//! done, or any, which is an unsafe call and its caller's promise
//! ([`submit_raw`](crate::Queue::submit_raw)). So no write here makes the device touch an object
//! that somebody else is using.
#![allow(unsafe_code)]

use extlb_spec::regs::Register;
use extlb_spec::{BAR_DOORBELLS, BAR_REGS, DOORBELL_STRIDE, Iova};

use super::bus_space::Slot;
use super::core::Core;
use crate::error::Result;
use crate::hardware::Hardware;

impl<H: Hardware> Core<H> {
    pub(super) fn write(&self, register: Register, value: u64) {
        let (offset, width) = (register.offset, register.width);
        // SAFETY: see the top of this file.
        unsafe { self.hardware.write(BAR_REGS, offset, width, value) };
    }

    pub(super) fn write_doorbell(&self, context: u32) {
        let offset = u64::from(context) * DOORBELL_STRIDE;
        // SAFETY: see the top of this file.
        unsafe { self.hardware.write(BAR_DOORBELLS, offset, 4, 0) };
    }

    /// Maps memory at free bus addresses.
    pub(super) fn map(&self, addr: Iova, len: u64, write: bool) -> Result<Slot> {
        // A statement of its own: not locked while the hardware pins.
        let slot = self.bus().allocate(addr, len)?;
        // SAFETY: nothing leads the device to these bus addresses yet, and what will is dealt with
        // at the top of this file.
        match unsafe { self.hardware.map(addr, len, slot.start, write) } {
            Ok(()) => Ok(slot),
            Err(error) => {
                self.bus().free(slot);
                Err(error)
            }
        }
    }
}
