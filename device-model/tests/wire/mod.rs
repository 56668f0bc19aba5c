//! A client of the server over a real socket, with a context whose page table it writes itself.
#![allow(dead_code)] // each test file uses its part

pub mod client;
pub mod program;

use std::fs::File;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use client::Client;
use extlb_device::Config;
use extlb_device::server::{Options, Server};
use extlb_spec::context::{ContextEntry, ContextShadow, flags};
use extlb_spec::invalidation::{Command, CommandKind, InvalidationScope, KernelShadow, wait};
use extlb_spec::pte::Pte;
use extlb_spec::regs::{self, Register};
use extlb_spec::work::{Completion, Descriptor};
use extlb_spec::{BAR_DOORBELLS, BAR_REGS, Gpa};

/// Region of the configuration space.
pub const CONFIG: u32 = 7;
/// Bytes of RAM, at bus address 0.
pub const RAM: u64 = 1 << 20;
pub const CTX_TABLE: u64 = 0x1000;
pub const IQ: u64 = 0x2000;
pub const PRQ: u64 = 0x3000;
pub const SHADOW: u64 = 0x4000;
const CTX_SHADOW: u64 = 0x5000;
const RING: u64 = 0x6000;
const RECORDS: u64 = 0x7000;
/// Page table: root, and one table for each level below; it spans the first 2 MiB.
const TABLES: [u64; 4] = [0x10_000, 0x11_000, 0x12_000, 0x13_000];
/// Virtual addresses of ring and records.
const RING_AT: u64 = 0x1000;
const RECORDS_AT: u64 = 0x2000;

/// A server, on a thread of its own.
pub struct Served {
    pub socket: PathBuf,
    pub folder: tempfile::TempDir,
    thread: JoinHandle<()>,
}

impl Served {
    pub fn new(config: Config, once: bool) -> Self {
        Self::with(Options {
            config,
            once,
            ..Options::default()
        })
    }

    /// A server for one client, which records its run in the file `run` of the folder.
    pub fn recorded(config: Config) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let options = Options {
            config,
            once: true,
            record: Some(folder.path().join("run")),
            ..Options::default()
        };
        Self::within(folder, options)
    }

    /// At a socket in a folder of its own, with a report.
    pub fn with(options: Options) -> Self {
        Self::within(tempfile::tempdir().expect("a folder"), options)
    }

    fn within(folder: tempfile::TempDir, options: Options) -> Self {
        let socket = folder.path().join("device.sock");
        let server = Server::bind(Options {
            at: vec![socket.clone().into()],
            report: Some(folder.path().join("report.json")),
            ..options
        })
        .expect("listens");
        let thread = std::thread::spawn(move || server.serve().expect("serves"));
        Self {
            socket,
            folder,
            thread,
        }
    }

    /// The report, when a server of one client has ended.
    pub fn report(self) -> Vec<serde_json::Value> {
        self.thread.join().expect("ends");
        let text = std::fs::read_to_string(self.folder.path().join("report.json"));
        let text = text.expect("a report");
        let lines = text.lines().map(serde_json::from_str);
        lines.collect::<Result<_, _>>().expect("JSON")
    }
}

/// The lines of a report that tell of an event.
pub fn events<'a>(report: &'a [serde_json::Value], name: &str) -> Vec<&'a serde_json::Value> {
    report.iter().filter(|line| line["event"] == name).collect()
}

pub fn memory(len: u64) -> File {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(len).expect("sized");
    file
}

/// Waits for what another thread is going to do.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "it did not happen: {what}");
        std::thread::yield_now();
    }
}

/// A connected client, and its RAM.
pub struct Wire {
    pub client: Client,
    pub ram: File,
    iq_tail: u32,
    submitted: u32,
}

impl Wire {
    /// Connects and shakes hands. RAM is not mapped yet.
    pub fn connect(socket: &Path) -> Self {
        let mut wire = Self::silent(socket);
        wire.client.greet();
        wire
    }

    /// Connects, without a word.
    pub fn silent(socket: &Path) -> Self {
        Self {
            client: Client::silent(socket),
            ram: memory(RAM),
            iq_tail: 0,
            submitted: 0,
        }
    }

    pub fn map(&mut self, at: u64, file: &File, offset: u64, len: u64) {
        self.client
            .dma_map(offset, at, len, file.as_raw_fd())
            .expect("mapped");
    }

    pub fn map_ram(&mut self) {
        let ram = self.ram.try_clone().expect("cloned");
        self.map(0, &ram, 0, RAM);
    }

    pub fn config(&mut self, offset: u64, len: usize) -> u32 {
        let mut bytes = [0; 4];
        self.client
            .region_read(CONFIG, offset, &mut bytes[..len])
            .expect("read");
        u32::from_le_bytes(bytes)
    }

    pub fn set_config(&mut self, offset: u64, bytes: &[u8]) {
        self.client
            .region_write(CONFIG, offset, bytes)
            .expect("written");
    }

    /// Memory space and bus mastering on.
    pub fn start_bus(&mut self) {
        self.set_config(4, &[6, 0]);
    }

    pub fn get(&mut self, register: Register) -> u64 {
        let mut bytes = [0; 8];
        let width = register.width as usize;
        self.client
            .region_read(BAR_REGS.into(), register.offset, &mut bytes[..width])
            .expect("read");
        u64::from_le_bytes(bytes)
    }

    pub fn set(&mut self, register: Register, value: u64) {
        let bytes = value.to_le_bytes();
        self.client
            .region_write(
                BAR_REGS.into(),
                register.offset,
                &bytes[..register.width as usize],
            )
            .expect("written");
    }

    /// Writes the configuration registers, without enabling.
    pub fn configure(&mut self) {
        for (register, value) in [
            (regs::CTX_TABLE, CTX_TABLE),
            (regs::CTX_COUNT, 16),
            (regs::IQ_BASE, IQ),
            (regs::IQ_LOG2, 4),
            (regs::PRQ_BASE, PRQ),
            (regs::PRQ_LOG2, 4),
            (regs::SHADOW, SHADOW),
        ] {
            self.set(register, value);
        }
    }

    /// Enables, with indices that begin at 0 again.
    pub fn enable(&mut self) {
        self.write(SHADOW, &[0; 4096]);
        self.iq_tail = 0;
        self.set(regs::CTRL, regs::ctrl::ENABLE.into());
    }

    /// Everything: RAM, bus, registers, and context 0.
    pub fn start(&mut self) {
        self.map_ram();
        self.start_bus();
        self.configure();
        self.enable();
        assert_eq!(self.get(regs::STATUS), u64::from(regs::status::ENABLED));
        self.start_context();
    }

    /// Context 0, with its page table in RAM.
    pub fn start_context(&mut self) {
        for pair in TABLES.windows(2) {
            self.write(pair[0], &Pte::table(Gpa(pair[1])).0.to_le_bytes());
        }
        self.leaf(RING_AT, Pte::leaf(Gpa(RING), false));
        self.leaf(RECORDS_AT, Pte::leaf(Gpa(RECORDS), true));
        self.write(CTX_SHADOW, &[0; 4096]);
        self.submitted = 0;
        let entry = ContextEntry {
            flags: flags::VALID,
            page_table: TABLES[0],
            ring: RING_AT,
            ring_log2: 4,
            credits: 4,
            shadow: CTX_SHADOW,
            ..Default::default()
        };
        self.write(CTX_TABLE, &entry.to_bytes());
        self.post(Command {
            kind: CommandKind::ContextSync as u32,
            ..Default::default()
        });
        self.drain();
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.ram.write_all_at(bytes, at).expect("written");
    }

    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.read_exact_at(&mut bytes, at).expect("read");
        bytes
    }

    /// Sets the leaf of a virtual address below 2 MiB.
    pub fn leaf(&self, iova: u64, leaf: Pte) {
        self.write(TABLES[3] + (iova >> 12) * 8, &leaf.0.to_le_bytes());
    }

    /// Posts a command, without kicking.
    pub fn post(&mut self, command: Command) {
        let slot = u64::from(self.iq_tail % 16) * Command::SIZE as u64;
        self.write(IQ + slot, &command.to_bytes());
        self.iq_tail += 1;
        let at = SHADOW + offset_of!(KernelShadow, iq_tail) as u64;
        self.write(at, &self.iq_tail.to_le_bytes());
    }

    /// Posts a wait for a drain, and waits.
    pub fn drain(&mut self) {
        let at = SHADOW + offset_of!(KernelShadow, wait) as u64;
        let value = u64::from(self.iq_tail) + 1;
        self.write(at, &[0; 8]);
        self.post(Command {
            kind: CommandKind::Wait as u32,
            flags: wait::WRITE | wait::DRAINED,
            addr: at,
            value,
            ..Default::default()
        });
        self.set(regs::KICK, 1);
        eventually("the drain is acknowledged", || {
            u64::from_le_bytes(self.read(at)) == value
        });
    }

    /// What a driver does before it takes a page away: pte, invalidation, drain.
    pub fn shoot_down(&mut self, iova: u64) {
        self.leaf(iova, Pte(0));
        self.post(Command {
            kind: CommandKind::Invalidate as u32,
            flags: InvalidationScope::Range as u32,
            addr: iova,
            value: 4096,
            ..Default::default()
        });
        self.drain();
    }

    /// Submits and rings; returns the number.
    pub fn submit(&mut self, descriptor: Descriptor) -> u32 {
        let n = self.place(descriptor);
        self.client
            .region_write(BAR_DOORBELLS.into(), 0, &[1, 0, 0, 0])
            .expect("rung");
        n
    }

    /// Submits without ringing; returns the number. A device that is awake sees it by itself.
    pub fn place(&mut self, mut descriptor: Descriptor) -> u32 {
        let n = self.submitted;
        self.submitted += 1;
        let record = u64::from(n % 128) * Completion::SIZE as u64;
        self.write(RECORDS + record, &[0; Completion::SIZE]);
        descriptor.completion = RECORDS_AT + record;
        let slot = u64::from(n % 16) * Descriptor::SIZE as u64;
        self.write(RING + slot, &descriptor.to_bytes());
        let tail = CTX_SHADOW + offset_of!(ContextShadow, tail) as u64;
        self.write(tail, &self.submitted.to_le_bytes());
        n
    }

    /// The record of a submission as it is now.
    pub fn record(&self, n: u32) -> Completion {
        Completion::from_bytes(&self.read(RECORDS + u64::from(n % 128) * 32))
    }

    /// Waits for a submission's end.
    pub fn wait(&self, n: u32) -> Completion {
        eventually("the operation ends", || self.record(n).status != 0);
        self.record(n)
    }
}
