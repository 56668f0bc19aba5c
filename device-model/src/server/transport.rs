//! The transport: the vfio-user protocol, by the crate `vfio_user`, behind a trait of ours.
//!
//! Known limits of the crate: SET_IRQS with DATA_BOOL is refused, and what follows it on the
//! stream is not understood any more; an error reply carries no reason.
//!
//! Nothing of the crate is seen outside this file. It has no regions that the client may map:
//! one such region makes QEMU wait for the reply to each write.

use std::fs::File;
use std::io;
use std::path::Path;

use extlb_spec::{BAR_DOORBELLS, BAR_MSIX, BAR_REGS, VECTORS};
use extlb_spec::{BAR_DOORBELLS_SIZE, BAR_MSIX_SIZE, BAR_REGS_SIZE};
use vfio_bindings::bindings::vfio as v;
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, ServerBackend, ServerRegion};

use crate::memory::Rights;
use crate::pci::CONFIG_SIZE;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Regions of the protocol, in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Region {
    Bar(u8),
    Config,
}

/// What a SET_IRQS message asks for MSI-X vectors `[start, start + count)`.
#[derive(Debug)]
pub(super) enum IrqRequest {
    /// Take all event fds back.
    DisableAll,
    /// Signal these; one fd a vector.
    Assign { start: u32, fds: Vec<File> },
    /// Take event fds back.
    Deassign { start: u32, count: u32 },
    /// Raise, for a test of the path.
    Trigger { start: u32, count: u32 },
    /// Hold back, or let go again.
    Mask {
        start: u32,
        count: u32,
        masked: bool,
    },
}

/// What the client may ask of the device.
pub(super) trait Endpoint: Send {
    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) -> io::Result<()>;
    fn write(&mut self, region: Region, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Guest RAM appears; without a file it is nothing that a device can reach.
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
#[derive(Debug)]
pub(super) enum Ended {
    /// Something with this client.
    Client(BoxError),
    /// Something with the socket itself.
    Listener(BoxError),
}

/// Serves one client until it leaves.
pub(super) trait Transport {
    fn serve(&self, endpoint: &mut dyn Endpoint) -> Result<(), Ended>;
}

/// vfio-user on a UNIX socket.
pub(super) struct VfioUser(vfio_user::Server);

impl VfioUser {
    pub(super) fn bind(path: &Path) -> Result<Self, BoxError> {
        let server = vfio_user::Server::new(path, true, irqs(), regions())?;
        Ok(Self(server))
    }
}

impl Transport for VfioUser {
    fn serve(&self, endpoint: &mut dyn Endpoint) -> Result<(), Ended> {
        self.0
            .run(&mut Backend(endpoint))
            .map_err(|error| match error {
                vfio_user::Error::SocketAccept(_) => Ended::Listener(error.into()),
                _ => Ended::Client(error.into()),
            })
    }
}

/// Size of each region of the protocol.
fn region_size(index: u32) -> u64 {
    const REGS: u32 = BAR_REGS as u32;
    const DOORBELLS: u32 = BAR_DOORBELLS as u32;
    const MSIX: u32 = BAR_MSIX as u32;
    match index {
        REGS => BAR_REGS_SIZE,
        DOORBELLS => BAR_DOORBELLS_SIZE,
        MSIX => BAR_MSIX_SIZE,
        v::VFIO_PCI_CONFIG_REGION_INDEX => CONFIG_SIZE as u64,
        _ => 0,
    }
}

fn regions() -> Vec<ServerRegion> {
    (0..v::VFIO_PCI_NUM_REGIONS)
        .map(|index| {
            let size = region_size(index);
            let flags = match size {
                0 => 0,
                _ => v::VFIO_REGION_INFO_FLAG_READ | v::VFIO_REGION_INFO_FLAG_WRITE,
            };
            ServerRegion {
                region_info: v::vfio_region_info {
                    argsz: size_of::<v::vfio_region_info>() as u32,
                    flags,
                    index,
                    size,
                    ..Default::default()
                },
                sparse_areas: Vec::new(),
                mmap_fd: None,
            }
        })
        .collect()
}

/// INTx, MSI and MSI-X, of which the device has the last. What VFIO has beyond them (error and
/// request notifiers) it does not have at all: a client that is told so does not complain.
fn irqs() -> Vec<IrqInfo> {
    (0..=v::VFIO_PCI_MSIX_IRQ_INDEX)
        .map(|index| match index {
            v::VFIO_PCI_MSIX_IRQ_INDEX => IrqInfo {
                index,
                flags: v::VFIO_IRQ_INFO_EVENTFD
                    | v::VFIO_IRQ_INFO_MASKABLE
                    | v::VFIO_IRQ_INFO_NORESIZE,
                count: VECTORS,
            },
            _ => IrqInfo {
                index,
                flags: 0,
                count: 0,
            },
        })
        .collect()
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what.to_owned())
}

/// The crate's idea of a device, in terms of ours.
struct Backend<'a>(&'a mut dyn Endpoint);

/// The region that an access hits, if it lies within.
fn region(index: u32, offset: u64, len: usize) -> io::Result<Region> {
    let end = offset.checked_add(len as u64);
    if end.is_none_or(|end| end > region_size(index)) {
        return Err(invalid("access outside the region"));
    }
    Ok(match index {
        v::VFIO_PCI_CONFIG_REGION_INDEX => Region::Config,
        bar => Region::Bar(bar as u8),
    })
}

impl ServerBackend for Backend<'_> {
    fn region_read(&mut self, index: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let region = region(index, offset, data.len())?;
        self.0.read(region, offset, data)
    }

    fn region_write(&mut self, index: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let region = region(index, offset, data.len())?;
        self.0.write(region, offset, data)
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        let rights = Rights {
            read: flags.contains(DmaMapFlags::READ),
            write: flags.contains(DmaMapFlags::WRITE),
        };
        self.0.map(address, size, rights, fd, offset)
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        // The crate and VFIO differ on the bit that says "all"; both go with no range.
        let all = address == 0 && size == 0;
        self.0.unmap((!all).then_some((address, size)))
    }

    fn reset(&mut self) -> io::Result<()> {
        self.0.reset()
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> io::Result<()> {
        let none = flags & v::VFIO_IRQ_SET_DATA_NONE != 0;
        let eventfd = flags & v::VFIO_IRQ_SET_DATA_EVENTFD != 0;
        if index != v::VFIO_PCI_MSIX_IRQ_INDEX {
            // To switch off what is not there is fine.
            return match count == 0 || eventfd && fds.is_empty() {
                true => Ok(()),
                false => Err(invalid("the device has MSI-X only")),
            };
        }
        if start.checked_add(count).is_none_or(|end| end > VECTORS) {
            return Err(invalid("no such vector"));
        }
        let mask = |masked| IrqRequest::Mask {
            start,
            count,
            masked,
        };
        let action = flags & v::VFIO_IRQ_SET_ACTION_TYPE_MASK;
        let request = match (action, none, eventfd) {
            (v::VFIO_IRQ_SET_ACTION_MASK, true, false) => mask(true),
            (v::VFIO_IRQ_SET_ACTION_UNMASK, true, false) => mask(false),
            (v::VFIO_IRQ_SET_ACTION_TRIGGER, true, false) if count == 0 => IrqRequest::DisableAll,
            (v::VFIO_IRQ_SET_ACTION_TRIGGER, true, false) => IrqRequest::Trigger { start, count },
            (v::VFIO_IRQ_SET_ACTION_TRIGGER, false, true) if fds.is_empty() => {
                IrqRequest::Deassign { start, count }
            }
            (v::VFIO_IRQ_SET_ACTION_TRIGGER, false, true) if fds.len() == count as usize => {
                IrqRequest::Assign { start, fds }
            }
            _ => {
                return Err(invalid(
                    "no such request, or not as many event fds as vectors",
                ));
            }
        };
        self.0.irqs(request)
    }
}
