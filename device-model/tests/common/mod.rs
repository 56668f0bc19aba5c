//! A guest in a box: RAM, page tables, queues, and a kernel that is played by the test.
//!
//! Nothing here has a thread; tests call `run` or step the device themselves.
#![allow(dead_code)] // each test file uses its part

pub mod saved;

use std::collections::HashMap;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub use extlb_device::Core;
use extlb_device::fault::{Injection, Interposed};
use extlb_device::ports::{BusError, Clock, Dma, Event, Ignore, Interrupts, Ports, Trace};
use extlb_device::{Config, GuestRam, Step};
use extlb_spec::context::{ContextEntry, ContextShadow, flags as context_flags};
use extlb_spec::invalidation::{Command, CommandKind, InvalidationScope, KernelShadow, wait};
use extlb_spec::page_request::{PageRequest, RequestKind, Response};
use extlb_spec::pte::{self, Pte};
use extlb_spec::regs::{self, Register};
use extlb_spec::work::{Completion, Descriptor, Opcode, Status};
use extlb_spec::{BAR_DOORBELLS, BAR_REGS, DOORBELL_STRIDE, Gpa, Iova, Vector};

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

/// An access of the device, for a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read(Gpa),
    Write(Gpa),
    Copy(Gpa, Gpa),
    /// Before a word or a double word is loaded.
    Load(Gpa),
    /// After a double word was loaded.
    Loaded(Gpa),
    /// Before a word is stored, swapped or added to.
    Store(Gpa),
}

type Hook = Box<dyn FnMut(Access) -> bool + Send>;

/// Memory with a hook that runs in the middle of an access. A hook that returns true is done.
pub struct Hooked {
    pub ram: GuestRam,
    hook: Mutex<Option<Hook>>,
    pub accesses: AtomicU64,
    /// All of RAM has been taken away: every access is a bus error.
    pub gone: AtomicBool,
    /// How often a word other than 0 was stored, by address: completions, above all.
    pub stores: Mutex<HashMap<Gpa, u64>>,
}

impl Hooked {
    pub fn hook(&self, hook: impl FnMut(Access) -> bool + Send + 'static) {
        *self.hook.lock().unwrap() = Some(Box::new(hook));
    }

    fn meet(&self, access: Access) -> Result<(), BusError> {
        self.accesses.fetch_add(1, Ordering::SeqCst);
        self.look(access);
        let (Access::Read(addr)
        | Access::Write(addr)
        | Access::Copy(addr, _)
        | Access::Load(addr)
        | Access::Loaded(addr)
        | Access::Store(addr)) = access;
        match self.gone.load(Ordering::SeqCst) {
            true => Err(BusError { addr, len: 1 }),
            false => Ok(()),
        }
    }

    fn look(&self, access: Access) {
        // Out of its place while it runs: it may use the device, and so get here again.
        let hook = self.hook.lock().unwrap().take();
        if let Some(mut hook) = hook
            && !hook(access)
        {
            self.hook.lock().unwrap().get_or_insert(hook);
        }
    }

    pub fn is_done(&self) -> bool {
        self.hook.lock().unwrap().is_none()
    }
}

impl Dma for Hooked {
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        self.meet(Access::Read(from))?;
        self.ram.read(from, to)
    }
    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        self.meet(Access::Write(to))?;
        self.ram.write(to, from)
    }
    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        self.meet(Access::Copy(from, to))?;
        self.ram.copy(from, to, len)
    }
    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32, BusError> {
        self.meet(Access::Load(at))?;
        self.ram.load_u32(at, order)
    }
    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<(), BusError> {
        self.meet(Access::Store(at))?;
        if value != 0 {
            *self.stores.lock().unwrap().entry(at).or_default() += 1;
        }
        self.ram.store_u32(at, value, order)
    }
    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64, BusError> {
        self.meet(Access::Load(at))?;
        let value = self.ram.load_u64(at, order);
        self.look(Access::Loaded(at));
        value
    }
    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<(), BusError> {
        self.meet(Access::Store(at))?;
        self.ram.store_u64(at, value, order)
    }
    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<u64, BusError> {
        self.meet(Access::Store(at))?;
        self.ram.compare_exchange_u64(at, current, new)
    }
    fn fetch_add_u64(&self, at: Gpa, value: u64) -> Result<u64, BusError> {
        self.meet(Access::Store(at))?;
        self.ram.fetch_add_u64(at, value)
    }

    fn view(&self, f: &mut dyn FnMut(&dyn Dma)) {
        f(self);
    }
}

/// Counts interrupts, and lets a test look at the moment of each.
#[derive(Default)]
pub struct Vectors(Mutex<HashMap<u32, u64>>, Mutex<Option<Look>>);

type Look = Box<dyn FnMut(Vector) + Send>;

impl Vectors {
    pub fn count(&self, vector: Vector) -> u64 {
        *self.0.lock().unwrap().get(&(vector as u32)).unwrap_or(&0)
    }

    pub fn total(&self) -> u64 {
        self.0.lock().unwrap().values().sum()
    }

    pub fn look(&self, look: impl FnMut(Vector) + Send + 'static) {
        *self.1.lock().unwrap() = Some(Box::new(look));
    }
}

impl Interrupts for Vectors {
    fn raise(&self, vector: Vector) {
        *self.0.lock().unwrap().entry(vector as u32).or_default() += 1;
        if let Some(look) = &mut *self.1.lock().unwrap() {
            look(vector);
        }
    }
}

/// A clock that is turned by hand.
#[derive(Default)]
pub struct HandClock(AtomicU64);

impl HandClock {
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(by.as_nanos() as u64, Ordering::SeqCst);
    }
}

impl Clock for HandClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::SeqCst))
    }
}

#[derive(Default)]
pub struct Events(pub Mutex<Vec<Event>>);

impl Trace for Events {
    fn event(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }
}

/// Pages are handed out once, in order.
#[derive(Debug)]
pub struct Pages(AtomicU64);

impl Pages {
    pub fn take(&self) -> Gpa {
        Gpa(self.0.fetch_add(PAGE, Ordering::SeqCst))
    }
}

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
    prq_head: AtomicU64,
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
        let memory = Arc::new(Hooked {
            ram: ram.clone(),
            hook: Mutex::new(None),
            accesses: AtomicU64::new(0),
            gone: AtomicBool::new(false),
            stores: Mutex::default(),
        });
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
            pages: Arc::new(Pages(AtomicU64::new(0x10_0000))),
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

/// A process with a context: its two page tables, its ring, its shadow page.
#[derive(Clone)]
pub struct Process {
    pub context: u32,
    pub root: Gpa,
    pub cpu_root: Gpa,
    pub shadow: Gpa,
    pub ring: Iova,
    pub ring_page: Gpa,
    pub records: Iova,
    pub records_page: Gpa,
    ram: GuestRam,
    pages: Arc<Pages>,
    tail: Arc<AtomicU64>,
}

pub const RING_LOG2: u32 = 4;

impl Process {
    /// Its memory; the context table does not know it yet.
    pub fn new(guest: &Guest, context: u32) -> Self {
        let take = || guest.pages.take();
        let process = Self {
            context,
            root: take(),
            cpu_root: take(),
            shadow: take(),
            ring: Iova(0x7f00_0000_0000),
            ring_page: take(),
            records: Iova(0x7f00_0000_1000),
            records_page: take(),
            ram: guest.ram.clone(),
            pages: guest.pages.clone(),
            tail: Arc::default(),
        };
        process.map(process.ring, process.ring_page, true);
        process.map(process.records, process.records_page, true);
        process
    }

    /// Writes the entry of the context table, spoilt as given.
    pub fn write_entry(&self, guest: &Guest, spoil: impl Fn(&mut ContextEntry)) {
        let mut entry = ContextEntry {
            flags: context_flags::VALID | context_flags::ORACLE,
            page_table: self.root.0,
            ring: self.ring.0,
            ring_log2: RING_LOG2,
            credits: 4,
            shadow: self.shadow.0,
            cpu_page_table: self.cpu_root.0,
            ..Default::default()
        };
        spoil(&mut entry);
        let at = Gpa(CTX_TABLE.0 + u64::from(self.context) * ContextEntry::SIZE as u64);
        guest.ram.write(at, &entry.to_bytes()).unwrap();
    }

    pub fn stop(&self, guest: &Guest) {
        self.write_entry(guest, |e| e.flags = 0);
        guest.sync(self.context);
    }

    fn leaf(&self, root: Gpa, iova: Iova, table_bits: u64) -> Gpa {
        let mut table = root;
        for level in (2..=4).rev() {
            let at = Gpa(table.0 + pte::index(iova, level) * 8);
            let entry = self.ram.load_u64(at, Ordering::SeqCst).unwrap();
            table = if entry & 1 == 0 {
                let page = self.pages.take();
                let value = page.0 | table_bits;
                self.ram.store_u64(at, value, Ordering::SeqCst).unwrap();
                page
            } else {
                Gpa(entry & pte::ADDR_MASK)
            };
        }
        Gpa(table.0 + pte::index(iova, 1) * 8)
    }

    /// Where the leaf of the device's page table is.
    pub fn device_leaf(&self, iova: Iova) -> Gpa {
        self.leaf(self.root, iova, 1)
    }

    pub fn device_pte(&self, iova: Iova) -> Pte {
        let at = self.device_leaf(iova);
        Pte(self.ram.load_u64(at, Ordering::SeqCst).unwrap())
    }

    pub fn set_device(&self, iova: Iova, value: Pte) {
        let at = self.device_leaf(iova);
        self.ram.store_u64(at, value.0, Ordering::SeqCst).unwrap();
    }

    /// Writes where the device's page table leads, within a page.
    pub fn poke(&self, iova: Iova, bytes: &[u8]) {
        let at = Gpa(self.device_pte(iova).addr().0 + iova.page_offset());
        self.ram.write(at, bytes).unwrap();
    }

    /// Sets the process's own entry; `None` takes the page out.
    pub fn set_cpu(&self, iova: Iova, page: Option<(Gpa, bool)>) {
        let at = self.leaf(self.cpu_root, iova, 0x67);
        let value = page.map_or(0, |(gpa, write)| gpa.0 | 0x65 | u64::from(write) << 1);
        self.ram.store_u64(at, value, Ordering::SeqCst).unwrap();
    }

    /// Maps a page in both tables.
    pub fn map(&self, iova: Iova, page: Gpa, write: bool) {
        self.set_cpu(iova, Some((page, write)));
        self.set_device(iova, Pte::leaf(page, write));
    }

    /// Maps `count` fresh pages; returns them.
    pub fn map_fresh(&self, iova: Iova, count: u64) -> Vec<Gpa> {
        (0..count)
            .map(|i| {
                let page = self.pages.take();
                self.map(Iova(iova.0 + i * PAGE), page, true);
                page
            })
            .collect()
    }

    /// Address of the record that the n-th submission gets.
    pub fn record(&self, n: u64) -> Iova {
        Iova(self.records.0 + n % 128 * 32)
    }

    /// Writes a descriptor and rings, without waking; returns the number of the submission.
    pub fn submit(&self, mut descriptor: Descriptor) -> u64 {
        let n = self.tail.fetch_add(1, Ordering::SeqCst);
        if descriptor.completion == 0 {
            descriptor.completion = self.record(n).0;
            let record = Gpa(self.records_page.0 + n % 128 * 32);
            self.ram.write(record, &[0; 32]).unwrap();
        }
        let at = Gpa(self.ring_page.0 + (n & ((1 << RING_LOG2) - 1)) * 64);
        self.ram.write(at, &descriptor.to_bytes()).unwrap();
        self.set_tail(n as u32 + 1);
        n
    }

    /// Its queue is empty, and its records and its shadow page are zero: for a new life.
    pub fn restart(&self) {
        self.tail.store(0, Ordering::SeqCst);
        for page in [self.shadow, self.records_page] {
            self.ram.write(page, &[0; 4096]).unwrap();
        }
    }

    pub fn set_tail(&self, tail: u32) {
        let at = Gpa(self.shadow.0 + offset_of!(ContextShadow, tail) as u64);
        self.ram.store_u32(at, tail, Ordering::SeqCst).unwrap();
    }

    pub fn word(&self, offset: usize) -> u32 {
        let at = Gpa(self.shadow.0 + offset as u64);
        self.ram.load_u32(at, Ordering::SeqCst).unwrap()
    }

    pub fn error(&self) -> u32 {
        self.word(offset_of!(ContextShadow, error))
    }

    /// How many submissions there were.
    pub fn submitted(&self) -> u64 {
        self.tail.load(Ordering::SeqCst)
    }

    /// Submissions that are not retired.
    pub fn ahead(&self) -> u32 {
        let tail = self.tail.load(Ordering::SeqCst) as u32;
        tail.wrapping_sub(self.word(offset_of!(ContextShadow, head)))
    }

    /// Rings the doorbell.
    pub fn ring(&self, guest: &Guest) {
        let at = u64::from(self.context) * DOORBELL_STRIDE;
        guest.device.mmio_write(BAR_DOORBELLS, at, &[1, 0, 0, 0]);
    }

    pub fn completion(&self, n: u64) -> Completion {
        let mut bytes = [0; Completion::SIZE];
        let at = Gpa(self.records_page.0 + n % 128 * 32);
        self.ram.read(at, &mut bytes).unwrap();
        Completion::from_bytes(&bytes)
    }

    pub fn status(&self, n: u64) -> Option<Status> {
        Status::from_raw(self.completion(n).status)
    }

    /// Submits, rings, runs; the record.
    pub fn go(&self, guest: &Guest, descriptor: Descriptor) -> Completion {
        let n = self.submit(descriptor);
        self.ring(guest);
        guest.run();
        self.completion(n)
    }
}

pub fn op(opcode: Opcode, src: u64, dst: u64, len: u64) -> Descriptor {
    Descriptor {
        opcode: opcode as u8,
        src,
        dst,
        len,
        ..Default::default()
    }
}

pub fn copy(src: u64, dst: u64, len: u64) -> Descriptor {
    op(Opcode::Copy, src, dst, len)
}
