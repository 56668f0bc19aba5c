//! A device that is stepped by hand, and the kernel's side of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use extlb_device::ports::{Clock, Ignore, Ports};
use extlb_device::{Config, Device, Step};
use extlb_spec::context::ContextEntry;
use extlb_spec::invalidation::{Command, CommandKind, wait};
use extlb_spec::page_request::{PageRequest, RequestKind};
use extlb_spec::regs::{self, FatalError, Register};
use extlb_spec::{BAR_DOORBELLS, BAR_REGS, DOORBELL_STRIDE, Gpa, PAGE_SIZE};

use crate::memory::{Watched, may};

/// The kernel's structures, a page each.
pub(crate) const CTX_TABLE: Gpa = Gpa(0);
pub(crate) const IQ: Gpa = Gpa(PAGE_SIZE);
pub(crate) const PRQ: Gpa = Gpa(2 * PAGE_SIZE);
pub(crate) const SHADOW: Gpa = Gpa(3 * PAGE_SIZE);
/// Here others may begin.
pub(crate) const FREE: Gpa = Gpa(4 * PAGE_SIZE);

pub(crate) const IQ_LOG2: u32 = 7;
pub(crate) const IQ_ENTRIES: u32 = 1 << IQ_LOG2;
pub(crate) const PRQ_LOG2: u32 = 4;
pub(crate) const CONTEXTS: u32 = 4;

/// Time passes whenever it is looked at.
#[derive(Default)]
struct Ticking(AtomicU64);

impl Clock for Ticking {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.fetch_add(500, Ordering::Relaxed))
    }
}

/// A word of the kernel's shadow page.
macro_rules! word {
    ($field:ident) => {
        extlb_spec::Gpa(
            $crate::machine::SHADOW.0
                + std::mem::offset_of!(extlb_spec::invalidation::KernelShadow, $field) as u64,
        )
    };
}
pub(crate) use word;

pub(crate) struct Machine {
    pub(crate) memory: Arc<Watched>,
    pub(crate) device: Device,
    pub(crate) iq_tail: u32,
    pub(crate) prq_head: u32,
    acks: u64,
}

impl Machine {
    /// A device that is enabled. The first four pages of the first piece are the kernel's.
    pub(crate) fn new(pieces: &[(Gpa, u64)]) -> Self {
        let memory = Arc::new(Watched::new(pieces));
        let mut config = Config {
            poll_us: 1,
            ..Default::default()
        };
        config.tlb.sets = 4;
        config.tlb.ways = 2;
        config.oracle.suspects = 32;
        config.oracle.invalidations = 32;
        let mut ports = Ports::stepped(memory.clone(), Arc::new(Ignore));
        ports.clock = Arc::new(Ticking::default());
        let device = Device::new(config, ports).expect("the configuration is valid");
        device.set_bus_master(true);
        let mut machine = Self {
            memory,
            device,
            iq_tail: 0,
            prq_head: 0,
            acks: 0,
        };
        machine.enable();
        machine
    }

    pub(crate) fn set(&self, register: &Register, value: u64) {
        let bytes = value.to_le_bytes();
        let bytes = &bytes[..register.width.into()];
        self.device.mmio_write(BAR_REGS, register.offset, bytes);
    }

    pub(crate) fn get(&self, register: &Register) -> u64 {
        let mut bytes = [0; 8];
        let data = &mut bytes[..register.width.into()];
        self.device.mmio_read(BAR_REGS, register.offset, data);
        u64::from_le_bytes(bytes)
    }

    /// Resets, and enables with empty queues. Other pages are left as they are.
    pub(crate) fn enable(&mut self) {
        self.device.reset();
        for (page, rights) in [
            (CTX_TABLE, may::READ),
            (IQ, may::READ),
            (PRQ, may::WRITE),
            (SHADOW, may::READ | may::STORE),
        ] {
            self.memory.clear(page);
            self.memory.allow(page, rights);
        }
        (self.iq_tail, self.prq_head) = (0, 0);
        self.set(&regs::CTX_TABLE, CTX_TABLE.0);
        self.set(&regs::CTX_COUNT, CONTEXTS.into());
        self.set(&regs::IQ_BASE, IQ.0);
        self.set(&regs::IQ_LOG2, IQ_LOG2.into());
        self.set(&regs::PRQ_BASE, PRQ.0);
        self.set(&regs::PRQ_LOG2, PRQ_LOG2.into());
        self.set(&regs::SHADOW, SHADOW.0);
        self.set(&regs::CTRL, regs::ctrl::ENABLE.into());
    }

    /// Whether the device stopped; the reason has a name, or it is a defect.
    pub(crate) fn fatal(&self) -> Option<FatalError> {
        if self.get(&regs::STATUS) & u64::from(regs::status::FATAL) == 0 {
            return None;
        }
        let error = FatalError::from_raw(self.get(&regs::ERROR) as u32);
        Some(error.expect("a fatal error has a name"))
    }

    pub(crate) fn doorbell(&self, context: u32) {
        let offset = u64::from(context) * DOORBELL_STRIDE;
        self.device.mmio_write(BAR_DOORBELLS, offset, &[1, 0, 0, 0]);
    }

    pub(crate) fn write_entry(&self, context: u32, entry: &ContextEntry) {
        let at = Gpa(CTX_TABLE.0 + u64::from(context) * ContextEntry::SIZE as u64);
        self.memory.put(at, &entry.to_bytes());
    }

    pub(crate) fn command_at(index: u32) -> Gpa {
        let slot = u64::from(index & (IQ_ENTRIES - 1));
        Gpa(IQ.0 + slot * Command::SIZE as u64)
    }

    /// Posts a command, and lets the device come to it if the ring is full.
    pub(crate) fn post(&mut self, command: &Command) {
        while self.iq_tail.wrapping_sub(self.iq_head()) >= IQ_ENTRIES {
            assert_eq!(self.device.invalidation_step(), Step::Busy, "no progress");
        }
        let at = Self::command_at(self.iq_tail);
        self.memory.put(at, &command.to_bytes());
        self.iq_tail = self.iq_tail.wrapping_add(1);
        self.memory.put_u32(word!(iq_tail), self.iq_tail);
    }

    pub(crate) fn iq_head(&self) -> u32 {
        self.memory.get_u32(word!(iq_head))
    }

    /// Posts a drained wait and steps the queue, and nothing else, until it is acknowledged: no
    /// page request, no operation and no engine is waited for.
    pub(crate) fn drain(&mut self) {
        self.acks += 1;
        let command = Command {
            kind: CommandKind::Wait as u32,
            flags: wait::WRITE | wait::DRAINED,
            addr: word!(wait).0,
            value: self.acks,
            ..Default::default()
        };
        self.post(&command);
        // One step a command.
        for _ in 0..=IQ_ENTRIES {
            if self.memory.get_u64(word!(wait)) == self.acks {
                return;
            }
            assert_eq!(self.device.invalidation_step(), Step::Busy, "no progress");
        }
        panic!("a drained wait is not acknowledged");
    }

    pub(crate) fn sync(&mut self, context: u32) {
        self.post(&Command {
            kind: CommandKind::ContextSync as u32,
            context,
            ..Default::default()
        });
    }

    /// The next record of the page request ring.
    pub(crate) fn take_record(&mut self) -> Option<PageRequest> {
        let tail = self.memory.get_u32(word!(prq_tail));
        if tail == self.prq_head {
            return None;
        }
        let slot = u64::from(self.prq_head & ((1 << PRQ_LOG2) - 1));
        let at = Gpa(PRQ.0 + slot * PageRequest::SIZE as u64);
        let bytes = self.memory.get(at);
        self.prq_head = self.prq_head.wrapping_add(1);
        self.memory.put_u32(word!(prq_head), self.prq_head);
        if self.memory.get_u32(word!(prq_need_kick)) != 0 {
            self.set(&regs::KICK, 1);
        }
        let record = PageRequest::from_bytes(&bytes);
        let kind = RequestKind::from_raw(record.kind);
        assert!(kind.is_some(), "a record of no kind: {record:?}");
        assert!(record.context < CONTEXTS, "{record:?}");
        Some(record)
    }
}
