//! The doors of the core: memory, interrupts, time, trace and wake-ups are arguments.
//!
//! A test passes its own: memory that blocks, counts or fails, a clock that it turns by hand.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use extlb_spec::context::ContextError;
use extlb_spec::regs::FatalError;
use extlb_spec::{Gpa, Iova, Vector};

use crate::fault::Injection;
use crate::oracle::StaleAccess;

/// An access that no RAM answered, or that was not aligned to its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no RAM answers at {addr:#x}, {len} bytes", addr = .addr.0)]
pub struct BusError {
    /// Where.
    pub addr: Gpa,
    /// Bytes.
    pub len: usize,
}

/// Guest memory, as the device's bus master sees it.
///
/// Every access lies within one leaf of the device's page table, so it may be longer than a page.
/// Memory that cannot answer such an access in one piece (its pages are in several places) gives
/// [`BusError`] and has moved nothing; the device then asks page by page. Data is moved as by a
/// DMA engine: bytes, in no order and without atomicity; words (`load`, `store`, …) are aligned,
/// atomic and ordered as asked.
pub trait Dma: Send + Sync {
    /// Reads bytes.
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError>;
    /// Writes bytes.
    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError>;
    /// Copies bytes; the ranges may overlap.
    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError>;
    /// Loads a word.
    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32, BusError>;
    /// Stores a word.
    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<(), BusError>;
    /// Loads a double word.
    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64, BusError>;
    /// Stores a double word.
    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<(), BusError>;
    /// Replaces `current` with `new`, and says what it found: `current`, if it did replace it.
    /// Atomic against the guest's processors; acquires, and releases if it replaced.
    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<u64, BusError>;
    /// Adds, modulo 2^64, and says what was there before. Atomic likewise.
    fn fetch_add_u64(&self, at: Gpa, value: u64) -> Result<u64, BusError>;
    /// Calls `f`, once, with this memory, for the accesses of one guard. Memory whose map can
    /// change may hand out the map of the moment, and so look for it once: whoever changes it
    /// waits for the guards of before ([`crate::Device::quiesce`]). If nothing is gained, `f(self)`.
    fn view(&self, f: &mut dyn FnMut(&dyn Dma));
}

/// MSI-X, as the device sees it.
pub trait Interrupts: Send + Sync {
    /// Sends the message of a vector.
    fn raise(&self, vector: Vector);
}

/// Time.
pub trait Clock: Send + Sync {
    /// Time since some fixed moment; never goes back.
    fn now(&self) -> Duration;
}

/// What happened, for people and reports: [`Display`](std::fmt::Display) says it in words.
/// Nothing here is on a hot path.
#[derive(Clone, Debug)]
pub enum Event {
    /// The rule was broken.
    Stale(StaleAccess),
    /// The oracle had no room for a difference; it could not be followed.
    OracleOverflow,
    /// A context stopped on an error.
    ContextError {
        /// The context.
        context: u32,
        /// Why.
        error: ContextError,
        /// What it is about.
        addr: u64,
    },
    /// No RAM answered an access for a work operation: a leaf, or a table on the way to it,
    /// points where nothing is mapped.
    BusError {
        /// The context.
        context: u32,
        /// What was translated.
        iova: Iova,
        /// The access.
        error: BusError,
    },
    /// The device did wrong, as planned.
    Injected(Injection),
    /// The device stopped on an error.
    Fatal {
        /// Why.
        error: FatalError,
        /// What it is about.
        info: u64,
    },
    /// Somebody stopped the device while it ran, or reset it after a fatal error.
    Stopped(Stop),
    /// A stop waits unusually long for an access to memory that is under way.
    SlowStop {
        /// For how long already.
        waited: Duration,
    },
}

/// How a device was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// `CTRL.ENABLE` was cleared.
    Disabled,
    /// Register reset, or function-level reset.
    Reset,
    /// The bus-master bit was cleared, or the power state left D0.
    BusMasterOff,
}

/// Takes events.
pub trait Trace: Send + Sync {
    /// Something happened. Called with locks of the device held: must not call back into it.
    fn event(&self, event: Event);
}

/// Wakes whoever steps the device. Called without any lock of the device held.
pub trait Wake: Send + Sync {
    /// A context has become runnable: `Device::engine_step` has something to do.
    fn work(&self);
    /// `Device::invalidation_step` has something to do.
    fn invalidation(&self);
}

/// All doors of a device.
#[derive(Clone)]
pub struct Ports {
    /// Guest memory.
    pub memory: Arc<dyn Dma>,
    /// Interrupts.
    pub interrupts: Arc<dyn Interrupts>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Events.
    pub trace: Arc<dyn Trace>,
    /// Wake-ups; [`crate::runner::Bell`] if threads drive the device.
    pub wake: Arc<dyn Wake>,
}

impl Ports {
    /// Memory and interrupts, the machine's clock, no trace, and nobody to wake: for a device
    /// that is stepped by hand.
    pub fn stepped(memory: Arc<dyn Dma>, interrupts: Arc<dyn Interrupts>) -> Self {
        Self {
            memory,
            interrupts,
            clock: Arc::new(SystemClock::default()),
            trace: Arc::new(Ignore),
            wake: Arc::new(Ignore),
        }
    }
}

/// The machine's monotonic clock.
#[derive(Debug)]
pub struct SystemClock(Instant);

impl Default for SystemClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// Takes everything and does nothing: a trace nobody reads, interrupts nobody hears.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ignore;

impl Trace for Ignore {
    fn event(&self, _: Event) {}
}

impl Wake for Ignore {
    fn work(&self) {}
    fn invalidation(&self) {}
}

impl Interrupts for Ignore {
    fn raise(&self, _: Vector) {}
}
