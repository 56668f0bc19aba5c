//! Complete: the record is written, the slot retired, the interrupt raised.

use std::sync::atomic::Ordering;

use extlb_spec::work::{Completion, Opcode, Status, flags as flag};
use extlb_spec::{Iova, Vector};

use super::doorbell::word;
use super::{Access, Halt};
use crate::Device;
use crate::context::{Space, Work};

/// Where in the record the fields after `status` begin.
const AFTER_STATUS: usize = std::mem::offset_of!(Completion, fault);
const _: () = assert!(std::mem::offset_of!(Completion, status) == 0);

impl Device {
    /// Writes the record of the operation that has ended, and retires it.
    pub(super) fn complete(&self, access: &Access<'_>, work: &mut Work) -> Result<(), Halt> {
        let Some(op) = &work.operation else {
            return Ok(());
        };
        let Some(record) = op.outcome else {
            return Ok(());
        };
        let (opcode, flags) = (op.opcode, op.descriptor.flags);
        access.count_bytes();
        let success = record.status == Status::Success as u32;
        if !success || flags & flag::QUIET == 0 {
            let page = access.page(Iova(op.descriptor.completion), true, 1)?;
            page.write_at(AFTER_STATUS as u64, &record.to_bytes()[AFTER_STATUS..])?;
            // Last, and after all data of the operation: this is what the program waits for.
            page.release_u32(record.status)?;
        }
        // From here on the operation is over, even if the shadow page fails.
        work.operation = None;
        let ended = match success {
            true => &self.counters.ops_completed,
            false => &self.counters.ops_faulted,
        };
        ended.add(1);
        if flags & flag::INTERRUPT != 0 {
            work.event_seq = work.event_seq.wrapping_add(1);
        }
        let alarm = opcode == Opcode::Fence && record.status == Status::EarlierFailed as u32;
        match opcode {
            // It told, and did not fail itself.
            Opcode::Fence if success || alarm => work.failed = 0,
            _ => work.failed += u64::from(!success),
        }
        let Some(batch) = &mut work.batch else {
            work.head = work.head.wrapping_add(1);
            return Ok(());
        };
        batch.own.done += 1;
        batch.failed += u64::from(!success);
        if alarm || batch.own.left() == 0 {
            let status = match alarm {
                true => Status::EarlierFailed,
                false => Status::Success,
            };
            let failed = batch.failed;
            batch.own.end(status, failed);
            work.leave_batch();
        }
        Ok(())
    }

    /// Makes the shadow page say where the queue stands. The completions themselves are in RAM
    /// already: this is said once for all that ended under one guard.
    pub(super) fn publish(
        &self,
        access: &Access<'_>,
        space: &Space,
        work: &mut Work,
    ) -> Result<(), Halt> {
        let memory = access.memory();
        if work.told.head != work.head {
            work.told.head = work.head;
            memory.store_u32(word!(space, head), work.head, Ordering::Release)?;
        }
        if work.told.event_seq == work.event_seq {
            return Ok(());
        }
        work.told.event_seq = work.event_seq;
        memory.store_u32(word!(space, event_seq), work.event_seq, Ordering::Release)?;
        // Inside the guard: a stop waits for it, so that none comes after a reset.
        self.messages.raise(Vector::Completion);
        Ok(())
    }
}
