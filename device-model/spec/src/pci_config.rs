//! The PCI configuration space: what each field is after reset, and what software can change.
//!
//! Sections named are those of the PCI Express Base Specification 6.0. All else of the 4096 bytes is
//! zero and cannot be written; there are no extended capabilities.

use crate::{
    BAR_DOORBELLS_SIZE, BAR_MSIX, BAR_MSIX_SIZE, BAR_REGS_SIZE, MSIX_PBA_OFFSET, PCI_CLASS,
    PCI_DEVICE_ID, PCI_REVISION, PCI_VENDOR_ID, VECTORS,
};

/// Size of the configuration space, in bytes.
pub const SIZE: usize = 4096;

/// A field of the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Name.
    pub name: &'static str,
    /// Offset in bytes.
    pub offset: usize,
    /// Width in bytes: 1, 2, 4 or 8.
    pub width: usize,
    /// Value after reset.
    pub reset: u64,
    /// Bits that software can change.
    pub writable: u64,
    /// Documentation lines.
    pub doc: &'static [&'static str],
}

macro_rules! fields {
    ($( $(#[doc = $doc:literal])* $name:ident : $width:literal @ $offset:literal
        reset $reset:expr, writable $writable:expr ;)*) => {
        $( $(#[doc = $doc])* pub const $name: Field = Field {
            name: stringify!($name), offset: $offset, width: $width,
            reset: $reset, writable: $writable, doc: &[$($doc),*],
        }; )*
        /// Every field, in order of offset.
        pub const ALL: &[Field] = &[$($name),*];
    };
}

/// Bits of [`COMMAND`].
pub mod command {
    /// The device decodes its BARs. Kept, but not looked at: whoever gets here has named a BAR.
    pub const MEMORY: u16 = 1 << 1;
    /// The device may access memory and raise interrupts.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// No INTx; there is none.
    pub const NO_INTX: u16 = 1 << 10;
}

/// Bits of [`PM_CONTROL`] (7.5.2).
pub mod power {
    /// The power state.
    pub const STATE: u8 = 0b11;
    /// Awake.
    pub const D0: u8 = 0b00;
    /// Asleep: answers in this space only.
    pub const D3_HOT: u8 = 0b11;
    /// On the way back to D0 the device is as it was.
    pub const NO_SOFT_RESET: u8 = 1 << 3;
}

/// Bit of [`DEVICE_CONTROL`]: function-level reset; reads as 0.
pub const INITIATE_FLR: u16 = 1 << 15;
/// One lane at 2.5 GT/s.
const LINK: u64 = 1 << 4 | 1;
/// A BAR of 64 bits, not prefetchable: its reads must not be repeated.
const BAR: u64 = 0b100;

const _: () = assert!(BAR_MSIX == 4 && VECTORS == 4);

fields! {
    /// Vendor.
    VENDOR: 2 @ 0x00 reset PCI_VENDOR_ID as u64, writable 0;
    /// Device.
    DEVICE: 2 @ 0x02 reset PCI_DEVICE_ID as u64, writable 0;
    /// Memory space (bit 1; kept, BARs answer in any case), bus master (bit 2), no INTx (bit 10;
    /// there is none).
    COMMAND: 2 @ 0x04 reset 0,
        writable (command::MEMORY | command::BUS_MASTER | command::NO_INTX) as u64;
    /// There is a list of capabilities.
    STATUS: 2 @ 0x06 reset 1 << 4, writable 0;
    /// Revision, and the class in the upper three bytes.
    CLASS: 4 @ 0x08 reset (PCI_CLASS << 8 | PCI_REVISION as u32) as u64, writable 0;
    /// For software to keep.
    CACHE_LINE_SIZE: 1 @ 0x0c reset 0, writable 0xff;
    /// Registers.
    BAR0: 8 @ 0x10 reset BAR, writable !(BAR_REGS_SIZE - 1);
    /// Doorbells.
    BAR2: 8 @ 0x18 reset BAR, writable !(BAR_DOORBELLS_SIZE - 1);
    /// MSI-X.
    BAR4: 8 @ 0x20 reset BAR, writable !(BAR_MSIX_SIZE - 1);
    /// As the vendor.
    SUBSYSTEM_VENDOR: 2 @ 0x2c reset PCI_VENDOR_ID as u64, writable 0;
    /// As the device.
    SUBSYSTEM: 2 @ 0x2e reset PCI_DEVICE_ID as u64, writable 0;
    /// The first capability: power management.
    CAPABILITIES: 1 @ 0x34 reset 0x40, writable 0;
    /// For software to keep.
    INTERRUPT_LINE: 1 @ 0x3c reset 0, writable 0xff;
    /// Power management (7.5.2); the next one is PCI Express.
    PM: 2 @ 0x40 reset 0x5001, writable 0;
    /// Version 3; D0 and D3hot, no PME.
    PM_CAPABILITIES: 2 @ 0x42 reset 3, writable 0;
    /// Bits 1:0: the state, 0 for D0 and 3 for D3hot; other states are not taken. Nothing is reset
    /// on the way back to D0 (bit 3).
    PM_CONTROL: 2 @ 0x44 reset power::NO_SOFT_RESET as u64, writable power::STATE as u64;
    /// PCI Express (7.5.3); the next one is MSI-X.
    PCIE: 2 @ 0x50 reset 0x9010, writable 0;
    /// Version 2, endpoint.
    PCIE_CAPABILITIES: 2 @ 0x52 reset 2, writable 0;
    /// Payload of 128 bytes, role-based error reporting (bit 15), function-level reset (bit 28).
    DEVICE_CAPABILITIES: 4 @ 0x54 reset 1 << 28 | 1 << 15, writable 0;
    /// After reset (7.5.3.4): read requests of 512 bytes, relaxed ordering, no snoop. Writable:
    /// those, and error reporting; the payload has one size. Writing 1 to bit 15 resets the
    /// function.
    DEVICE_CONTROL: 2 @ 0x58 reset 0x2810, writable 0x781f;
    /// One lane at 2.5 GT/s; says so about power states of the link (bit 22): none.
    LINK_CAPABILITIES: 4 @ 0x5c reset 1 << 22 | LINK, writable 0;
    /// Power states of the link, completion boundary, common clock: for software to keep.
    LINK_CONTROL: 2 @ 0x60 reset 0, writable 0xcb;
    /// One lane at 2.5 GT/s.
    LINK_STATUS: 2 @ 0x62 reset LINK, writable 0;
    /// 2.5 GT/s is the only speed.
    LINK_CAPABILITIES_2: 4 @ 0x7c reset 0b10, writable 0;
    /// And the target.
    LINK_CONTROL_2: 2 @ 0x80 reset 1, writable 0;
    /// MSI-X (7.7.2); the last one.
    MSIX: 2 @ 0x90 reset 0x0011, writable 0;
    /// Size of the table, less 1; function mask (bit 14), enable (bit 15).
    MSIX_CONTROL: 2 @ 0x92 reset VECTORS as u64 - 1, writable 0b11 << 14;
    /// The table: BAR and offset.
    MSIX_TABLE: 4 @ 0x94 reset BAR_MSIX as u64, writable 0;
    /// The pending bits: BAR and offset.
    MSIX_PENDING: 4 @ 0x98 reset (MSIX_PBA_OFFSET | BAR_MSIX as u32) as u64, writable 0;
}
