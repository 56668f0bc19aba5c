//! Page requests as the device sends them, and tails of contexts as it sees them.

use extlb_spec::Gpa;
use extlb_spec::page_request::{PageRequest, RequestKind};

use super::alarm::Job;
use super::card::{Card, delay};
use super::places::Stall;
use super::plan::{Kind, Rule};
use crate::ports::BusError;

impl Card {
    /// The device writes a record into a slot of the page request ring; under the ring's lock.
    ///
    /// What it does not know is that some were lost: those behind them go to slots before, and
    /// head and tail are translated where they are read and written. So the ring that software
    /// sees is well-formed, and the one that the device sees is as full as it really is.
    pub(super) fn request(
        &self,
        slot: u32,
        bytes: &[u8; PageRequest::SIZE],
    ) -> Result<(), BusError> {
        let record = PageRequest::from_bytes(bytes);
        let about = |rule: &Rule| rule.context.is_none_or(|c| c == record.context);
        let to = || {
            format!(
                "context {}, group {}, {:#x}",
                record.context, record.group, record.iova
            )
        };
        if record.kind == RequestKind::Page as u32
            && self.inject(Kind::LoseRequest, about, to).is_some()
        {
            let mut state = self.state();
            state.lost = state.lost.wrapping_add(1);
            return Ok(());
        }
        let at = {
            let state = self.state();
            let layout = state.layout.unwrap_or_default();
            let slot = slot.wrapping_sub(state.lost) & ((1 << layout.requests_log2) - 1);
            Gpa(layout.requests.0 + u64::from(slot) * PageRequest::SIZE as u64)
        };
        self.ports.memory.write(at, bytes)
    }

    /// The device has read a word of a context's shadow page: what it sees of it, if that is the
    /// tail.
    pub(super) fn tail(&self, at: Gpa, context: u32, honest: u32) -> u32 {
        let now = self.now();
        let seen = {
            let mut state = self.state();
            let Some(view) = state.view(at) else {
                return honest;
            };
            match view.stalled {
                Some(Stall::ForEver) => return view.seen,
                Some(Stall::Until(end)) if now < end => return view.seen,
                _ => view.stalled = None,
            }
            if honest == view.seen {
                return honest;
            }
            view.seen
        };
        let about = |rule: &Rule| rule.context.is_none_or(|c| c == context);
        let to = || format!("context {context}, tail {honest}");
        let fired = self.inject(Kind::StallContext, about, to);
        let stall = fired.map(|fired| match delay(&fired) {
            None => Stall::ForEver,
            Some(delay) => {
                // Nobody rings twice for the same descriptors.
                self.later(delay, Job::Doorbell(context));
                Stall::Until(now.saturating_add(delay))
            }
        });
        if let Some(view) = self.state().view(at) {
            match stall {
                Some(_) => view.stalled = stall,
                None => view.seen = honest,
            }
        }
        match stall {
            Some(_) => seen,
            None => honest,
        }
    }
}
