//! Operations that were saved are checked before they go on.

use extlb_spec::Iova;
use extlb_spec::work::{Opcode, Segment, Status, flags};

use super::descriptor::parse;
use super::operation::{Batch, Cursor, Operation};
use crate::state::{StateError, check};

impl Operation {
    /// Refuses what no descriptor becomes.
    pub(crate) fn check(&self, in_batch: bool) -> Result<(), StateError> {
        let Self {
            opcode,
            descriptor,
            done,
            src,
            dst,
            down,
            crc: _,
            outcome,
        } = self;
        let begun = parse(*descriptor, in_batch).ok();
        let begun = begun.filter(|begun| begun.opcode == *opcode && begun.down == *down);
        check("an operation", begun.is_some(), self)?;
        check("the bytes of an operation", *done <= descriptor.len, done)?;
        if let Some(outcome) = outcome {
            // What is left is to write it: the operands are looked at no more.
            let status = Status::from_raw(outcome.status);
            let ended = status.is_some_and(|status| status != Status::Pending);
            return check("the status of an operation", ended, outcome);
        }
        let begun = begun.filter(|begun| begun.outcome.is_none());
        check("an operation that has not ended", begun.is_some(), self)?;
        let Some(begun) = begun else { return Ok(()) };
        for (cursor, first, list) in [
            (src, begun.src, flags::SRC_LIST),
            (dst, begun.dst, flags::DST_LIST),
        ] {
            let is_list = descriptor.flags & list != 0;
            cursor.check(&first, is_list, *done, self)?;
        }
        Ok(())
    }
}

impl Cursor {
    /// Refuses what an operand that began as `first` is not after `done` bytes.
    fn check(
        &self,
        first: &Cursor,
        is_list: bool,
        done: u64,
        op: &Operation,
    ) -> Result<(), StateError> {
        let Self {
            at,
            left,
            next,
            segments,
        } = self;
        let good = if is_list {
            let read = first.segments.checked_sub(*segments);
            let size = Segment::SIZE as u64;
            read.is_some_and(|read| *next == first.next + u64::from(read) * size)
                && *left <= op.descriptor.len - done
                && Iova(*at).range_is_valid(*left)
        } else {
            // The operand that an operation does not use has no bytes, and its address counts on.
            let unused = first.left == 0;
            let moved = if op.down { 0 } else { done };
            let at_there = unused || *at == first.at + moved;
            at_there && *left == first.left.saturating_sub(done) && (*next, *segments) == (0, 0)
        };
        check("an operand", good, self)
    }
}

impl Batch {
    pub(crate) fn check(&self) -> Result<(), StateError> {
        let Self { own, failed } = self;
        own.check(false)?;
        let runs = own.opcode == Opcode::Batch && own.outcome.is_none() && own.left() > 0;
        check("a batch", runs && *failed <= own.done, self)
    }
}
