//! A script of work that uses all of the device: programs that submit, and a kernel that serves
//! page requests and shoots pages down in between.

use std::collections::BTreeMap;

use crate::common::{self, Guest, PAGE, PRQ_LOG2, Process, copy, op};
use extlb_device::ports::Dma;
use extlb_device::{Config, Step};
use extlb_spec::invalidation::wait;
use extlb_spec::page_request::{RequestKind, Response};
use extlb_spec::work::{Descriptor, Opcode, Status, flags};
use extlb_spec::{Gpa, Iova};

const SRC: u64 = 0x5555_0000_0000;
const DST: u64 = 0x5555_1000_0000;
/// Whatever is asked for here is refused.
const REFUSED: u64 = 0x5555_2000_0000;
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

/// A program, and what becomes of each of its submissions.
struct Program {
    process: Process,
    work: Vec<(Descriptor, Status)>,
    /// Bytes and result of each, and the memory in the end.
    want: Vec<(u64, u64)>,
    memory: Simulation,
    /// Frames behind SRC and DST, in order, as they were mapped.
    frames: Vec<(u64, Gpa)>,
}

pub struct Script {
    programs: Vec<Program>,
    /// Page requests are taken when at least so many are there, or nothing else happens.
    lazy: bool,
    turns: u64,
    posted: u64,
    idle: u32,
}

/// What a page has in it when it is mapped: the sources something, the others nothing.
fn byte(at: u64) -> u8 {
    match at < DST {
        true => (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8,
        false => 0,
    }
}

/// An atomic operation on a word of its own.
fn word(opcode: Opcode, src: u64, arg: u64) -> Descriptor {
    Descriptor {
        arg,
        ..op(opcode, src, WORD, 8)
    }
}

/// What the device's memory is, and how operations end, by carrying them out one after the other.
#[derive(Default)]
struct Simulation {
    written: BTreeMap<u64, u8>,
    failed: u64,
}

impl Simulation {
    fn at(&self, addr: u64) -> u8 {
        self.written.get(&addr).copied().unwrap_or(byte(addr))
    }

    fn bytes(&self, addr: u64, len: u64) -> Vec<u8> {
        (addr..addr + len).map(|at| self.at(at)).collect()
    }

    fn page(&self, page: u64) -> Vec<u8> {
        let mut bytes = contents(page);
        for (addr, byte) in self.written.range(page..page + PAGE) {
            bytes[(addr - page) as usize] = *byte;
        }
        bytes
    }

    fn write(&mut self, addr: u64, bytes: &[u8]) {
        self.written.extend((addr..).zip(bytes.iter().copied()));
    }

    /// Carries out an operation that ends with this status; its bytes and its result.
    fn run(&mut self, d: &Descriptor, status: Status) -> (u64, u64) {
        let failed = self.failed;
        let opcode = Opcode::from_raw(d.opcode);
        self.failed = match opcode {
            Some(Opcode::Fence) => 0,
            _ => failed + u64::from(status != Status::Success),
        };
        match (opcode, status) {
            (Some(Opcode::Fence), _) => return (0, failed),
            (Some(Opcode::Compare), Status::Mismatch) => {
                let (a, b) = (self.bytes(d.src, d.len), self.bytes(d.dst, d.len));
                let first = (0..d.len).find(|i| a[*i as usize] != b[*i as usize]);
                let first = first.expect("they differ");
                return (first, first);
            }
            (Some(opcode), Status::Success) => {
                let result = match opcode {
                    Opcode::Copy => {
                        let bytes = self.bytes(d.src, d.len);
                        self.write(d.dst, &bytes);
                        0
                    }
                    Opcode::Fill => {
                        let pattern = d.arg.to_le_bytes().into_iter().cycle();
                        let bytes: Vec<u8> = pattern.take(d.len as usize).collect();
                        self.write(d.dst, &bytes);
                        0
                    }
                    Opcode::Crc32c => crc32c::crc32c(&self.bytes(d.src, d.len)).into(),
                    Opcode::FetchAdd | Opcode::CompareSwap => {
                        let bytes = self.bytes(d.dst, 8).try_into().expect("8 bytes");
                        let old = u64::from_le_bytes(bytes);
                        let new = match opcode {
                            Opcode::FetchAdd => old + d.arg,
                            _ if old == d.arg => d.src,
                            _ => old,
                        };
                        self.write(d.dst, &new.to_le_bytes());
                        old
                    }
                    _ => 0,
                };
                return (d.len, result);
            }
            _ => {}
        }
        (0, 0)
    }
}

fn contents(addr: u64) -> Vec<u8> {
    (addr..addr + PAGE).map(byte).collect()
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
        let crc = Descriptor {
            flags: flags::INTERRUPT,
            ..op(Opcode::Crc32c, DST + PAGE - 40, 0, 200)
        };
        let bad = Descriptor {
            opcode: 255,
            ..Default::default()
        };
        script.program(
            guest,
            1,
            &[
                (copy(SRC + PAGE - 70, DST + PAGE - 40, 200), ok),
                (
                    op(Opcode::Compare, SRC + PAGE - 70, DST + PAGE - 40, 200),
                    ok,
                ),
                (crc, ok),
                (op(Opcode::Fill, 0, REFUSED + 8, 8), Status::PageFault),
                (
                    op(Opcode::Compare, SRC, DST + PAGE - 40, 64),
                    Status::Mismatch,
                ),
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
        script.program(
            guest,
            2,
            &[
                (bad, Status::BadDescriptor),
                (op(Opcode::Crc32c, NOWHERE, 0, 8), Status::BusError),
                (
                    Descriptor {
                        arg: 0x0102_0304_0506_0708,
                        ..op(Opcode::Fill, 0, DST + PAGE - 13, 100)
                    },
                    ok,
                ),
                (copy(SRC, REFUSED, 64), Status::PageFault),
            ],
        );
        script
    }

    /// More page requests than the ring holds, by a kernel that looks at it seldom.
    pub fn crowd(guest: &Guest) -> Self {
        let mut script = Self::new(guest, true);
        for context in 0..(1 << PRQ_LOG2) + 3 {
            script.program(
                guest,
                context,
                &[(op(Opcode::Crc32c, SRC + 5, 0, 64), Status::Success)],
            );
        }
        script
    }

    fn program(&mut self, guest: &Guest, context: u32, work: &[(Descriptor, Status)]) {
        let process = guest.process(context);
        process.map(Iova(NOWHERE), Gpa(common::RAM as u64), true);
        let mut memory = Simulation::default();
        let want = work.iter().map(|(d, status)| memory.run(d, *status));
        self.programs.push(Program {
            process,
            work: work.to_vec(),
            want: want.collect(),
            memory,
            frames: Vec::new(),
        });
    }

    /// Submits all.
    pub fn start(&mut self, guest: &Guest) {
        // Of the records that were counted before, none is of this script.
        guest.memory.stores.lock().unwrap().clear();
        for program in &self.programs {
            for (descriptor, _) in &program.work {
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
            guest.shoot(context, SRC, DST + (1 << 20));
            self.posted = guest.post_wait(wait::DRAINED | wait::INTERRUPT);
        }
        while let Some(request) = guest.take_request() {
            assert_eq!(request.kind, RequestKind::Page as u32, "{request:?}");
            let mut response = Response::Invalid;
            let asked = |p: &&mut Program| p.process.context == request.context;
            let program = self.programs.iter_mut().find(asked).expect("is known");
            if request.iova < REFUSED {
                let known = program.frames.iter().any(|(at, _)| *at == request.iova);
                if !known {
                    let frame = guest.pages.take();
                    guest.ram.write(frame, &contents(request.iova)).unwrap();
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
        self.ended() == self.all() && guest.ack() >= self.posted
    }

    fn all(&self) -> u64 {
        self.programs.iter().map(|p| p.work.len() as u64).sum()
    }

    /// How many records have their status.
    pub fn ended(&self) -> u64 {
        let ended = |p: &Program| {
            let over = |n: &u64| p.process.completion(*n).status != 0;
            (0..p.work.len() as u64).filter(over).count() as u64
        };
        self.programs.iter().map(ended).sum()
    }

    /// Runs to the end.
    pub fn finish(&mut self, guest: &Guest) {
        for _ in 0..10_000 {
            if !self.step(guest) {
                return;
            }
        }
        panic!("does not come to an end: {} ended", self.ended());
    }

    /// Nothing is half done or done twice.
    pub fn check_half(&self, guest: &Guest, what: &str) {
        let stores = guest.memory.stores.lock().unwrap();
        for program in &self.programs {
            for (n, (descriptor, status)) in program.work.iter().enumerate() {
                let done = program.process.completion(n as u64);
                let record = Gpa(program.process.records_page.0 + n as u64 * 32);
                let times = stores.get(&record).copied().unwrap_or(0);
                assert_eq!(times, u64::from(done.status != 0), "{what}: {n} {done:?}");
                if done.status == 0 {
                    continue;
                }
                assert_eq!(Status::from_raw(done.status), Some(*status), "{what}: {n}");
                assert_eq!((done.bytes, done.result), program.want[n], "{what}: {n}");
                match status {
                    Status::PageFault => assert_eq!(done.fault_addr, descriptor.dst, "{what}"),
                    Status::BusError => assert_eq!(done.fault_addr, NOWHERE, "{what}"),
                    _ => {}
                }
            }
        }
    }

    /// All is done, once, and the memory is as it must be.
    pub fn check(&self, guest: &Guest, what: &str) {
        self.check_half(guest, what);
        assert_eq!(self.ended(), self.all(), "{what}: lost");
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
