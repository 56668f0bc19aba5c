//! A device in process, stepped by the one who measures it, and its contexts.
#![allow(dead_code)] // each binary uses its part

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use extlb_device::ports::{Dma, Ignore, Ports};
use extlb_device::{Config, Device, GuestRam, Step};
use extlb_spec::context::{ContextEntry, ContextShadow, flags};
use extlb_spec::invalidation::{Command, CommandKind, KernelShadow};
use extlb_spec::pte::{self, Pte, bit};
use extlb_spec::work::{Completion, Descriptor, Status};
use extlb_spec::{BAR_DOORBELLS, BAR_REGS, DOORBELL_STRIDE, Gpa, Iova, PAGE_SIZE, regs};
use rustix::time::{ClockId, clock_gettime};

const CTX_TABLE: Gpa = Gpa(0x1_0000);
const IQ: Gpa = Gpa(0x2_0000);
const PRQ: Gpa = Gpa(0x4_0000);
const SHADOW: Gpa = Gpa(0x6_0000);
const RING_LOG2: u32 = 12;
/// Descriptors of a ring.
pub const RING: u32 = 1 << RING_LOG2;
const RING_AT: u64 = 0x7000_0000_0000;
const RECORDS_AT: u64 = 0x7000_1000_0000;

/// The device and its memory; pages are handed out from the start of it.
pub struct Rig {
    pub ram: GuestRam,
    pub device: Arc<Device>,
    next_page: u64,
    commands: u32,
}

/// A context, with a ring of [`RING`] descriptors.
pub struct Program {
    number: u32,
    root: Gpa,
    shadow: Gpa,
    ring: Vec<Gpa>,
    records: Vec<Gpa>,
    pub submitted: u32,
}

impl Rig {
    pub fn new(config: Config, bytes: usize) -> Self {
        let ram = GuestRam::anonymous(&[(Gpa(0), bytes)]).expect("RAM");
        let ports = Ports::stepped(Arc::new(ram.clone()), Arc::new(Ignore));
        let device = Arc::new(Device::new(config, ports).expect("a device"));
        device.set_bus_master(true);
        for (register, value) in [
            (regs::CTX_TABLE, CTX_TABLE.0),
            (regs::CTX_COUNT, 256),
            (regs::IQ_BASE, IQ.0),
            (regs::IQ_LOG2, 10),
            (regs::PRQ_BASE, PRQ.0),
            (regs::PRQ_LOG2, 10),
            (regs::SHADOW, SHADOW.0),
            (regs::CTRL, 1),
        ] {
            let bytes = value.to_le_bytes();
            let width = register.width as usize;
            device.mmio_write(BAR_REGS, register.offset, &bytes[..width]);
        }
        Self {
            ram,
            device,
            next_page: 0x8_0000,
            commands: 0,
        }
    }

    /// A fresh page.
    pub fn page(&mut self) -> Gpa {
        self.pages(PAGE_SIZE, PAGE_SIZE)
    }

    /// Fresh memory.
    pub fn pages(&mut self, len: u64, align: u64) -> Gpa {
        let at = self.next_page.next_multiple_of(align);
        self.next_page = at + len;
        // The pages of the host are made now and not while something is measured.
        for offset in (0..len).step_by(PAGE_SIZE as usize) {
            self.store(Gpa(at + offset), 0);
        }
        Gpa(at)
    }

    fn store(&self, at: Gpa, value: u64) {
        self.ram
            .store_u64(at, value, Ordering::Release)
            .expect("RAM");
    }

    /// A context with an empty page table but for its rings.
    pub fn program(&mut self, number: u32) -> Program {
        let ring_pages = Descriptor::SIZE as u64 * u64::from(RING) / PAGE_SIZE;
        let record_pages = Completion::SIZE as u64 * u64::from(RING) / PAGE_SIZE;
        let program = Program {
            number,
            root: self.page(),
            shadow: self.page(),
            ring: (0..ring_pages).map(|_| self.page()).collect(),
            records: (0..record_pages).map(|_| self.page()).collect(),
            submitted: 0,
        };
        for (start, pages) in [(RING_AT, &program.ring), (RECORDS_AT, &program.records)] {
            for (i, page) in pages.iter().enumerate() {
                self.map(&program, start + i as u64 * PAGE_SIZE, *page, 1);
            }
        }
        let entry = ContextEntry {
            flags: flags::VALID,
            page_table: program.root.0,
            ring: RING_AT,
            ring_log2: RING_LOG2,
            credits: 2,
            shadow: program.shadow.0,
            ..Default::default()
        };
        let at = Gpa(CTX_TABLE.0 + u64::from(number) * ContextEntry::SIZE as u64);
        self.ram.write(at, &entry.to_bytes()).expect("RAM");
        self.post(Command {
            kind: CommandKind::ContextSync as u32,
            context: number,
            ..Default::default()
        });
        program
    }

    /// Maps a leaf of this level.
    pub fn map(&mut self, program: &Program, iova: u64, page: Gpa, level: u32) {
        let mut table = program.root.0;
        for level in (level + 1..=pte::LEVELS).rev() {
            let at = Gpa(table + pte::index(Iova(iova), level) * 8);
            let entry = self.ram.load_u64(at, Ordering::Acquire).expect("RAM");
            table = match Pte(entry).is_present() {
                true => Pte(entry).addr().0,
                false => {
                    let fresh = self.page();
                    self.store(at, Pte::table(fresh).0);
                    fresh.0
                }
            };
        }
        let large = if level > 1 { bit::LEAF } else { 0 };
        let at = Gpa(table + pte::index(Iova(iova), level) * 8);
        self.store(at, Pte::leaf(page, true).0 | large);
    }

    /// Puts this in the place of a leaf of 4 KiB.
    pub fn spoil(&mut self, program: &Program, iova: Iova, value: Pte) {
        let mut table = program.root;
        for level in (2..=pte::LEVELS).rev() {
            let at = Gpa(table.0 + pte::index(iova, level) * 8);
            table = Pte(self.ram.load_u64(at, Ordering::Acquire).expect("RAM")).addr();
        }
        self.store(Gpa(table.0 + pte::index(iova, 1) * 8), value.0);
    }

    fn post(&mut self, command: Command) {
        let at = Gpa(IQ.0 + u64::from(self.commands % 1024) * Command::SIZE as u64);
        self.ram.write(at, &command.to_bytes()).expect("RAM");
        self.commands += 1;
        let tail = Gpa(SHADOW.0 + offset_of!(KernelShadow, iq_tail) as u64);
        let order = Ordering::Release;
        self.ram.store_u32(tail, self.commands, order).expect("RAM");
        while self.device.invalidation_step() != Step::Idle {}
    }

    fn word(&self, program: &Program, offset: usize) -> u32 {
        let at = Gpa(program.shadow.0 + offset as u64);
        self.ram.load_u32(at, Ordering::Acquire).expect("RAM")
    }

    pub fn head(&self, program: &Program) -> u32 {
        self.word(program, offset_of!(ContextShadow, head))
    }

    /// Fills the ring.
    pub fn refill(&self, program: &mut Program, next: impl Fn(u32) -> Descriptor) {
        let room = RING - program.submitted.wrapping_sub(self.head(program));
        self.submit(program, room, next);
    }

    /// Submits so many, for which there must be room, and rings.
    pub fn submit(&self, program: &mut Program, count: u32, next: impl Fn(u32) -> Descriptor) {
        // One look at the map of RAM: a program has none to look at.
        self.ram.view(&mut |ram| {
            for _ in 0..count {
                let slot = (program.submitted % RING) as usize;
                let (per_page, records) = (slot / 64, slot / 128);
                let record = Gpa(program.records[records].0 + slot as u64 % 128 * 32);
                ram.write(record, &[0; 32]).expect("RAM");
                let descriptor = Descriptor {
                    completion: RECORDS_AT + slot as u64 * 32,
                    ..next(program.submitted)
                };
                let at = Gpa(program.ring[per_page].0 + slot as u64 % 64 * 64);
                ram.write(at, &descriptor.to_bytes()).expect("RAM");
                program.submitted += 1;
            }
        });
        let tail = Gpa(program.shadow.0 + offset_of!(ContextShadow, tail) as u64);
        let order = Ordering::Release;
        self.ram
            .store_u32(tail, program.submitted, order)
            .expect("RAM");
        if self.word(program, offset_of!(ContextShadow, need_kick)) != 0 {
            let at = u64::from(program.number) * DOORBELL_STRIDE;
            self.device.mmio_write(BAR_DOORBELLS, at, &[0; 4]);
        }
    }

    /// Steps until all is done; panics if the last operation did not succeed.
    pub fn finish(&self, program: &Program) -> Duration {
        let time = timed(|| {
            while self.head(program) != program.submitted {
                self.device.engine_step();
            }
        });
        let slot = u64::from(program.submitted.wrapping_sub(1) % RING);
        let record = Gpa(program.records[slot as usize / 128].0 + slot % 128 * 32);
        let status = self.ram.load_u32(record, Ordering::Acquire).expect("RAM");
        assert_eq!(Status::from_raw(status), Some(Status::Success));
        time
    }
}

/// The processor's time that this thread takes: what others do on the machine does not count.
pub fn timed(f: impl FnOnce()) -> Duration {
    let now = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Duration::try_from(time).expect("a time")
    };
    let start = now();
    f();
    now() - start
}

/// Not watched by the oracle, whose look at each page costs a walk.
pub fn config() -> Config {
    let mut config = Config::default();
    config.oracle.enabled = false;
    config
}
