//! What operations do and how they end, by carrying them out one after the other, byte by byte.

use std::collections::BTreeMap;
use std::ops::Range;

use extlb_spec::work::{Completion, Descriptor, Opcode, Segment, Status, fault, flags};

use super::{DST, NOWHERE, REFUSED};
use crate::common::PAGE;

/// What a page has in it when it is mapped: the sources something, the others nothing.
fn byte(at: u64) -> u8 {
    match at < DST {
        true => (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8,
        false => 0,
    }
}

/// Why an access to an address fails, if it does.
fn failure(at: u64) -> Option<Status> {
    let page = |start: u64| start..start + PAGE;
    if page(REFUSED).contains(&at) {
        return Some(Status::PageFault);
    }
    page(NOWHERE).contains(&at).then_some(Status::BusError)
}

/// A page, with other bytes over some of it.
fn over(mut bytes: Vec<u8>, page: u64, others: &BTreeMap<u64, u8>) -> Vec<u8> {
    for (addr, byte) in others.range(page..page + PAGE) {
        bytes[(addr - page) as usize] = *byte;
    }
    bytes
}

/// The memory of a program.
#[derive(Default)]
pub struct Simulation {
    /// What its pages have in them when they are mapped, beside what [`byte`] says.
    given: BTreeMap<u64, u8>,
    written: BTreeMap<u64, u8>,
    failed: u64,
}

/// An operand: its addresses in order, and why a list of them ends too early.
struct Operand {
    bytes: Vec<u64>,
    bad: Option<(Status, u64)>,
}

impl Simulation {
    /// Has something in its memory from the start.
    pub fn give(&mut self, addr: u64, bytes: &[u8]) {
        self.given.extend((addr..).zip(bytes.iter().copied()));
    }

    fn fresh(&self, addr: u64) -> u8 {
        self.given.get(&addr).copied().unwrap_or(byte(addr))
    }

    /// What a page has in it when it is mapped.
    pub fn fresh_page(&self, page: u64) -> Vec<u8> {
        let bytes = (page..page + PAGE).map(byte).collect();
        over(bytes, page, &self.given)
    }

    /// What it has in it now.
    pub fn page(&self, page: u64) -> Vec<u8> {
        over(self.fresh_page(page), page, &self.written)
    }

    fn at(&self, addr: u64) -> u8 {
        self.written.get(&addr).copied().unwrap_or(self.fresh(addr))
    }

    fn bytes(&self, range: Range<u64>) -> Vec<u8> {
        range.map(|at| self.at(at)).collect()
    }

    fn word(&self, addr: u64) -> u64 {
        let bytes = self.bytes(addr..addr + 8).try_into();
        u64::from_le_bytes(bytes.expect("8 bytes"))
    }

    fn write(&mut self, addr: u64, bytes: &[u8]) {
        self.written.extend((addr..).zip(bytes.iter().copied()));
    }

    fn operand(&self, d: &Descriptor, source: bool) -> Operand {
        let (at, flag, segments) = match source {
            true => (d.src, flags::SRC_LIST, d.src_segments),
            false => (d.dst, flags::DST_LIST, d.dst_segments),
        };
        let mut operand = Operand {
            bytes: Vec::new(),
            bad: None,
        };
        if d.flags & flag == 0 {
            operand.bytes.extend(at..at + d.len);
            return operand;
        }
        let size = Segment::SIZE as u64;
        let end = at + u64::from(segments) * size;
        for at in (at..end).step_by(Segment::SIZE) {
            let (addr, len) = (self.word(at), self.word(at + 8));
            let left = d.len - operand.bytes.len() as u64;
            if len > left {
                operand.bad = Some((Status::BadSegments, at));
                return operand;
            }
            operand.bytes.extend(addr..addr + len);
        }
        if (operand.bytes.len() as u64) < d.len {
            operand.bad = Some((Status::BadSegments, end));
        }
        operand
    }

    /// Carries out an operation, and all that it consists of: tells of each in the order in
    /// which they end.
    pub fn run(&mut self, d: &Descriptor) -> Vec<(Descriptor, Completion)> {
        let mut all = Vec::new();
        let done = match Opcode::from_raw(d.opcode) {
            Some(Opcode::Batch) => self.batch(d, &mut all),
            _ => self.one(d),
        };
        self.ended(d, &done);
        all.push((*d, done));
        all
    }

    fn ended(&mut self, d: &Descriptor, done: &Completion) {
        self.failed = match d.opcode == Opcode::Fence as u8 {
            true => 0,
            false => self.failed + u64::from(done.status != Status::Success as u32),
        };
    }

    fn batch(&mut self, d: &Descriptor, all: &mut Vec<(Descriptor, Completion)>) -> Completion {
        let mut own = Completion {
            status: Status::Success as u32,
            ..Default::default()
        };
        let end = d.src + d.len * Descriptor::SIZE as u64;
        for at in (d.src..end).step_by(Descriptor::SIZE) {
            let bytes = self.bytes(at..at + Descriptor::SIZE as u64).try_into();
            let element = Descriptor::from_bytes(&bytes.expect("64 bytes"));
            let done = match element.opcode == Opcode::Batch as u8 {
                true => Completion {
                    status: Status::NestedBatch as u32,
                    ..Default::default()
                },
                false => self.one(&element),
            };
            self.ended(&element, &done);
            all.push((element, done));
            own.bytes += 1;
            own.result += u64::from(done.status != Status::Success as u32);
            if done.status == Status::EarlierFailed as u32 {
                own.status = done.status;
                break;
            }
        }
        own
    }

    fn one(&mut self, d: &Descriptor) -> Completion {
        let success = |bytes, result| Completion {
            status: Status::Success as u32,
            bytes,
            result,
            ..Default::default()
        };
        match Opcode::from_raw(d.opcode) {
            Some(Opcode::Nop) => success(0, 0),
            Some(Opcode::Fence) => Completion {
                status: match self.failed {
                    0 => Status::Success as u32,
                    _ => Status::EarlierFailed as u32,
                },
                ..success(0, self.failed)
            },
            Some(opcode @ (Opcode::FetchAdd | Opcode::CompareSwap)) => {
                let old = self.word(d.dst);
                let new = match opcode {
                    Opcode::FetchAdd => old + d.arg,
                    _ if old == d.arg => d.src,
                    _ => old,
                };
                self.write(d.dst, &new.to_le_bytes());
                success(8, old)
            }
            Some(opcode) => self.move_bytes(opcode, d),
            None => Completion {
                status: Status::BadDescriptor as u32,
                ..Default::default()
            },
        }
    }

    /// An operation on ranges of memory.
    fn move_bytes(&mut self, opcode: Opcode, d: &Descriptor) -> Completion {
        use Opcode::{Compare, Copy, Crc32c, Fill};
        let writes = matches!(opcode, Copy | Fill);
        let source = (opcode != Fill).then(|| self.operand(d, true));
        let target = (opcode != Crc32c).then(|| self.operand(d, false));
        let down = opcode == Copy
            && d.flags & (flags::SRC_LIST | flags::DST_LIST) == 0
            && (d.src + 1..d.src + d.len).contains(&d.dst);
        let len = d.len as usize;
        let mut done = Completion {
            status: Status::Success as u32,
            ..Default::default()
        };
        let read = source.iter().flat_map(|s| &s.bytes);
        let read: Vec<u8> = read.map(|at| self.at(*at)).collect();
        let mut crc = d.arg as u32;
        for n in 0..len {
            let i = if down { len - 1 - n } else { n };
            let operands = [(&source, false), (&target, writes)];
            if let Some((status, at, write)) = stopped(operands, i) {
                let write = write && status == Status::PageFault;
                done.status = status as u32;
                done.fault_addr = at;
                done.fault =
                    if write { fault::WRITE } else { 0 } | if down { fault::FROM_END } else { 0 };
                break;
            }
            let to = target.as_ref().map_or(0, |target| target.bytes[i]);
            match opcode {
                Copy => self.write(to, &[read[i]]),
                Fill => self.write(to, &[d.arg.to_le_bytes()[i % 8]]),
                Compare if read[i] != self.at(to) => {
                    done.status = Status::Mismatch as u32;
                    done.result = done.bytes;
                    break;
                }
                Crc32c => crc = crc32c::crc32c_append(crc, &[read[i]]),
                _ => {}
            }
            done.bytes += 1;
        }
        if opcode == Crc32c {
            done.result = crc.into();
        }
        done
    }
}

/// Why the byte at `i` cannot be done, with the address, and whether it is of a write: lists come
/// first.
fn stopped(operands: [(&Option<Operand>, bool); 2], i: usize) -> Option<(Status, u64, bool)> {
    let operands = operands.map(|(operand, write)| operand.as_ref().map(|o| (o, write)));
    let operands = operands.into_iter().flatten();
    let bad = operands.clone().find_map(|(o, _)| match o.bytes.get(i) {
        None => o.bad.map(|(status, at)| (status, at, false)),
        Some(_) => None,
    });
    bad.or_else(|| {
        operands.clone().find_map(|(o, write)| {
            let at = *o.bytes.get(i)?;
            Some((failure(at)?, at, write))
        })
    })
}
