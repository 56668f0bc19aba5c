//! The configuration space, as anybody may look at it (PCI Express Base Specification 6.0, 7.5).

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;
use vfio_ioctls::VfioDevice;

use crate::region_unsafe::Region;

const COMMAND: u64 = 0x04;
/// Memory space and bus mastering.
const COMMAND_ON: u64 = 0b110;
const CAPABILITIES: u64 = 0x34;
const MSIX: u64 = 0x11;
/// Where capabilities may be.
const CAPABILITY_AREA: Range<u64> = 0x40..0x100;

/// Where the MSI-X table is (7.7.2).
#[derive(Debug)]
pub struct MsixTable {
    pub bar: u32,
    pub offsets: Range<u64>,
}

/// Reads all of it, checks the capability list, and checks that identity is not writable.
pub fn look(device: &VfioDevice) -> Result<MsixTable> {
    let space = Region::new(device, VFIO_PCI_CONFIG_REGION_INDEX)?;
    ensure!(space.size() == 4096, "{} bytes", space.size());
    for offset in (0..space.size()).step_by(4) {
        space.read(offset, 4)?;
    }
    let id = space.read(0, 4)?;
    ensure!(id != 0xffff_ffff, "the device does not answer");
    space.write(0, 4, 0)?;
    ensure!(space.read(0, 4)? == id, "its identity can be written");

    let mut capabilities = Vec::new();
    let mut table = None;
    let mut at = space.read(CAPABILITIES, 1)?;
    while at != 0 {
        ensure!(
            CAPABILITY_AREA.contains(&at) && at.is_multiple_of(4) && capabilities.len() < 48,
            "the capability list leads to {at:#x} after {capabilities:x?}"
        );
        let capability = space.read(at, 1)?;
        capabilities.push(capability);
        if capability == MSIX {
            let vectors = (space.read(at + 2, 2)? & 0x7ff) + 1;
            let place = space.read(at + 4, 4)?;
            let start = place & !0b111;
            table = Some(MsixTable {
                bar: (place & 0b111) as u32,
                offsets: start..start + vectors * 16,
            });
        }
        at = space.read(at + 1, 1)?;
    }
    println!(
        "{:04x}:{:04x}, class {:06x}, capabilities {capabilities:x?}",
        id & 0xffff,
        id >> 16,
        space.read(0x08, 4)? >> 8
    );
    table.context("no MSI-X")
}

/// Lets the device answer at its BARs, access memory and raise interrupts.
pub fn switch_on(device: &VfioDevice) -> Result<()> {
    let space = Region::new(device, VFIO_PCI_CONFIG_REGION_INDEX)?;
    let command = space.read(COMMAND, 2)?;
    space.write(COMMAND, 2, command | COMMAND_ON)?;
    let now = space.read(COMMAND, 2)?;
    ensure!(now & COMMAND_ON == COMMAND_ON, "command is {now:#x}");
    Ok(())
}
