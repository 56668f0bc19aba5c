//! Drain: accesses that began before are waited for.

use extlb_spec::Gpa;
use extlb_spec::invalidation::wait;

use crate::Device;
use crate::guard::Drain;

/// A wait command that is not acknowledged yet.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(super) flags: u32,
    pub(super) addr: Gpa,
    pub(super) value: u64,
    /// Present if the command asked for it.
    pub(super) drain: Option<Drain>,
}

impl Device {
    /// Begins a wait. "Cleared" needs nothing: the commands before it were carried out.
    pub(super) fn begin_wait(&self, flags: u32, addr: Gpa, value: u64) -> Waiting {
        Waiting {
            flags,
            addr,
            value,
            drain: (flags & wait::DRAINED != 0).then(|| self.guards.begin()),
        }
    }

    /// Whether every access that began before the wait has ended, if that was asked for.
    pub(super) fn drained(&self, waiting: &mut Waiting) -> bool {
        match &mut waiting.drain {
            Some(drain) => self.config.debug.skip_drain || self.guards.poll(drain),
            None => true,
        }
    }

    /// Waits for every access that is under way, also those of the queues themselves.
    ///
    /// For the paths where the host, not the guest's kernel, must know that the device is
    /// silent: reset, bus master off, RAM that goes away. Guards last microseconds. In force
    /// whatever `debug.skip_drain` says: the host's own memory is at stake.
    pub fn quiesce(&self) {
        drop(crate::sync::lock(&self.commands));
        drop(crate::sync::lock(&self.requests));
        let mut drain = self.guards.begin();
        while !self.guards.poll(&mut drain) {
            std::thread::yield_now();
        }
    }
}
