//! Registers and memory formats of the extlb device: the only definition of each.
//!
//! Everything here is a plain value: no input or output, no `unsafe`, no allocation. The device
//! model and the Rust driver use the types; the C headers of the kernel driver are printed from
//! the same tables by [`c_header`], and a test fails when a header in the tree is stale.
//!
//! Conventions, said once:
//! - all integers are little-endian; offsets and sizes are bytes unless a name says otherwise;
//! - every range is half-open, `[start, end)`;
//! - reserved fields and bits are written as zero; a device that reads another value refuses
//!   the structure;
//! - ring indices count freely modulo 2^32; a slot is `index & (entries - 1)`.
#![no_std]
#![forbid(unsafe_code)]

pub mod addr;
pub mod c_header;
pub mod context;
pub mod example;
#[cfg(feature = "serde")]
mod hex;
pub mod histogram;
pub mod invalidation;
pub mod page_request;
pub mod pci_config;
pub mod pte;
pub mod regs;
pub mod table;
pub mod uapi;
pub mod work;

pub use addr::{Gpa, Iova, PAGE_SHIFT, PAGE_SIZE};

/// PCI vendor id. Not registered with the PCI-SIG: taken from the range QEMU leaves to its users.
pub const PCI_VENDOR_ID: u16 = 0x1234;
/// PCI device id; unregistered, like the vendor id.
pub const PCI_DEVICE_ID: u16 = 0xe71b;
/// PCI revision.
pub const PCI_REVISION: u8 = 1;
/// PCI class code: processing accelerator, vendor-specific.
pub const PCI_CLASS: u32 = 0x12_00_00;
/// BAR of the privileged registers ([`regs`]).
pub const BAR_REGS: u8 = 0;
/// Size of [`BAR_REGS`].
pub const BAR_REGS_SIZE: u64 = 4096;
/// BAR of the doorbell pages: one page per context, so that the kernel can map one to one process.
pub const BAR_DOORBELLS: u8 = 2;
/// Size of one doorbell page.
pub const DOORBELL_STRIDE: u64 = 4096;
/// Size of [`BAR_DOORBELLS`].
pub const BAR_DOORBELLS_SIZE: u64 = DOORBELL_STRIDE * MAX_CONTEXTS as u64;
/// BAR of the MSI-X table and pending bits.
pub const BAR_MSIX: u8 = 4;
/// Size of [`BAR_MSIX`].
pub const BAR_MSIX_SIZE: u64 = 8192;
/// Offset of the MSI-X pending bit array in [`BAR_MSIX`]; the table is at 0.
pub const MSIX_PBA_OFFSET: u32 = 4096;
/// Number of contexts that the device can hold.
pub const MAX_CONTEXTS: u32 = 256;

table::enumeration! {
    /// MSI-X vectors.
    pub enum Vector: u32 {
        /// Fatal device error; read `STATUS` and `ERROR`.
        Error = 0,
        /// The page request ring has new records.
        PageRequest = 1,
        /// An invalidation wait command with the interrupt flag completed.
        Invalidation = 2,
        /// A work descriptor with the interrupt flag completed; see `event_seq` of the contexts.
        Completion = 3,
    }
}
/// Number of MSI-X vectors.
pub const VECTORS: u32 = 4;
