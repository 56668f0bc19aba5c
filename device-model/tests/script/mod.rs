//! A script of work that uses all of the device: programs that submit, and a kernel that serves
//! page requests and shoots pages down in between.

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

fn byte(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
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
            ..op(Opcode::Crc32c, DST + 70, 0, PAGE)
        };
        let bad = Descriptor {
            opcode: 255,
            ..Default::default()
        };
        script.program(
            guest,
            1,
            &[
                (copy(SRC + 100, DST + 70, PAGE + 10), ok),
                (op(Opcode::Compare, SRC + 100, DST + 70, PAGE + 10), ok),
                (crc, ok),
                (op(Opcode::Fill, 0, REFUSED + 8, 8), Status::PageFault),
                (op(Opcode::Compare, SRC, DST + 70, 64), Status::Mismatch),
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
                        ..op(Opcode::Fill, 0, DST + 1, 2 * PAGE)
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
        self.programs.push(Program {
            process,
            work: work.to_vec(),
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
                    let fill = match request.iova < DST {
                        true => contents(request.iova),
                        false => vec![0; PAGE as usize],
                    };
                    guest.ram.write(frame, &fill).unwrap();
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
                match status {
                    Status::Success if descriptor.opcode == Opcode::Crc32c as u8 => {
                        let from = match descriptor.src {
                            at if at < DST => at,
                            at => at - DST - 70 + SRC + 100,
                        };
                        let data: Vec<u8> = (from..from + descriptor.len).map(byte).collect();
                        assert_eq!(done.result, u64::from(crc32c::crc32c(&data)), "{what}");
                        assert_eq!(done.bytes, descriptor.len);
                    }
                    Status::Success => assert_eq!(done.bytes, descriptor.len, "{what}: {n}"),
                    Status::PageFault => {
                        assert_eq!(done.fault_addr, descriptor.dst, "{what}: {n}");
                        assert_eq!(done.bytes, 0, "{what}: {n}");
                    }
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
            for (descriptor, status) in &program.work {
                let kind = Opcode::from_raw(descriptor.opcode);
                let wrote = matches!(kind, Some(Opcode::Copy | Opcode::Fill));
                if !wrote || *status != Status::Success {
                    continue;
                }
                for i in 0..descriptor.len {
                    let at = descriptor.dst + i;
                    let page = at & !(PAGE - 1);
                    let (_, frame) = program
                        .frames
                        .iter()
                        .find(|(iova, _)| *iova == page)
                        .expect("was asked for");
                    let at = Gpa(frame.0 + at % PAGE);
                    let want = match kind {
                        Some(Opcode::Copy) => byte(descriptor.src + i),
                        _ => descriptor.arg.to_le_bytes()[i as usize % 8],
                    };
                    let mut found = [0];
                    guest.ram.read(at, &mut found).unwrap();
                    assert_eq!(found[0], want, "{what}: byte {i}");
                }
            }
        }
    }
}
