//! The device with its threads: pages are taken back while it copies without pause.

mod common;

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use common::*;
use extlb_device::ports::{Dma, Ignore, Interrupts, Ports, SystemClock};
use extlb_device::runner::{Bell, Runner};
use extlb_device::{Config, Device, GuestRam};
use extlb_spec::context::{ContextEntry, ContextShadow};
use extlb_spec::invalidation::{Command, CommandKind, KernelShadow, wait};
use extlb_spec::pte::{self, Pte};
use extlb_spec::regs;
use extlb_spec::work::{Completion, Descriptor, Opcode, Status};
use extlb_spec::{BAR_DOORBELLS, BAR_REGS, Gpa, Iova, Vector};

#[derive(Default)]
struct Count(AtomicU64);
impl Interrupts for Count {
    fn raise(&self, _: Vector) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

const RING: u64 = 0x7000_0000;
const RECORD: u64 = 0x7000_1000;
const SRC: u64 = 0x5000_0000;
const DST: u64 = 0x6000_0000;
const ROOT: Gpa = Gpa(0x4_0000);
const CTX_SHADOW: Gpa = Gpa(0x3_1000);
const LOG2: u32 = 6;
const PAGES: u64 = 16;

struct Machine {
    ram: GuestRam,
    device: Arc<Device>,
    next_table: AtomicU64,
    iq_tail: AtomicU64,
}

impl Machine {
    fn set(&self, r: regs::Register, v: u64) {
        let bytes = v.to_le_bytes();
        self.device
            .mmio_write(BAR_REGS, r.offset, &bytes[..r.width as usize]);
    }

    fn leaf(&self, iova: u64) -> Gpa {
        let mut table = ROOT;
        for level in (2..=4).rev() {
            let at = Gpa(table.0 + pte::index(Iova(iova), level) * 8);
            let entry = Pte(self.ram.load_u64(at, Ordering::SeqCst).unwrap());
            table = if entry.is_present() {
                entry.addr()
            } else {
                let page = Gpa(self.next_table.fetch_add(4096, Ordering::SeqCst));
                let value = Pte::table(page).0;
                self.ram.store_u64(at, value, Ordering::SeqCst).unwrap();
                page
            };
        }
        Gpa(table.0 + pte::index(Iova(iova), 1) * 8)
    }

    fn map(&self, iova: u64, pte: Pte) {
        let at = self.leaf(iova);
        self.ram.store_u64(at, pte.0, Ordering::SeqCst).unwrap();
    }

    fn post(&self, command: Command) {
        let index = self.iq_tail.fetch_add(1, Ordering::SeqCst);
        let at = Gpa(IQ.0 + (index & ((1 << LOG2) - 1)) * 32);
        self.ram.write(at, &command.to_bytes()).unwrap();
        let tail = Gpa(SHADOW.0 + offset_of!(KernelShadow, iq_tail) as u64);
        self.ram
            .store_u32(tail, index as u32 + 1, Ordering::Release)
            .unwrap();
    }

    /// Posts a drained wait, kicks if asked, and waits: what the kernel does under its locks.
    fn drained(&self, value: u64) {
        self.post(Command {
            kind: CommandKind::Wait as u32,
            flags: wait::WRITE | wait::DRAINED,
            addr: ACK.0,
            value,
            ..Default::default()
        });
        fence(Ordering::SeqCst);
        let kick = Gpa(SHADOW.0 + offset_of!(KernelShadow, iq_need_kick) as u64);
        if self.ram.load_u32(kick, Ordering::SeqCst).unwrap() != 0 {
            self.set(regs::KICK, 1);
        }
        while self.ram.load_u64(ACK, Ordering::Acquire).unwrap() != value {
            std::thread::yield_now();
        }
    }

    fn shadow(&self, offset: usize) -> Gpa {
        Gpa(CTX_SHADOW.0 + offset as u64)
    }

    fn submit(&self, n: u64, mut descriptor: Descriptor) {
        descriptor.completion = RECORD + n % 64 * 32;
        let record = Gpa(0x3_3000 + n % 64 * 32);
        self.ram.write(record, &[0; 32]).unwrap();
        let at = Gpa(0x3_2000 + n % 16 * 64);
        self.ram.write(at, &descriptor.to_bytes()).unwrap();
        let tail = self.shadow(offset_of!(ContextShadow, tail));
        self.ram
            .store_u32(tail, n as u32 + 1, Ordering::Release)
            .unwrap();
        fence(Ordering::SeqCst);
        let kick = self.shadow(offset_of!(ContextShadow, need_kick));
        if self.ram.load_u32(kick, Ordering::SeqCst).unwrap() != 0 {
            self.device.mmio_write(BAR_DOORBELLS, 0, &[1, 0, 0, 0]);
        }
    }

    fn wait(&self, n: u64) -> Completion {
        let record = Gpa(0x3_3000 + n % 64 * 32);
        while self.ram.load_u32(record, Ordering::Acquire).unwrap() == 0 {
            std::thread::yield_now();
        }
        let mut bytes = [0; 32];
        self.ram.read(record, &mut bytes).unwrap();
        Completion::from_bytes(&bytes)
    }
}

fn machine(config: Config) -> (Arc<Machine>, Runner) {
    let ram = GuestRam::anonymous(&[(Gpa(0), 8 << 20)]).unwrap();
    let bell = Bell::new();
    let ports = Ports {
        memory: Arc::new(ram.clone()),
        interrupts: Arc::new(Count::default()),
        clock: Arc::new(SystemClock::default()),
        trace: Arc::new(Ignore),
        wake: bell.clone(),
    };
    let device = Arc::new(Device::new(config, ports).unwrap());
    let runner = Runner::start(&device, &bell).unwrap();
    device.set_bus_master(true);
    let machine = Arc::new(Machine {
        ram,
        device,
        next_table: AtomicU64::new(0x10_0000),
        iq_tail: AtomicU64::new(0),
    });
    for (register, value) in [
        (regs::CTX_TABLE, CTX_TABLE.0),
        (regs::CTX_COUNT, 1),
        (regs::IQ_BASE, IQ.0),
        (regs::IQ_LOG2, LOG2.into()),
        (regs::PRQ_BASE, PRQ.0),
        (regs::PRQ_LOG2, 4),
        (regs::SHADOW, SHADOW.0),
        (regs::CTRL, 1),
    ] {
        machine.set(register, value);
    }
    machine.map(RING, Pte::leaf(Gpa(0x3_2000), true));
    machine.map(RECORD, Pte::leaf(Gpa(0x3_3000), true));
    let entry = ContextEntry {
        flags: 1,
        page_table: ROOT.0,
        ring: RING,
        ring_log2: 4,
        credits: 1,
        shadow: CTX_SHADOW.0,
        ..Default::default()
    };
    machine.ram.write(CTX_TABLE, &entry.to_bytes()).unwrap();
    machine.post(Command {
        kind: CommandKind::ContextSync as u32,
        ..Default::default()
    });
    machine.drained(u64::MAX);
    (machine, runner)
}

/// The program fills and copies; the kernel moves its pages from frame to frame. After each
/// acknowledgement the old frame is poisoned, and must stay so.
#[test]
fn no_write_lands_in_a_page_after_its_acknowledgement() {
    for engines in [1, 3] {
        let (machine, runner) = machine(Config {
            engines,
            ..Default::default()
        });
        let frames = |set: u64, i: u64| Gpa(0x20_0000 + (set * PAGES + i) * 4096);
        for i in 0..PAGES {
            machine.map(DST + i * 4096, Pte::leaf(frames(0, i), true));
            machine.map(SRC + i * 4096, Pte::leaf(frames(4, i), true));
        }
        let (stop, operations) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let program = scope.spawn(|| {
                let mut n = 0;
                while stop.load(Ordering::SeqCst) == 0 {
                    let len = PAGES * 4096;
                    let descriptor = match n % 2 {
                        0 => Descriptor {
                            opcode: Opcode::Copy as u8,
                            src: SRC,
                            dst: DST,
                            len,
                            ..Default::default()
                        },
                        _ => Descriptor {
                            opcode: Opcode::Fill as u8,
                            dst: DST,
                            len,
                            arg: 0x1111_1111_1111_1111,
                            ..Default::default()
                        },
                    };
                    machine.submit(n, descriptor);
                    let done = machine.wait(n);
                    assert_eq!(Status::from_raw(done.status), Some(Status::Success));
                    n += 1;
                    operations.store(n, Ordering::SeqCst);
                }
            });
            let poison = [0xdb; 4096];
            let mut bytes = [0; 4096];
            for round in 0..u64::MAX {
                // Long enough for both sides, however the machine shares its processors out.
                if round > 2000 && operations.load(Ordering::SeqCst) > 50 {
                    break;
                }
                let i = round * 7 % PAGES;
                let set = round / PAGES % 2;
                let (old, new) = (frames(set, i), frames(1 - set, i));
                if machine
                    .ram
                    .load_u64(machine.leaf(DST + i * 4096), Ordering::SeqCst)
                    .unwrap()
                    & pte::ADDR_MASK
                    != old.0
                {
                    continue;
                }
                let pte = Pte::leaf(new, true);
                machine.map(DST + i * 4096, pte);
                machine.post(range(0, DST + i * 4096, DST + (i + 1) * 4096));
                machine.drained(round + 1);
                machine.ram.write(old, &poison).unwrap();
                for _ in 0..3 {
                    std::thread::yield_now();
                    machine.ram.read(old, &mut bytes).unwrap();
                    assert!(bytes == poison, "a write after the acknowledgement");
                }
            }
            stop.store(1, Ordering::SeqCst);
            program.join().unwrap();
        });
        drop(runner);
    }
}

/// Nothing to do, nothing done: after the polling time nobody touches memory or the clock.
#[test]
fn an_idle_device_sleeps_and_wakes_by_kicks() {
    let (machine, runner) = machine(Config {
        poll_us: 10,
        ..Default::default()
    });
    for n in 0..50 {
        machine.submit(n, Descriptor::default());
        assert_eq!(machine.wait(n).status, Status::Success as u32);
        // Wait until it sleeps: it says so itself.
        let kick = machine.shadow(offset_of!(ContextShadow, need_kick));
        while machine.ram.load_u32(kick, Ordering::SeqCst).unwrap() == 0 {
            std::thread::yield_now();
        }
        machine.drained(n + 1);
    }
    drop(runner);
}
