//! Operations under way: all that is kept of them between two steps.

use extlb_spec::Iova;
use extlb_spec::work::{Completion, Descriptor, Opcode, Status, fault};
use serde::{Deserialize, Serialize};

/// An operation under way.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Operation {
    pub(crate) opcode: Opcode,
    pub(crate) descriptor: Descriptor,
    /// Bytes done; of a batch, descriptors.
    pub(crate) done: u64,
    /// What is left of the operands.
    pub(crate) src: Cursor,
    pub(crate) dst: Cursor,
    /// From the highest address down.
    pub(crate) down: bool,
    /// CRC32C so far.
    pub(crate) crc: u32,
    /// How it ended, once it has: what is left is to write this.
    pub(crate) outcome: Option<Completion>,
}

/// What is left of an operand: a range, and after that a list of ranges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Cursor {
    /// The range is `[at, at + left)`, in the address space.
    pub(crate) at: u64,
    pub(crate) left: u64,
    /// Address of the next segment of the list.
    pub(crate) next: u64,
    /// How many there are from there on.
    pub(crate) segments: u32,
}

/// A batch whose descriptors are being run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Batch {
    /// The batch's own operation; its `done` counts descriptors that ended.
    pub(crate) own: Operation,
    /// How many of those did not succeed.
    pub(crate) failed: u64,
}

impl Operation {
    /// An operation that has done nothing yet.
    pub(super) fn new(opcode: Opcode, descriptor: Descriptor) -> Self {
        Self {
            opcode,
            descriptor,
            done: 0,
            src: Cursor::default(),
            dst: Cursor::default(),
            down: false,
            crc: descriptor.arg as u32,
            outcome: None,
        }
    }

    /// Bytes that are left.
    pub(super) fn left(&self) -> u64 {
        self.descriptor.len - self.done
    }

    /// The addresses of the next `len` bytes of both operands.
    pub(super) fn piece(&self, len: u64) -> (Iova, Iova) {
        let at = |cursor: &Cursor| match self.down {
            // Ranges of the same length, as neither is a list.
            true => Iova(cursor.at.wrapping_add(cursor.left).wrapping_sub(len)),
            false => Iova(cursor.at),
        };
        (at(&self.src), at(&self.dst))
    }

    /// The next `len` bytes are done.
    pub(super) fn advance(&mut self, len: u64) {
        for cursor in [&mut self.src, &mut self.dst] {
            // An operand that is not used stays at nothing.
            cursor.left = cursor.left.saturating_sub(len);
            if !self.down {
                cursor.at = cursor.at.wrapping_add(len);
            }
        }
        self.done += len;
    }

    /// Ends the operation.
    pub(super) fn end(&mut self, status: Status, result: u64) {
        self.outcome = Some(Completion {
            status: status as u32,
            bytes: self.done,
            result,
            ..Default::default()
        });
    }

    /// Ends the operation at an address.
    pub(super) fn end_at(&mut self, status: Status, iova: Iova, write: bool) {
        let write = write && status == Status::PageFault;
        let result = match self.opcode {
            // To go on from.
            Opcode::Crc32c => u64::from(self.crc),
            _ => 0,
        };
        self.outcome = Some(Completion {
            status: status as u32,
            fault: if write { fault::WRITE } else { 0 }
                | if self.down { fault::FROM_END } else { 0 },
            bytes: self.done,
            fault_addr: iova.0,
            result,
        });
    }
}

impl Cursor {
    /// An operand of one range.
    pub(super) fn range(at: u64, len: u64) -> Self {
        Self {
            at,
            left: len,
            ..Default::default()
        }
    }

    /// An operand of a list.
    pub(super) fn list(at: u64, segments: u32) -> Self {
        Self {
            next: at,
            segments,
            ..Default::default()
        }
    }
}
