//! A guest in a box: RAM, page tables, queues, and a kernel that is played by the test.
//!
//! Nothing here has a thread; tests call `run` or step the device themselves.
#![allow(dead_code, unused_imports)] // each test file uses its part

mod memory;
mod ports;
mod process;
pub mod saved;

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub use extlb_device::Core;
use extlb_device::fault::{Injection, Interposed};
use extlb_device::ports::{Dma, Event, Ignore, Ports};
use extlb_device::{Config, GuestRam, Step};
use extlb_spec::context::flags as context_flags;
use extlb_spec::invalidation::{Command, CommandKind, InvalidationScope, KernelShadow, wait};
use extlb_spec::page_request::{PageRequest, RequestKind, Response};
use extlb_spec::regs::{self, Register};
use extlb_spec::{BAR_REGS, Gpa};
pub use memory::{Access, Hooked, Pages};
pub use ports::{Events, HandClock, Vectors};
pub use process::{Process, RING_LOG2, copy, op, status};

pub const RAM: usize = 32 << 20;
pub const CTX_TABLE: Gpa = Gpa(0x1000);
pub const IQ: Gpa = Gpa(0x10_000);
pub const PRQ: Gpa = Gpa(0x20_000);
pub const SHADOW: Gpa = Gpa(0x30_000);
/// Where drained waits write.
pub const ACK: Gpa = Gpa(SHADOW.0 + offset_of!(KernelShadow, wait) as u64);
pub const IQ_LOG2: u32 = 7;
pub const PRQ_LOG2: u32 = 4;
pub const PAGE: u64 = 4096;

pub struct Guest {
    pub ram: GuestRam,
    pub memory: Arc<Hooked>,
    pub vectors: Arc<Vectors>,
    pub clock: Arc<HandClock>,
    pub events: Arc<Events>,
    pub device: Arc<dyn Core>,
    pub pages: Arc<Pages>,
    /// Where the invalidation queue is, and log2 of its length.
    pub iq: (Gpa, u32),
    iq_tail: AtomicU64,
    pub prq_head: AtomicU64,
    acks: AtomicU64,
}

/// Polls for no time at all, and has a small TLB.
pub fn config() -> Config {
    let mut config = Config {
        poll_us: 0,
        ..Default::default()
    };
    config.tlb.sets = 16;
    config.tlb.ways = 4;
    config
}

impl Guest {
    /// With a plan of faults, as on a command line.
    pub fn faulty(plan: &[&str]) -> Self {
        let rules = plan.iter().map(|rule| rule.parse().unwrap());
        let mut config = config();
        config.fault = rules.collect();
        Self::with(config)
    }

    /// The faults that were injected so far.
    pub fn injections(&self) -> Vec<Injection> {
        let events = self.events.0.lock().unwrap();
        let injected = events.iter().filter_map(|event| match event {
            Event::Injected(injection) => Some(injection.clone()),
            _ => None,
        });
        injected.collect()
    }

    /// Their names, and what they were done to.
    pub fn injected(&self) -> Vec<(&'static str, String)> {
        let injections = self.injections().into_iter();
        injections.map(|i| (i.kind.name(), i.to)).collect()
    }

    pub fn new() -> Self {
        Self::with(config())
    }

    pub fn with(config: Config) -> Self {
        let guest = Self::disabled(config);
        guest.device.set_bus_master(true);
        guest.enable();
        guest
    }

    pub fn disabled(config: Config) -> Self {
        Self::around(|ports| Arc::new(Interposed::new(config, ports).unwrap()))
    }

    /// A guest of the device that is made with these ports.
    pub fn around(make: impl FnOnce(Ports) -> Arc<dyn Core>) -> Self {
        Self::over(&[(Gpa(0), RAM)], make)
    }

    /// A guest whose RAM is these pieces.
    pub fn over(ram: &[(Gpa, usize)], make: impl FnOnce(Ports) -> Arc<dyn Core>) -> Self {
        let ram = GuestRam::anonymous(ram).unwrap();
        let memory = Arc::new(Hooked::new(ram.clone()));
        let (vectors, clock, events) = (
            Arc::new(Vectors::default()),
            Arc::new(HandClock::default()),
            Arc::new(Events::default()),
        );
        let ports = Ports {
            memory: memory.clone(),
            interrupts: vectors.clone(),
            clock: clock.clone(),
            trace: events.clone(),
            wake: Arc::new(Ignore),
        };
        Self {
            ram,
            memory,
            vectors,
            clock,
            events,
            device: make(ports),
            pages: Arc::new(Pages::from(Gpa(0x10_0000))),
            iq: (IQ, IQ_LOG2),
            iq_tail: AtomicU64::new(0),
            prq_head: AtomicU64::new(0),
            acks: AtomicU64::new(0),
        }
    }

    pub fn enable(&self) {
        self.ram.write(SHADOW, &[0; 4096]).unwrap();
        self.iq_tail.store(0, Ordering::SeqCst);
        self.prq_head.store(0, Ordering::SeqCst);
        self.set(regs::CTX_TABLE, CTX_TABLE.0);
        self.set(regs::CTX_COUNT, 64);
        self.set(regs::IQ_BASE, self.iq.0.0);
        self.set(regs::IQ_LOG2, self.iq.1.into());
        self.set(regs::PRQ_BASE, PRQ.0);
        self.set(regs::PRQ_LOG2, PRQ_LOG2.into());
        self.set(regs::SHADOW, SHADOW.0);
        self.set(regs::CTRL, regs::ctrl::ENABLE.into());
    }

    /// Enables again with the configuration that is there.
    pub fn enable_as_is(&self) {
        self.ram.write(SHADOW, &[0; 4096]).unwrap();
        self.iq_tail.store(0, Ordering::SeqCst);
        self.prq_head.store(0, Ordering::SeqCst);
        self.set(regs::CTRL, regs::ctrl::ENABLE.into());
    }

    pub fn set(&self, register: Register, value: u64) {
        let bytes = value.to_le_bytes();
        self.device
            .mmio_write(BAR_REGS, register.offset, &bytes[..register.width as usize]);
    }

    pub fn get(&self, register: Register) -> u64 {
        let mut bytes = [0; 8];
        self.device.mmio_read(
            BAR_REGS,
            register.offset,
            &mut bytes[..register.width as usize],
        );
        u64::from_le_bytes(bytes)
    }

    pub fn kernel_word(&self, offset: usize) -> u32 {
        let at = Gpa(SHADOW.0 + offset as u64);
        self.ram.load_u32(at, Ordering::SeqCst).unwrap()
    }

    pub fn set_kernel_word(&self, offset: usize, value: u32) {
        let at = Gpa(SHADOW.0 + offset as u64);
        self.ram.store_u32(at, value, Ordering::SeqCst).unwrap();
    }

    /// Commands posted and not done.
    pub fn commands_ahead(&self) -> u32 {
        let tail = self.iq_tail.load(Ordering::SeqCst) as u32;
        tail.wrapping_sub(self.kernel_word(offset_of!(KernelShadow, iq_head)))
    }

    /// Posts a command, without kicking.
    pub fn post(&self, command: Command) {
        let index = self.iq_tail.fetch_add(1, Ordering::SeqCst);
        let slot = index & ((1 << self.iq.1) - 1);
        let at = Gpa(self.iq.0.0 + slot * Command::SIZE as u64);
        self.ram.write(at, &command.to_bytes()).unwrap();
        self.set_kernel_word(offset_of!(KernelShadow, iq_tail), index as u32 + 1);
    }

    /// Posts a wait with these flags; returns the value that will be at [`ACK`].
    pub fn post_wait(&self, flags: u32) -> u64 {
        let value = self.acks.fetch_add(1, Ordering::SeqCst) + 1;
        self.post(Command {
            kind: CommandKind::Wait as u32,
            flags: flags | wait::WRITE,
            addr: ACK.0,
            value,
            ..Default::default()
        });
        value
    }

    pub fn ack(&self) -> u64 {
        self.ram.load_u64(ACK, Ordering::SeqCst).unwrap()
    }

    /// Posts an invalidation of a range and a drained wait; returns the value to come.
    pub fn shoot(&self, context: u32, start: u64, end: u64) -> u64 {
        self.post(range(context, start, end));
        self.post_wait(wait::DRAINED)
    }

    /// Steps the device until nothing is left to do.
    pub fn run(&self) {
        for _ in 0..100_000 {
            let engine = self.device.engine_step();
            let invalidation = self.device.invalidation_step();
            if (engine, invalidation) == (Step::Idle, Step::Idle) {
                return;
            }
            if (engine, invalidation) == (Step::Waiting, Step::Idle) {
                self.clock.advance(Duration::from_millis(1));
            }
        }
        panic!("the device does not come to rest");
    }

    /// A new context with an empty page table, its ring mapped.
    pub fn process(&self, context: u32) -> Process {
        let process = Process::new(self, context);
        process.write_entry(self, |_| {});
        self.sync(context);
        self.run();
        process
    }

    /// One that the oracle does not watch: its accesses reach as far as a leaf does.
    pub fn unwatched(&self, context: u32) -> Process {
        let process = self.process(context);
        process.write_entry(self, |e| e.flags &= !context_flags::ORACLE);
        self.sync(context);
        self.run();
        process
    }

    pub fn sync(&self, context: u32) {
        self.post(Command {
            kind: CommandKind::ContextSync as u32,
            context,
            ..Default::default()
        });
    }

    /// The next page request or error record, if there is one.
    pub fn take_request(&self) -> Option<PageRequest> {
        let tail = self.kernel_word(offset_of!(KernelShadow, prq_tail));
        let head = self.prq_head.load(Ordering::SeqCst);
        if head as u32 == tail {
            return None;
        }
        let slot = head & ((1 << PRQ_LOG2) - 1);
        let mut bytes = [0; PageRequest::SIZE];
        let at = Gpa(PRQ.0 + slot * PageRequest::SIZE as u64);
        self.ram.read(at, &mut bytes).unwrap();
        self.prq_head.store(head + 1, Ordering::SeqCst);
        self.set_kernel_word(offset_of!(KernelShadow, prq_head), head as u32 + 1);
        if self.kernel_word(offset_of!(KernelShadow, prq_need_kick)) != 0 {
            self.set(regs::KICK, 1);
        }
        Some(PageRequest::from_bytes(&bytes))
    }

    pub fn expect_request(&self) -> PageRequest {
        let request = self.take_request().expect("a page request");
        assert_eq!(request.kind, RequestKind::Page as u32, "{request:?}");
        request
    }

    pub fn expect_error(&self) -> PageRequest {
        let request = self.take_request().expect("an error record");
        assert_eq!(request.kind, RequestKind::ContextError as u32);
        request
    }

    pub fn respond(&self, request: &PageRequest, response: Response) {
        self.post(Command {
            kind: CommandKind::PageResponse as u32,
            flags: response as u32,
            context: request.context,
            group: request.group,
            ..Default::default()
        });
    }

    pub fn fatal(&self) -> u64 {
        let fatal = self.get(regs::STATUS) == u64::from(regs::status::FATAL);
        if fatal { self.get(regs::ERROR) } else { 0 }
    }

    pub fn load(&self, at: Gpa) -> u64 {
        self.ram.load_u64(at, Ordering::SeqCst).unwrap()
    }

    pub fn store(&self, at: Gpa, value: u64) {
        self.ram.store_u64(at, value, Ordering::SeqCst).unwrap();
    }

    pub fn bytes(&self, at: Gpa, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read(at, &mut bytes).unwrap();
        bytes
    }
}

pub fn range(context: u32, start: u64, end: u64) -> Command {
    Command {
        kind: CommandKind::Invalidate as u32,
        flags: InvalidationScope::Range as u32,
        context,
        addr: start,
        value: end - start,
        ..Default::default()
    }
}
