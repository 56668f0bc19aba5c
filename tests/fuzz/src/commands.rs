//! An invalidation queue of arbitrary bytes.
//!
//! The input is commands, a step each. Before each step a reference says what the command at the
//! head must lead to: it is carried out (and a wait acknowledged), or the device stops, with the
//! error that belongs to it and the index or address that it is about. Nothing else can happen,
//! and never is nothing done while a command is there.

use std::cell::RefCell;

use extlb_device::Step;
use extlb_spec::context::{ContextEntry, flags as context_flags};
use extlb_spec::invalidation::Command;
use extlb_spec::regs::{self, FatalError};
use extlb_spec::work::{Descriptor, Opcode};
use extlb_spec::{Gpa, PAGE_SIZE};

use crate::input::Input;
use crate::machine::{CONTEXTS, CTX_TABLE, FREE, IQ_ENTRIES, Machine, word};
use crate::memory::may;

/// RAM that commands may let the device write.
const PAGES: u64 = 8;
/// Commands of an input.
const COMMANDS: usize = 32;
/// Tables, ring and shadow page of the contexts, in [`PAGES`]; what is there is as it comes.
const SPACE: Gpa = FREE;

/// What a command leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    /// Acknowledged: this at that address.
    Written(u64, Gpa),
    Stops(FatalError, u64),
}

struct World {
    machine: Machine,
}

impl World {
    fn new() -> Self {
        let machine = Machine::new(&[(Gpa(0), FREE.0 / PAGE_SIZE + PAGES)]);
        Self { machine }
    }

    fn begin(&mut self) {
        let clean = self.machine.fatal().is_none() && self.machine.iq_tail < 1 << 30;
        for page in 0..PAGES {
            let at = Gpa(FREE.0 + page * PAGE_SIZE);
            self.machine.memory.clear(at);
        }
        if !clean {
            self.machine.enable();
        }
        // The kernel is trusted with its own memory: a wait may write any of it.
        for page in 0..FREE.0 / PAGE_SIZE + PAGES {
            self.machine.memory.allow(Gpa(page * PAGE_SIZE), may::ALL);
        }
    }

    /// Whether a word of 8 bytes at an address is in RAM.
    fn is_ram(at: u64, len: u64) -> bool {
        at.checked_add(len)
            .is_some_and(|end| end <= FREE.0 + PAGES * PAGE_SIZE)
    }

    /// The reference, by the words of the datasheet.
    fn outcome(command: &Command, index: u32) -> Outcome {
        let bad = Outcome::Stops(FatalError::BadCommand, index.into());
        let Command {
            kind,
            flags,
            context,
            group,
            addr,
            value,
        } = *command;
        let known = context < CONTEXTS;
        match (kind, flags) {
            // A page response.
            (4, 0..=2) if known => Outcome::Done,
            _ if group != 0 => bad,
            // Invalidations: of a range, a context, all.
            (1, 0) => {
                let end = addr.checked_add(value);
                let pages = |end: u64| (addr | end).is_multiple_of(PAGE_SIZE);
                match end.is_some_and(pages) && known {
                    true => Outcome::Done,
                    false => bad,
                }
            }
            (1, 1) if known => Outcome::Done,
            (1, 2) if context == 0 => Outcome::Done,
            // A wait.
            (2, _) if flags & !0b11_0011 == 0 && context == 0 => match flags & 1 {
                0 => Outcome::Done,
                _ if !addr.is_multiple_of(8) => bad,
                _ if !Self::is_ram(addr, 8) => Outcome::Stops(FatalError::WaitWrite, addr),
                _ => Outcome::Written(value, Gpa(addr)),
            },
            // A sync.
            (3, 0) if known => Outcome::Done,
            // An audit.
            (5, 0 | 1) if known && addr.is_multiple_of(64) => match Self::is_ram(addr, 64) {
                true => Outcome::Written(1, Gpa(addr.wrapping_add(56))),
                false => Outcome::Stops(FatalError::WaitWrite, addr),
            },
            _ => bad,
        }
    }

    /// A command that is worth a try.
    fn command(input: &mut Input<'_>) -> Command {
        let choice = input.u8();
        if choice & 0x80 != 0 {
            return Command::from_bytes(&input.array());
        }
        let small = input.u8();
        let near = |input: &mut Input<'_>| match input.u8() {
            0xff => input.u64(),
            0xfe => !u64::from(input.u16()),
            page => u64::from(page % 16) * PAGE_SIZE + u64::from(input.u8()) * 8,
        };
        let kind = u32::from(choice & 7);
        let (mut addr, mut value) = (near(input), near(input));
        if kind == 1 && small & 0x80 == 0 {
            addr &= !(PAGE_SIZE - 1);
            value &= !(PAGE_SIZE - 1);
        }
        let flags = match kind {
            2 => u32::from(small & 0x33),
            _ => u32::from(small & 3),
        };
        Command {
            kind,
            flags: flags | u32::from(choice >> 6) << 2,
            context: match kind {
                2 => 0,
                1 if flags == 2 => 0,
                _ => u32::from(small >> 3 & 7),
            },
            group: match kind {
                4 => small.into(),
                _ => u32::from(choice >> 5 & 1),
            },
            addr,
            value,
        }
    }

    /// Puts a context table entry, good or not, and a descriptor for it.
    fn entry(&self, input: &mut Input<'_>) {
        let index = input.u8();
        let mut bytes: [u8; ContextEntry::SIZE] = input.array();
        if index & 0x80 == 0 {
            let entry = ContextEntry {
                flags: context_flags::VALID | u64::from(index >> 6) << 1,
                page_table: SPACE.0,
                ring: 0,
                ring_log2: 1,
                credits: 1,
                shadow: SPACE.0 + 2 * PAGE_SIZE,
                cpu_page_table: SPACE.0,
                ..Default::default()
            };
            // Some bytes of the input spoil it.
            let good = entry.to_bytes();
            for (byte, good) in bytes.iter_mut().zip(good) {
                *byte = if *byte & 0xf0 == 0xf0 { *byte } else { good };
            }
        }
        let at = Gpa(CTX_TABLE.0 + u64::from(index % CONTEXTS as u8) * ContextEntry::SIZE as u64);
        let memory = &self.machine.memory;
        memory.put(at, &bytes);
        // A page table that maps its own page at address 0, and something to do.
        memory.put_u64(SPACE, SPACE.0 | 1);
        let fill = Descriptor {
            opcode: Opcode::Fill as u8,
            dst: 3 * PAGE_SIZE,
            len: 64,
            completion: 4 * PAGE_SIZE,
            ..Default::default()
        };
        let at = Gpa(SPACE.0 + 64);
        memory.put(at, &fill.to_bytes());
        memory.put_u32(Gpa(SPACE.0 + 2 * PAGE_SIZE), 1);
    }

    /// One command; false if the device stopped.
    fn step(&mut self, command: &Command) -> bool {
        let memory = self.machine.memory.clone();
        let index = self.machine.iq_tail;
        let at = Machine::command_at(index);
        memory.put(at, &command.to_bytes());
        self.machine.iq_tail = index.wrapping_add(1);
        memory.put_u32(word!(iq_tail), self.machine.iq_tail);
        let expected = Self::outcome(command, index);
        if let Outcome::Written(value, at) = expected {
            memory.put_u64(at, !value);
            // That may have been the command, or the tail.
            memory.put(Machine::command_at(index), &command.to_bytes());
            memory.put_u32(word!(iq_tail), self.machine.iq_tail);
        }
        let step = self.machine.device.invalidation_step();
        match expected {
            Outcome::Stops(error, info) => {
                assert_eq!(step, Step::Idle);
                assert_eq!(self.machine.fatal(), Some(error), "{command:?}");
                assert_eq!(self.machine.get(&regs::ERROR_INFO), info, "{command:?}");
                return false;
            }
            Outcome::Done | Outcome::Written(..) => {
                let fatal = self.machine.fatal();
                assert_eq!((step, fatal), (Step::Busy, None), "{command:?}");
            }
        }
        if let Outcome::Written(value, at) = expected {
            let head = word!(iq_head);
            // The head is written after it, and may be in the same place.
            if at.0 >> 3 != head.0 >> 3 {
                assert_eq!(memory.get_u64(at), value, "{command:?}");
            }
        }
        assert_eq!(self.machine.iq_head(), self.machine.iq_tail, "not retired");
        // What was written may be the kernel's own words.
        memory.put_u32(word!(iq_tail), self.machine.iq_tail);
        true
    }

    fn run(&mut self, data: &[u8]) {
        self.begin();
        let mut input = Input::new(data);
        for _ in 0..COMMANDS {
            if input.is_empty() {
                break;
            }
            match input.u8() % 8 {
                0 => self.entry(&mut input),
                1 => {
                    for _ in 0..1 + input.below(8) {
                        self.machine.device.engine_step();
                    }
                    // Contexts write anywhere here; the kernel's own words are put back.
                    if self.machine.fatal().is_some() {
                        break;
                    }
                    self.machine
                        .memory
                        .put_u32(word!(iq_tail), self.machine.iq_tail);
                }
                2 if input.u8() == 0xaa => {
                    // A tail beyond the ring.
                    let wrong = self
                        .machine
                        .iq_tail
                        .wrapping_add(IQ_ENTRIES + 1 + input.u32() % 1000);
                    self.machine.memory.put_u32(word!(iq_tail), wrong);
                    assert_eq!(self.machine.device.invalidation_step(), Step::Idle);
                    assert_eq!(self.machine.fatal(), Some(FatalError::IqOverrun));
                    assert_eq!(self.machine.get(&regs::ERROR_INFO), u64::from(wrong));
                    break;
                }
                _ => {
                    let command = Self::command(&mut input);
                    if !self.step(&command) {
                        break;
                    }
                }
            }
        }
        self.end();
    }

    /// Stopped with a reason, or all contexts can be stopped by a device that goes on.
    fn end(&mut self) {
        if self.machine.fatal().is_some() {
            let before = self.machine.memory.accesses();
            assert_eq!(self.machine.device.invalidation_step(), Step::Idle);
            assert_eq!(self.machine.device.engine_step(), Step::Idle);
            assert_eq!(self.machine.memory.accesses(), before, "it is stopped");
            return;
        }
        for context in 0..CONTEXTS {
            self.machine.write_entry(context, &ContextEntry::default());
            self.machine.sync(context);
        }
        self.machine.drain();
    }
}

/// Runs an input.
pub fn run(data: &[u8]) {
    thread_local! {
        static WORLD: RefCell<World> = RefCell::new(World::new());
    }
    WORLD.with_borrow_mut(|world| world.run(data));
}
