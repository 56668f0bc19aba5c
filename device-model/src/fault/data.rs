//! Data on its way.

use std::time::{Duration, Instant};

use extlb_spec::Gpa;

use super::alarm::Job;
use super::card::{Card, delay};
use super::plan::Kind;
use crate::ports::BusError;

/// Shorter reads and writes are descriptors, records and words; a copy is data of any length.
const DATA: usize = 65;
/// How long an access waits for the reset or the end of the connection that it is to meet.
const MEET: Duration = Duration::from_secs(2);

impl Card {
    pub(super) fn read_data(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        if to.len() < DATA {
            return self.ports.memory.read(from, to);
        }
        self.under_way("read", from, to.len());
        self.ports.memory.read(from, to)?;
        if let Some((index, mask)) = self.poison("read", from, to.len()) {
            to[index] ^= mask;
        }
        Ok(())
    }

    pub(super) fn write_data(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        if from.len() < DATA {
            return self.ports.memory.write(to, from);
        }
        self.under_way("write", to, from.len());
        let Some((index, mask)) = self.poison("write", to, from.len()) else {
            return self.ports.memory.write(to, from);
        };
        let mut bytes = from.to_vec();
        bytes[index] ^= mask;
        self.ports.memory.write(to, &bytes)
    }

    pub(super) fn copy_data(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        self.under_way("copy", to, len);
        self.ports.memory.copy(from, to, len)?;
        if len > 0
            && let Some((index, mask)) = self.poison("copy", to, len)
        {
            let at = Gpa(to.0 + index as u64);
            let mut byte = [0];
            self.ports.memory.read(at, &mut byte)?;
            self.ports.memory.write(at, &[byte[0] ^ mask])?;
        }
        Ok(())
    }

    /// Whether a bit is to be flipped: in which byte, and which of its bits.
    fn poison(&self, what: &str, at: Gpa, len: usize) -> Option<(usize, u8)> {
        let to = || describe(what, at, len);
        let fired = self.inject(Kind::PoisonData, |_| true, to)?;
        let bit = (fired.bits % (len as u64 * 8)) as usize;
        Some((bit / 8, 1 << (bit % 8)))
    }

    /// A data access is under way: the device has decided where it goes, and nothing has happened.
    fn under_way(&self, what: &str, at: Gpa, len: usize) {
        let to = || describe(what, at, len);
        for kind in [Kind::SlowMemory, Kind::HangBus] {
            let fired = self.inject(kind, |_| true, to);
            if let Some(delay) = fired.as_ref().and_then(delay) {
                std::thread::sleep(delay);
            }
        }
        if self.inject(Kind::ResetMidDma, |_| true, to).is_some() {
            // On a thread of its own: a reset waits for this very access.
            self.later(Duration::ZERO, Job::Reset);
            self.wait_for_the_stop();
        }
        if let Some(disconnect) = self.disconnect()
            && self.inject(Kind::DisconnectMidDma, |_| true, to).is_some()
        {
            disconnect();
            self.wait_for_the_stop();
        }
    }

    /// Until the device's gate is closed: whoever closes it then waits for this access.
    fn wait_for_the_stop(&self) {
        let begun = Instant::now();
        while self.device_runs() && begun.elapsed() < MEET {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

fn describe(what: &str, at: Gpa, len: usize) -> String {
    format!("{what} of {len} bytes at {at}")
}
