//! Who has which memory: what a driver promises of it, checked.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use extlb_spec::{Gpa, Iova};

/// A mapping for the device.
#[derive(Clone, Debug)]
struct Mapped {
    range: Range<Iova>,
    /// The memory is gone.
    freed: bool,
    /// Resets before it: the device knows nothing from before its last one.
    resets: u64,
}

/// What is mapped for a device, and what was done wrong.
#[derive(Debug, Default)]
pub(super) struct Ledger(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    mapped: BTreeMap<Gpa, Mapped>,
    /// The device makes no access: it was reset, and is not a bus master.
    quiet: bool,
    /// Resets that succeeded.
    resets: u64,
    /// Bus addresses that were unmapped while nobody knew what the device did.
    doubtful: Vec<Range<Gpa>>,
    /// A reset of a device at work has failed, and none succeeded since.
    lost: bool,
    violations: Vec<String>,
}

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was done wrong so far.
    pub(super) fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    pub(super) fn mapped(&self, addr: Iova, len: u64, bus: Gpa) {
        let mut state = self.lock();
        let taken = bus..Gpa(bus.0.saturating_add(len));
        let doubtful = |range: &Range<Gpa>| range.start < taken.end && taken.start < range.end;
        if let Some(range) = state.doubtful.iter().find(|range| doubtful(range)).cloned() {
            let text = format!("bus addresses {range:x?} are reused, and the device may know them");
            state.violations.push(text);
        }
        let range = addr..Iova(addr.0.saturating_add(len));
        let (freed, resets) = (false, state.resets);
        let mapped = Mapped {
            range,
            freed,
            resets,
        };
        state.mapped.insert(bus, mapped);
    }

    pub(super) fn unmapped(&self, bus: Gpa) {
        let mut state = self.lock();
        let mapped = state.mapped.remove(&bus);
        if let (Some(Mapped { range, resets, .. }), true) = (mapped, state.lost)
            && resets == state.resets
        {
            let end = Gpa(bus.0 + (range.end.0 - range.start.0));
            state.doubtful.push(bus..end);
        }
    }

    /// Memory of this process is given back to the system.
    pub(super) fn freed(&self, addr: Iova, len: u64) {
        let mut state = self.lock();
        let State {
            mapped,
            quiet,
            violations,
            ..
        } = &mut *state;
        for (bus, mapped) in mapped.iter_mut() {
            if mapped.range.start.0 < addr.0.saturating_add(len) && addr < mapped.range.end {
                mapped.freed = true;
                if !*quiet {
                    let text = format!("memory at {addr} is freed, and mapped at {bus:x?}");
                    violations.push(text);
                }
            }
        }
    }

    pub(super) fn reset(&self, done: bool) {
        let mut state = self.lock();
        state.quiet |= done;
        state.resets += u64::from(done);
        // If it was quiet already, a failure changes nothing.
        state.lost = !state.quiet;
    }

    /// Bus mastering goes on.
    pub(super) fn runs(&self) {
        let mut state = self.lock();
        state.quiet = false;
        let State {
            mapped, violations, ..
        } = &mut *state;
        for (bus, _) in mapped.iter().filter(|(_, mapped)| mapped.freed) {
            violations.push(format!("the device runs, with freed memory at {bus:x?}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_seen_and_what_is_right_is_not() {
        let ledger = Ledger::default();
        let (bus, at) = (Gpa(0x10_0000), Iova(0x7000_0000));
        ledger.reset(true);
        ledger.runs();
        ledger.mapped(at, 0x3000, bus);
        ledger.freed(Iova(at.0 + 0x3000), 0x1000);
        ledger.unmapped(bus);
        ledger.freed(at, 0x3000);
        ledger.mapped(at, 0x3000, bus);
        assert!(ledger.violations().is_empty());
        ledger.freed(Iova(at.0 + 0x2000), 0x1000);
        assert_eq!(ledger.violations().len(), 1, "freed under the device");
        ledger.runs();
        assert_eq!(ledger.violations().len(), 2, "and it runs on");
        ledger.reset(false);
        ledger.unmapped(bus);
        ledger.mapped(at, 0x1000, Gpa(bus.0 + 0x1000));
        assert_eq!(ledger.violations().len(), 3, "reused too early");
    }
}
