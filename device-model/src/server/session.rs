//! One client's device.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use extlb_spec::{BAR_MSIX, MSIX_PBA_OFFSET};

use super::dma::ClientMemory;
use super::driven::Driven;
use super::irqs::Irqs;
use super::memory_map::{MemoryMap, Unsealed};
use super::report::Report;
use super::transport::{Endpoint, IrqRequest, Region};
use super::vfio_user::Link;
use super::{Error, Options};
use crate::memory::{Indirect, Removed, Rights};
use crate::pci::ConfigSpace;
use crate::ports::{Ignore, Ports, SystemClock, Trace};
use crate::{Config, GuestRam, Step, Totals};

/// A device, its threads, and what the client has given it.
pub(super) struct Session {
    device: Driven,
    pci: ConfigSpace,
    map: MemoryMap,
    ram: GuestRam,
    /// What holds the memory that comes without a file.
    asked: Option<Arc<dyn Indirect>>,
    irqs: Arc<Irqs>,
}

impl Session {
    /// A fresh device with its threads, for the client at the other end of `link`; recorded, if
    /// there is a place for it.
    pub(super) fn new(
        options: &Options,
        report: Arc<Report>,
        link: &Arc<Link>,
        record: Option<Box<dyn Write + Send>>,
    ) -> Result<Self, Error> {
        let config = options.config.clone();
        let device = |ports| Driven::new(config, ports, link, record);
        let mut session = Self::around(options.unsealed, report, device)?;
        if link.questions.on() {
            session.asked = Some(Arc::new(ClientMemory(link.clone())));
            let (ram, irqs) = (session.ram.clone(), session.irqs.clone());
            link.on_lost_write(Box::new(move || {
                // What is under way ends as it ends; nothing begins any more.
                let _ = ram.clear();
                let _ = irqs.set(IrqRequest::DisableAll);
            }));
        }
        Ok(session)
    }

    /// A fresh device without threads; see [`Session::step`].
    pub(super) fn stepped(config: Config) -> Result<Self, Error> {
        let device = |ports| Driven::stepped(config, ports);
        Self::around(Unsealed::default(), Arc::new(Ignore), device)
    }

    fn around(
        unsealed: Unsealed,
        trace: Arc<dyn Trace>,
        device: impl FnOnce(Ports) -> Result<Driven, Error>,
    ) -> Result<Self, Error> {
        let ram = GuestRam::default();
        let irqs = Arc::new(Irqs::default());
        let ports = Ports {
            memory: Arc::new(ram.clone()),
            interrupts: irqs.clone(),
            clock: Arc::new(SystemClock::default()),
            trace,
            wake: Arc::new(Ignore),
        };
        Ok(Self {
            device: device(ports)?,
            pci: ConfigSpace::new(),
            map: MemoryMap::new(ram.clone(), unsealed),
            ram,
            asked: None,
            irqs,
        })
    }

    /// Lets a device without threads work, though not for long.
    pub(super) fn step(&self) {
        for _ in 0..8 {
            let steps = [self.device.engine_step(), self.device.invalidation_step()];
            if steps == [Step::Idle; 2] {
                break;
            }
        }
    }

    /// Stops the device, and says what it has done.
    pub(super) fn end(self) -> Totals {
        // Differences whose time is over by now count; the others are nobody's any more.
        self.device.invalidation_step();
        self.device.reset();
        self.device.finish();
        // Nothing is under way any more.
        let _ = self.ram.clear();
        self.device.totals()
    }

    /// The pending bits; the table is the client's, and reads as zero here.
    fn read_msix(&self, offset: u64, data: &mut [u8]) {
        let pending = self.irqs.pending().to_le_bytes();
        for (at, byte) in (offset..).zip(data) {
            let at = at.checked_sub(u64::from(MSIX_PBA_OFFSET));
            let at = at.and_then(|at| usize::try_from(at).ok());
            *byte = at.and_then(|at| pending.get(at)).copied().unwrap_or(0);
        }
    }

    /// When this returns, no access to what was taken out of the map is under way. An operation
    /// that has found out where to go, and goes there only now, meets a bus error.
    fn settle(&self, removed: Removed) {
        if !removed.is_empty() {
            self.device.quiesce();
        }
    }
}

impl Endpoint for Session {
    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match region {
            Region::Config => self.pci.read(offset, data),
            // Powered down: nobody answers.
            Region::Bar(_) if !self.pci.is_awake() => data.fill(0xff),
            Region::Bar(BAR_MSIX) => self.read_msix(offset, data),
            Region::Bar(bar) => self.device.mmio_read(bar, offset, data),
        }
        Ok(())
    }

    fn write(&mut self, region: Region, offset: u64, data: &[u8]) -> io::Result<()> {
        match region {
            Region::Config => {
                let effect = self.pci.write(offset, data);
                if let Some(on) = effect.bus_master {
                    self.device.set_bus_master(on);
                }
                if effect.reset {
                    self.device.reset();
                    self.irqs.reset();
                }
            }
            Region::Bar(_) if !self.pci.is_awake() => {}
            Region::Bar(bar) => self.device.mmio_write(bar, offset, data),
        }
        Ok(())
    }

    fn map(
        &mut self,
        at: u64,
        len: u64,
        rights: Rights,
        file: Option<File>,
        offset: u64,
    ) -> io::Result<()> {
        let mapped = match (file, &self.asked) {
            (Some(file), _) => self.map.map(at, len, rights, file, offset),
            // By its bus address.
            (None, Some(asked)) => self.map.ask(at, len, rights, asked.clone(), at),
            // Nothing that a device can reach, where there may have been something.
            (None, None) => return self.unmap(Some((at, len))),
        };
        let replaced = mapped.map_err(|error| {
            let why = format!("guest memory at {at:#x}, {len:#x} bytes: {error}");
            io::Error::new(error.kind(), why)
        })?;
        self.settle(replaced);
        Ok(())
    }

    fn unmap(&mut self, range: Option<(u64, u64)>) -> io::Result<()> {
        let removed = match range {
            None => self.map.clear(),
            Some((at, len)) => match at.checked_add(len) {
                Some(end) => self.map.unmap(at..end),
                None => return Err(io::Error::from(io::ErrorKind::InvalidInput)),
            },
        };
        self.settle(removed);
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.pci = ConfigSpace::new();
        self.device.set_bus_master(false);
        self.device.reset();
        self.irqs.reset();
        Ok(())
    }

    fn irqs(&mut self, request: IrqRequest) -> io::Result<()> {
        self.irqs.set(request)
    }
}
