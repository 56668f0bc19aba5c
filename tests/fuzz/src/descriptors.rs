//! Programs that submit anything, and a kernel that answers anything.
//!
//! The input is a script: work is submitted in two contexts, pages are mapped, protected and taken
//! back (by the kernel's rules), page requests answered in all ways, contexts stopped and started,
//! the device reset, its bus mastering switched. What must hold:
//!
//! - nobody panics, and the device comes to rest in a bounded number of steps;
//! - it reads and writes only what is mapped for it at the moment, or was since the last
//!   acknowledged drain; its own words and rings excepted;
//! - a drain is acknowledged by steps of the invalidation queue alone;
//! - descriptors are retired in order, none before it was submitted, and all of them, unless the
//!   context stopped with an error that has a name;
//! - a device whose contexts are stopped is silent.

use std::cell::RefCell;
use std::mem::offset_of;

use extlb_device::Step;
use extlb_spec::context::{ContextEntry, ContextError, ContextShadow, flags as context_flags};
use extlb_spec::invalidation::{Command, CommandKind, InvalidationScope};
use extlb_spec::page_request::{PageRequest, RequestKind, Response};
use extlb_spec::pte::{self, Pte, bit};
use extlb_spec::regs;
use extlb_spec::work::{Completion, Descriptor, Segment, flags as work_flags};
use extlb_spec::{Gpa, Iova, PAGE_SIZE};

use crate::input::Input;
use crate::machine::{FREE, Machine, PRQ_LOG2, word};
use crate::memory::may;

/// Contexts that work.
const PROCESSES: usize = 2;
/// Pages of RAM of a process: four tables, shadow page, ring, records.
const OWN: u64 = 7;
/// RAM for data: at a multiple of 2 MiB, so that leaves of that size can map it.
const DATA: Gpa = Gpa(2 << 20);
const DATA_PAGES: u64 = 16;
/// RAM at a multiple of 1 GiB.
const FAR: Gpa = Gpa(1 << 30);
const FAR_PAGES: u64 = 2;
/// Addresses of the programs: small pages from here on, the first two for ring and records.
const WINDOW: u64 = 0x7f40_0000_0000;
const RING: Iova = Iova(WINDOW);
const RECORDS: Iova = Iova(WINDOW + PAGE_SIZE);
/// Pages of the window that the script maps.
const WINDOW_PAGES: u64 = 16;
/// A leaf of 2 MiB may be here, one of 1 GiB there.
const LARGE: u64 = WINDOW + (2 << 20);
const HUGE: u64 = WINDOW + (1 << 30);
const RING_LOG2: u32 = 4;
const RING_ENTRIES: u32 = 1 << RING_LOG2;
/// Actions of a script; more is not looked at.
const ACTIONS: usize = 96;
/// Steps in which the device comes to rest when the kernel says no to everything.
const REST: usize = 20_000;

/// A mapping of the page table, as the kernel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapped {
    frame: Gpa,
    pages: u64,
    write: bool,
}

struct Process {
    context: u32,
    base: Gpa,
    /// Window pages, then the leaf of 2 MiB, then that of 1 GiB.
    mapped: Vec<Option<Mapped>>,
    tail: u32,
    /// The script broke the tail.
    wild: bool,
    /// Told of by a record.
    failed: Option<ContextError>,
    running: bool,
}

impl Process {
    fn new(index: usize) -> Self {
        Self {
            context: 1 + index as u32,
            base: Gpa(FREE.0 + index as u64 * OWN * PAGE_SIZE),
            mapped: vec![None; WINDOW_PAGES as usize + 2],
            tail: 0,
            wild: false,
            failed: None,
            running: false,
        }
    }

    fn page(&self, index: u64) -> Gpa {
        Gpa(self.base.0 + index * PAGE_SIZE)
    }

    fn shadow(&self) -> Gpa {
        self.page(4)
    }

    /// The word by which the device retires descriptors.
    fn head(&self) -> Gpa {
        Gpa(self.shadow().0 + offset_of!(ContextShadow, head) as u64)
    }

    /// The table of a level.
    fn table(&self, level: u32) -> Gpa {
        self.page(u64::from(pte::LEVELS - level))
    }

    /// Where the leaf of a place is, its address and its size.
    fn leaf(&self, place: usize) -> (Gpa, Iova, u64) {
        let small = WINDOW_PAGES as usize;
        let (iova, level) = match place {
            p if p == small => (LARGE, 2),
            p if p == small + 1 => (HUGE, 3),
            p => (WINDOW + p as u64 * PAGE_SIZE, 1),
        };
        let iova = Iova(iova);
        let at = Gpa(self.table(level).0 + pte::index(iova, level) * 8);
        (at, iova, pte::leaf_size(level))
    }
}

struct World {
    machine: Machine,
    processes: Vec<Process>,
    /// Page requests that were not answered.
    requests: Vec<PageRequest>,
    /// One that was, for another answer.
    answered: Option<PageRequest>,
}

impl World {
    fn new() -> Self {
        let low = FREE.0 / PAGE_SIZE + OWN * PROCESSES as u64;
        let pieces = [(Gpa(0), low), (DATA, DATA_PAGES), (FAR, FAR_PAGES)];
        Self {
            machine: Machine::new(&pieces),
            processes: (0..PROCESSES).map(Process::new).collect(),
            requests: Vec::new(),
            answered: None,
        }
    }

    /// As new, whatever was.
    fn begin(&mut self) {
        if self.machine.fatal().is_some() {
            self.machine.enable();
        }
        for (start, pages) in [(DATA, DATA_PAGES), (FAR, FAR_PAGES)] {
            for page in 0..pages {
                self.machine.memory.clear(Gpa(start.0 + page * PAGE_SIZE));
            }
        }
        for index in 0..PROCESSES {
            self.processes[index] = Process::new(index);
            for page in 0..OWN {
                let at = self.processes[index].page(page);
                self.machine.memory.clear(at);
            }
            self.start(index, 0);
        }
        self.allow();
        self.machine.drain();
        self.requests.clear();
        self.answered = None;
    }

    /// What the device may do with the frames of data, by all mappings.
    fn allow(&self) {
        let memory = &self.machine.memory;
        for (start, pages) in [(DATA, DATA_PAGES), (FAR, FAR_PAGES)] {
            for page in 0..pages {
                memory.allow(Gpa(start.0 + page * PAGE_SIZE), 0);
            }
        }
        // Twice, as a frame that is mapped both ways may be written.
        for write in [false, true] {
            let rights = if write { may::ALL } else { may::READ };
            let all = self
                .processes
                .iter()
                .flat_map(|p| p.mapped.iter().flatten());
            for mapped in all.filter(|m| m.write == write) {
                for page in 0..mapped.pages {
                    memory.allow(Gpa(mapped.frame.0 + page * PAGE_SIZE), rights);
                }
            }
        }
    }

    /// Starts a context with an empty queue and nothing mapped but ring and records.
    fn start(&mut self, index: usize, choice: u8) {
        let process = &mut self.processes[index];
        process.tail = 0;
        process.wild = false;
        process.failed = None;
        process.running = true;
        let process = &self.processes[index];
        let memory = &self.machine.memory;
        memory.clear(process.shadow());
        memory.count(process.head(), RING_ENTRIES);
        for level in (1..pte::LEVELS).rev() {
            memory.allow(process.table(level), may::READ | may::SWAP);
            let at = process.table(level + 1).0 + pte::index(RING, level + 1) * 8;
            memory.put_u64(Gpa(at), Pte::table(process.table(level)).0);
        }
        memory.allow(process.table(4), may::READ | may::SWAP);
        memory.allow(process.shadow(), may::READ | may::STORE);
        for (place, page) in [(0, 5), (1, 6)] {
            memory.allow(process.page(page), may::ALL);
            memory.put_u64(process.leaf(place).0, Pte::leaf(process.page(page), true).0);
        }
        let oracle = match choice & 1 {
            0 => 0,
            _ => context_flags::ORACLE,
        };
        let entry = ContextEntry {
            flags: context_flags::VALID | oracle,
            page_table: process.table(4).0,
            ring: RING.0,
            ring_log2: RING_LOG2,
            credits: 1 + u32::from(choice >> 1 & 3),
            shadow: process.shadow().0,
            // Its tables are good enough to be looked at.
            cpu_page_table: process.table(4).0,
            ..Default::default()
        };
        self.machine.write_entry(process.context, &entry);
        self.machine.sync(process.context);
    }

    /// Stops a context. When it returns, nothing of it is under way.
    fn stop(&mut self, index: usize) {
        let context = self.processes[index].context;
        self.machine.write_entry(context, &ContextEntry::default());
        self.machine.sync(context);
        self.machine.drain();
        self.processes[index].running = false;
        // Records that were in the ring are of the past.
        self.collect();
        self.requests.retain(|request| request.context != context);
    }

    /// Changes a leaf by the rules: the device's entry, invalidation, drain; then the page is free.
    fn map(&mut self, index: usize, place: usize, new: Option<(Mapped, u64)>) {
        let process = &mut self.processes[index];
        let (at, iova, size) = process.leaf(place);
        let had = process.mapped[place].is_some() || self.machine.memory.get_u64(at) != 0;
        self.machine.memory.put_u64(at, 0);
        if had {
            let command = Command {
                kind: CommandKind::Invalidate as u32,
                flags: InvalidationScope::Range as u32,
                context: process.context,
                addr: iova.0,
                value: size,
                ..Default::default()
            };
            self.machine.post(&command);
            self.machine.drain();
        }
        self.processes[index].mapped[place] = new.map(|(mapped, _)| mapped);
        self.allow();
        if let Some((mapped, bits)) = new {
            let write = if mapped.write { bit::WRITE } else { 0 };
            let entry = mapped.frame.0 | bit::PRESENT | write | bits;
            self.machine.memory.put_u64(at, entry);
        }
    }

    /// Maps something at a place, or nothing.
    fn map_by(&mut self, index: usize, input: &mut Input<'_>) {
        // Ring and records stay: without them there is little to see.
        let place = 2 + input.below(WINDOW_PAGES) as usize;
        let choice = input.u8();
        let write = choice & 1 != 0;
        let small = WINDOW_PAGES as usize;
        let (frame, pages, bits) = match place {
            p if p == small => (DATA, DATA_PAGES, bit::LEAF),
            p if p == small + 1 => (FAR, FAR_PAGES, bit::LEAF),
            _ => {
                let page = u64::from(choice >> 1) % DATA_PAGES;
                (Gpa(DATA.0 + page * PAGE_SIZE), 1, 0)
            }
        };
        let mapped = Mapped {
            frame,
            pages,
            write,
        };
        match choice >> 5 {
            0 | 1 => self.map(index, place, None),
            // What no kernel should write: reserved bits, pages outside RAM.
            7 => {
                self.map(index, place, None);
                let broken = [1 << 62, 1 << 40, 1 << 8, bit::LEAF][usize::from(choice >> 3 & 3)];
                let at = self.processes[index].leaf(place).0;
                let broken = if place < small { broken } else { 1 << 62 };
                self.machine.memory.put_u64(at, broken | bit::PRESENT);
            }
            _ => self.map(index, place, Some((mapped, bits))),
        }
    }

    fn submit(&mut self, index: usize, mut descriptor: Descriptor) {
        let process = &mut self.processes[index];
        let slot = process.tail % RING_ENTRIES;
        if descriptor.completion == 0 {
            descriptor.completion = RECORDS.0 + u64::from(slot) * Completion::SIZE as u64;
        }
        let at = Gpa(process.page(5).0 + u64::from(slot) * Descriptor::SIZE as u64);
        let memory = &self.machine.memory;
        memory.put(at, &descriptor.to_bytes());
        let ahead = process.tail.wrapping_sub(memory.counted(process.head()));
        if ahead < RING_ENTRIES && !process.wild {
            process.tail = process.tail.wrapping_add(1);
            memory.put_u32(process.shadow(), process.tail);
        }
    }

    /// An address that is worth a try, more or less aligned.
    fn address(input: &mut Input<'_>) -> u64 {
        let choice = input.u8();
        let offset = u64::from(input.u16()) & [!0, !7, !15, !63][usize::from(choice >> 4 & 3)];
        match choice % 8 {
            0..=3 => WINDOW + offset,
            4 => LARGE + offset,
            5 => HUGE + (offset >> 1),
            6 => (1 << 48) - offset,
            _ => input.u64(),
        }
    }

    /// A descriptor of few bytes.
    fn compact(input: &mut Input<'_>) -> Descriptor {
        let length = input.u16();
        let (mantissa, shift) = (length & 0xff, length >> 8 & 0x1f);
        let (opcode, flags) = (input.u8() % 16, input.u8());
        let (src, dst) = (Self::address(input), Self::address(input));
        let arg = input.u8();
        let segments = |flag: u8| match flags & flag {
            0 => 0,
            _ => u32::from(arg % 9),
        };
        Descriptor {
            opcode,
            flags: flags
                & if flags & 0x80 == 0 {
                    work_flags::ALL
                } else {
                    !0
                },
            src,
            dst,
            len: u64::from(mantissa) << shift,
            arg: u64::from(arg),
            src_segments: segments(work_flags::SRC_LIST),
            dst_segments: segments(work_flags::DST_LIST),
            ..Default::default()
        }
    }

    /// Writes a list of segments, or the descriptors of a batch, into a page of data.
    fn list(&self, input: &mut Input<'_>) {
        let choice = input.u8();
        let mut at = Gpa(DATA.0 + u64::from(choice) % DATA_PAGES * PAGE_SIZE);
        for n in 0..input.below(9) {
            let bytes = match choice >> 4 & 1 {
                0 => {
                    let segment = Segment {
                        addr: Self::address(input),
                        len: u64::from(input.u8()) << (choice >> 5),
                    };
                    segment.to_bytes().to_vec()
                }
                _ => {
                    let mut descriptor = Self::compact(input);
                    descriptor.completion = RECORDS.0 + 1024 + n * Completion::SIZE as u64;
                    descriptor.to_bytes().to_vec()
                }
            };
            self.machine.memory.put(at, &bytes);
            at.0 += bytes.len() as u64;
        }
    }

    /// Takes what is in the page request ring.
    fn collect(&mut self) {
        while let Some(record) = self.machine.take_record() {
            let index = record.context.wrapping_sub(1) as usize;
            if record.kind == RequestKind::Page as u32 {
                self.requests.push(record);
                continue;
            }
            let error = ContextError::from_raw(record.code).expect("an error with a name");
            if let Some(process) = self.processes.get_mut(index) {
                process.failed = process.running.then_some(error);
                self.requests.retain(|r| r.context != record.context);
            }
        }
    }

    fn respond(&mut self, request: &PageRequest, response: Response) {
        self.machine.post(&Command {
            kind: CommandKind::PageResponse as u32,
            flags: response as u32,
            context: request.context,
            group: request.group,
            ..Default::default()
        });
    }

    fn answer(&mut self, input: &mut Input<'_>) {
        self.collect();
        let choice = input.u8();
        if self.requests.is_empty() || choice & 0x80 != 0 {
            // Nobody asked, or twice.
            let request = self.answered.unwrap_or(PageRequest {
                context: u32::from(choice) % 3,
                group: u32::from(choice),
                ..Default::default()
            });
            self.respond(&request, Response::Success);
            return;
        }
        let request = self
            .requests
            .remove(usize::from(choice) % self.requests.len());
        self.answered = Some(request);
        let response = match choice >> 4 & 7 {
            0..=3 => {
                let page = request.iova.wrapping_sub(WINDOW) / PAGE_SIZE;
                if (2..WINDOW_PAGES).contains(&page) {
                    let frame = Gpa(DATA.0 + page % DATA_PAGES * PAGE_SIZE);
                    let write = request.flags & extlb_spec::page_request::flags::WRITE != 0;
                    let mapped = Mapped {
                        frame,
                        pages: 1,
                        write,
                    };
                    let index = request.context as usize - 1;
                    self.map(index, page as usize, Some((mapped, 0)));
                }
                Response::Success
            }
            4 | 5 => Response::Success,
            6 => Response::Invalid,
            _ => Response::Failure,
        };
        self.respond(&request, response);
    }

    /// One action of the script.
    fn act(&mut self, input: &mut Input<'_>) {
        let action = input.u8();
        let index = usize::from(action >> 7);
        match action & 0x1f {
            0..=5 => {
                let descriptor = Self::compact(input);
                self.submit(index, descriptor);
                self.machine.doorbell(self.processes[index].context);
            }
            6 => {
                let descriptor = Descriptor::from_bytes(&input.array());
                self.submit(index, descriptor);
                self.machine.doorbell(self.processes[index].context);
            }
            7..=10 => self.map_by(index, input),
            11..=14 => self.answer(input),
            15..=18 => {
                for _ in 0..1 + input.below(32) {
                    self.machine.device.engine_step();
                }
            }
            19 => {
                self.machine.device.invalidation_step();
            }
            20 | 21 => {
                // What a program has in its memory: lists, descriptors of batches.
                let page = input.below(DATA_PAGES + 1);
                let offset = u64::from(input.u8()) * 16;
                let len = input.u8();
                let bytes = input.take(usize::from(len));
                let base = match page {
                    DATA_PAGES => self.processes[index].page(6),
                    page => Gpa(DATA.0 + page * PAGE_SIZE),
                };
                let len = bytes.len().min((PAGE_SIZE - offset) as usize);
                let at = Gpa(base.0 + offset);
                self.machine.memory.put(at, &bytes[..len]);
            }
            22 | 30 => self.list(input),
            23 => {
                // A tail that makes no sense.
                let process = &mut self.processes[index];
                process.wild = true;
                process.tail = input.u32();
                self.machine.memory.put_u32(process.shadow(), process.tail);
                self.machine.doorbell(process.context);
            }
            24 => {
                // The program may write all of its shadow page.
                let offset = u64::from(input.u8()) * 4;
                let value = input.u32();
                if offset != 0 {
                    let at = Gpa(self.processes[index].shadow().0 + offset);
                    self.machine.memory.put_u32(at, value);
                }
            }
            25 => {
                self.stop(index);
                let choice = input.u8();
                self.start(index, choice);
            }
            26 => self.stop(index),
            27 => {
                let on = input.u8() & 1 != 0;
                self.machine.device.set_bus_master(on);
                if !on {
                    self.silent(0);
                }
                // Without it nothing is acknowledged.
                self.machine.device.set_bus_master(true);
            }
            28 => {
                // A head that makes no sense leaves no room.
                self.collect();
                let head = self.machine.prq_head;
                let wrong = head.wrapping_sub(1 << PRQ_LOG2);
                self.machine.memory.put_u32(word!(prq_head), wrong);
                for _ in 0..8 {
                    self.machine.device.engine_step();
                }
                self.machine.memory.put_u32(word!(prq_head), head);
                self.machine.set(&regs::KICK, 1);
            }
            29 if input.u8() == 0x55 => {
                // Rare, as it costs much.
                self.machine.enable();
                self.requests.clear();
                for process in &mut self.processes {
                    process.running = false;
                }
                self.silent(u64::MAX);
                for index in 0..PROCESSES {
                    self.start(index, 0);
                }
            }
            _ => self.machine.doorbell(self.processes[index].context),
        }
    }

    /// Steps, and sees that no memory is accessed meanwhile but the kernel's, at most so often.
    fn silent(&self, accesses: u64) {
        let memory = &self.machine.memory;
        for process in &self.processes {
            for page in 0..OWN {
                memory.allow(process.page(page), 0);
            }
        }
        for (start, pages) in [(DATA, DATA_PAGES), (FAR, FAR_PAGES)] {
            for page in 0..pages {
                memory.allow(Gpa(start.0 + page * PAGE_SIZE), 0);
            }
        }
        let before = memory.accesses();
        for _ in 0..4 {
            self.machine.device.engine_step();
            self.machine.device.invalidation_step();
        }
        let accesses_now = memory.accesses() - before;
        assert!(accesses_now <= accesses, "{accesses_now} accesses");
        for process in &self.processes {
            for page in 0..4 {
                memory.allow(process.page(page), may::READ | may::SWAP);
            }
            memory.allow(process.shadow(), may::READ | may::STORE);
            memory.allow(process.page(5), may::ALL);
            memory.allow(process.page(6), may::ALL);
        }
        self.allow();
    }

    /// The kernel says no to everything, until there is nothing left.
    fn rest(&mut self) {
        let mut steps = 0;
        loop {
            let device = &self.machine.device;
            let done = (device.engine_step(), device.invalidation_step());
            self.collect();
            for request in std::mem::take(&mut self.requests) {
                self.respond(&request, Response::Invalid);
            }
            let posted = self.machine.iq_tail == self.machine.iq_head();
            if done == (Step::Idle, Step::Idle) && posted {
                return;
            }
            steps += 1;
            assert!(steps < REST, "the device does not come to rest");
        }
    }

    fn end(&mut self) {
        for process in &self.processes {
            self.machine.doorbell(process.context);
        }
        self.rest();
        assert_eq!(self.machine.fatal(), None, "a program stopped the device");
        for process in &self.processes {
            let done = self.machine.memory.counted(process.head());
            if process.running && process.failed.is_none() {
                assert_eq!(done, process.tail, "a descriptor was left behind");
            }
        }
        for index in 0..PROCESSES {
            self.stop(index);
        }
        self.silent(u64::MAX);
    }

    fn run(&mut self, data: &[u8]) {
        self.begin();
        let mut input = Input::new(data);
        for _ in 0..ACTIONS {
            if input.is_empty() {
                break;
            }
            self.act(&mut input);
        }
        self.end();
    }
}

/// Runs a script.
pub fn run(data: &[u8]) {
    thread_local! {
        static WORLD: RefCell<World> = RefCell::new(World::new());
    }
    WORLD.with_borrow_mut(|world| world.run(data));
}
