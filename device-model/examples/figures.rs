//! Figures of a device in process: `cargo run --release -p extlb-device --example figures`.
//!
//! One engine thread, this thread as program and kernel; the oracle on and off.

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use extlb_device::ports::{Dma, Ignore, Ports, SystemClock};
use extlb_device::runner::{Bell, Runner};
use extlb_device::{Config, Device, GuestRam};
use extlb_spec::context::{ContextEntry, ContextShadow};
use extlb_spec::invalidation::{Command, CommandKind, KernelShadow, wait};
use extlb_spec::pte::{self, Pte};
use extlb_spec::regs::{self, Register};
use extlb_spec::work::{Descriptor, Opcode};
use extlb_spec::{BAR_DOORBELLS, BAR_REGS, Gpa, Iova, PAGE_SIZE};

const IQ: Gpa = Gpa(0x2000);
const SHADOW: Gpa = Gpa(0x4000);
const ACK: Gpa = Gpa(SHADOW.0 + offset_of!(KernelShadow, wait) as u64);
const CTX_SHADOW: Gpa = Gpa(0x5000);
const RING_PAGE: Gpa = Gpa(0x6000);
const RECORDS: Gpa = Gpa(0x7000);
const ROOT: Gpa = Gpa(0x8000);
const CPU_ROOT: Gpa = Gpa(0x9000);
const RING: u64 = 0x7000_0000;
const RING_LOG2: u32 = 6;
const RECORD: u64 = 0x7000_1000;
const SRC: u64 = 0x1000_0000;
const DST: u64 = 0x2000_0000;
const DATA: u64 = 0x100_0000;
const PAGES: u64 = 4096;

struct Machine {
    ram: GuestRam,
    device: Arc<Device>,
    next_table: u64,
    iq_tail: u32,
    tail: u32,
    acks: u64,
    shootdowns: u64,
}

impl Machine {
    fn set(&self, r: Register, v: u64) {
        let bytes = v.to_le_bytes();
        self.device
            .mmio_write(BAR_REGS, r.offset, &bytes[..r.width as usize]);
    }

    fn store(&self, at: Gpa, value: u64) {
        self.ram
            .store_u64(at, value, Ordering::Release)
            .expect("in RAM");
    }

    fn load_u32(&self, at: Gpa) -> u32 {
        self.ram.load_u32(at, Ordering::Acquire).expect("in RAM")
    }

    /// Maps in the device's page table and in the process's own.
    fn map(&mut self, iova: u64, page: u64) {
        for (root, table_bits, leaf) in [
            (ROOT, 1, Pte::leaf(Gpa(page), true).0),
            (CPU_ROOT, 7, page | 7),
        ] {
            let mut table = root.0;
            for level in [4, 3, 2] {
                let at = Gpa(table + pte::index(Iova(iova), level) * 8);
                let entry = self.ram.load_u64(at, Ordering::Acquire).expect("in RAM");
                table = match entry & pte::ADDR_MASK {
                    0 => {
                        self.next_table += PAGE_SIZE;
                        self.store(at, self.next_table | table_bits);
                        self.next_table
                    }
                    next => next,
                };
            }
            self.store(Gpa(table + pte::index(Iova(iova), 1) * 8), leaf);
        }
    }

    fn post(&mut self, command: Command) {
        let at = Gpa(IQ.0 + u64::from(self.iq_tail % 64) * 32);
        self.ram.write(at, &command.to_bytes()).expect("in RAM");
        self.iq_tail += 1;
        let tail = Gpa(SHADOW.0 + offset_of!(KernelShadow, iq_tail) as u64);
        self.ram
            .store_u32(tail, self.iq_tail, Ordering::Release)
            .expect("in RAM");
    }

    fn drained(&mut self) {
        self.acks += 1;
        self.post(Command {
            kind: CommandKind::Wait as u32,
            flags: wait::WRITE | wait::DRAINED,
            addr: ACK.0,
            value: self.acks,
            ..Default::default()
        });
        fence(Ordering::SeqCst);
        let need_kick = offset_of!(KernelShadow, iq_need_kick) as u64;
        if self.load_u32(Gpa(SHADOW.0 + need_kick)) != 0 {
            self.set(regs::KICK, 1);
        }
        while self.ram.load_u64(ACK, Ordering::Acquire) != Ok(self.acks) {
            std::thread::yield_now();
        }
    }

    fn shoot_down(&mut self, page: u64) {
        self.shootdowns += 1;
        self.post(Command {
            kind: CommandKind::Invalidate as u32,
            addr: page,
            value: PAGE_SIZE,
            ..Default::default()
        });
        self.drained();
    }

    fn submit(&mut self, mut descriptor: Descriptor) {
        let n = u64::from(self.tail % 64);
        descriptor.completion = RECORD + n * 32;
        self.ram
            .store_u32(Gpa(RECORDS.0 + n * 32), 0, Ordering::Relaxed)
            .expect("in RAM");
        let at = Gpa(RING_PAGE.0 + n * 64);
        self.ram.write(at, &descriptor.to_bytes()).expect("in RAM");
        self.tail += 1;
        let tail = Gpa(CTX_SHADOW.0 + offset_of!(ContextShadow, tail) as u64);
        self.ram
            .store_u32(tail, self.tail, Ordering::Release)
            .expect("in RAM");
        fence(Ordering::SeqCst);
        let need_kick = offset_of!(ContextShadow, need_kick) as u64;
        if self.load_u32(Gpa(CTX_SHADOW.0 + need_kick)) != 0 {
            self.device.mmio_write(BAR_DOORBELLS, 0, &[0; 4]);
        }
    }

    fn retired(&self) -> u32 {
        self.load_u32(Gpa(CTX_SHADOW.0 + offset_of!(ContextShadow, head) as u64))
    }

    /// Keeps the ring full for a while; operations a second.
    fn saturate(&mut self, descriptor: Descriptor, mut also: impl FnMut(&mut Self)) -> f64 {
        let (start, first) = (Instant::now(), self.tail);
        while start.elapsed() < Duration::from_millis(500) {
            while self.tail.wrapping_sub(self.retired()) < 1 << RING_LOG2 {
                self.submit(descriptor);
            }
            also(self);
            std::thread::yield_now();
        }
        while self.retired() != self.tail {
            std::thread::yield_now();
        }
        f64::from(self.tail - first) / start.elapsed().as_secs_f64()
    }
}

fn machine(oracle: bool) -> (Machine, Runner) {
    let ram = GuestRam::anonymous(&[(Gpa(0), 64 << 20)]).expect("RAM");
    let bell = Bell::new();
    let ports = Ports {
        memory: Arc::new(ram.clone()),
        interrupts: Arc::new(Ignore),
        clock: Arc::new(SystemClock::default()),
        trace: Arc::new(Ignore),
        wake: bell.clone(),
    };
    let device = Arc::new(Device::new(Config::default(), ports).expect("a device"));
    let runner = Runner::start(&device, &bell).expect("threads");
    device.set_bus_master(true);
    let mut machine = Machine {
        ram,
        device,
        next_table: 0x10_0000,
        iq_tail: 0,
        tail: 0,
        acks: 0,
        shootdowns: 0,
    };
    for (register, value) in [
        (regs::CTX_TABLE, 0x1000),
        (regs::CTX_COUNT, 1),
        (regs::IQ_BASE, IQ.0),
        (regs::IQ_LOG2, 6),
        (regs::PRQ_BASE, 0x3000),
        (regs::PRQ_LOG2, 4),
        (regs::SHADOW, SHADOW.0),
        (regs::CTRL, 1),
    ] {
        machine.set(register, value);
    }
    machine.map(RING, RING_PAGE.0);
    machine.map(RECORD, RECORDS.0);
    for i in 0..PAGES {
        machine.map(SRC + i * PAGE_SIZE, DATA + i * PAGE_SIZE);
        machine.map(DST + i * PAGE_SIZE, DATA + (PAGES + i) * PAGE_SIZE);
    }
    let entry = ContextEntry {
        flags: if oracle { 3 } else { 1 },
        page_table: ROOT.0,
        ring: RING,
        ring_log2: RING_LOG2,
        credits: 1,
        shadow: CTX_SHADOW.0,
        cpu_page_table: CPU_ROOT.0,
        ..Default::default()
    };
    machine
        .ram
        .write(Gpa(0x1000), &entry.to_bytes())
        .expect("in RAM");
    machine.post(Command {
        kind: CommandKind::ContextSync as u32,
        ..Default::default()
    });
    machine.drained();
    (machine, runner)
}

fn main() {
    for oracle in [true, false] {
        println!("oracle {}", if oracle { "on" } else { "off" });
        let (mut m, runner) = machine(oracle);
        let op = |opcode: Opcode, len| Descriptor {
            opcode: opcode as u8,
            src: SRC,
            dst: DST,
            len,
            ..Default::default()
        };
        let rate = m.saturate(op(Opcode::Nop, 0), |_| ());
        println!("  nop                     {rate:>12.0} /s");
        let rate = m.saturate(op(Opcode::Copy, PAGE_SIZE), |_| ());
        println!("  copy of 4 KiB           {rate:>12.0} /s");
        for (name, opcode) in [("copy", Opcode::Copy), ("crc32c", Opcode::Crc32c)] {
            let rate = m.saturate(op(opcode, 1 << 20), |_| ());
            println!(
                "  {name:<6} of 1 MiB (hits)  {:>12.2} GB/s",
                rate * 1048576e-9
            );
            let len = PAGES * PAGE_SIZE;
            let rate = m.saturate(op(opcode, len), |_| ());
            let bytes = rate * len as f64;
            println!("  {name:<6} of 16 MiB (misses){:>11.2} GB/s", bytes * 1e-9);
        }
        for busy in [false, true] {
            let mut times = Vec::new();
            let mut shoot = |m: &mut Machine| {
                let page = SRC + m.shootdowns * 7 % 256 * PAGE_SIZE;
                let start = Instant::now();
                m.shoot_down(page);
                times.push(start.elapsed());
            };
            if busy {
                m.saturate(op(Opcode::Copy, 1 << 20), &mut shoot);
            } else {
                let start = Instant::now();
                while start.elapsed() < Duration::from_millis(500) {
                    shoot(&mut m);
                }
            }
            times.sort();
            let at = |n: usize| times[(times.len() - 1) * n / 1000];
            println!(
                "  shootdown, {}   p50 {:?}, p99 {:?}, max {:?}, {} of them",
                if busy { "device busy" } else { "device idle" },
                at(500),
                at(990),
                at(1000),
                times.len()
            );
        }
        drop(runner);
    }
}
