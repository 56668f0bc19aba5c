//! Indices of all rings wrap around at 2^32. Nobody has the time to get there by working, so
//! these tests start shortly before.

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use extlb_spec::context::{ContextEntry, ContextShadow};
use extlb_spec::invalidation::{Command, CommandKind, KernelShadow, wait};
use extlb_spec::page_request::{PageRequest, Response};
use extlb_spec::pte::{self, Pte};
use extlb_spec::work::{Descriptor, Opcode, Status};
use extlb_spec::{BAR_DOORBELLS, BAR_REGS, Gpa, Iova, regs};

use crate::ports::{Dma, Ignore, Ports};
use crate::sync::lock;
use crate::{Config, Device, GuestRam, Step};

const TABLE: u64 = 0x1000;
const IQ: u64 = 0x2000;
const PRQ: u64 = 0x3000;
const SHADOW: u64 = 0x4000;
const CONTEXT_SHADOW: u64 = 0x5000;
const RING: u64 = 0x6000;
const RECORDS: u64 = 0x7000;
const ROOT: u64 = 0x1_0000;
const RING_IOVA: u64 = 0x4000_0000;
const RECORDS_IOVA: u64 = 0x4000_1000;
const MISSING: u64 = 0x4000_2000;
/// Where each index starts: so far before its end.
const START: u32 = u32::MAX - 5;

struct Rig {
    ram: GuestRam,
    device: Device,
    iq_tail: u32,
}

impl Rig {
    fn new() -> Self {
        let ram = GuestRam::anonymous(&[(Gpa(0), 1 << 20)]).unwrap();
        let ports = Ports::stepped(Arc::new(ram.clone()), Arc::new(Ignore));
        let config = Config {
            poll_us: 0,
            ..Default::default()
        };
        let device = Device::new(config, ports).unwrap();
        let mut rig = Self {
            ram,
            device,
            iq_tail: START,
        };
        rig.device.set_bus_master(true);
        for (register, value) in [
            (regs::CTX_TABLE, TABLE),
            (regs::CTX_COUNT, 1),
            (regs::IQ_BASE, IQ),
            (regs::IQ_LOG2, 4),
            (regs::PRQ_BASE, PRQ),
            (regs::PRQ_LOG2, 4),
            (regs::SHADOW, SHADOW),
            (regs::CTRL, 1),
        ] {
            let bytes = value.to_le_bytes();
            let width = usize::from(register.width);
            rig.device
                .mmio_write(BAR_REGS, register.offset, &bytes[..width]);
        }
        lock(&rig.device.commands).head = START;
        lock(&rig.device.requests).tail = START;
        for offset in [
            offset_of!(KernelShadow, iq_tail),
            offset_of!(KernelShadow, prq_head),
            offset_of!(KernelShadow, prq_tail),
        ] {
            rig.store(SHADOW + offset as u64, START);
        }
        // A page table of one table a level.
        for level in (2..=4).rev() {
            let at = ROOT + u64::from(4 - level) * 0x1000;
            let slot = at + pte::index(Iova(RING_IOVA), level) * 8;
            let entry = Pte::table(Gpa(at + 0x1000)).0;
            rig.ram
                .store_u64(Gpa(slot), entry, Ordering::SeqCst)
                .unwrap();
        }
        rig.map(RING_IOVA, RING);
        rig.map(RECORDS_IOVA, RECORDS);
        let entry = ContextEntry {
            flags: 1,
            page_table: ROOT,
            ring: RING_IOVA,
            ring_log2: 2,
            credits: 1,
            shadow: CONTEXT_SHADOW,
            ..Default::default()
        };
        rig.ram.write(Gpa(TABLE), &entry.to_bytes()).unwrap();
        rig.post(Command {
            kind: CommandKind::ContextSync as u32,
            ..Default::default()
        });
        rig.run();
        let context = &rig.device.contexts[0];
        let mut work = lock(&context.work);
        (work.head, work.tail) = (START, START);
        drop(work);
        rig.store(
            CONTEXT_SHADOW + offset_of!(ContextShadow, tail) as u64,
            START,
        );
        rig
    }

    fn store(&self, at: u64, value: u32) {
        self.ram
            .store_u32(Gpa(at), value, Ordering::SeqCst)
            .unwrap();
    }

    fn load(&self, at: u64) -> u32 {
        self.ram.load_u32(Gpa(at), Ordering::SeqCst).unwrap()
    }

    fn map(&self, iova: u64, frame: u64) {
        let at = ROOT + 0x3000 + pte::index(Iova(iova), 1) * 8;
        let leaf = Pte::leaf(Gpa(frame), true).0;
        self.ram.store_u64(Gpa(at), leaf, Ordering::SeqCst).unwrap();
    }

    fn post(&mut self, command: Command) {
        let at = IQ + u64::from(self.iq_tail & 15) * Command::SIZE as u64;
        self.ram.write(Gpa(at), &command.to_bytes()).unwrap();
        self.iq_tail = self.iq_tail.wrapping_add(1);
        let tail = SHADOW + offset_of!(KernelShadow, iq_tail) as u64;
        self.store(tail, self.iq_tail);
    }

    fn run(&self) {
        for _ in 0..1000 {
            let steps = (self.device.engine_step(), self.device.invalidation_step());
            if steps == (Step::Idle, Step::Idle) {
                return;
            }
        }
        panic!("the device does not come to rest");
    }

    fn submit(&self, index: u32, descriptor: Descriptor) {
        let at = RING + u64::from(index & 3) * Descriptor::SIZE as u64;
        self.ram.write(Gpa(at), &descriptor.to_bytes()).unwrap();
        let tail = CONTEXT_SHADOW + offset_of!(ContextShadow, tail) as u64;
        self.store(tail, index.wrapping_add(1));
        self.device.mmio_write(BAR_DOORBELLS, 0, &[1, 0, 0, 0]);
    }
}

#[test]
fn the_invalidation_queue_goes_on_beyond_2_to_the_32() {
    let mut rig = Rig::new();
    let word = SHADOW + offset_of!(KernelShadow, wait) as u64;
    for round in 1..20 {
        // As full as can be, across the end: each slot is carried out once, in order.
        for n in 0..16u64 {
            rig.post(Command {
                kind: CommandKind::Wait as u32,
                flags: wait::WRITE | wait::DRAINED,
                addr: word + n * 8,
                value: round,
                ..Default::default()
            });
        }
        for n in 0..16 {
            assert_eq!(rig.device.invalidation_step(), Step::Busy);
            assert_eq!(rig.load(word + n * 8), round as u32);
            assert!(n == 15 || rig.load(word + n * 8 + 8) == round as u32 - 1);
        }
        assert_eq!(rig.device.invalidation_step(), Step::Idle);
    }
    let head = rig.load(SHADOW + offset_of!(KernelShadow, iq_head) as u64);
    assert_eq!(head, rig.iq_tail);
    assert!(head < START, "beyond the end");
}

#[test]
fn work_and_page_request_rings_go_on_beyond_2_to_the_32() {
    let mut rig = Rig::new();
    let prq_head = SHADOW + offset_of!(KernelShadow, prq_head) as u64;
    for n in 0..20u32 {
        let index = START.wrapping_add(n);
        let record = u64::from(n % 8) * 32;
        rig.store(RECORDS + record, 0);
        rig.submit(
            index,
            Descriptor {
                opcode: Opcode::Crc32c as u8,
                src: MISSING,
                len: 8,
                completion: RECORDS_IOVA + record,
                ..Default::default()
            },
        );
        rig.run();
        let prq_tail = rig.load(SHADOW + offset_of!(KernelShadow, prq_tail) as u64);
        assert_eq!(prq_tail, index.wrapping_add(1), "one request each");
        let mut bytes = [0; PageRequest::SIZE];
        let at = PRQ + u64::from(index & 15) * PageRequest::SIZE as u64;
        rig.ram.read(Gpa(at), &mut bytes).unwrap();
        let request = PageRequest::from_bytes(&bytes);
        rig.store(prq_head, prq_tail);
        rig.post(Command {
            kind: CommandKind::PageResponse as u32,
            flags: Response::Invalid as u32,
            group: request.group,
            ..Default::default()
        });
        rig.run();
        let status = rig.load(RECORDS + record);
        assert_eq!(status, Status::PageFault as u32, "operation {index:#x}");
        let head = rig.load(CONTEXT_SHADOW + offset_of!(ContextShadow, head) as u64);
        assert_eq!(head, index.wrapping_add(1));
    }
}

#[test]
fn a_full_request_ring_is_full_across_the_end_too() {
    let rig = Rig::new();
    let room = offset_of!(KernelShadow, prq_need_kick) as u64;
    // The reader is 16 records behind a tail that has wrapped around.
    lock(&rig.device.requests).tail = 3;
    rig.store(
        SHADOW + offset_of!(KernelShadow, prq_head) as u64,
        3u32.wrapping_sub(16),
    );
    let miss = Descriptor {
        opcode: Opcode::Crc32c as u8,
        src: MISSING,
        len: 8,
        completion: RECORDS_IOVA,
        ..Default::default()
    };
    rig.submit(START, miss);
    rig.run();
    assert_eq!(rig.load(SHADOW + room), 1, "waits for room");
    assert_eq!(lock(&rig.device.requests).tail, 3);
    rig.store(
        SHADOW + offset_of!(KernelShadow, prq_head) as u64,
        3u32.wrapping_sub(15),
    );
    rig.device
        .mmio_write(BAR_REGS, regs::KICK.offset, &[1, 0, 0, 0]);
    rig.run();
    assert_eq!(lock(&rig.device.requests).tail, 4);
    assert_eq!(rig.load(SHADOW + room), 0);
}
