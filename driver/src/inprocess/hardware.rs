//! The device with its threads, as its registers show it.

use std::sync::Arc;

use extlb_device::Config;
use extlb_device::fault::Interposed;
use extlb_device::ports::{Dma, Ignore, Interrupts, Ports, SystemClock};
use extlb_device::runner::{Bell, Runner};
use extlb_spec::regs::{self, Register};
use extlb_spec::{BAR_DOORBELLS, BAR_REGS, DOORBELL_STRIDE};

use crate::error::{Error, Result};
use crate::protocol::Layout;

/// A device that runs.
#[derive(Debug)]
pub(super) struct Hardware {
    device: Interposed,
    /// Ends the threads when dropped.
    _runner: Runner,
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
        let device = Interposed::new(config, ports)
            .map_err(|_| Error::Argument("a device configuration that is out of range"))?;
        let runner = Runner::start(device.device(), &bell)
            .map_err(|_| Error::Argument("no thread left for the device"))?;
        let hardware = Self {
            device,
            _runner: runner,
        };
        hardware.device.set_bus_master(true);
        layout.start(|register, value| hardware.write(register, value));
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
