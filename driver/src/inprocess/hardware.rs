//! The device with its threads, as its registers show it.

use std::sync::Arc;

use extlb_device::ports::{Dma, Ignore, Interrupts, Ports, SystemClock};
use extlb_device::runner::{Bell, Runner};
use extlb_device::{Config, Device};
use extlb_spec::regs::{self, Register};
use extlb_spec::{BAR_DOORBELLS, BAR_REGS, DOORBELL_STRIDE, Gpa, MAX_CONTEXTS};

use super::{page_requests, shootdown};
use crate::error::{Error, Result};

/// A device that runs.
#[derive(Debug)]
pub(super) struct Hardware {
    device: Arc<Device>,
    /// Ends the threads when dropped.
    _runner: Runner,
}

/// Where the kernel's structures are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) context_table: Gpa,
    pub(super) invalidations: Gpa,
    pub(super) page_requests: Gpa,
    pub(super) shadow: Gpa,
}

impl Hardware {
    pub(super) fn start(
        config: Config,
        memory: Arc<dyn Dma>,
        interrupts: Arc<dyn Interrupts>,
        layout: &Layout,
    ) -> Result<Self> {
        let bell = Bell::new();
        let ports = Ports {
            memory,
            interrupts,
            clock: Arc::new(SystemClock::default()),
            trace: Arc::new(Ignore),
            wake: bell.clone(),
        };
        let device = Device::new(config, ports)
            .map_err(|_| Error::Argument("a device configuration that is out of range"))?;
        let device = Arc::new(device);
        let runner = Runner::start(&device, &bell)
            .map_err(|_| Error::Argument("no thread left for the device"))?;
        let hardware = Self {
            device,
            _runner: runner,
        };
        hardware.device.set_bus_master(true);
        hardware.write(regs::CTX_TABLE, layout.context_table.0);
        hardware.write(regs::CTX_COUNT, MAX_CONTEXTS.into());
        hardware.write(regs::IQ_BASE, layout.invalidations.0);
        hardware.write(regs::IQ_LOG2, shootdown::LOG2.into());
        hardware.write(regs::PRQ_BASE, layout.page_requests.0);
        hardware.write(regs::PRQ_LOG2, page_requests::LOG2.into());
        hardware.write(regs::SHADOW, layout.shadow.0);
        hardware.write(regs::CTRL, regs::ctrl::ENABLE.into());
        Ok(hardware)
    }

    pub(super) fn kick(&self) {
        self.write(regs::KICK, 1);
    }

    pub(super) fn ring_doorbell(&self, context: u32) {
        let offset = u64::from(context) * DOORBELL_STRIDE;
        self.device.mmio_write(BAR_DOORBELLS, offset, &[0; 4]);
    }

    pub(super) fn read(&self, register: Register) -> u64 {
        let mut bytes = [0; 8];
        let width = usize::from(register.width);
        self.device
            .mmio_read(BAR_REGS, register.offset, &mut bytes[..width]);
        u64::from_le_bytes(bytes)
    }

    /// Stops the device for good: no access is under way when it returns.
    pub(super) fn reset(&self) {
        self.device.reset();
    }

    fn write(&self, register: Register, value: u64) {
        let width = usize::from(register.width);
        self.device
            .mmio_write(BAR_REGS, register.offset, &value.to_le_bytes()[..width]);
    }
}
