//! Complete: the record is written, the slot retired, the interrupt raised.

use std::sync::atomic::Ordering;

use extlb_spec::work::{Completion, Status, flags};
use extlb_spec::{Iova, Vector};

use super::Halt;
use super::doorbell::word;
use crate::Device;
use crate::context::{Context, Space, Work};
use crate::guard::Lane;

/// Where in the record the fields after `status` begin.
const AFTER_STATUS: usize = std::mem::offset_of!(Completion, fault_write);
const _: () = assert!(std::mem::offset_of!(Completion, status) == 0);

impl Device {
    /// Writes the record of the operation that has ended, and retires it.
    pub(super) fn complete(
        &self,
        lane: &mut Lane<'_>,
        context: &Context,
        space: &Space,
        work: &mut Work,
    ) -> Result<(), Halt> {
        let Some((op, record)) = work.operation.and_then(|op| Some((op, op.outcome?))) else {
            return Ok(());
        };
        let access = self.enter(lane, context, space, work.epoch)?;
        {
            let page = access.page(Iova(op.descriptor.completion), true, 1)?;
            page.write_at(AFTER_STATUS as u64, &record.to_bytes()[AFTER_STATUS..])?;
            // Last, and after all data of the operation: this is what the program waits for.
            page.release_u32(record.status)?;
        }
        // From here on the operation is over, even if the shadow page fails.
        work.operation = None;
        work.head = work.head.wrapping_add(1);
        let ended = match record.status == Status::Success as u32 {
            true => &self.counters.ops_completed,
            false => &self.counters.ops_faulted,
        };
        ended.add(1);
        let memory = access.memory();
        memory.store_u32(word!(space, head), work.head, Ordering::Release)?;
        if op.descriptor.flags & flags::INTERRUPT != 0 {
            work.event_seq = work.event_seq.wrapping_add(1);
            memory.store_u32(word!(space, event_seq), work.event_seq, Ordering::Release)?;
            // Inside the guard: a stop waits for it, so that none comes after a reset.
            self.messages.raise(Vector::Completion);
        }
        Ok(())
    }
}
