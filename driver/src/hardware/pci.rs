//! What is the same for a PCI device behind VFIO and behind vfio-user.

use extlb_spec::{PCI_DEVICE_ID, PCI_VENDOR_ID, VECTORS};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::pages_unsafe::failed;
use crate::error::{Error, Result};

/// Index of the configuration space's region.
pub(super) const CONFIG: u32 = 7;

/// Offset of the command register (PCI Express Base Specification 6.0, 7.5.1.1.3); 16 bits.
pub(super) const COMMAND: u64 = 4;

const MEMORY: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;

/// The command register with bus mastering on or off. Memory space stays on.
pub(super) fn command(now: u16, bus_master: bool) -> u16 {
    let rest = now & !BUS_MASTER | MEMORY;
    rest | if bus_master { BUS_MASTER } else { 0 }
}

/// An error unless the first four bytes of the configuration space are those of our device.
pub(super) fn check_id(id: [u8; 4], name: &str) -> Result<()> {
    let id = u32::from_le_bytes(id);
    let (vendor, device) = (id & 0xffff, id >> 16);
    if (vendor, device) == (PCI_VENDOR_ID.into(), PCI_DEVICE_ID.into()) {
        return Ok(());
    }
    Err(Error::Hardware(format!(
        "{name}: PCI device {vendor:04x}:{device:04x} is not an extlb device \
         ({PCI_VENDOR_ID:04x}:{PCI_DEVICE_ID:04x})"
    )))
}

/// All ones in `width` bytes: what a device that is not there answers.
pub(super) fn nobody(width: u8) -> u64 {
    if width < 8 { u32::MAX.into() } else { u64::MAX }
}

/// An event fd for each vector. They do not block, neither side.
pub(super) fn events() -> Result<[EventFd; VECTORS as usize]> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let event = || EventFd::from_flags(flags).map_err(failed("eventfd"));
    Ok([event()?, event()?, event()?, event()?])
}
