//! What the protocol carries: the device as its client sees it, and the trait of a transport.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use extlb_spec::{BAR_DOORBELLS, BAR_MSIX, BAR_REGS, VECTORS};
use extlb_spec::{BAR_DOORBELLS_SIZE, BAR_MSIX_SIZE, BAR_REGS_SIZE};
use vfio_bindings::bindings::vfio as v;

use super::connection::Broken;
use crate::memory::Rights;
use crate::pci::CONFIG_SIZE;

/// Regions of the protocol, in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Region {
    Bar(u8),
    Config,
}

/// Regions that VFIO has: BARs, ROM, configuration space, VGA.
pub(super) const REGIONS: u32 = v::VFIO_PCI_NUM_REGIONS;
/// INTx, MSI and MSI-X, of which the device has the last. What VFIO has beyond them (error and
/// request notifiers) it does not have at all: a client that is told so does not complain.
pub(super) const IRQ_INDICES: u32 = v::VFIO_PCI_MSIX_IRQ_INDEX + 1;

impl Region {
    /// The region of an index, if the device has it.
    pub(super) fn of(index: u32) -> Option<Self> {
        const REGS: u32 = BAR_REGS as u32;
        const DOORBELLS: u32 = BAR_DOORBELLS as u32;
        const MSIX: u32 = BAR_MSIX as u32;
        match index {
            REGS => Some(Region::Bar(BAR_REGS)),
            DOORBELLS => Some(Region::Bar(BAR_DOORBELLS)),
            MSIX => Some(Region::Bar(BAR_MSIX)),
            v::VFIO_PCI_CONFIG_REGION_INDEX => Some(Region::Config),
            _ => None,
        }
    }

    /// Bytes.
    pub(super) fn size(self) -> u64 {
        match self {
            Region::Bar(BAR_REGS) => BAR_REGS_SIZE,
            Region::Bar(BAR_DOORBELLS) => BAR_DOORBELLS_SIZE,
            Region::Bar(BAR_MSIX) => BAR_MSIX_SIZE,
            Region::Bar(_) => 0,
            Region::Config => CONFIG_SIZE as u64,
        }
    }

    /// Whether `[offset, offset + len)` lies within.
    pub(super) fn holds(self, offset: u64, len: usize) -> bool {
        let end = offset.checked_add(len as u64);
        end.is_some_and(|end| end <= self.size())
    }
}

/// Vectors that an interrupt index has.
pub(super) fn vectors(index: u32) -> u32 {
    match index {
        v::VFIO_PCI_MSIX_IRQ_INDEX => VECTORS,
        _ => 0,
    }
}

/// What a SET_IRQS message asks for MSI-X vectors. All of them exist.
#[derive(Debug)]
pub(super) enum IrqRequest {
    /// Take all event fds back.
    DisableAll,
    /// Signal these from `start` on; one fd a vector.
    Assign { start: u32, fds: Vec<OwnedFd> },
    /// Take event fds back.
    Deassign { vectors: Vec<u32> },
    /// Raise, for a test of the path.
    Trigger { vectors: Vec<u32> },
    /// Hold back, or let go again.
    Mask { vectors: Vec<u32>, masked: bool },
}

/// What the client may ask of the device.
pub(super) trait Endpoint: Send {
    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) -> io::Result<()>;
    fn write(&mut self, region: Region, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Guest RAM appears; without a file it can be reached by messages only, if at all.
    fn map(
        &mut self,
        at: u64,
        len: u64,
        rights: Rights,
        file: Option<File>,
        offset: u64,
    ) -> io::Result<()>;
    /// Guest RAM goes away; when this returns, no access to it is under way. `None`: all.
    fn unmap(&mut self, range: Option<(u64, u64)>) -> io::Result<()>;
    fn reset(&mut self) -> io::Result<()>;
    fn irqs(&mut self, request: IrqRequest) -> io::Result<()>;
}

/// Why a session ended other than by the client's leaving.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    /// Nothing can be received or sent any more.
    #[error(transparent)]
    Broken(#[from] Broken),
    /// The client did what no session survives.
    #[error("{0}")]
    Protocol(Cow<'static, str>),
    /// Something on this side; which has said so.
    #[error("{0}")]
    Here(String),
}

/// A connected client's way to a device.
pub(super) trait Transport {
    /// Serves the client until it leaves.
    fn serve(&self, endpoint: &mut dyn Endpoint) -> Result<(), Ended>;
}
