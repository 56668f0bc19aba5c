//! A whole driver in user space, over any [`Hardware`].
//!
//! It owns the device: context table, device page tables, invalidation queue and page request ring
//! are in memory that it allocates and maps. What a program registers is mapped (and thereby
//! locked) until it is taken back, in the order of the rule: device ptes cleared, translations
//! invalidated, in-flight accesses drained, acknowledged; only then is the mapping taken from the
//! bus, and only then may the memory be used for something else.
//!
//! # Registrations
//! Each has a mapping of its own: memory that is registered with two contexts is mapped twice, at
//! two bus addresses, and each goes by itself. Within one context an address leads to one place:
//! what overlaps is refused ([`crate::Error::Overlap`]).
//!
//! Memory that an operation works on cannot be freed, whatever backing it is of: it was handed over.
//! ```compile_fail,E0382
//! # use extlb_driver::{Context, Result, hardware::Hardware, userspace::Userspace};
//! fn freed<H: Hardware>(context: &Context<Userspace<H>>) -> Result<()> {
//!     let buffer = context.allocate(4096)?;
//!     let pending = context.queue().fill(buffer, 7)?;
//!     drop(buffer); // the device has it
//!     pending.wait()?;
//!     Ok(())
//! }
//! ```
//! Nor can it be taken back, before the operation has given it back:
//! ```
//! # use extlb_driver::{Context, Mapping, Result, hardware::Hardware, userspace::Userspace};
//! fn right<H: Hardware>(context: &Context<Userspace<H>>) -> Result<Option<Mapping<Userspace<H>>>> {
//!     let buffer = context.allocate(4096)?;
//!     let ((), buffer) = context.queue().fill(buffer, 7)?.finish()?;
//!     Ok(buffer.unregister()?.ok())
//! }
//! ```
//!
//! # When a device fails
//! A device that does not acknowledge, stops on a fatal error, does not answer (all ones) or says
//! what no device may say is fenced, bus mastering off and reset, and everything fails with the
//! reason from then on. [`Userspace::restart`] begins again, with new contexts. Memory of old
//! contexts can be taken back if the device is known to be silent, or unmapped by the hardware; if
//! neither can be had, it stays mapped for ever.

mod arena;
mod backing_unsafe;
mod bus_space;
mod bus_unsafe;
mod contexts;
mod core;
mod registrations;
mod service;
mod space;

use std::sync::Arc;
use std::time::Duration;

pub use backing_unsafe::UserspaceContext;

use crate::error::Result;
use crate::hardware::Hardware;
use crate::protocol::Invalidations;

/// What the driver is like.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Config {
    /// How long the device may take to acknowledge an invalidation, before it counts as dead.
    pub patience: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            patience: Invalidations::PATIENCE,
        }
    }
}

impl Config {
    /// With another [`Config::patience`].
    #[must_use]
    pub fn patience(self, patience: Duration) -> Self {
        Self { patience }
    }
}

/// A device that this program drives itself. Clones are handles to the same.
pub struct Userspace<H: Hardware> {
    driver: Arc<Driver<H>>,
}

/// The driver and its thread. The thread ends first.
struct Driver<H: Hardware> {
    _service: service::Service,
    core: Arc<core::Core<H>>,
}

impl<H: Hardware> Userspace<H> {
    /// Takes the device over: resets it, whatever state somebody left it in, and starts it.
    ///
    /// # Errors
    /// [`crate::Error::Dead`] with `ENODEV` if it does not answer, [`crate::Error::Identity`] and
    /// [`crate::Error::Interface`] if it is another device; and those of the hardware.
    pub fn new(hardware: H, config: Config) -> Result<Self> {
        let core = Arc::new(core::Core::new(hardware, config)?);
        let service = service::Service::start(&core)?;
        Ok(Self {
            driver: Arc::new(Driver {
                _service: service,
                core,
            }),
        })
    }

    /// The hardware.
    pub fn hardware(&self) -> &H {
        &self.driver.core.hardware
    }

    /// Resets the device and starts it afresh. Contexts from before are dead, with all operations
    /// that were under way; their memory can be taken back. New contexts work.
    ///
    /// # Errors
    /// Those of [`Userspace::new`]. The device is then dead, and may be restarted again.
    pub fn restart(&self) -> Result<()> {
        self.driver.core.restart()
    }
}

impl<H: Hardware> Clone for Userspace<H> {
    fn clone(&self) -> Self {
        Self {
            driver: self.driver.clone(),
        }
    }
}

impl<H: Hardware> std::fmt::Debug for Userspace<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.driver.fmt(f)
    }
}

impl<H: Hardware> std::fmt::Debug for Driver<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Userspace({})", self.core.hardware.name())
    }
}
