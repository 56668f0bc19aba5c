//! One client's device.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::Error;
use super::irqs::Irqs;
use super::memory_map::MemoryMap;
use super::report::Report;
use super::transport::{Endpoint, IrqRequest, Region};
use crate::pci::ConfigSpace;
use crate::ports::{Ports, SystemClock};
use crate::runner::{Bell, Runner};
use crate::{Config, Device, GuestRam, Totals};

/// A device, its threads, and what the client has given it.
pub(super) struct Session {
    device: Arc<Device>,
    /// Ends the threads when it goes.
    _runner: Runner,
    pci: ConfigSpace,
    ram: GuestRam,
    map: MemoryMap,
    irqs: Arc<Irqs>,
}

impl Session {
    pub(super) fn new(config: Config, report: Arc<Report>) -> Result<Self, Error> {
        let ram = GuestRam::default();
        let irqs = Arc::new(Irqs::default());
        let bell = Bell::new();
        let ports = Ports {
            memory: Arc::new(ram.clone()),
            interrupts: irqs.clone(),
            clock: Arc::new(SystemClock::default()),
            trace: report,
            wake: bell.clone(),
        };
        let device = Arc::new(Device::new(config, ports)?);
        let runner = Runner::start(&device, &bell).map_err(Error::Threads)?;
        Ok(Self {
            device,
            _runner: runner,
            pci: ConfigSpace::new(),
            ram,
            map: MemoryMap::default(),
            irqs,
        })
    }

    /// Stops the device, and says what it has done.
    pub(super) fn end(self) -> Totals {
        // Differences whose time is over by now count; the others are nobody's any more.
        self.device.invalidation_step();
        self.device.reset();
        self.device.totals()
    }

    /// Puts the map in force. The old one stays mapped for accesses that are under way; when
    /// this returns there are none.
    fn remap(&mut self) {
        self.ram.replace(self.map.memory());
        self.device.quiesce();
    }
}

impl Endpoint for Session {
    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match region {
            Region::Bar(bar) => self.device.mmio_read(bar, offset, data),
            Region::Config => self.pci.read(offset, data),
        }
        Ok(())
    }

    fn write(&mut self, region: Region, offset: u64, data: &[u8]) -> io::Result<()> {
        match region {
            Region::Bar(bar) => self.device.mmio_write(bar, offset, data),
            Region::Config => {
                let effect = self.pci.write(offset, data);
                if let Some(on) = effect.bus_master {
                    self.device.set_bus_master(on);
                }
                if effect.reset {
                    self.device.reset();
                }
            }
        }
        Ok(())
    }

    fn map(&mut self, at: u64, len: u64, file: Option<File>, offset: u64) -> io::Result<()> {
        let Some(file) = file else {
            return Ok(());
        };
        let mapped = self.map.map(at, len, file, offset);
        self.remap();
        // The protocol crate cannot tell the client why; so say it here.
        mapped.inspect_err(|error| {
            eprintln!("extlb-device: guest memory at {at:#x}, {len:#x} bytes: {error}");
        })
    }

    fn unmap(&mut self, range: Option<(u64, u64)>) -> io::Result<()> {
        let unmapped = match range {
            None => {
                self.map.clear();
                Ok(())
            }
            Some((at, len)) => match at.checked_add(len) {
                Some(end) => self.map.unmap(at..end),
                None => Err(io::Error::from(io::ErrorKind::InvalidInput)),
            },
        };
        self.remap();
        unmapped
    }

    fn reset(&mut self) -> io::Result<()> {
        self.pci = ConfigSpace::new();
        self.device.set_bus_master(false);
        self.device.reset();
        Ok(())
    }

    fn irqs(&mut self, request: IrqRequest) -> io::Result<()> {
        self.irqs.set(request)
    }
}
