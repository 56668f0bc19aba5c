//! An operation: its operands, and what has been seen and written of them.

use std::collections::HashSet;

use extlb_spec::work::{Completion, Descriptor, Opcode, Segment, Status, flags};

use super::{Tally, page_of};
use crate::common::PAGE;

/// Bytes of an operation, from an offset in it on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    pub source: bool,
    pub offset: usize,
}

/// Where the bytes of an operand are: in one range, or in those of a list.
#[derive(Clone, Debug)]
struct Place {
    /// The address of the list.
    list: Option<u64>,
    segments: Vec<Segment>,
    /// How many of them the device knows: it reads a list one by one.
    known: usize,
    /// Bytes of the operation.
    len: u64,
}

impl Place {
    fn new(addr: u64, list: Option<Vec<Segment>>, len: u64) -> Self {
        Self {
            list: list.is_some().then_some(addr),
            known: usize::from(list.is_none()),
            segments: list.unwrap_or_else(|| vec![Segment { addr, len }]),
            len,
        }
    }

    /// The offset of each segment in the operation, to the first that does not fit.
    fn fitting(&self) -> impl Iterator<Item = (u64, Segment)> {
        let mut offset = 0;
        self.segments.iter().map_while(move |segment| {
            let start = offset;
            offset += segment.len;
            (offset <= self.len).then_some((start, *segment))
        })
    }

    /// What is wrong with the list: at which offset, and at which address, it is found.
    fn bad(&self) -> Option<(u64, u64)> {
        let list = self.list?;
        let (count, end) = self.fitting().fold((0, 0), |(count, _), (start, segment)| {
            (count + 1, start + segment.len)
        });
        let fits = count == self.segments.len() && end == self.len;
        (!fits).then_some((end, list + (count * Segment::SIZE) as u64))
    }

    /// Where in the operation these bytes are.
    fn find(&self, iova: u64, len: u64) -> Option<usize> {
        self.fitting()
            .take(self.known)
            .find_map(|(start, segment)| {
                let offset = iova.checked_sub(segment.addr)?;
                (offset + len <= segment.len).then_some((start + offset) as usize)
            })
    }

    /// Whether a page is in the ranges that the device knows.
    fn touches(&self, page: u64) -> bool {
        let mut known = self.fitting().take(self.known);
        known.any(|(_, s)| s.len > 0 && (page_of(s.addr)..s.addr + s.len).contains(&page))
    }

    /// The next segment of the list, if one is left.
    fn next(&self) -> Option<u64> {
        let at = self.list? + (self.known * Segment::SIZE) as u64;
        (self.known < self.segments.len()).then_some(at)
    }
}

#[derive(Clone, Debug)]
pub struct Operation {
    /// Where in the page of records its record is.
    pub record: u64,
    /// It is one of a batch, which follows it.
    pub in_batch: bool,
    pub descriptor: Descriptor,
    opcode: Option<Opcode>,
    len: usize,
    places: [Place; 2],
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
    /// With the lists that its operands are.
    pub fn new(record: u64, descriptor: Descriptor, lists: [Option<Vec<Segment>>; 2]) -> Self {
        let opcode = Opcode::from_raw(descriptor.opcode);
        let len = match opcode {
            None | Some(Opcode::Nop | Opcode::Fence | Opcode::Batch) => 0,
            _ => descriptor.len as usize,
        };
        let [src, dst] = lists;
        let places = [
            Place::new(descriptor.src, src, len as u64),
            Place::new(descriptor.dst, dst, len as u64),
        ];
        // An access is told to belong to an operand by its address.
        let ranges = || places.iter().flat_map(Place::fitting).enumerate();
        for (i, (_, a)) in ranges() {
            let apart = |b: Segment| a.addr + a.len <= b.addr || b.addr + b.len <= a.addr;
            let apart = ranges().all(|(j, (_, b))| i == j || apart(b));
            assert!(apart, "operands that overlap are not modelled");
        }
        Self {
            record,
            in_batch: false,
            descriptor,
            opcode,
            len,
            places,
            source: vec![None; len],
            target: vec![None; len],
            written: vec![false; len],
            found: Vec::new(),
            refused: HashSet::new(),
        }
    }

    pub fn of_batch(self) -> Self {
        Self {
            in_batch: true,
            ..self
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
        let [src, dst] = &self.places;
        let within = |place: &Place, source| {
            let offset = place.find(iova, len)?;
            Some(Operand { source, offset })
        };
        let source = (!write && self.reads_source()).then(|| within(src, true));
        let target = match write {
            true => self.writes_target(),
            false => self.reads_target(),
        };
        let target = target.then(|| within(dst, false));
        source.flatten().or(target.flatten())
    }

    /// Whether it needs a page in this way.
    pub fn needs(&self, page: u64, write: bool) -> bool {
        let [src, dst] = &self.places;
        let next = |place: &Place| place.next().map(page_of) == Some(page);
        !write && self.reads_source() && src.touches(page)
            || write && self.writes_target() && dst.touches(page)
            || !write && self.reads_target() && dst.touches(page)
            || !write && (next(src) || next(dst))
    }

    /// The next segment of a list is read; whether it is that.
    pub fn saw_segment(&mut self, iova: u64, len: usize) -> bool {
        let next = self.places.iter_mut().find(|p| p.next() == Some(iova));
        match next {
            Some(place) if len == Segment::SIZE => {
                place.known += 1;
                true
            }
            _ => false,
        }
    }

    /// What is wrong with its lists: the first is found.
    fn bad_list(&self) -> Option<(u64, u64)> {
        let bad = self.places.iter().filter_map(Place::bad);
        bad.min_by_key(|(offset, _)| *offset)
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

    /// Whether the operation may end with success now, and its result.
    pub fn may_succeed(&self, tally: &Tally) -> Result<u64, &'static str> {
        let full = |bytes: &[Option<u8>]| bytes.iter().all(Option::is_some);
        let all_written = self.written.iter().all(|written| *written);
        let reads = matches!(self.opcode, Some(Opcode::Crc32c | Opcode::Compare));
        let read_out = self.places.iter().all(|place| place.next().is_none());
        let fence = self.is_fence();
        check(self.refused.is_empty(), "success in spite of a refusal")?;
        check(self.opcode.is_some(), "success of no operation")?;
        check(self.bad_list().is_none(), "success of a bad list")?;
        check(read_out, "before the lists were read")?;
        check(
            !self.writes_target() || all_written,
            "before all was written",
        )?;
        check(!reads || full(&self.source), "before all was read")?;
        check(
            !fence || tally.unsuccessful == 0,
            "a fence that misses a failure",
        )?;
        match self.opcode {
            Some(Opcode::Crc32c) => {
                let bytes: Vec<u8> = self.source.iter().flatten().copied().collect();
                let crc = crc32c::crc32c_append(self.descriptor.arg as u32, &bytes);
                Ok(crc.into())
            }
            Some(Opcode::FetchAdd | Opcode::CompareSwap) => {
                check(self.found.len() == 1, "not exactly once")?;
                Ok(self.found[0])
            }
            Some(Opcode::Compare) => {
                check(self.source == self.target, "they differ")?;
                Ok(0)
            }
            Some(Opcode::Batch) => {
                let all = tally.ended == self.descriptor.len && !tally.stopped;
                check(all, "before all of it ended")?;
                Ok(tally.failed)
            }
            _ => Ok(0),
        }
    }

    /// Whether the operation may end so now.
    pub fn may_end(&self, record: &Completion, tally: &Tally) -> Result<(), &'static str> {
        let bytes = record.bytes as usize;
        let done = |at: usize| match self.writes_target() {
            true => self.written[at],
            false => self.source[at].is_some(),
        };
        let all_done = bytes <= self.len && (0..bytes).all(done);
        match Status::from_raw(record.status) {
            Some(Status::Success) => {
                let result = self.may_succeed(tally)?;
                check(!self.is_quiet(), "a record that nobody wants")?;
                check(record.result == result, "another result")?;
                let all = match self.opcode {
                    Some(Opcode::Batch) => tally.ended,
                    _ => self.len as u64,
                };
                check(record.bytes == all, "another count of bytes")
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
                if self.opcode == Some(Opcode::Batch) {
                    return check(record.bytes == tally.ended, "another count of bytes");
                }
                let list = self.places.iter().any(|place| place.list.is_some());
                // Of a list the rest may be to be read when all else is done.
                check(
                    all_done && (bytes < self.len || list),
                    "not all of it was done",
                )
            }
            Some(Status::BadSegments) => {
                let found = (record.bytes, record.fault_addr);
                check(self.bad_list() == Some(found), "no bad segment there")?;
                check(all_done, "not all of it was done")
            }
            Some(Status::BadDescriptor) => check(self.opcode.is_none(), "it is a good one"),
            Some(Status::EarlierFailed) if self.opcode == Some(Opcode::Batch) => {
                check(tally.stopped, "no fence has stopped it")?;
                let counts = (tally.ended, tally.failed);
                check((record.bytes, record.result) == counts, "other numbers")
            }
            Some(Status::EarlierFailed) => {
                check(self.is_fence(), "of no fence")?;
                check(tally.unsuccessful > 0, "none before failed")?;
                check(record.result == tally.unsuccessful, "another number")
            }
            _ => Err("a status for which there is no reason"),
        }
    }

    pub fn is_fence(&self) -> bool {
        self.opcode == Some(Opcode::Fence)
    }

    /// It leaves no record when it succeeds.
    pub fn is_quiet(&self) -> bool {
        self.descriptor.flags & flags::QUIET != 0
    }
}

fn check(good: bool, what: &'static str) -> Result<(), &'static str> {
    if good { Ok(()) } else { Err(what) }
}

const _: () = assert!(PAGE == 4096);
