//! A bus on which what the device writes to the driver's structures is changed. Data is not.

use std::collections::BTreeSet;
use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use extlb_device::ports::{BusError, Dma, Interrupts};
use extlb_spec::context::{ContextEntry, ContextShadow};
use extlb_spec::invalidation::{Command, CommandKind, KernelShadow, wait};
use extlb_spec::page_request::{PageRequest, RequestKind};
use extlb_spec::pte::{Pte, bit};
use extlb_spec::regs::{self, Register};
use extlb_spec::work::{Completion, Status};
use extlb_spec::{Gpa, MAX_CONTEXTS, PAGE_SIZE, Vector};

use super::mutated_faults::{Faults, Lie};

/// An address that no driver maps anything at.
const NOWHERE: Gpa = Gpa(PAGE_SIZE);

/// Where the driver's structures are: what it has told the device.
#[derive(Debug, Default)]
pub(super) struct Structures {
    table: AtomicU64,
    commands: AtomicU64,
    requests: AtomicU64,
    requests_log2: AtomicU32,
    kernel: AtomicU64,
    contexts: Mutex<BTreeSet<Gpa>>,
    /// The tail of the page request ring, as it was last written.
    tail: AtomicU32,
}

/// What is at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// The kernel's shadow page, at this offset.
    Kernel(usize),
    /// A context's.
    Context(usize),
    Other,
}

fn within(at: Gpa, start: &AtomicU64, len: u64) -> Option<u64> {
    let start = start.load(Ordering::Relaxed);
    let offset = at.0.checked_sub(start)?;
    (start != 0 && offset < len).then_some(offset)
}

impl Structures {
    /// The driver writes a register.
    pub(super) fn note(&self, register: Register, value: u64) {
        let to = match register.offset {
            o if o == regs::CTX_TABLE.offset => &self.table,
            o if o == regs::IQ_BASE.offset => &self.commands,
            o if o == regs::PRQ_BASE.offset => &self.requests,
            o if o == regs::SHADOW.offset => {
                self.tail.store(0, Ordering::Relaxed);
                &self.kernel
            }
            o if o == regs::PRQ_LOG2.offset => {
                let log2 = value as u32 % 32;
                return self.requests_log2.store(log2, Ordering::Relaxed);
            }
            _ => return,
        };
        to.store(value, Ordering::Relaxed);
    }

    fn contexts(&self) -> MutexGuard<'_, BTreeSet<Gpa>> {
        self.contexts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, at: Gpa) -> Place {
        if let Some(offset) = within(at, &self.kernel, PAGE_SIZE) {
            return Place::Kernel(offset as usize);
        }
        match self.contexts().contains(&at.page()) {
            true => Place::Context(at.page_offset() as usize),
            false => Place::Other,
        }
    }
}

/// The bus, and the interrupts.
pub(super) struct MutatedBus {
    pub(super) memory: Arc<dyn Dma>,
    pub(super) interrupts: Arc<dyn Interrupts>,
    pub(super) faults: Arc<Faults>,
    pub(super) structures: Arc<Structures>,
}

impl Interrupts for MutatedBus {
    fn raise(&self, vector: Vector) {
        if self.faults.is_removed() || self.faults.take(Lie::InterruptLost).is_some() {
            return;
        }
        self.interrupts.raise(vector);
        if self.faults.take(Lie::InterruptTwice).is_some() {
            for vector in [Vector::Completion, Vector::PageRequest, Vector::Error] {
                self.interrupts.raise(vector);
            }
        }
    }
}

impl MutatedBus {
    fn there(&self, addr: Gpa, len: usize) -> Result<(), BusError> {
        match self.faults.is_removed() {
            true => Err(BusError { addr, len }),
            false => Ok(()),
        }
    }

    /// A command was fetched.
    fn command(&self, command: &Command) -> Result<(), BusError> {
        let kind = CommandKind::from_raw(command.kind);
        if kind == Some(CommandKind::Wait)
            && command.flags & wait::WRITE != 0
            && self.faults.take(Lie::WaitEarly).is_some()
        {
            let at = Gpa(command.addr);
            self.memory
                .store_u64(at, command.value, Ordering::Release)?;
        }
        let answer = kind == Some(CommandKind::PageResponse);
        let request = |context, iova, pages| PageRequest {
            kind: RequestKind::Page as u32,
            context,
            iova,
            pages,
            group: 1,
            ..PageRequest::default()
        };
        let context = command.context;
        // An answer is followed by nothing but a flood: the others would be one, too.
        let made = if answer {
            self.faults
                .take(Lie::RequestFlood)
                .map(|_| request(context, 0, 1))
        } else if self.faults.take(Lie::RequestFlood).is_some() {
            Some(request(context, 0, 1))
        } else if let Some(bits) = self.faults.take(Lie::RequestKind) {
            let kind = RequestKind::ContextError as u32 + 1 + bits as u32 % (1 << 31);
            Some(PageRequest {
                kind,
                ..request(context, 0, 1)
            })
        } else if let Some(bits) = self.faults.take(Lie::RequestContext) {
            let number = MAX_CONTEXTS + bits as u32 % (u32::MAX - MAX_CONTEXTS);
            Some(request(number, 0, 1))
        } else if let Some(bits) = self.faults.take(Lie::RequestAddress) {
            Some(request(context, bits | 1 << 63, 1))
        } else if let Some(bits) = self.faults.take(Lie::RequestAgain) {
            Some(request(context, 0, bits as u32))
        } else {
            self.faults
                .take(Lie::RequestStopped)
                .map(|bits| PageRequest {
                    kind: RequestKind::ContextError as u32,
                    code: bits as u32,
                    ..request(context, bits, 0)
                })
        };
        made.map_or(Ok(()), |made| self.post(&made))
    }

    /// A record in the page request ring that the device knows nothing of, if there is room.
    fn post(&self, record: &PageRequest) -> Result<(), BusError> {
        let structures = &self.structures;
        let entries = 1u64 << structures.requests_log2.load(Ordering::Relaxed);
        let kernel = structures.kernel.load(Ordering::Relaxed);
        let head = Gpa(kernel + offset_of!(KernelShadow, prq_head) as u64);
        let head = self.memory.load_u32(head, Ordering::Acquire)?;
        let tail = structures.tail.load(Ordering::Relaxed);
        if u64::from(tail.wrapping_sub(head)) >= entries {
            return Ok(());
        }
        structures
            .tail
            .store(tail.wrapping_add(1), Ordering::Relaxed);
        let slot = u64::from(tail) & (entries - 1);
        let base = structures.requests.load(Ordering::Relaxed);
        let at = Gpa(base + slot * PageRequest::SIZE as u64);
        self.memory.write(at, &record.to_bytes())?;
        let word = Gpa(kernel + offset_of!(KernelShadow, prq_tail) as u64);
        self.memory
            .store_u32(word, tail.wrapping_add(1), Ordering::Release)?;
        self.raise(Vector::PageRequest);
        Ok(())
    }

    /// The status of a completion is written, after all other fields.
    fn complete(&self, at: Gpa, honest: u32) -> Result<(), BusError> {
        let field = |offset: usize| Gpa(at.0 + offset as u64);
        let (bytes, result) = (
            field(offset_of!(Completion, bytes)),
            field(offset_of!(Completion, result)),
        );
        let set = |at, value| self.memory.store_u64(at, value, Ordering::Relaxed);
        let unknown = |bits: u64| Status::NestedBatch as u32 + 1 + bits as u32 % (u32::MAX - 12);
        let status = |at, status| self.memory.store_u32(at, status, Ordering::Release);
        if self.faults.take(Lie::RecordNever).is_some() {
            return Ok(());
        }
        if let Some(bits) = self.faults.take(Lie::RecordStatus) {
            return status(at, unknown(bits));
        }
        if self.faults.take(Lie::RecordMismatch).is_some() {
            return status(at, Status::Mismatch as u32);
        }
        if let Some(bits) = self.faults.take(Lie::RecordBytes) {
            let was = self.memory.load_u64(bytes, Ordering::Relaxed)?;
            let other = [0, u64::MAX, was + 1, was.wrapping_sub(1), bits];
            let other = other[bits as usize % other.len()];
            set(bytes, if other == was { !was } else { other })?;
        }
        if let Some(bits) = self.faults.take(Lie::RecordFault) {
            set(field(offset_of!(Completion, fault_addr)), bits | 1 << 63)?;
            let kinds = [Status::PageFault, Status::BusError];
            return status(at, kinds[bits as usize % 2] as u32);
        }
        if let Some(bits) = self.faults.take(Lie::RecordResult) {
            set(result, bits | 1 << 63)?;
        }
        status(at, honest)?;
        if let Some(bits) = self.faults.take(Lie::RecordTwice) {
            status(at, unknown(bits))?;
        }
        let next = field(Completion::SIZE);
        if next.page() == at.page() && self.faults.take(Lie::RecordNext).is_some() {
            let mut fields = [0; Completion::SIZE - 4];
            self.memory.read(field(4), &mut fields)?;
            self.memory.write(Gpa(next.0 + 4), &fields)?;
            status(next, Status::Success as u32)?;
        }
        Ok(())
    }

    /// What a word of a shadow page becomes; `None` if it is not written.
    fn shadow(&self, place: Place, honest: u32) -> Option<u32> {
        const HEAD: usize = offset_of!(ContextShadow, head);
        const EVENTS: usize = offset_of!(ContextShadow, event_seq);
        const KICK: usize = offset_of!(ContextShadow, need_kick);
        const COMMANDS: usize = offset_of!(KernelShadow, iq_head);
        const COMMAND_KICK: usize = offset_of!(KernelShadow, iq_need_kick);
        const REQUESTS: usize = offset_of!(KernelShadow, prq_tail);
        let word = |lie| self.faults.word(lie, honest).unwrap_or(honest);
        let never = |lie| self.faults.take(lie).is_some();
        Some(match place {
            Place::Context(HEAD) if never(Lie::HeadNever) => return None,
            Place::Context(HEAD) if never(Lie::HeadBack) => honest.wrapping_sub(2),
            Place::Context(HEAD) => word(Lie::Head),
            Place::Context(EVENTS) if never(Lie::EventNever) => return None,
            Place::Context(EVENTS) => word(Lie::EventJump),
            Place::Context(KICK) => word(Lie::KickGarbage),
            Place::Kernel(COMMANDS) if never(Lie::CommandHeadNever) => return None,
            Place::Kernel(COMMANDS) => word(Lie::CommandHead),
            Place::Kernel(COMMAND_KICK) => word(Lie::CommandKick),
            Place::Kernel(REQUESTS) => {
                self.structures.tail.store(honest, Ordering::Relaxed);
                honest
            }
            _ => honest,
        })
    }

    /// Lies about what the device has not written at all, when it has written a context's head.
    fn aside(&self, shadow: Gpa) -> Result<(), BusError> {
        if let Some(bits) = self.faults.take(Lie::ContextError) {
            let error = Gpa(shadow.0 + offset_of!(ContextShadow, error) as u64);
            let unknown = 7 + bits as u32 % (u32::MAX - 7);
            self.memory.store_u32(error, unknown, Ordering::Release)?;
        }
        let tail = self.structures.tail.load(Ordering::Relaxed);
        let missing = self.faults.take(Lie::RequestMissing);
        let missing = missing.map(|bits| tail.wrapping_add(1 + bits as u32 % 4));
        if let Some(tail) = self.faults.word(Lie::RequestTail, tail).or(missing) {
            let kernel = self.structures.kernel.load(Ordering::Relaxed);
            let at = Gpa(kernel + offset_of!(KernelShadow, prq_tail) as u64);
            self.memory.store_u32(at, tail, Ordering::Release)?;
            self.raise(Vector::PageRequest);
        }
        Ok(())
    }

    /// What may stand in a page table so that no data goes anywhere it should not.
    fn entry(&self, bits: u64, table: Gpa) -> u64 {
        let kernel = Gpa(self.structures.kernel.load(Ordering::Relaxed));
        let entries = [
            0,
            u64::MAX,
            Pte::table(NOWHERE).0,
            Pte::table(table).0,
            Pte::table(kernel).0,
        ];
        entries[bits as usize % entries.len()]
    }
}

impl Dma for MutatedBus {
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        self.there(from, to.len())?;
        self.memory.read(from, to)?;
        let commands = (Command::SIZE as u64) << regs::MAX_RING_LOG2;
        if let Ok(bytes) = <&[u8; Command::SIZE]>::try_from(&*to)
            && within(from, &self.structures.commands, commands).is_some()
        {
            return self.command(&Command::from_bytes(bytes));
        }
        let table = ContextEntry::SIZE as u64 * u64::from(MAX_CONTEXTS);
        if let Ok(bytes) = <&[u8; ContextEntry::SIZE]>::try_from(&*to)
            && within(from, &self.structures.table, table).is_some()
        {
            let entry = ContextEntry::from_bytes(bytes);
            self.structures.contexts().insert(Gpa(entry.shadow));
        }
        Ok(())
    }

    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        self.there(to, from.len())?;
        self.memory.write(to, from)
    }

    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        self.there(to, len)?;
        self.memory.copy(from, to, len)
    }

    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32, BusError> {
        self.there(at, 4)?;
        self.memory.load_u32(at, order)
    }

    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<(), BusError> {
        self.there(at, 4)?;
        let place = self.structures.place(at);
        if place == Place::Other {
            // Words elsewhere are written at the end of a completion record only.
            return self.complete(at, value);
        }
        if let Some(value) = self.shadow(place, value) {
            self.memory.store_u32(at, value, order)?;
        }
        match place {
            Place::Context(offset) if offset == offset_of!(ContextShadow, head) => {
                self.aside(at.page())
            }
            _ => Ok(()),
        }
    }

    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64, BusError> {
        self.there(at, 8)?;
        let value = self.memory.load_u64(at, order)?;
        // Double words are read in page tables. Entries that lead to another table have no bit
        // but one, and the tables are where all structures are.
        let other = bit::WRITE | bit::ACCESSED | bit::DIRTY | bit::LEAF;
        let entry = Pte(value);
        if entry.is_present()
            && value & other == 0
            && self.is_near(entry.addr())
            && let Some(bits) = self.faults.take(Lie::Table)
        {
            let spoilt = self.entry(bits, at.page());
            self.memory.store_u64(at, spoilt, Ordering::Release)?;
        }
        Ok(value)
    }

    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<(), BusError> {
        self.there(at, 8)?;
        let mut value = value;
        if let Place::Kernel(_) = self.structures.place(at) {
            if self.faults.take(Lie::WaitNever).is_some() {
                return Ok(());
            }
            if let Some(bits) = self.faults.take(Lie::WaitAhead) {
                let ahead = [1 << 32, bits, u64::MAX - value];
                value = value.saturating_add(ahead[bits as usize % 3].max(1 << 16));
            }
            if self.faults.take(Lie::WaitBehind).is_some() {
                value = value.saturating_sub(1);
            }
        }
        self.memory.store_u64(at, value, order)
    }

    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<u64, BusError> {
        self.there(at, 8)?;
        let found = self.memory.compare_exchange_u64(at, current, new)?;
        if found == current
            && let Some(bits) = self.faults.take(Lie::Leaf)
        {
            let spoilt = [0, u64::MAX, Pte::leaf(NOWHERE, true).0][bits as usize % 3];
            self.memory.store_u64(at, spoilt, Ordering::Release)?;
        }
        Ok(found)
    }

    fn fetch_add_u64(&self, at: Gpa, value: u64) -> Result<u64, BusError> {
        self.there(at, 8)?;
        self.memory.fetch_add_u64(at, value)
    }

    fn view(&self, f: &mut dyn FnMut(&dyn Dma)) {
        f(self);
    }
}

impl MutatedBus {
    /// Whether a bus address is in the driver's first piece of memory for structures.
    fn is_near(&self, at: Gpa) -> bool {
        within(at, &self.structures.table, 1 << 20).is_some()
    }
}
