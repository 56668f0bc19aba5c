//! What a host calls: a device by itself, or one whose run is recorded.

use std::time::Duration;

use crate::record::Recorder;
use crate::{Config, Device, Step, Totals};

/// A [`Device`], or something directly around it. All methods may be called from any thread, and
/// do what the device's of the same name do.
pub trait Core: Send + Sync {
    /// The configuration.
    fn config(&self) -> &Config;
    /// A read from a BAR.
    fn mmio_read(&self, bar: u8, offset: u64, data: &mut [u8]);
    /// A write to a BAR.
    fn mmio_write(&self, bar: u8, offset: u64, data: &[u8]);
    /// The bus-master bit.
    fn set_bus_master(&self, on: bool);
    /// Function-level reset.
    fn reset(&self);
    /// Waits for every access that is under way.
    fn quiesce(&self);
    /// Does a bit of work.
    fn engine_step(&self) -> Step;
    /// Carries out one command.
    fn invalidation_step(&self) -> Step;
    /// When to call [`Core::invalidation_step`] again at the latest.
    fn next_deadline(&self) -> Option<Duration>;
    /// What the device has done.
    fn totals(&self) -> Totals;
}

macro_rules! core {
    ($($type:ty),*) => {$(
        impl Core for $type {
            fn config(&self) -> &Config {
                self.config()
            }
            fn mmio_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
                self.mmio_read(bar, offset, data);
            }
            fn mmio_write(&self, bar: u8, offset: u64, data: &[u8]) {
                self.mmio_write(bar, offset, data);
            }
            fn set_bus_master(&self, on: bool) {
                self.set_bus_master(on);
            }
            fn reset(&self) {
                self.reset();
            }
            fn quiesce(&self) {
                self.quiesce();
            }
            fn engine_step(&self) -> Step {
                self.engine_step()
            }
            fn invalidation_step(&self) -> Step {
                self.invalidation_step()
            }
            fn next_deadline(&self) -> Option<Duration> {
                self.next_deadline()
            }
            fn totals(&self) -> Totals {
                self.totals()
            }
        }
    )*};
}
// A method that a type lacks is one that calls itself, which the compiler warns of.
core!(Device, Recorder);
