//! A recorded run in words: registers, commands and places in memory have their names.

use std::mem::offset_of;

use extlb_spec::context::{ContextEntry, ContextShadow};
use extlb_spec::invalidation::{Command, CommandKind, KernelShadow};
use extlb_spec::page_request::{PageRequest, RequestKind};
use extlb_spec::regs::{self, Register};
use extlb_spec::table::Layout;
use extlb_spec::{BAR_DOORBELLS, BAR_REGS, DOORBELL_STRIDE, MAX_CONTEXTS, PAGE_SIZE, Vector};

use super::entry::{Answer, Call, Entry, Request, Return};

/// What the log has said so far about where things are.
pub(super) struct Listing {
    /// Registers that were written, by their place in [`regs::ALL`].
    registers: Vec<u64>,
    /// Addresses of the contexts' shadow pages; grows to at most [`MAX_CONTEXTS`].
    shadows: Vec<u64>,
}

/// A register at an offset, and the offset in it.
fn register(bar: u8, offset: u64) -> Option<(usize, &'static Register, u64)> {
    let all = regs::ALL.iter().enumerate().filter(|_| bar == BAR_REGS);
    let mut hit = all.filter(|(_, r)| (r.offset..r.end()).contains(&offset));
    hit.next().map(|(i, r)| (i, r, offset - r.offset))
}

/// The field of a layout at an offset.
fn field(layout: &Layout, offset: u64) -> &'static str {
    let offset = offset as usize;
    let mut fields = layout.fields.iter();
    let hit = fields.find(|f| (f.offset..f.offset + f.size * f.count).contains(&offset));
    hit.map_or("?", |f| f.name)
}

/// The fields of a structure that are not zero.
fn fields(layout: &Layout, bytes: &[u8]) -> String {
    let mut text = String::new();
    for field in layout.fields.iter().filter(|f| f.count == 1) {
        let bytes = bytes.get(field.offset..field.offset + field.size);
        let value = number(bytes.unwrap_or_default());
        if value != 0 {
            text += &format!(" {}={value:#x}", field.name);
        }
    }
    text
}

/// A little-endian number of at most 8 bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |n, byte| n << 8 | u64::from(*byte))
}

/// Bytes that follow `base`, as far as `at` is among them.
fn inside(at: u64, base: u64, len: u64) -> Option<u64> {
    at.checked_sub(base).filter(|offset| *offset < len)
}

/// Bytes in short.
fn hex(bytes: &[u8]) -> String {
    const SHOWN: usize = 64;
    let shown = &bytes[..bytes.len().min(SHOWN)];
    let text: String = shown.iter().map(|byte| format!("{byte:02x}")).collect();
    match bytes.len() > SHOWN {
        true => format!("{text}… crc32c {:08x}", crc32c::crc32c(bytes)),
        false => text,
    }
}

impl Default for Listing {
    fn default() -> Self {
        Self {
            registers: vec![0; regs::ALL.len()],
            shadows: Vec::new(),
        }
    }
}

impl Listing {
    /// Takes note of what an entry says about where things are.
    pub(super) fn follow(&mut self, entry: &Entry) {
        match entry {
            Entry::Call(Call::MmioWrite { bar, offset, data }) => {
                let Some((index, register, within)) = register(*bar, *offset) else {
                    return;
                };
                let len = data.len().min(register.width as usize);
                let mut bytes = self.registers[index].to_le_bytes();
                if let Some(place) = bytes.get_mut(within as usize..within as usize + len) {
                    place.copy_from_slice(&data[..len]);
                }
                self.registers[index] = u64::from_le_bytes(bytes);
            }
            Entry::Port(Request::Read { from, .. }, Answer::Bytes(bytes)) => {
                let Ok(bytes) = <&[u8; ContextEntry::SIZE]>::try_from(&bytes[..]) else {
                    return;
                };
                if let Some(context) = self.context(*from) {
                    let context = context as usize;
                    if self.shadows.len() <= context {
                        self.shadows.resize(context + 1, u64::MAX);
                    }
                    self.shadows[context] = ContextEntry::from_bytes(bytes).shadow;
                }
            }
            _ => {}
        }
    }

    /// The register as it was written last.
    fn value(&self, register: &Register) -> u64 {
        let index = regs::ALL.iter().position(|r| r.offset == register.offset);
        index.map_or(0, |index| self.registers[index])
    }

    /// The context whose entry of the context table is at an address.
    fn context(&self, at: u64) -> Option<u64> {
        let contexts = self.value(&regs::CTX_COUNT).min(u64::from(MAX_CONTEXTS));
        let size = ContextEntry::SIZE as u64;
        Some(inside(at, self.value(&regs::CTX_TABLE), contexts * size)? / size)
    }

    /// The slot of a ring at an address.
    fn slot(&self, at: u64, base: &Register, log2: &Register, size: usize) -> Option<u64> {
        let entries = 1u64 << self.value(log2).min(u64::from(regs::MAX_RING_LOG2));
        let size = size as u64;
        Some(inside(at, self.value(base), entries * size)? / size)
    }

    fn command(&self, at: u64) -> Option<u64> {
        self.slot(at, &regs::IQ_BASE, &regs::IQ_LOG2, Command::SIZE)
    }

    fn page_request(&self, at: u64) -> Option<u64> {
        self.slot(at, &regs::PRQ_BASE, &regs::PRQ_LOG2, PageRequest::SIZE)
    }

    /// A place in memory, by name if it has one.
    fn place(&self, at: u64) -> String {
        let wait = offset_of!(KernelShadow, wait) as u64;
        if let Some(offset) = inside(at, self.value(&regs::SHADOW), PAGE_SIZE) {
            return match offset.checked_sub(wait) {
                Some(inside) => format!("kernel shadow wait[{}]", inside / 8),
                None => format!("kernel shadow {}", field(&KernelShadow::LAYOUT, offset)),
            };
        }
        if let Some(slot) = self.command(at) {
            return format!("invalidation queue[{slot}]");
        }
        if let Some(slot) = self.page_request(at) {
            return format!("page request ring[{slot}]");
        }
        if let Some(context) = self.context(at) {
            return format!("context table[{context}]");
        }
        for (context, shadow) in self.shadows.iter().enumerate() {
            if let Some(offset) = inside(at, *shadow, PAGE_SIZE) {
                let field = field(&ContextShadow::LAYOUT, offset);
                return format!("context {context} shadow {field}");
            }
        }
        format!("{at:#x}")
    }

    /// What bytes at a place mean.
    fn bytes(&self, at: u64, bytes: &[u8]) -> String {
        if self.command(at).is_some() && bytes.len() == Command::SIZE {
            let kind = CommandKind::from_raw(number(&bytes[..4]) as u32);
            let kind = kind.map_or("?".into(), |kind| format!("{kind:?}"));
            return format!("{kind}{}", fields(&Command::LAYOUT, bytes));
        }
        if self.page_request(at).is_some() && bytes.len() == PageRequest::SIZE {
            let kind = RequestKind::from_raw(number(&bytes[..4]) as u32);
            let kind = kind.map_or("?".into(), |kind| format!("{kind:?}"));
            return format!("{kind}{}", fields(&PageRequest::LAYOUT, bytes));
        }
        if self.context(at).is_some() && bytes.len() == ContextEntry::SIZE {
            return format!("entry{}", fields(&ContextEntry::LAYOUT, bytes));
        }
        hex(bytes)
    }

    pub(super) fn entry(&self, entry: &Entry) -> String {
        match entry {
            Entry::Call(call) => self.call(call),
            Entry::Port(request, answer) => {
                let text = self.request(request);
                match (request, answer) {
                    (_, Answer::Done) => format!("  {text}"),
                    (Request::Read { from, .. }, Answer::Bytes(bytes)) => {
                        format!("  {text}: {}", self.bytes(*from, bytes))
                    }
                    (_, Answer::Bytes(bytes)) => format!("  {text}: {}", hex(bytes)),
                    (_, Answer::Word(word)) => format!("  {text}: {word:#x}"),
                    (_, Answer::Time(time)) => format!("  {text}: {time} ns"),
                    (_, Answer::BusError { addr, len }) => {
                        format!("  {text}: no RAM at {addr:#x}, {len} bytes")
                    }
                }
            }
            Entry::Return(returned) => format!("  = {}", Self::returned(returned)),
            Entry::End(totals) => format!("end {totals}"),
        }
    }

    pub(super) fn call(&self, call: &Call) -> String {
        match call {
            Call::MmioRead { bar, offset, len } => {
                format!("mmio read {}, {len} bytes", Self::bar_place(*bar, *offset))
            }
            Call::MmioWrite { bar, offset, data } => {
                let place = Self::bar_place(*bar, *offset);
                match data.len() <= 8 {
                    true => format!("mmio write {place} = {:#x}", number(data)),
                    false => format!("mmio write {place} = {}", hex(data)),
                }
            }
            Call::SetBusMaster(on) => format!("bus master {}", if *on { "on" } else { "off" }),
            Call::Reset => "reset".into(),
            Call::Quiesce => "quiesce".into(),
            Call::EngineStep => "engine step".into(),
            Call::InvalidationStep => "invalidation step".into(),
        }
    }

    fn bar_place(bar: u8, offset: u64) -> String {
        match register(bar, offset) {
            Some((_, register, 0)) => register.name.into(),
            Some((_, register, within)) => format!("{}+{within}", register.name),
            None if bar == BAR_DOORBELLS => format!("doorbell {}", offset / DOORBELL_STRIDE),
            None => format!("BAR {bar} {offset:#x}"),
        }
    }

    pub(super) fn request(&self, request: &Request) -> String {
        match request {
            Request::Read { from, len } => format!("read {}, {len} bytes", self.place(*from)),
            Request::Write { to, data } => {
                let bytes = self.bytes(*to, data);
                format!("write {}, {} bytes: {bytes}", self.place(*to), data.len())
            }
            Request::Copy { from, to, len } => format!("copy {from:#x} to {to:#x}, {len} bytes"),
            Request::LoadU32(at) => format!("load u32 {}", self.place(*at)),
            Request::StoreU32(at, value) => format!("store u32 {} = {value:#x}", self.place(*at)),
            Request::LoadU64(at) => format!("load u64 {}", self.place(*at)),
            Request::StoreU64(at, value) => format!("store u64 {} = {value:#x}", self.place(*at)),
            Request::Exchange { at, current, new } => {
                format!(
                    "exchange u64 {}, {current:#x} for {new:#x}",
                    self.place(*at)
                )
            }
            Request::Add(at, value) => format!("add u64 {} + {value:#x}", self.place(*at)),
            Request::Now => "time".into(),
            Request::Raise(vector) => match Vector::from_raw(*vector) {
                Some(vector) => format!("interrupt {vector:?}"),
                None => format!("interrupt {vector}"),
            },
            Request::Event(event) => format!("event {event}"),
            Request::WakeWork => "wake the engine".into(),
            Request::WakeInvalidation => "wake the invalidation queue".into(),
        }
    }

    pub(super) fn returned(returned: &Return) -> String {
        match returned {
            Return::Nothing => "returned".into(),
            Return::Data(data) if data.len() <= 8 => format!("{:#x}", number(data)),
            Return::Data(data) => hex(data),
            Return::Busy => "busy".into(),
            Return::Waiting => "waiting".into(),
            Return::Idle => "idle".into(),
        }
    }
}
