//! A device that is broken on purpose, by a plan.
//!
//! Nothing of this is in the device. It is a card between the device and its slot: it has the
//! device's doors ([`crate::ports`]) on one side and the real ones on the other, and sees the
//! registers being written. From these it knows what each access is: a command that is fetched, an
//! acknowledgement, a page request and its tail, an entry of a page table, data.
//!
//! A plan ([`Rule`]) is a part of the configuration, or of a command line:
//!
//! ```
//! use extlb_device::Config;
//! let config = Config::from_toml(
//!     r#"
//!     fault_seed = 7
//!     [[fault]]
//!     kind = "skip-ack"
//!     after = 10
//!     times = 1
//!     [[fault]]
//!     kind = "poison-data"
//!     probability = 0.01
//!     "#,
//! )
//! .unwrap();
//! assert_eq!(config.fault[0], "skip-ack,after=10,times=1".parse().unwrap());
//! ```
//!
//! [`TABLE`] lists what can go wrong, and who notices. Each fault that is injected is an
//! [`Event::Injected`](crate::ports::Event::Injected).
//!
//! # What a broken device still keeps to
//! The card accesses memory only within an access of the device, and the same door: so whoever
//! has stopped the device (reset, bus master off, memory unmapped) has stopped the card. What was
//! held back by then is never written.

mod acks;
mod alarm;
mod card;
mod data;
mod places;
mod plan;
mod requests;
mod table;
mod tables;

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use extlb_spec::regs::{self, Register, ctrl, status};
use extlb_spec::{BAR_REGS, Gpa};

pub use plan::{Kind, Permission, PlanError, Rule, VectorName};
pub use table::{FaultKind, TABLE, document, help};

use crate::config::{Config, ConfigError};
use crate::ports::Ports;
use crate::{Core, Device, Step, Totals};
use card::Card;
use places::Layout;

/// A fault that was injected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Injection {
    /// The kind.
    pub kind: Kind,
    /// How many were injected by now, of all kinds.
    pub number: u64,
    /// When, by the device's clock.
    pub at: Duration,
    /// What it was done to.
    pub to: String,
}

/// A device, with a card in front of it if its configuration has a fault plan.
///
/// Is used as the device itself; only writes to registers take another way.
#[derive(Debug)]
pub struct Interposed<D = Device> {
    device: Arc<D>,
    card: Option<Arc<Card>>,
}

impl Interposed {
    /// A device as after power-on; see [`Device::new`].
    pub fn new(config: Config, ports: Ports) -> Result<Self, ConfigError> {
        let this = Self::around(config, ports, Device::new)?;
        if let Some(card) = &this.card {
            card.watch_gate(&this.device);
        }
        Ok(this)
    }
}

impl<D: Core + 'static> Interposed<D> {
    /// The same for something directly around the device, a recorder for instance: it is made
    /// with the configuration and the ports that `make` is given.
    pub fn around<E: From<ConfigError>>(
        mut config: Config,
        ports: Ports,
        make: impl FnOnce(Config, Ports) -> Result<D, E>,
    ) -> Result<Self, E> {
        config.check()?;
        let plan = config.fault_rules();
        if plan.is_empty() {
            let device = Arc::new(make(config, ports)?);
            return Ok(Self { device, card: None });
        }
        config.debug.skip_drain |= plan.iter().any(|rule| rule.kind == Kind::SkipDrain);
        let (card, alarm) = Card::new(&plan, config.fault_seed, ports.clone());
        let card = Arc::new(card);
        let wake = ports.wake.clone();
        let ports = Ports {
            memory: card.clone(),
            interrupts: card.clone(),
            ..ports
        };
        let device = Arc::new(make(config, ports)?);
        alarm
            .start(device.clone(), wake)
            .map_err(ConfigError::Thread)?;
        let card = Some(card);
        Ok(Self { device, card })
    }

    /// The device behind the card.
    pub fn device(&self) -> &Arc<D> {
        &self.device
    }

    /// How many faults were injected so far.
    pub fn injected(&self) -> u64 {
        self.card.as_ref().map_or(0, |card| card.injected())
    }

    /// Says how to end the connection to the client, for `disconnect-mid-dma`. Called in the
    /// middle of an access, from a thread of the device: must not wait for it.
    pub fn on_disconnect(&self, disconnect: impl Fn() + Send + Sync + 'static) {
        if let Some(card) = &self.card {
            card.on_disconnect(Box::new(disconnect));
        }
    }

    /// A write to a BAR; see [`Device::mmio_write`].
    pub fn mmio_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if let Some(card) = &self.card
            && bar == BAR_REGS
            && offset == regs::CTRL.offset
            && data
                .first()
                .is_some_and(|low| u32::from(*low) & ctrl::ENABLE != 0)
            && self.register(regs::STATUS) & u64::from(status::ENABLED) == 0
        {
            // The device is about to be enabled: its configuration is final.
            card.start(self.layout());
        }
        self.device.mmio_write(bar, offset, data);
    }

    fn register(&self, register: Register) -> u64 {
        let mut bytes = [0; 8];
        let width = usize::from(register.width);
        self.device
            .mmio_read(BAR_REGS, register.offset, &mut bytes[..width]);
        u64::from_le_bytes(bytes)
    }

    fn layout(&self) -> Layout {
        let log2 = |register| self.register(register).min(regs::MAX_RING_LOG2.into()) as u32;
        Layout {
            table: Gpa(self.register(regs::CTX_TABLE)),
            contexts: self.register(regs::CTX_COUNT) as u32,
            commands: Gpa(self.register(regs::IQ_BASE)),
            commands_log2: log2(regs::IQ_LOG2),
            requests: Gpa(self.register(regs::PRQ_BASE)),
            requests_log2: log2(regs::PRQ_LOG2),
            shadow: Gpa(self.register(regs::SHADOW)),
        }
    }
}

impl<D> Deref for Interposed<D> {
    type Target = D;

    fn deref(&self) -> &D {
        &self.device
    }
}

impl<D: Core + 'static> Core for Interposed<D> {
    fn config(&self) -> &Config {
        self.device.config()
    }
    fn mmio_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.device.mmio_read(bar, offset, data);
    }
    fn mmio_write(&self, bar: u8, offset: u64, data: &[u8]) {
        Interposed::mmio_write(self, bar, offset, data);
    }
    fn set_bus_master(&self, on: bool) {
        self.device.set_bus_master(on);
    }
    fn reset(&self) {
        self.device.reset();
    }
    fn quiesce(&self) {
        self.device.quiesce();
    }
    fn engine_step(&self) -> Step {
        self.device.engine_step()
    }
    fn invalidation_step(&self) -> Step {
        self.device.invalidation_step()
    }
    fn next_deadline(&self) -> Option<Duration> {
        self.device.next_deadline()
    }
    fn totals(&self) -> Totals {
        self.device.totals()
    }
}
