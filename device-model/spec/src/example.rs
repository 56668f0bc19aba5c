//! A worked example: from reset to the first page that was shot down, and a proof of silence.
//!
//! It is data, so that the datasheet prints it and a test of the device plays it: each value that
//! is said to be found was found.

use core::mem::offset_of;

use crate::context::{ContextEntry, ContextShadow, flags as context_flags};
use crate::invalidation::{Command, CommandKind, InvalidationScope, KernelShadow, wait};
use crate::page_request::{PageRequest, RequestKind, Response, flags as request_flags};
use crate::pte::{self, Pte, bit};
use crate::regs::{self, Register};
use crate::table::Layout;
use crate::work::{Completion, Descriptor, Opcode, Status, fault, flags as work_flags};
use crate::{Gpa, Iova, PAGE_SIZE, Vector};

/// Bytes in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Item {
    /// The structure, if they are one.
    pub layout: Option<&'static Layout>,
    bytes: [u8; 64],
    len: usize,
}

impl Item {
    fn new(layout: Option<&'static Layout>, from: &[u8]) -> Self {
        let mut bytes = [0; 64];
        bytes[..from.len()].copy_from_slice(from);
        Self {
            layout,
            bytes,
            len: from.len(),
        }
    }

    /// The bytes, 64 at most.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl From<u32> for Item {
    fn from(word: u32) -> Self {
        Self::new(None, &word.to_le_bytes())
    }
}

impl From<u64> for Item {
    fn from(word: u64) -> Self {
        Self::new(None, &word.to_le_bytes())
    }
}

impl From<&[u8]> for Item {
    /// At most 64 bytes.
    fn from(bytes: &[u8]) -> Self {
        Self::new(None, bytes)
    }
}

macro_rules! items {
    ($($structure:ty),*) => {$(
        impl From<$structure> for Item {
            fn from(structure: $structure) -> Self {
                Self::new(Some(&<$structure>::LAYOUT), &structure.to_bytes())
            }
        }
    )*};
}
items!(ContextEntry, Command, PageRequest, Descriptor, Completion);

/// A step of software, or something that it finds. After each write to a BAR the device is left
/// alone until it has come to rest.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// What follows, in a few words.
    Title(&'static str),
    /// Why.
    Say(&'static str),
    /// Writes 16 bits to the PCI configuration space.
    Config(&'static str, u16, u16),
    /// Writes a register.
    Write(Register, u64),
    /// Reads a register, and finds this.
    Read(Register, u64),
    /// Writes a 1 to the doorbell page of a context.
    Doorbell(u32),
    /// Writes guest memory.
    Put(&'static str, Gpa, Item),
    /// Reads guest memory, and finds this.
    Find(&'static str, Gpa, Item),
    /// An interrupt has come since the last time, and no other.
    Interrupt(Vector),
}

/// Bytes of RAM from 0 on that the example needs, zero at first.
pub const RAM: u64 = 0x4_0000;

const CTX_TABLE: Gpa = Gpa(0x1_0000);
const IQ: Gpa = Gpa(0x1_1000);
const PRQ: Gpa = Gpa(0x1_2000);
const SHADOW: Gpa = Gpa(0x1_3000);
const CONTEXT: u32 = 1;
const CONTEXT_SHADOW: Gpa = Gpa(0x1_4000);
/// Tables of levels 4 to 1.
const TABLES: [Gpa; 4] = [Gpa(0x2_0000), Gpa(0x2_1000), Gpa(0x2_2000), Gpa(0x2_3000)];

const RING: Iova = Iova(0x7f12_3456_0000);
const RECORDS: Iova = Iova(RING.0 + PAGE_SIZE);
const SOURCE: Iova = Iova(RING.0 + 2 * PAGE_SIZE);
const TARGET: Iova = Iova(RING.0 + 3 * PAGE_SIZE);
const RING_PAGE: Gpa = Gpa(0x3_0000);
const RECORDS_PAGE: Gpa = Gpa(0x3_1000);
const SOURCE_PAGE: Gpa = Gpa(0x3_2000);
const TARGET_PAGE: Gpa = Gpa(0x3_3000);
/// The operands begin here in their pages.
const INSIDE: u64 = 0x100;
const DATA: &[u8] = b"bytes of a process, by its address";
const SOMEBODY_ELSES: &[u8] = b"bytes of another, in the same page";

/// Where in the kernel's shadow page.
macro_rules! kernel {
    ($field:ident) => {
        Gpa(SHADOW.0 + offset_of!(KernelShadow, $field) as u64)
    };
}
/// Where in the context's shadow page.
macro_rules! context {
    ($field:ident) => {
        Gpa(CONTEXT_SHADOW.0 + offset_of!(ContextShadow, $field) as u64)
    };
}

/// Where the entry of `level` for an address is.
fn entry(iova: Iova, level: u32) -> Gpa {
    Gpa(TABLES[(pte::LEVELS - level) as usize].0 + pte::index(iova, level) * 8)
}

fn leaf(page: Gpa) -> u64 {
    Pte::leaf(page, true).0
}

fn command_at(index: u64) -> Gpa {
    Gpa(IQ.0 + index * Command::SIZE as u64)
}

fn descriptor_at(index: u64) -> Gpa {
    Gpa(RING_PAGE.0 + index * Descriptor::SIZE as u64)
}

fn record(index: u64) -> (Iova, Gpa) {
    let offset = index * Completion::SIZE as u64;
    (Iova(RECORDS.0 + offset), Gpa(RECORDS_PAGE.0 + offset))
}

fn wait_for(value: u64) -> Command {
    Command {
        kind: CommandKind::Wait as u32,
        flags: wait::WRITE | wait::DRAINED,
        addr: kernel!(wait).0,
        value,
        ..Default::default()
    }
}

fn respond(group: u32, response: Response) -> Command {
    Command {
        kind: CommandKind::PageResponse as u32,
        flags: response as u32,
        context: CONTEXT,
        group,
        ..Default::default()
    }
}

fn request(group: u32) -> PageRequest {
    PageRequest {
        kind: RequestKind::Page as u32,
        context: CONTEXT,
        iova: TARGET.0,
        pages: 1,
        flags: request_flags::WRITE,
        group,
        ..Default::default()
    }
}

/// Hands every step to the player, in order.
pub fn play(player: &mut dyn FnMut(Step)) {
    bring_up(player);
    start_a_context(player);
    work_and_be_asked(player);
    shoot_down(player);
    see_that_it_is_gone(player);
}

fn bring_up(f: &mut dyn FnMut(Step)) {
    use Step::*;
    f(Title("Reset and enable"));
    f(Say(
        "Is this the device, and of a major version that we know?",
    ));
    f(Read(regs::ID, regs::ID_VALUE.into()));
    f(Read(regs::VERSION, regs::VERSION_VALUE.into()));
    f(Say(
        "Whatever it did before, it does not do it any more when a read after the reset returns.",
    ));
    f(Write(regs::CTRL, regs::ctrl::RESET.into()));
    f(Read(regs::STATUS, 0));
    f(Say(
        "Memory decoding and bus mastering on. (MSI-X is set up as for any device.)",
    ));
    f(Config("Command", 0x04, 0x0006));
    f(Say(
        "The kernel's structures, all zero by now: a context table of 2 entries, two rings of 16, a shadow page.",
    ));
    f(Write(regs::CTX_TABLE, CTX_TABLE.0));
    f(Write(regs::CTX_COUNT, 2));
    f(Write(regs::IQ_BASE, IQ.0));
    f(Write(regs::IQ_LOG2, 4));
    f(Write(regs::PRQ_BASE, PRQ.0));
    f(Write(regs::PRQ_LOG2, 4));
    f(Write(regs::SHADOW, SHADOW.0));
    f(Write(regs::CTRL, regs::ctrl::ENABLE.into()));
    f(Read(regs::STATUS, regs::status::ENABLED.into()));
    f(Find(
        "`iq_need_kick`: it sleeps",
        kernel!(iq_need_kick),
        1u32.into(),
    ));
}

fn start_a_context(f: &mut dyn FnMut(Step)) {
    use Step::*;
    f(Title("A context with three pages"));
    f(Say(
        "Page table: one table of each level, and leaves for the ring, the completion records and the source. The target is not mapped.",
    ));
    for level in [4, 3, 2] {
        let next = TABLES[(pte::LEVELS - level + 1) as usize];
        let what = ["entry of level 2", "entry of level 3", "entry of level 4"];
        f(Put(
            what[level as usize - 2],
            entry(RING, level),
            Pte::table(next).0.into(),
        ));
    }
    f(Put(
        "leaf of the ring",
        entry(RING, 1),
        leaf(RING_PAGE).into(),
    ));
    f(Put(
        "leaf of the records",
        entry(RECORDS, 1),
        leaf(RECORDS_PAGE).into(),
    ));
    f(Put(
        "leaf of the source",
        entry(SOURCE, 1),
        leaf(SOURCE_PAGE).into(),
    ));
    let at = Gpa(CTX_TABLE.0 + u64::from(CONTEXT) * ContextEntry::SIZE as u64);
    let space = ContextEntry {
        flags: context_flags::VALID,
        page_table: TABLES[0].0,
        ring: RING.0,
        ring_log2: 4,
        credits: 1,
        shadow: CONTEXT_SHADOW.0,
        ..Default::default()
    };
    f(Put("entry of context 1", at, space.into()));
    f(Say("Sync it, and wait for that (`WRITE | DRAINED`)."));
    let sync = Command {
        kind: CommandKind::ContextSync as u32,
        context: CONTEXT,
        ..Default::default()
    };
    f(Put("command 0", command_at(0), sync.into()));
    f(Put("command 1", command_at(1), wait_for(1).into()));
    f(Put("`iq_tail`", kernel!(iq_tail), 2u32.into()));
    f(Say("Fence; `iq_need_kick` is 1, so kick."));
    f(Write(regs::KICK, 1));
    f(Find(
        "the word of the wait command",
        kernel!(wait),
        1u64.into(),
    ));
    f(Find("`iq_head`", kernel!(iq_head), 2u32.into()));
}

fn work_and_be_asked(f: &mut dyn FnMut(Step)) {
    use Step::*;
    f(Title("A copy, and a page request on the way"));
    f(Put("the source", Gpa(SOURCE_PAGE.0 + INSIDE), DATA.into()));
    let (iova, gpa) = record(0);
    let copy = Descriptor {
        opcode: Opcode::Copy as u8,
        flags: work_flags::INTERRUPT,
        src: SOURCE.0 + INSIDE,
        dst: TARGET.0 + INSIDE,
        len: DATA.len() as u64,
        completion: iova.0,
        ..Default::default()
    };
    f(Put("descriptor 0", descriptor_at(0), copy.into()));
    f(Put("`tail`", context!(tail), 1u32.into()));
    f(Say("Fence; `need_kick` is 1, so ring the doorbell."));
    f(Find("`need_kick`", context!(need_kick), 1u32.into()));
    f(Doorbell(CONTEXT));
    f(Say(
        "The target is not mapped: the operation waits, holding nothing, and asks.",
    ));
    f(Interrupt(Vector::PageRequest));
    f(Find("`prq_tail`", kernel!(prq_tail), 1u32.into()));
    f(Find(
        "record 0 of the page request ring",
        PRQ,
        request(1).into(),
    ));
    f(Say("Consume it, map a page, answer."));
    f(Put("`prq_head`", kernel!(prq_head), 1u32.into()));
    f(Put(
        "leaf of the target",
        entry(TARGET, 1),
        leaf(TARGET_PAGE).into(),
    ));
    f(Put(
        "command 2",
        command_at(2),
        respond(1, Response::Success).into(),
    ));
    f(Put("`iq_tail`", kernel!(iq_tail), 3u32.into()));
    f(Write(regs::KICK, 1));
    f(Interrupt(Vector::Completion));
    let done = Completion {
        status: Status::Success as u32,
        bytes: DATA.len() as u64,
        ..Default::default()
    };
    f(Find("the record", gpa, done.into()));
    f(Find("the target", Gpa(TARGET_PAGE.0 + INSIDE), DATA.into()));
    f(Find("`head`", context!(head), 1u32.into()));
    f(Find("`event_seq`", context!(event_seq), 1u32.into()));
}

fn shoot_down(f: &mut dyn FnMut(Step)) {
    use Step::*;
    f(Title("The page is taken back"));
    f(Say(
        "The kernel wants the target's page. It has changed the process's own page table; now it takes the leaf out of the device's, by an atomic exchange: the device used the page and wrote it.",
    ));
    let used = leaf(TARGET_PAGE) | bit::ACCESSED | bit::DIRTY;
    f(Find("leaf of the target", entry(TARGET, 1), used.into()));
    f(Put("leaf of the target", entry(TARGET, 1), 0u64.into()));
    let range = Command {
        kind: CommandKind::Invalidate as u32,
        flags: InvalidationScope::Range as u32,
        context: CONTEXT,
        addr: TARGET.0,
        value: PAGE_SIZE,
        ..Default::default()
    };
    f(Put("command 3", command_at(3), range.into()));
    f(Put("command 4", command_at(4), wait_for(2).into()));
    f(Put("`iq_tail`", kernel!(iq_tail), 5u32.into()));
    f(Write(regs::KICK, 1));
    f(Find(
        "the word of the wait command",
        kernel!(wait),
        2u64.into(),
    ));
    f(Say(
        "From here on the page may be somebody else's. What the device counted, for the curious (a driver reads no register here):",
    ));
    f(Read(regs::INVALIDATIONS, 1));
    f(Read(regs::TLB_SHOT_DOWN, 1));
    f(Read(regs::DRAINS, 2));
}

fn see_that_it_is_gone(f: &mut dyn FnMut(Step)) {
    use Step::*;
    f(Title("The device cannot touch it"));
    f(Put(
        "the page, with another owner",
        Gpa(TARGET_PAGE.0 + INSIDE),
        SOMEBODY_ELSES.into(),
    ));
    let (iova, gpa) = record(1);
    let fill = Descriptor {
        opcode: Opcode::Fill as u8,
        dst: TARGET.0 + INSIDE,
        len: 64,
        completion: iova.0,
        arg: u64::from_le_bytes(*b"scribble"),
        ..Default::default()
    };
    f(Put("descriptor 1", descriptor_at(1), fill.into()));
    f(Put("`tail`", context!(tail), 2u32.into()));
    f(Doorbell(CONTEXT));
    f(Interrupt(Vector::PageRequest));
    let second = Gpa(PRQ.0 + PageRequest::SIZE as u64);
    f(Find(
        "record 1 of the page request ring",
        second,
        request(2).into(),
    ));
    f(Say("This time there is no such page."));
    f(Put("`prq_head`", kernel!(prq_head), 2u32.into()));
    f(Put(
        "command 5",
        command_at(5),
        respond(2, Response::Invalid).into(),
    ));
    f(Put("`iq_tail`", kernel!(iq_tail), 6u32.into()));
    f(Write(regs::KICK, 1));
    let fault = Completion {
        status: Status::PageFault as u32,
        fault: fault::WRITE,
        fault_addr: TARGET.0 + INSIDE,
        ..Default::default()
    };
    f(Find("the record", gpa, fault.into()));
    f(Find(
        "the page",
        Gpa(TARGET_PAGE.0 + INSIDE),
        SOMEBODY_ELSES.into(),
    ));
    f(Read(regs::OPS_COMPLETED, 1));
    f(Read(regs::OPS_FAULTED, 1));
    f(Read(regs::PAGE_REQUESTS, 2));
    f(Read(regs::STRAY_RESPONSES, 0));
}
