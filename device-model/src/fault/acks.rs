//! Commands as the device fetches them, and acknowledgements as it writes them.
//!
//! All of this runs under the lock of the device's invalidation queue, as every access to it does.

use std::sync::atomic::Ordering;
use std::time::Duration;

use extlb_spec::invalidation::{Command, CommandKind, InvalidationScope, wait};
use extlb_spec::{Gpa, PAGE_SIZE};

use super::alarm::Job;
use super::card::{Card, delay};
use super::plan::{Kind, Rule};
use crate::ports::BusError;

/// An acknowledgement that is still to be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    addr: Gpa,
    value: u64,
    /// Write it when the next one has been written.
    follows: bool,
    /// Write it when this time has come.
    due: Option<Duration>,
}

/// Acknowledgements held, and expected, at most: more than any queue has.
const MOST: usize = 1 << 16;

impl Card {
    /// A command was fetched: changes what the device will see of it.
    pub(super) fn command(&self, bytes: &mut [u8; Command::SIZE]) -> Result<(), BusError> {
        let mut command = Command::from_bytes(bytes);
        let about = |rule: &Rule| rule.context.is_none_or(|c| c == command.context);
        match CommandKind::from_raw(command.kind) {
            Some(CommandKind::Wait) if command.flags & wait::WRITE != 0 => {
                return self.wait(Gpa(command.addr), command.value);
            }
            Some(CommandKind::Invalidate)
                if command.flags == InvalidationScope::Range as u32
                    && command.value >= PAGE_SIZE =>
            {
                let to = || range(&command);
                let Some(fired) = self.inject(Kind::SkipTlbEntry, about, to) else {
                    return Ok(());
                };
                command.value -= PAGE_SIZE;
                if fired.bits & 1 != 0 {
                    command.addr = command.addr.wrapping_add(PAGE_SIZE);
                }
            }
            Some(CommandKind::PageResponse) => {
                let to = || format!("context {}, group {}", command.context, command.group);
                if self.inject(Kind::LoseResponse, about, to).is_none() {
                    return Ok(());
                }
                // A wait that wants nothing.
                command = Command {
                    kind: CommandKind::Wait as u32,
                    ..Command::default()
                };
            }
            _ => return Ok(()),
        }
        *bytes = command.to_bytes();
        Ok(())
    }

    /// A wait command that asks for an acknowledgement was fetched.
    fn wait(&self, addr: Gpa, value: u64) -> Result<(), BusError> {
        {
            let mut state = self.state();
            if state.expected.len() >= MOST {
                state.expected.pop_front();
            }
            state.expected.push_back((addr, value));
        }
        if !addr.is_aligned(8) {
            // The device will refuse it.
            return Ok(());
        }
        match self.inject(Kind::EarlyAck, |_| true, || ack(addr, value)) {
            Some(_) => self.ports.memory.store_u64(addr, value, Ordering::Release),
            None => Ok(()),
        }
    }

    /// Whether a store is the acknowledgement of a command that was fetched.
    pub(super) fn is_expected(&self, at: Gpa, value: u64) -> bool {
        let mut state = self.state();
        let found = state.expected.iter().position(|e| *e == (at, value));
        found.is_some_and(|index| state.expected.remove(index).is_some())
    }

    /// The device acknowledges.
    pub(super) fn acknowledge(
        &self,
        addr: Gpa,
        value: u64,
        order: Ordering,
    ) -> Result<(), BusError> {
        let to = || ack(addr, value);
        if self.inject(Kind::SkipAck, |_| true, to).is_some() {
            return Ok(());
        }
        if let Some(fired) = self.inject(Kind::DelayAck, |_| true, to) {
            self.hold(addr, value, false, delay(&fired));
            return Ok(());
        }
        if let Some(fired) = self.inject(Kind::ReorderAck, |_| true, to) {
            self.hold(addr, value, true, delay(&fired));
            return Ok(());
        }
        self.ports.memory.store_u64(addr, value, order)?;
        self.release(|held| held.follows);
        if let Some(fired) = self.inject(Kind::DuplicateAck, |_| true, to) {
            let delay = delay(&fired);
            self.hold(addr, value, delay.is_none(), delay);
        }
        Ok(())
    }

    fn hold(&self, addr: Gpa, value: u64, follows: bool, delay: Option<Duration>) {
        let due = delay.map(|delay| self.now().saturating_add(delay));
        if let Some(delay) = delay {
            // A device that sleeps looks at nothing by itself.
            self.later(delay, Job::Look);
        }
        let mut state = self.state();
        if state.held.len() < MOST {
            state.held.push(Held {
                addr,
                value,
                follows,
                due,
            });
        }
    }

    /// The device looks at its queue: what was delayed long enough is written.
    pub(super) fn release_due(&self) {
        if self.state().held.is_empty() {
            return;
        }
        let now = self.now();
        self.release(|held| held.due.is_some_and(|due| due <= now));
    }

    fn release(&self, which: impl Fn(&Held) -> bool) {
        let released: Vec<_> = {
            let held = &mut self.state().held;
            held.extract_if(.., |held| which(held)).collect()
        };
        for Held { addr, value, .. } in released {
            // Memory that went away meanwhile: then nobody is there to be lied to.
            let _ = self.ports.memory.store_u64(addr, value, Ordering::Release);
        }
    }
}

fn ack(addr: Gpa, value: u64) -> String {
    format!("acknowledgement {value:#x} at {addr}")
}

fn range(command: &Command) -> String {
    let end = command.addr.wrapping_add(command.value);
    format!(
        "invalidation of {:#x}..{end:#x} of context {}",
        command.addr, command.context
    )
}
