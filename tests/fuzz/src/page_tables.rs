//! Page tables of arbitrary entries.
//!
//! The input fills tables and names addresses. Each address is read, or written, by an operation
//! of one byte; what the device says and does is what a reference walker says, word by word: the
//! same end, the same byte read, and nothing in memory changed but that byte and the accessed and
//! dirty bits of the one leaf. The number of accesses is bounded.

use std::cell::RefCell;
use std::mem::offset_of;

use extlb_device::Step;
use extlb_spec::context::{ContextEntry, ContextError, ContextShadow, flags as context_flags};
use extlb_spec::invalidation::{Command, CommandKind, InvalidationScope};
use extlb_spec::page_request::{RequestKind, Response, flags as request_flags};
use extlb_spec::work::{Completion, Descriptor, Opcode, Status};
use extlb_spec::{Gpa, Iova, PAGE_SIZE};

use crate::input::Input;
use crate::machine::{FREE, Machine};
use crate::memory::may;

/// Pages of arbitrary tables and data; the root is the first.
const TABLES: Gpa = FREE;
const PAGES: u64 = 8;
/// More of it at the place of a leaf of 2 MiB, and of 1 GiB.
const LARGE: Gpa = Gpa(2 << 20);
const HUGE: Gpa = Gpa(1 << 30);
const HIGH_PAGES: u64 = 2;
/// Tables that lead to ring and record, in the last entry of the root; out of reach otherwise.
const OWN: Gpa = Gpa(FREE.0 + PAGES * PAGE_SIZE);
const SHADOW: Gpa = Gpa(OWN.0 + 3 * PAGE_SIZE);
const RING_PAGE: Gpa = Gpa(OWN.0 + 4 * PAGE_SIZE);
const OWN_PAGES: u64 = 5;
const CONTEXT: u32 = 1;
const RING: Iova = Iova(511 << 39);
const RING_LOG2: u32 = 2;
const RECORD: u64 = 2048;
/// Addresses that one input may try.
const TRIES: usize = 8;
/// Accesses of an operation of one byte: itself, its descriptor, record and words, four walks,
/// and twice that for the second attempt after a response.
const ACCESSES: u64 = 200;

/// What an access ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Here, by the leaf in the entry at the second place.
    Leaf(Gpa, Gpa),
    NotMapped,
    /// On the bus, or for reserved bits; by a leaf in this entry that names no RAM.
    Broken(Option<Gpa>),
}

struct World {
    machine: Machine,
    tail: u32,
}

impl World {
    fn new() -> Self {
        let low = OWN.0 / PAGE_SIZE + OWN_PAGES;
        let pieces = [(Gpa(0), low), (LARGE, HIGH_PAGES), (HUGE, HIGH_PAGES)];
        let machine = Machine::new(&pieces);
        let memory = &machine.memory;
        for (start, pages) in [(TABLES, PAGES), (LARGE, HIGH_PAGES), (HUGE, HIGH_PAGES)] {
            for page in 0..pages {
                memory.allow(Gpa(start.0 + page * PAGE_SIZE), may::ALL);
            }
        }
        for page in 0..3 {
            memory.allow(Gpa(OWN.0 + page * PAGE_SIZE), may::READ | may::SWAP);
        }
        memory.allow(SHADOW, may::READ | may::STORE);
        memory.allow(RING_PAGE, may::ALL);
        Self { machine, tail: 0 }
    }

    /// All of memory that an arbitrary entry can name without leaving what is the program's.
    fn pieces() -> [(Gpa, u64); 3] {
        [(TABLES, PAGES), (LARGE, HIGH_PAGES), (HUGE, HIGH_PAGES)]
    }

    /// Whether an address is in one of them.
    fn is_own(at: Gpa) -> bool {
        let inside = |(start, pages): &(Gpa, u64)| {
            let offset = at.0.checked_sub(start.0);
            offset.is_some_and(|offset| offset < pages * PAGE_SIZE)
        };
        Self::pieces().iter().any(inside)
    }

    fn is_ram(at: Gpa) -> bool {
        at.0 < OWN.0 + OWN_PAGES * PAGE_SIZE || Self::is_own(at)
    }

    /// The reference: one loop, by the words of the datasheet.
    fn walk(&self, iova: u64, write: bool) -> End {
        let mut table = TABLES.0;
        for level in [4, 3, 2, 1] {
            let shift = 12 + 9 * (level - 1);
            let at = table + (iova >> shift) % 512 * 8;
            if !Self::is_ram(Gpa(at)) {
                return End::Broken(None);
            }
            let entry = self.machine.memory.get_u64(Gpa(at));
            if entry & 1 == 0 {
                return End::NotMapped;
            }
            let address = entry & 0x000f_ffff_ffff_f000;
            let leaf = level == 1 || entry & 0x80 != 0;
            let mut reserved = 0xfff0_0000_0000_0000 | 0x11c;
            if level == 1 || level == 4 {
                reserved |= 0x80;
            }
            if !leaf {
                reserved |= 0x60;
            }
            if entry & reserved != 0 || leaf && !address.is_multiple_of(1 << shift) {
                return End::Broken(None);
            }
            if !leaf {
                table = address;
                continue;
            }
            if write && entry & 2 == 0 {
                return End::NotMapped;
            }
            let to = Gpa(address + iova % (1 << shift));
            return match Self::is_ram(to) {
                true => End::Leaf(to, Gpa(at)),
                false => End::Broken(Some(Gpa(at))),
            };
        }
        End::Broken(None)
    }

    /// Fills memory from the input, and starts the context.
    fn begin(&mut self, input: &mut Input<'_>) {
        if self.machine.fatal().is_some() {
            self.machine.enable();
        }
        let memory = self.machine.memory.clone();
        for (start, pages) in Self::pieces() {
            for page in 0..pages {
                let at = Gpa(start.0 + page * PAGE_SIZE);
                memory.clear(at);
            }
        }
        memory.clear(SHADOW);
        for _ in 0..input.u8() {
            self.entry(input);
        }
        // The way to ring and record, last: it is always there.
        for (table, next) in [(0, 1), (1, 2)] {
            let at = Gpa(OWN.0 + table * PAGE_SIZE);
            memory.put_u64(at, (OWN.0 + next * PAGE_SIZE) | 1);
        }
        memory.put_u64(Gpa(OWN.0 + 2 * PAGE_SIZE), RING_PAGE.0 | 3);
        memory.put_u64(Gpa(TABLES.0 + 511 * 8), OWN.0 | 1);
        let entry = ContextEntry {
            flags: context_flags::VALID,
            page_table: TABLES.0,
            ring: RING.0,
            ring_log2: RING_LOG2,
            credits: 2,
            shadow: SHADOW.0,
            ..Default::default()
        };
        self.machine.write_entry(CONTEXT, &entry);
        self.machine.sync(CONTEXT);
        self.machine.drain();
        self.tail = 0;
        // After a reset the device looks at every context once.
        self.rest();
    }

    /// One entry of a table.
    fn entry(&self, input: &mut Input<'_>) {
        let slot = u64::from(input.u16());
        let page = slot >> 9 & 7;
        let at = Gpa(TABLES.0 + page * PAGE_SIZE + slot % 512 * 8);
        let kind = slot >> 12;
        let raw = match kind & 0xf {
            // Anything at all.
            0 | 1 => input.u64(),
            // A table, or a small leaf, in the same memory.
            2..=9 => {
                let bits = u64::from(input.u16());
                (TABLES.0 + (bits >> 12 & 7) * PAGE_SIZE) | bits & 0xfff
            }
            10 | 11 => LARGE.0 | u64::from(input.u16()),
            12 | 13 => HUGE.0 | u64::from(input.u16()),
            // A leaf's address near the end of RAM.
            14 => (LARGE.0 + (HIGH_PAGES - input.below(3)) * PAGE_SIZE) | 3,
            // One bit more than a leaf has, somewhere.
            _ => (1 << input.below(64)) | (TABLES.0 + 5 * PAGE_SIZE) | 3,
        };
        // Nothing of the device's own: its tables, its ring and its words are not for data.
        let address = raw & 0x000f_ffff_ffff_f000;
        if address < FREE.0 || (OWN.0..OWN.0 + OWN_PAGES * PAGE_SIZE).contains(&address) {
            return;
        }
        self.machine.memory.put_u64(at, raw);
    }

    /// Whether an access leaves the way to the ring and to itself as it is: tables that point at
    /// themselves can map anything.
    fn is_fair(to: Gpa, entry: Gpa, write: bool) -> bool {
        let words = [entry.0 >> 3, (TABLES.0 + 511 * 8) >> 3];
        let own = !Self::is_own(to) || !Self::is_own(entry);
        let spoils = write && words.contains(&(to.0 >> 3));
        !own && !spoils
    }

    /// Lets the device come to rest.
    fn rest(&self) {
        for _ in 0..500 {
            let device = &self.machine.device;
            let done = (device.engine_step(), device.invalidation_step());
            let posted = self.machine.iq_tail == self.machine.iq_head();
            if done == (Step::Idle, Step::Idle) && posted {
                return;
            }
        }
        panic!("the device does not come to rest");
    }

    /// Accesses one byte.
    fn access(&mut self, iova: u64, write: bool, value: u8) {
        let iova = iova % (511 << 39);
        let expected = self.walk(iova, write);
        let memory = self.machine.memory.clone();
        let word = |at: Option<Gpa>| at.map_or(0, |at| memory.get_u64(at));
        let (to, entry) = match expected {
            End::Leaf(to, entry) => (Some(to), Some(entry)),
            End::NotMapped => (None, None),
            End::Broken(entry) => (None, entry),
        };
        let byte = |to: Option<Gpa>| to.map_or(0, |to| u8::from_le_bytes(memory.get(to)));
        let (old_entry, old_byte) = (word(entry), byte(to));
        let slot = u64::from(self.tail % (1 << RING_LOG2));
        let record = RECORD + slot * Completion::SIZE as u64;
        let descriptor = Descriptor {
            opcode: if write { Opcode::Fill } else { Opcode::Crc32c } as u8,
            src: iova,
            dst: iova,
            len: 1,
            completion: RING.0 + record,
            arg: if write { u64::from(value) } else { 0 },
            ..Default::default()
        };
        let at = Gpa(RING_PAGE.0 + slot * Descriptor::SIZE as u64);
        memory.put(at, &descriptor.to_bytes());
        memory.put_u32(Gpa(RING_PAGE.0 + record), 0);
        self.tail = self.tail.wrapping_add(1);
        memory.put_u32(SHADOW, self.tail);
        let before = memory.accesses();
        memory.changed();
        self.machine.doorbell(CONTEXT);
        self.rest();
        let mut asked = None;
        if let Some(request) = self.machine.take_record() {
            assert_eq!(request.kind, RequestKind::Page as u32, "{request:?}");
            asked = Some((request.iova, request.flags & request_flags::WRITE != 0));
            self.machine.post(&Command {
                kind: CommandKind::PageResponse as u32,
                flags: Response::Invalid as u32,
                context: CONTEXT,
                group: request.group,
                ..Default::default()
            });
            self.machine.set(&extlb_spec::regs::KICK, 1);
            self.rest();
        }
        let accesses = memory.accesses() - before;
        assert!(accesses <= ACCESSES, "{accesses} accesses for a byte");
        let done = Completion::from_bytes(&memory.get(Gpa(RING_PAGE.0 + record)));
        let status = Status::from_raw(done.status).expect("a status with a name");
        let used = old_entry | if write { 0x60 } else { 0x20 };
        // What must have been changed, beside the device's own words and records.
        let mut changes = Vec::new();
        if let Some(entry) = entry {
            changes.extend((used != old_entry).then_some((entry, 8)));
            assert_eq!(memory.get_u64(entry), used, "accessed and dirty");
        }
        match expected {
            End::Leaf(to, _) => {
                assert_eq!((status, done.bytes, asked), (Status::Success, 1, None));
                let new = byte(Some(to));
                if write {
                    changes.push((to, 1));
                    assert_eq!(new, value);
                } else {
                    // It may be a byte of the entry: read before the bits were set, or after.
                    let sums = [crc(old_byte), crc(new)];
                    assert!(sums.contains(&done.result), "another byte");
                }
            }
            End::NotMapped => {
                assert_eq!(status, Status::PageFault, "{done:?}");
                assert_eq!((done.fault_addr, done.bytes), (iova, 0));
                assert_eq!(done.fault, u32::from(write));
                assert_eq!(asked, Some((iova & !(PAGE_SIZE - 1), write)));
            }
            End::Broken(_) => {
                assert_eq!(status, Status::BusError, "{done:?}");
                assert_eq!((done.fault_addr, done.bytes, asked), (iova, 0, None));
            }
        }
        let changed = memory.changed();
        let changed: Vec<_> = changed.into_iter().filter(|c| Self::is_own(c.0)).collect();
        assert_eq!(changed, changes, "changed, and should be");
    }

    /// Forgets all translations.
    fn flush(&mut self) {
        self.machine.post(&Command {
            kind: CommandKind::Invalidate as u32,
            flags: InvalidationScope::All as u32,
            ..Default::default()
        });
        self.machine.drain();
    }

    fn run(&mut self, data: &[u8]) {
        let mut input = Input::new(data);
        self.begin(&mut input);
        for _ in 0..TRIES {
            if input.is_empty() {
                break;
            }
            let choice = input.u8();
            let iova = match choice & 0xc {
                // Small parts, so that they meet the entries that were written.
                0 | 4 => {
                    let [a, b, c, d, e] = input.array().map(u64::from);
                    a << 39 | b << 30 | c << 21 | d << 12 | e
                }
                8 => input.u64() >> 16,
                _ => u64::from(input.u16()) << 32 | u64::from(input.u16()),
            };
            let write = choice & 1 != 0;
            if let End::Leaf(to, entry) = self.walk(iova % (511 << 39), write)
                && !Self::is_fair(to, entry, write)
            {
                continue;
            }
            self.access(iova, write, choice >> 4);
            self.flush();
        }
        self.stop();
    }

    fn stop(&mut self) {
        self.machine.write_entry(CONTEXT, &ContextEntry::default());
        self.machine.sync(CONTEXT);
        self.machine.drain();
        let error = Gpa(SHADOW.0 + offset_of!(ContextShadow, error) as u64);
        let error = ContextError::from_raw(self.machine.memory.get_u32(error));
        assert_eq!(error, None, "the context failed");
        assert_eq!(self.machine.fatal(), None, "the device failed");
    }
}

/// CRC32C of one byte, bit by bit.
fn crc(byte: u8) -> u64 {
    let mut crc = !0u32 ^ u32::from(byte);
    for _ in 0..8 {
        crc = crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
    }
    u64::from(!crc)
}

/// Runs an input.
pub fn run(data: &[u8]) {
    thread_local! {
        static WORLD: RefCell<World> = RefCell::new(World::new());
    }
    WORLD.with_borrow_mut(|world| world.run(data));
}
