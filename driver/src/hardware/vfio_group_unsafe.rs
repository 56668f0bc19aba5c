//! VFIO by group and container (type 1, version 2), by the crate pci-driver.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;

use extlb_spec::{BAR_DOORBELLS, BAR_REGS, Gpa, Iova, VECTORS};
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use pci_driver::backends::vfio::VfioPciDevice;
use pci_driver::device::PciDevice;
use pci_driver::regions::{MappedOwningPciRegion, OwningPciRegion, PciRegion, Permissions};

use super::pci::CONFIG;
use super::vfio_unsafe::{Address, Function, Refusal};
use crate::error::{Error, Result};

/// The device by its IOMMU group.
#[derive(Debug)]
pub struct Group {
    // Both keep the device open; the mapping goes first.
    doorbells: Option<MappedOwningPciRegion>,
    bars: [Option<OwningPciRegion>; 2],
    device: VfioPciDevice,
}

impl Group {
    /// Calls `access` with the region.
    fn region<T>(
        &self,
        region: u32,
        access: impl FnOnce(&dyn PciRegion) -> io::Result<T>,
    ) -> Option<T> {
        const REGS: u32 = BAR_REGS as u32;
        const DOORBELLS: u32 = BAR_DOORBELLS as u32;
        let done = match region {
            CONFIG => access(&self.device.config()),
            REGS => access(self.bars[0].as_ref()?),
            DOORBELLS => access(self.bars[1].as_ref()?),
            _ => return None,
        };
        done.ok()
    }
}

/// The crate keeps the error of a mapping as text only, where the number is at the end, in the way
/// of the standard library.
fn refusal(error: io::Error) -> Refusal {
    let text = error.to_string();
    let number = text
        .rsplit_once("(os error ")
        .and_then(|(_, rest)| rest.trim_end_matches(')').parse().ok());
    Refusal {
        errno: error.raw_os_error().or(number).map(Errno::from_raw),
        text,
    }
}

// SAFETY: VFIO_IOMMU_MAP_DMA pins the pages of the range and maps them; VFIO_IOMMU_UNMAP_DMA returns
// after the IOMMU has forgotten them (the kernel unpins the pages on the strength of it). A partial
// unmap is refused by version 2. VFIO_DEVICE_RESET returns after the reset. The crate passes the
// results of all three on.
unsafe impl Function for Group {
    const WAY: &'static str = "VFIO group";

    fn open(device: &Address) -> Result<Self> {
        let opened = VfioPciDevice::open(&device.path).map_err(|error| {
            Error::Hardware(format!(
                "{}: the group cannot be had: {error}; may you open /dev/vfio/vfio and the \
                 group beside it, is the whole group bound to vfio-pci, and is it free?",
                device.name
            ))
        })?;
        let bars = [BAR_REGS, BAR_DOORBELLS].map(|bar| opened.bar(bar.into()));
        let doorbells = bars[1]
            .as_ref()
            .filter(|bar| bar.is_mappable())
            .and_then(|bar| bar.map(.., Permissions::ReadWrite).ok());
        Ok(Self {
            doorbells,
            bars,
            device: opened,
        })
    }

    fn read(&self, region: u32, offset: u64, bytes: &mut [u8]) {
        let mut copy = bytes.to_vec();
        let read = self.region(region, |region| region.read_bytes(offset, &mut copy));
        if read.is_some() {
            bytes.copy_from_slice(&copy);
        }
    }

    fn write(&self, region: u32, offset: u64, bytes: &[u8]) {
        let _ = self.region(region, |region| match *bytes {
            [a, b] => region.write_le_u16(offset, u16::from_le_bytes([a, b])),
            // The crate writes no 8 bytes at once: two halves, low half first, do the same.
            _ => bytes
                .chunks_exact(4)
                .zip((offset..).step_by(4))
                .try_for_each(|(half, at)| {
                    region
                        .write_le_u32(at, u32::from_le_bytes([half[0], half[1], half[2], half[3]]))
                }),
        });
    }

    fn doorbells(&self) -> Option<(NonNull<u8>, u64)> {
        let map = self.doorbells.as_ref()?;
        Some((NonNull::new(map.as_mut_ptr())?, map.len() as u64))
    }

    fn ranges(&self) -> Result<Vec<Range<u64>>> {
        // The crate takes VFIO's last address of a range for its end. One more makes it the end; a
        // version that does it right loses nothing, because ends are rounded down to pages.
        let ranges = self.device.iommu();
        let ranges = ranges.valid_iova_ranges().iter();
        Ok(ranges
            .map(|range| range.start..range.end.saturating_add(1))
            .collect())
    }

    fn map(&self, addr: Iova, len: u64, bus: Gpa, write: bool) -> Result<(), Refusal> {
        let permissions = match write {
            true => Permissions::ReadWrite,
            false => Permissions::Read,
        };
        let Ok(len) = usize::try_from(len) else {
            return Err(refusal(Errno::EINVAL.into()));
        };
        let addr = addr.0 as *const u8;
        // SAFETY: the pointer is not dereferenced, only its number goes to the kernel. That the
        // device works on memory of this process is what callers of `Hardware::map` ask for.
        unsafe { self.device.iommu().map(bus.0, len, addr, permissions) }.map_err(refusal)
    }

    fn unmap(&self, bus: Gpa, len: u64) -> Result<(), Refusal> {
        let Ok(len) = usize::try_from(len) else {
            return Err(refusal(Errno::EINVAL.into()));
        };
        self.device.iommu().unmap(bus.0, len).map_err(refusal)
    }

    fn connect(&self, events: &[EventFd; VECTORS as usize]) -> Result<(), Refusal> {
        let events = events.each_ref().map(|event| event.as_fd().as_raw_fd());
        let interrupts = self.device.interrupts();
        interrupts.msi_x().enable(&events).map_err(refusal)
    }

    fn reset(&self) -> Result<(), Refusal> {
        self.device.reset().map_err(refusal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_found_in_the_text() {
        let io = io::Error::other("no: Cannot allocate memory (os error 12)");
        assert_eq!(refusal(io).errno, Some(Errno::ENOMEM));
        let io = io::Error::from_raw_os_error(nix::libc::ENOSPC);
        assert_eq!(refusal(io).errno, Some(Errno::ENOSPC));
        assert_eq!(refusal(io::Error::other("TODO")).errno, None);
    }
}
