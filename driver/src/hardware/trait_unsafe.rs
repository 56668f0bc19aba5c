//! What a driver in user space needs of a device.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;

use extlb_spec::{Gpa, Iova, Vector};
use nix::sys::eventfd::EventFd;

use crate::error::Result;
use crate::memory_unsafe::{Fork, Memory, Sharing};

/// A device that this program owns: its registers, memory that it reaches, its interrupts, and a
/// reset. [`crate::userspace`] makes a
/// [`crate::Backing`] of it.
///
/// Three address spaces meet here. Programs name memory by [`Iova`], which is the address in this
/// process. The device's own page table leads from there to *bus addresses* ([`Gpa`]), which are
/// what the device puts on the bus. What a bus address means, this trait decides
/// ([`Hardware::map`]): an IOMMU behind VFIO, or the list of mappings that a vfio-user client gives
/// its server.
///
/// # Safety
/// - What `allocate` and `map_file` return must keep the promises of [`Memory`].
/// - The device reaches no memory of this process but what is mapped ([`Hardware::map`]).
/// - When [`Hardware::unmap`] returned `Ok`, it does not reach the range any more, not even with
///   accesses that began before.
/// - When [`Hardware::reset`] returned `Ok`, no access is under way, and none begins before bus
///   mastering and the device are enabled again.
pub unsafe trait Hardware: Send + Sync + 'static {
    /// Memory that can be mapped for this device.
    type Memory: Memory;

    /// For reports: which hardware this is, and where.
    fn name(&self) -> String;

    /// Fresh zeroed memory of `len` bytes, a multiple of the page size. Memory of at least 2 MiB is
    /// aligned to 2 MiB.
    fn allocate(&self, len: usize, fork: Fork) -> Result<Self::Memory>;
    /// A range of a file; its start is a multiple of the page size.
    fn map_file(&self, file: &File, range: Range<u64>, sharing: Sharing) -> Result<Self::Memory>;

    /// Reads 4 or 8 bytes of a BAR, little-endian. All ones if the device does not answer, as on a
    /// real bus.
    fn read(&self, bar: u8, offset: u64, width: u8) -> u64;
    /// Writes 4 or 8 bytes of a BAR. May be posted; lost if the device does not answer.
    ///
    /// # Safety
    /// Whatever the write makes the device access, now or later, is memory that it may: nothing that
    /// is mapped and in use by somebody else.
    unsafe fn write(&self, bar: u8, offset: u64, width: u8, value: u64);

    /// Bus addresses that [`Hardware::map`] takes, in order and apart.
    fn bus_ranges(&self) -> Vec<Range<Gpa>>;
    /// Lets the device reach `[addr, addr + len)` of this process at bus address `bus`; all are
    /// multiples of the page size. The memory stays resident until it is unmapped.
    ///
    /// # Errors
    /// Among others if this hardware can only map what it has allocated itself, or if no more
    /// memory may be locked.
    ///
    /// # Safety
    /// The device may be set to work on the range until it is unmapped: by then nothing that uses
    /// `bus` makes it access memory that is in use by somebody else.
    unsafe fn map(&self, addr: Iova, len: u64, bus: Gpa, write: bool) -> Result<()>;
    /// Takes a mapping back, as a whole; see the trait's promises.
    fn unmap(&self, bus: Gpa, len: u64) -> Result<()>;

    /// The event that an interrupt vector raises. The same one at each call.
    fn interrupt(&self, vector: Vector) -> &EventFd;

    /// Lets the device access memory and raise interrupts, or not.
    fn set_bus_master(&self, on: bool) -> Result<()>;
    /// Resets the function (FLR); see the trait's promises. Bus mastering is off afterwards;
    /// interrupts stay connected, mappings stay.
    fn reset(&self) -> Result<()>;
}
