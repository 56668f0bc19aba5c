//! The privileged side of the device's protocol: what whoever owns a device has to speak, be it
//! the driver in user space ([`crate::userspace`]) or the kernel that plays in this process.
//!
//! All of it is written against memory by bus address ([`BusMemory`]) and a device's few registers
//! ([`Port`]), and knows neither where the memory is nor how the device is reached.

mod bell;
mod invalidations;
mod page_table;
mod registers;
mod requests;

use std::sync::atomic::Ordering;

use extlb_spec::Gpa;

pub(crate) use bell::Bell;
#[cfg(feature = "inprocess")]
pub(crate) use invalidations::audit;
pub(crate) use invalidations::{Invalidations, invalidate, respond, sync};
pub(crate) use page_table::{Format, PageTable, Pages};
pub(crate) use registers::Layout;
pub(crate) use requests::Requests;

use crate::error::Result;

/// Memory that the owner shares with its device, by bus address.
///
/// Words are aligned and atomic. Bytes are moved in no order and without atomicity; both start
/// and length are multiples of 8.
///
/// # Errors
/// For addresses that the owner has no memory at.
pub(crate) trait BusMemory {
    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32>;
    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<()>;
    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64>;
    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<()>;
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<()>;
    fn write(&self, to: Gpa, from: &[u8]) -> Result<()>;
}

/// A device, as its owner sees it.
pub(crate) trait Port {
    /// Where the structures are.
    type Memory: BusMemory;
    fn memory(&self) -> &Self::Memory;
    /// Writes the register that makes the device look at the kernel's shadow page.
    fn kick(&self);
    /// Fails if the device has stopped, says nonsense, or does not answer. May be slow: it reads
    /// a register.
    fn alive(&self) -> Result<()>;
}
