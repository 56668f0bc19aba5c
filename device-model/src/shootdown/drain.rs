//! Drain: accesses that began before are waited for.

use std::time::Duration;

use extlb_spec::Gpa;
use extlb_spec::invalidation::wait;
use serde::{Deserialize, Serialize};

use crate::Device;
use crate::guard::{Drain, Guards};
use crate::ports::Event;
use crate::state::{StateError, check};

/// A stop that waits longer is worth a line in the log.
const SLOW: Duration = Duration::from_secs(1);

/// A wait command that is not acknowledged yet.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Waiting {
    pub(super) flags: u32,
    pub(super) addr: Gpa,
    pub(super) value: u64,
    /// Present if the command asked for it. Not saved: see [`Waiting::restore`].
    #[serde(skip)]
    pub(super) drain: Option<Drain>,
}

impl Waiting {
    fn begin(flags: u32, addr: Gpa, value: u64, guards: &Guards) -> Self {
        Self {
            flags,
            addr,
            value,
            drain: (flags & wait::DRAINED != 0).then(|| guards.begin()),
        }
    }

    /// Begins the drain of a wait command that was saved.
    pub(super) fn restore(&mut self, guards: &Guards) -> Result<(), StateError> {
        let Self {
            flags,
            addr,
            value,
            drain: _,
        } = *self;
        let aligned = flags & wait::WRITE == 0 || addr.is_aligned(8);
        check("a wait command", flags & !wait::ALL == 0 && aligned, &self)?;
        *self = Self::begin(flags, addr, value, guards);
        Ok(())
    }
}

impl Device {
    /// Begins a wait. "Cleared" needs nothing: the commands before it were carried out.
    pub(super) fn begin_wait(&self, flags: u32, addr: Gpa, value: u64) -> Waiting {
        Waiting::begin(flags, addr, value, &self.guards)
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
    /// silent: reset, bus master off, RAM that goes away. In force whatever `debug.skip_drain`
    /// says: the host's own memory is at stake.
    ///
    /// # How long it takes
    /// As long as the longest access that is under way: a guard covers a bounded number of
    /// steps, none of which waits for anything but memory, and the queues' locks are held for
    /// bounded bursts. Guest RAM that is mapped takes microseconds. Memory that can hang (a file
    /// whose host hangs, a client that serves accesses by message) holds the stop up until its
    /// own time limit has passed; the stop does not give up before, as an answer would promise
    /// silence that nobody can promise. Meanwhile the guest's processor that asked for it waits
    /// in its access to the configuration space, and the log says why ([`Event::SlowStop`]).
    pub fn quiesce(&self) {
        drop(crate::sync::lock(&self.commands));
        drop(crate::sync::lock(&self.requests));
        let mut drain = self.guards.begin();
        let begun = self.now();
        let mut told = false;
        while !self.guards.poll(&mut drain) {
            let waited = self.now().saturating_sub(begun);
            if !told && waited >= SLOW {
                told = true;
                self.ports.trace.event(Event::SlowStop { waited });
            }
            std::thread::yield_now();
        }
    }
}
