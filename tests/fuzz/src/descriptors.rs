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

mod kernel;
mod process;
mod programs;

use std::cell::RefCell;

use extlb_device::Step;
use extlb_spec::page_request::{PageRequest, Response};
use extlb_spec::regs;
use extlb_spec::work::Descriptor;
use extlb_spec::{Gpa, Iova, PAGE_SIZE};

use crate::input::Input;
use crate::machine::{FREE, Machine, PRQ_LOG2, word};
use crate::memory::may;
use process::{Mapped, Process};

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
                // It is read again when all is done that it said before: one turn may see two
                // rings full.
                let head = process.head();
                self.machine.memory.may_count(head, 2 * RING_ENTRIES);
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
