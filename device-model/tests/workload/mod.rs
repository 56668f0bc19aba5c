//! A guest that does all sorts of things, at random but the same for the same seed: several
//! processes, page requests answered late or badly, shootdowns, stops and resets, with the
//! device stepped in between. Works with any device behind [`Core`].
#![allow(dead_code)] // each test file uses its part

use std::sync::{Arc, Mutex};
use std::time::Duration;

use extlb_device::config::{Geometry, Policy, Split};
use extlb_device::ports::{Dma, Event, Interrupts, Ports, Trace};
use extlb_device::{Config, Step, Totals};
use extlb_spec::invalidation::{Command, CommandKind, InvalidationScope, wait};
use extlb_spec::page_request::{PageRequest, RequestKind, Response, flags as request_flags};
use extlb_spec::pte::Pte;
use extlb_spec::regs;
use extlb_spec::work::{Descriptor, Opcode, Segment, flags};
use extlb_spec::{Gpa, Iova, Vector};

use crate::common::*;

/// Addresses that operations use: so many pages from here on.
const WINDOW: u64 = 0x5000_0000;
const WINDOW_PAGES: u64 = 24;
const CONTEXTS: u32 = 4;
/// Where a process has its lists of segments, and its batches; always mapped.
const LISTS: u64 = 0x6000_0000;
const BATCH: u64 = LISTS + 2048;

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// What the device let others know, in order.
#[derive(Default)]
pub struct Diary(Mutex<Vec<String>>);

impl Diary {
    pub fn note(&self, line: String) {
        self.0.lock().unwrap().push(line);
    }
}

impl Interrupts for Diary {
    fn raise(&self, vector: Vector) {
        self.note(format!("interrupt {vector:?}"));
    }
}

impl Trace for Diary {
    fn event(&self, event: Event) {
        self.note(format!("{event:?}"));
    }
}

/// All that a run leaves behind.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    pub diary: Vec<String>,
    pub totals: Totals,
    pub registers: Vec<(&'static str, u64)>,
    /// CRC32C of all of RAM.
    pub ram: u32,
}

pub struct Workload {
    pub guest: Guest,
    pub diary: Arc<Diary>,
    pub ports: Ports,
    processes: Vec<Process>,
    /// By context: the page at [`LISTS`].
    lists: Vec<Gpa>,
    random: Random,
    requests: Vec<PageRequest>,
    bus_master: bool,
}

/// A device that has much to remember, and a policy that needs its random state.
pub fn config(seed: u64) -> Config {
    let mut config = crate::common::config();
    config.tlb.sets = 4;
    config.tlb.ways = 2;
    config.tlb.seed = seed;
    config.schedule.quantum = 4096;
    config.schedule.chunk = 4096;
    config.poll_us = 50;
    config.oracle.bound_ms = 5;
    config.tlb.walk_cache = 4;
    config.tlb.policy = match seed % 4 {
        0 => Policy::Lru,
        1 => Policy::Random,
        2 => Policy::Fifo,
        _ => Policy::Plru,
    };
    if seed % 8 > 3 {
        let small = Geometry { sets: 1, ways: 2 };
        config.tlb.split = Some(Split {
            size_2m: small,
            size_1g: small,
        });
    }
    config
}

impl Workload {
    pub fn new(seed: u64, make: impl FnOnce(Ports) -> Arc<dyn Core>) -> Self {
        let diary = Arc::new(Diary::default());
        let mut kept = None;
        let guest = Guest::around(|ports| {
            let ports = Ports {
                interrupts: diary.clone(),
                trace: diary.clone(),
                ..ports
            };
            kept = Some(ports.clone());
            make(ports)
        });
        guest.device.set_bus_master(true);
        guest.enable();
        let mut workload = Self {
            guest,
            diary,
            ports: kept.unwrap(),
            processes: Vec::new(),
            lists: vec![Gpa(0); CONTEXTS as usize],
            random: Random(seed),
            requests: Vec::new(),
            bus_master: true,
        };
        workload.start_all();
        workload
    }

    fn start_all(&mut self) {
        self.requests.clear();
        self.processes = (0..CONTEXTS).map(|c| self.start(c)).collect();
    }

    /// A new process; some of its pages are there.
    fn start(&mut self, context: u32) -> Process {
        let process = Process::new(&self.guest, context);
        for page in 0..WINDOW_PAGES {
            if self.random.below(3) > 0 {
                process.map_fresh(Iova(WINDOW + page * PAGE), 1);
            }
        }
        self.lists[context as usize] = process.map_fresh(Iova(LISTS), 1)[0];
        let credits = 1 + self.random.below(3) as u32;
        process.write_entry(&self.guest, |e| e.credits = credits);
        self.guest.sync(context);
        process
    }

    fn some(&mut self) -> usize {
        self.random.below(u64::from(CONTEXTS)) as usize
    }

    fn page(&mut self) -> Iova {
        Iova(WINDOW + self.random.below(WINDOW_PAGES) * PAGE)
    }

    /// One thing that a guest does, or a few steps of the device.
    pub fn step(&mut self) {
        match self.random.below(100) {
            0..20 => self.submit(),
            20..30 => self.take_requests(),
            30..40 => self.respond(),
            40..47 => self.shoot(),
            47..50 => self.stall(),
            50 => self.restart(),
            51 if self.random.below(4) == 0 => self.reset(),
            52 => self.toggle_bus_master(),
            53..55 => self.wait(wait::WRITE | wait::INTERRUPT),
            55 if self.random.below(8) == 0 => self.audit(),
            56..60 => self.look(),
            60..65 => self.guest.clock.advance(Duration::from_micros(40)),
            65 => self.guest.clock.advance(Duration::from_millis(3)),
            _ => {
                for _ in 0..=self.random.below(12) {
                    match self.random.below(4) {
                        0 => self.guest.device.invalidation_step(),
                        _ => self.guest.device.engine_step(),
                    };
                }
            }
        }
    }

    fn submit(&mut self) {
        let context = self.some();
        if self.processes[context].ahead() == 1 << RING_LOG2 || self.processes[context].error() != 0
        {
            return;
        }
        let descriptor = match self.random.below(4) {
            0 => self.batch(context),
            1 => self.scattered(context),
            _ => self.operation(),
        };
        let process = &self.processes[context];
        process.submit(descriptor);
        process.ring(&self.guest);
    }

    /// An operation on plain ranges.
    fn operation(&mut self) -> Descriptor {
        let len = [1, 8, 100, 4096, 5000, 20_000][self.random.below(6) as usize];
        let mut at = || WINDOW + self.random.below((WINDOW_PAGES - 5) * PAGE);
        let (src, dst) = (at(), at());
        let opcode = [
            Opcode::Nop,
            Opcode::Copy,
            Opcode::Fill,
            Opcode::Crc32c,
            Opcode::Compare,
            Opcode::FetchAdd,
            Opcode::CompareSwap,
            Opcode::Fence,
        ][self.random.below(8) as usize];
        let mut descriptor = op(opcode, src, dst, len);
        if matches!(opcode, Opcode::FetchAdd | Opcode::CompareSwap) {
            (descriptor.dst, descriptor.len) = (dst & !7, 8);
        }
        descriptor.arg = self.random.next() >> 32;
        descriptor.flags = [0, flags::INTERRUPT, flags::QUIET][self.random.below(3) as usize];
        descriptor
    }

    /// A copy from a list of segments.
    fn scattered(&mut self, context: usize) -> Descriptor {
        let segments = 1 + self.random.below(5);
        let mut len = 0;
        for n in 0..segments {
            let segment = Segment {
                addr: WINDOW + self.random.below((WINDOW_PAGES - 5) * PAGE),
                len: self.random.below(6000),
            };
            len += segment.len;
            let at = Gpa(self.lists[context].0 + n * Segment::SIZE as u64);
            self.guest.ram.write(at, &segment.to_bytes()).unwrap();
        }
        let mut descriptor = copy(LISTS, WINDOW + self.random.below(PAGE), len);
        descriptor.flags = flags::SRC_LIST;
        descriptor.src_segments = segments as u32;
        descriptor
    }

    fn batch(&mut self, context: usize) -> Descriptor {
        let count = 1 + self.random.below(8);
        for n in 0..count {
            let mut descriptor = self.operation();
            descriptor.completion = self.processes[context].record(120 + n).0;
            let at = self.lists[context].0 + (BATCH - LISTS) + n * Descriptor::SIZE as u64;
            let bytes = descriptor.to_bytes();
            self.guest.ram.write(Gpa(at), &bytes).unwrap();
        }
        op(Opcode::Batch, BATCH, 0, count)
    }

    fn take_requests(&mut self) {
        while let Some(request) = self.guest.take_request() {
            self.diary.note(format!("{request:?}"));
            if request.kind == RequestKind::Page as u32 {
                self.requests.push(request);
            } else {
                self.processes[request.context as usize] = self.start(request.context);
            }
        }
    }

    fn respond(&mut self) {
        if self.requests.is_empty() || self.guest.commands_ahead() > 100 {
            return;
        }
        let request = self.random.below(self.requests.len() as u64) as usize;
        let request = self.requests.swap_remove(request);
        let response = match self.random.below(40) {
            0 => Response::Failure,
            1..4 => Response::Invalid,
            _ => Response::Success,
        };
        let process = &self.processes[request.context as usize];
        let page = Iova(request.iova);
        // Ring and records stay where they are.
        if response == Response::Success && (WINDOW..WINDOW + WINDOW_PAGES * PAGE).contains(&page.0)
        {
            let old = process.device_pte(page);
            let write = request.flags & request_flags::WRITE != 0 || self.random.below(2) == 0;
            match old.is_present() {
                true => process.map(page, old.addr(), write),
                false => process.map(page, self.guest.pages.take(), write),
            }
        }
        self.guest.respond(&request, response);
        self.kick();
    }

    /// What a kernel does to take a page away; now and then it forgets the invalidation.
    fn shoot(&mut self) {
        if self.guest.commands_ahead() > 100 {
            return;
        }
        let (context, page) = (self.some(), self.page());
        let process = &self.processes[context];
        process.set_cpu(page, None);
        process.set_device(page, Pte::EMPTY);
        let context = context as u32;
        match self.random.below(8) {
            0 => {}
            1 => self.guest.post(Command {
                kind: CommandKind::Invalidate as u32,
                flags: InvalidationScope::Context as u32,
                context,
                ..Default::default()
            }),
            _ => self.guest.post(range(context, page.0, page.0 + PAGE)),
        }
        self.wait(wait::WRITE | wait::DRAINED);
    }

    fn wait(&mut self, flags: u32) {
        if self.guest.commands_ahead() < 100 {
            self.guest.post_wait(flags);
            self.kick();
        }
    }

    fn audit(&mut self) {
        if self.guest.commands_ahead() < 100 {
            let context = self.some() as u32;
            self.guest.post(Command {
                kind: CommandKind::Audit as u32,
                context,
                addr: 0x8_0000,
                ..Default::default()
            });
        }
    }

    fn kick(&mut self) {
        if self.random.below(2) == 0 {
            self.guest.set(regs::KICK, 1);
        }
    }

    /// A doorbell for nothing.
    fn stall(&mut self) {
        let context = self.some();
        self.processes[context].ring(&self.guest);
    }

    fn restart(&mut self) {
        if self.guest.commands_ahead() > 100 {
            return;
        }
        let context = self.some();
        if self.random.below(2) == 0 {
            self.processes[context].stop(&self.guest);
        }
        self.processes[context] = self.start(context as u32);
    }

    fn reset(&mut self) {
        match self.random.below(2) {
            0 => self.guest.device.reset(),
            _ => self.guest.set(regs::CTRL, regs::ctrl::RESET.into()),
        }
        self.guest.enable();
        self.start_all();
    }

    fn toggle_bus_master(&mut self) {
        self.bus_master = !self.bus_master;
        self.guest.device.set_bus_master(self.bus_master);
    }

    /// Reads registers, some in halves.
    fn look(&mut self) {
        let register = &regs::ALL[self.random.below(regs::ALL.len() as u64) as usize];
        let mut bytes = [0; 4];
        let offset = register.offset + 4 * self.random.below(u64::from(register.width) / 4);
        self.guest.device.mmio_read(0, offset, &mut bytes);
        let value = u32::from_le_bytes(bytes);
        self.diary.note(format!("{}: {value:#x}", register.name));
    }

    /// Answers what is asked until all is done, and says what there is then.
    pub fn finish(&mut self) -> Outcome {
        if !self.bus_master {
            self.toggle_bus_master();
        }
        for _ in 0..10_000 {
            let engine = self.guest.device.engine_step();
            let invalidation = self.guest.device.invalidation_step();
            self.take_requests();
            self.respond();
            if engine != Step::Busy {
                self.guest.clock.advance(Duration::from_micros(100));
            }
            if (engine, invalidation) == (Step::Idle, Step::Idle)
                && self.requests.is_empty()
                && self.guest.commands_ahead() == 0
            {
                break;
            }
        }
        self.outcome()
    }

    pub fn outcome(&self) -> Outcome {
        let mut ram = vec![0; RAM];
        self.guest.ram.read(Gpa(0), &mut ram).unwrap();
        let registers = regs::ALL.iter().map(|r| (r.name, self.guest.get(*r)));
        Outcome {
            registers: registers.collect(),
            diary: self.diary.0.lock().unwrap().clone(),
            totals: self.guest.device.totals(),
            ram: crc32c::crc32c(&ram),
        }
    }
}
