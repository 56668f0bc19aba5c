//! A script of work that uses all of the device: programs that submit, and a kernel that serves
//! page requests and shoots pages down in between.

mod program;
mod simulation;

use std::ops::RangeInclusive;

use crate::common::{self, Guest, PAGE, PRQ_LOG2, copy, op};
use extlb_device::ports::Dma;
use extlb_device::{Config, Step};
use extlb_spec::Iova;
use extlb_spec::invalidation::wait;
use extlb_spec::page_request::{RequestKind, Response};
use extlb_spec::work::{Descriptor, Opcode, Status, flags};
use program::{Program, Work};

const SRC: u64 = 0x5555_0000_0000;
const DST: u64 = 0x5555_1000_0000;
/// Lists, and descriptors of batches: the first of either crosses a page.
const LISTS: u64 = 0x5555_1800_0000 + PAGE - 16;
const BATCHES: u64 = 0x5555_1801_0000 + PAGE - 128;
/// A page that is refused; those around it are not.
const REFUSED: u64 = 0x5555_2000_0000;
/// What is shot down now and then.
const ALL: std::ops::Range<u64> = SRC..REFUSED;
/// The word of atomic operations.
const WORD: u64 = DST + 5 * PAGE + 64;
/// Mapped to where no RAM is.
const NOWHERE: u64 = 0x5555_3000_0000;

/// Small steps, so that a stop can come between any two.
pub fn config() -> Config {
    let mut config = common::config();
    config.schedule.quantum = PAGE as u32;
    config.schedule.chunk = PAGE as u32;
    config
}

pub struct Script {
    programs: Vec<Program>,
    /// Page requests are taken when at least so many are there, or nothing else happens.
    lazy: bool,
    turns: u64,
    posted: u64,
    idle: u32,
}

/// An atomic operation on a word of its own.
fn word(opcode: Opcode, src: u64, arg: u64) -> Descriptor {
    Descriptor {
        arg,
        ..op(opcode, src, WORD, 8)
    }
}

fn with(flags: u8, descriptor: Descriptor) -> Descriptor {
    Descriptor {
        flags: flags | descriptor.flags,
        ..descriptor
    }
}

/// The source, or the destination, is a list.
fn from_list((src, src_segments): (u64, u32), descriptor: Descriptor) -> Descriptor {
    Descriptor {
        src,
        src_segments,
        ..with(flags::SRC_LIST, descriptor)
    }
}

fn to_list((dst, dst_segments): (u64, u32), descriptor: Descriptor) -> Descriptor {
    Descriptor {
        dst,
        dst_segments,
        ..with(flags::DST_LIST, descriptor)
    }
}

fn bad() -> Descriptor {
    Descriptor {
        opcode: 255,
        ..Default::default()
    }
}

impl Script {
    fn new(guest: &Guest, lazy: bool) -> Self {
        Self {
            programs: Vec::new(),
            lazy,
            turns: 0,
            posted: guest.ack(),
            idle: 0,
        }
    }

    /// Every operation and every way to end, by two programs; page requests and drains come in
    /// between.
    pub fn operations(guest: &Guest) -> Self {
        let mut script = Self::new(guest, false);
        let ok = Status::Success;
        let crc = op(Opcode::Crc32c, DST + PAGE - 40, 0, 200);
        let compare = |src, len| op(Opcode::Compare, src, DST + PAGE - 40, len);
        script.program(
            guest,
            1,
            &[
                (copy(SRC + PAGE - 70, DST + PAGE - 40, 200), ok),
                (compare(SRC + PAGE - 70, 200), ok),
                (with(flags::INTERRUPT, crc), ok),
                (op(Opcode::Fill, 0, REFUSED + 8, 8), Status::PageFault),
                (compare(SRC, 64), Status::Mismatch),
                (op(Opcode::Fence, 0, 0, 0), Status::EarlierFailed),
                (word(Opcode::FetchAdd, 0, 5), ok),
                (word(Opcode::FetchAdd, 0, 6), ok),
                (word(Opcode::CompareSwap, 99, 11), ok),
                (word(Opcode::CompareSwap, 77, 11), ok),
                // Overlapping, so that it goes from the end down.
                (copy(DST + PAGE - 60, DST + PAGE - 30, 300), ok),
                (op(Opcode::Fence, 0, 0, 0), ok),
                (Descriptor::default(), ok),
            ],
        );
        let fill = Descriptor {
            arg: 0x0102_0304_0506_0708,
            ..op(Opcode::Fill, 0, DST + PAGE - 13, 100)
        };
        script.program(
            guest,
            2,
            &[
                (bad(), Status::BadDescriptor),
                (op(Opcode::Crc32c, NOWHERE, 0, 8), Status::BusError),
                (fill, ok),
                (copy(SRC, REFUSED, 64), Status::PageFault),
            ],
        );
        script
    }

    /// Batches and lists, and operations that leave no record, and every way to end of those.
    pub fn batches(guest: &Guest) -> Self {
        let mut script = Self::new(guest, false);
        let ok = Status::Success;
        let fence = op(Opcode::Fence, 0, 0, 0);

        let mut one = Program::new(guest, 1);
        let scattered = one.list(&[
            (SRC + PAGE - 30, 50),
            (SRC + 3 * PAGE, 0),
            (SRC + 2 * PAGE - 7, 100),
        ]);
        let gathered = one.list(&[(DST + PAGE - 13, 20), (DST + 3 * PAGE + 5, 130)]);
        let both = |opcode| from_list(scattered, to_list(gathered, op(opcode, 0, 0, 150)));
        one.add((with(flags::INTERRUPT, both(Opcode::Copy)), ok));
        one.add((both(Opcode::Compare), ok));
        let refused = one.list(&[(DST + PAGE + 70, 30), (REFUSED + 9, 30)]);
        let pattern = Descriptor {
            arg: 0x0102_0304_0506_0708,
            ..to_list(gathered, op(Opcode::Fill, 0, 0, 150))
        };
        // A failure and a fence, behind which nothing is begun.
        let batch = one.batch(&[
            (with(flags::QUIET, pattern), ok),
            (to_list(refused, copy(SRC, 0, 60)), Status::PageFault),
            (with(flags::QUIET, word(Opcode::FetchAdd, 0, 5)), ok),
            (with(flags::INTERRUPT, fence), Status::EarlierFailed),
            (word(Opcode::FetchAdd, 0, 5), Status::Pending),
        ]);
        one.add_batch(batch, Status::EarlierFailed);
        one.add((fence, Status::EarlierFailed));
        let crc = from_list(scattered, op(Opcode::Crc32c, 0, 0, 150));
        let down = copy(DST + PAGE - 60, DST + PAGE - 30, 100);
        let (batch, ends) = one.batch(&[
            (word(Opcode::FetchAdd, 0, 6), ok),
            (with(flags::QUIET, word(Opcode::CompareSwap, 99, 11)), ok),
            (with(flags::INTERRUPT, crc), ok),
            (with(flags::QUIET, down), ok),
        ]);
        one.add_batch((with(flags::QUIET, batch), ends), ok);
        one.add((with(flags::QUIET | flags::INTERRUPT, fence), ok));
        script.programs.push(one);

        let mut two = Program::new(guest, 2);
        let short = two.list(&[(SRC + 5, 20), (SRC + PAGE - 5, 20)]);
        let broken = two.list(&[(SRC + 5, 20), (NOWHERE, 20)]);
        let from = |list, opcode| from_list(list, op(opcode, 0, DST + 9, 50));
        let batch = two.batch(&[
            (op(Opcode::Batch, BATCHES, 0, 1), Status::NestedBatch),
            (from(short, Opcode::Copy), Status::BadSegments),
            (from(short, Opcode::Compare), Status::BadSegments),
            (
                with(flags::QUIET, from(broken, Opcode::Crc32c)),
                Status::BusError,
            ),
            (bad(), Status::BadDescriptor),
        ]);
        two.add_batch(batch, ok);
        // From the end down, with the start refused.
        let end = REFUSED + PAGE;
        two.add((copy(end - 100, end - 70, 300), Status::PageFault));
        two.add((op(Opcode::Batch, BATCHES, 0, 0), ok));
        script.programs.push(two);
        script
    }

    /// More page requests than the ring holds, by a kernel that looks at it seldom.
    pub fn crowd(guest: &Guest) -> Self {
        let mut script = Self::new(guest, true);
        let crc = op(Opcode::Crc32c, SRC + 5, 0, 64);
        for context in 0..(1 << PRQ_LOG2) + 3 {
            script.program(guest, context, &[(crc, Status::Success)]);
        }
        script
    }

    fn program(&mut self, guest: &Guest, context: u32, work: &[Work]) {
        let mut program = Program::new(guest, context);
        work.iter().for_each(|work| program.add(*work));
        self.programs.push(program);
    }

    /// Submits all.
    pub fn start(&mut self, guest: &Guest) {
        // Of the records that were counted before, none is of this script.
        guest.memory.stores.lock().unwrap().clear();
        for program in &self.programs {
            for descriptor in &program.work {
                program.process.submit(*descriptor);
            }
            program.process.ring(guest);
        }
    }

    pub fn ring_all(&self, guest: &Guest) {
        for program in &self.programs {
            program.process.ring(guest);
        }
    }

    /// One step of everybody. False: all is done.
    pub fn step(&mut self, guest: &Guest) -> bool {
        let engine = guest.device.engine_step();
        let queue = guest.device.invalidation_step();
        let rests = engine != Step::Busy && queue != Step::Busy;
        if rests && !self.serve(guest) {
            return false;
        }
        if !self.lazy {
            self.serve(guest);
        }
        true
    }

    /// The kernel's part. False: all is done.
    pub fn serve(&mut self, guest: &Guest) -> bool {
        self.turns += 1;
        if self.idle == 0 && self.turns % 11 == 3 && self.posted < guest.ack() + 4 {
            // Spurious, so that results stay what they are.
            let context = self.programs[self.turns as usize % self.programs.len()]
                .process
                .context;
            guest.shoot(context, ALL.start, ALL.end);
            self.posted = guest.post_wait(wait::DRAINED | wait::INTERRUPT);
        }
        while let Some(request) = guest.take_request() {
            assert_eq!(request.kind, RequestKind::Page as u32, "{request:?}");
            let mut response = Response::Invalid;
            let asked = |p: &&mut Program| p.process.context == request.context;
            let program = self.programs.iter_mut().find(asked).expect("is known");
            if request.iova != REFUSED {
                let known = program.frames.iter().any(|(at, _)| *at == request.iova);
                if !known {
                    let frame = guest.pages.take();
                    let bytes = program.memory.fresh_page(request.iova);
                    guest.ram.write(frame, &bytes).unwrap();
                    program.process.map(Iova(request.iova), frame, true);
                    program.frames.push((request.iova, frame));
                }
                response = Response::Success;
            }
            guest.respond(&request, response);
        }
        guest.set(extlb_spec::regs::KICK, 1);
        if self.is_done(guest) {
            self.idle += 1;
        }
        // A little longer, for what comes after the last record.
        self.idle < 4 || !self.is_done(guest)
    }

    pub fn is_done(&self, guest: &Guest) -> bool {
        self.programs.iter().all(Program::is_done) && guest.ack() >= self.posted
    }

    /// Runs to the end.
    pub fn finish(&mut self, guest: &Guest) {
        for _ in 0..10_000 {
            if !self.step(guest) {
                return;
            }
        }
        panic!("does not come to an end");
    }

    /// Nothing is half done or done twice.
    pub fn check_half(&self, guest: &Guest, what: &str) {
        for program in &self.programs {
            program.check_half(guest, what);
        }
    }

    /// Likewise, by a device that can still say in the shadow pages how far it got: how many
    /// operations have ended, which is known but for those that leave no record.
    pub fn check_told(&self, guest: &Guest, what: &str) -> RangeInclusive<u64> {
        self.check_half(guest, what);
        let ended = self.programs.iter().map(|p| p.check_told(what));
        let (least, most): (Vec<_>, Vec<_>) = ended.map(RangeInclusive::into_inner).unzip();
        least.iter().sum()..=most.iter().sum()
    }

    /// All is done, once, and the memory is as it must be.
    pub fn check(&self, guest: &Guest, what: &str) {
        let all: usize = self.programs.iter().map(|p| p.ends.len()).sum();
        let ended = self.check_told(guest, what);
        assert_eq!(ended, all as u64..=all as u64, "{what}: lost");
        assert_eq!(
            guest.ack(),
            self.posted,
            "{what}: an acknowledgement is lost"
        );
        assert_eq!(guest.fatal(), 0, "{what}");
        for program in &self.programs {
            for (page, frame) in &program.frames {
                let found = guest.bytes(*frame, PAGE as usize);
                assert!(found == program.memory.page(*page), "{what}: {page:#x}");
            }
        }
    }
}
