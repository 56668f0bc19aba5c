//! Doorbell: how the device learns of new descriptors.
//!
//! The tail is polled in the shadow page while the context has work and for a short time after;
//! then the context is parked, and a write to its doorbell page queues it again.

use std::sync::atomic::Ordering;
use std::time::Duration;

use extlb_spec::context::ContextError;

use super::{Access, Halt, Turn};
use crate::Device;
use crate::context::{Context, Space, Work};
use crate::guard::Lane;
use crate::handshake::before_sleep;
use crate::ports::BusError;

/// Address of a word of the shadow page.
macro_rules! word {
    ($space:expr, $field:ident) => {
        extlb_spec::Gpa(
            $space.shadow.0
                + std::mem::offset_of!(extlb_spec::context::ContextShadow, $field) as u64,
        )
    };
}
pub(super) use word;

impl From<BusError> for Halt {
    /// The shadow page is the only memory that the request path names by itself; everything
    /// else goes through a translation, which has its own error.
    fn from(error: BusError) -> Self {
        Halt::Failed(ContextError::Shadow, error.addr.0)
    }
}

impl Device {
    /// A write to a context's doorbell page.
    pub(crate) fn doorbell(&self, context: u32) {
        if self.schedule.push(context) {
            self.ports.wake.work();
        }
    }

    /// Looks for new descriptors; whether there are any.
    pub(super) fn poll_tail(
        &self,
        access: &Access<'_>,
        space: &Space,
        work: &mut Work,
    ) -> Result<bool, Halt> {
        if work.head != work.tail {
            return Ok(true);
        }
        // Acquire pairs with the program's release: its descriptors are visible.
        let tail = access
            .memory()
            .load_u32(word!(space, tail), Ordering::Acquire)?;
        if tail.wrapping_sub(work.head) > space.entries {
            return Err(Halt::Failed(ContextError::RingOverrun, u64::from(tail)));
        }
        work.tail = tail;
        let more = work.head != work.tail;
        if more && work.parked {
            access
                .memory()
                .store_u32(word!(space, need_kick), 0, Ordering::Relaxed)?;
            work.parked = false;
        }
        Ok(more)
    }

    /// Nothing is submitted: polls a while longer, then asks for a kick and parks.
    pub(super) fn park(
        &self,
        lane: &mut Lane<'_>,
        context: &Context,
        space: &Space,
        work: &mut Work,
        now: Duration,
    ) -> Turn {
        if now.saturating_sub(work.last_work) < self.poll_time() {
            return Turn::Polled;
        }
        let parked = self
            .enter(lane, context, space, work.epoch)
            .and_then(|access| {
                let need_kick = word!(space, need_kick);
                let ask = |work: &mut Work| {
                    let memory = access.memory();
                    memory.store_u32(need_kick, 1, Ordering::Relaxed)?;
                    work.parked = true;
                    Ok(())
                };
                before_sleep(work, ask, |work| self.poll_tail(&access, space, work))
            });
        match parked {
            Ok(true) | Err(Halt::Stopped) => Turn::Worked,
            Ok(false) => Turn::Parked,
            Err(Halt::Failed(error, addr)) => {
                work.failure = Some(crate::context::Failure::new(error, addr));
                self.fail(lane, context, space, work)
            }
            Err(Halt::Empty | Halt::Missing(_) | Halt::Broken(_)) => Turn::Parked,
        }
    }
}
