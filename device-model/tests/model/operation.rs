//! An operation: its operands, and what has been seen and written of them.

use std::collections::HashSet;

use extlb_spec::work::{Completion, Descriptor, Opcode, Status};

use super::page_of;
use crate::common::PAGE;

/// Bytes of an operation, from an offset in it on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    pub source: bool,
    pub offset: usize,
}

#[derive(Clone, Debug)]
pub struct Operation {
    /// Where in the page of records its record is.
    pub record: u64,
    pub descriptor: Descriptor,
    opcode: Option<Opcode>,
    len: usize,
    /// What was read of each operand.
    source: Vec<Option<u8>>,
    target: Vec<Option<u8>>,
    /// Which bytes of the destination were written.
    written: Vec<bool>,
    /// What was found by an atomic operation, each time.
    found: Vec<u64>,
    /// Pages that software refused.
    pub refused: HashSet<u64>,
}

impl Operation {
    pub fn new(record: u64, descriptor: Descriptor) -> Self {
        let opcode = Opcode::from_raw(descriptor.opcode);
        let len = match opcode {
            None | Some(Opcode::Nop | Opcode::Fence) => 0,
            _ => descriptor.len as usize,
        };
        // An access is told to belong to an operand by its address.
        let apart = descriptor.src.abs_diff(descriptor.dst) >= len as u64;
        assert!(apart, "operands that overlap are not modelled");
        Self {
            record,
            descriptor,
            opcode,
            len,
            source: vec![None; len],
            target: vec![None; len],
            written: vec![false; len],
            found: Vec::new(),
            refused: HashSet::new(),
        }
    }

    fn reads_source(&self) -> bool {
        use Opcode::*;
        matches!(self.opcode, Some(Copy | Crc32c | Compare))
    }

    fn reads_target(&self) -> bool {
        matches!(self.opcode, Some(Opcode::Compare))
    }

    fn writes_target(&self) -> bool {
        use Opcode::*;
        matches!(self.opcode, Some(Copy | Fill | FetchAdd | CompareSwap))
    }

    /// Where an access is in the operands, if it is in one and is what this one is for.
    pub fn operand(&self, iova: u64, len: u64, write: bool) -> Option<Operand> {
        let within = |start: u64, source: bool| {
            let offset = iova.checked_sub(start)?;
            (offset + len <= self.len as u64).then_some(Operand {
                source,
                offset: offset as usize,
            })
        };
        let d = &self.descriptor;
        let source = (!write && self.reads_source()).then(|| within(d.src, true));
        let target = match write {
            true => self.writes_target(),
            false => self.reads_target(),
        };
        let target = target.then(|| within(d.dst, false));
        source.flatten().or(target.flatten())
    }

    /// Whether it needs a page in this way.
    pub fn needs(&self, page: u64, write: bool) -> bool {
        let touches =
            |start: u64| self.len > 0 && (page_of(start)..start + self.len as u64).contains(&page);
        let d = &self.descriptor;
        !write && self.reads_source() && touches(d.src)
            || write && self.writes_target() && touches(d.dst)
            || !write && self.reads_target() && touches(d.dst)
    }

    pub fn saw(&mut self, operand: Operand, bytes: &[u8]) {
        let seen = match operand.source {
            true => &mut self.source,
            false => &mut self.target,
        };
        for (seen, byte) in seen[operand.offset..].iter_mut().zip(bytes) {
            *seen = Some(*byte);
        }
    }

    /// Bytes are written: whether they are those that it is to write.
    pub fn wrote(&mut self, operand: Operand, bytes: &[u8]) -> bool {
        let range = operand.offset..operand.offset + bytes.len();
        self.written[range.clone()].fill(true);
        range.zip(bytes).all(|(at, byte)| match self.opcode {
            Some(Opcode::Fill) => *byte == self.descriptor.arg.to_le_bytes()[at % 8],
            Some(Opcode::Copy) => self.source[at] == Some(*byte),
            _ => false,
        })
    }

    /// An atomic operation was carried out; whether with the right operands.
    pub fn swapped(&mut self, add: bool, current: u64, new: u64, found: u64) -> bool {
        self.found.push(found);
        self.written.fill(true);
        let d = &self.descriptor;
        match self.opcode {
            Some(Opcode::FetchAdd) => add && new == d.arg,
            Some(Opcode::CompareSwap) => !add && (current, new) == (d.arg, d.src),
            _ => false,
        }
    }

    /// Whether the operation may end so now. `unsuccessful`: operations before it since the last
    /// fence.
    pub fn may_end(&self, record: &Completion, unsuccessful: u64) -> Result<(), &'static str> {
        let full = |bytes: &[Option<u8>]| bytes.iter().all(Option::is_some);
        let all_written = self.written.iter().all(|written| *written);
        let bytes = record.bytes as usize;
        let check = |good: bool, what: &'static str| if good { Ok(()) } else { Err(what) };
        match Status::from_raw(record.status) {
            Some(Status::Success) => {
                check(self.refused.is_empty(), "success in spite of a refusal")?;
                check(self.opcode.is_some(), "success of no operation")?;
                check(
                    !self.writes_target() || all_written,
                    "before all was written",
                )?;
                check(
                    !matches!(self.opcode, Some(Opcode::Crc32c | Opcode::Compare))
                        || full(&self.source),
                    "before all was read",
                )?;
                let result = match self.opcode {
                    Some(Opcode::Crc32c) => {
                        let bytes: Vec<u8> = self.source.iter().flatten().copied().collect();
                        u64::from(crc32c::crc32c_append(self.descriptor.arg as u32, &bytes))
                    }
                    Some(Opcode::FetchAdd | Opcode::CompareSwap) => {
                        check(self.found.len() == 1, "not exactly once")?;
                        self.found[0]
                    }
                    Some(Opcode::Compare) => {
                        check(self.source == self.target, "they differ")?;
                        0
                    }
                    _ => 0,
                };
                check(record.result == result, "another result")?;
                check(
                    self.opcode != Some(Opcode::Fence) || unsuccessful == 0,
                    "a fence that misses a failure",
                )?;
                check(bytes == self.len, "another count of bytes")
            }
            Some(Status::Mismatch) => {
                check(self.opcode == Some(Opcode::Compare), "of no compare")?;
                let differ = |at: &usize| self.source[*at] != self.target[*at];
                let first = (0..self.len).find(differ);
                check(first == Some(bytes), "not the first difference")?;
                check(record.result == record.bytes, "another result")
            }
            Some(Status::PageFault) => {
                let page = page_of(record.fault_addr);
                check(self.refused.contains(&page), "nobody refused it")?;
                check(self.found.is_empty(), "a fault after the fact")?;
                let done = |at: usize| match self.writes_target() {
                    true => self.written[at],
                    false => self.source[at].is_some(),
                };
                check(
                    bytes < self.len && (0..bytes).all(done),
                    "not all of it was done",
                )
            }
            Some(Status::BadDescriptor) => check(self.opcode.is_none(), "it is a good one"),
            Some(Status::EarlierFailed) => {
                check(self.opcode == Some(Opcode::Fence), "of no fence")?;
                check(unsuccessful > 0, "none before failed")?;
                check(record.result == unsuccessful, "another number")
            }
            _ => Err("a status for which there is no reason"),
        }
    }

    pub fn is_fence(&self) -> bool {
        self.opcode == Some(Opcode::Fence)
    }
}

const _: () = assert!(PAGE == 4096);
