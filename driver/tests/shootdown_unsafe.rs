//! Memory is taken from the device while it works on it: after the call has returned the device
//! does not touch it any more, whatever it was doing.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use extlb_driver::inprocess::{InProcess, MachineConfig};
use extlb_driver::spec::work::{Completion, Descriptor, Opcode, Status, fault};
use extlb_driver::spec::{Gpa, PAGE_SIZE};
use extlb_driver::{Context, Device, Iova, Options};

/// Addresses far from where the process has anything of its own.
const BASE: u64 = 0x10_0000_0000;
const PAGES: u64 = 64;

fn range(pages: Range<u64>) -> Range<Iova> {
    Iova(BASE + pages.start * PAGE_SIZE)..Iova(BASE + pages.end * PAGE_SIZE)
}

fn open(config: MachineConfig) -> (Device<InProcess>, Context<InProcess>) {
    let device = Device::open(InProcess::new(config).unwrap()).unwrap();
    let context = device
        .context(Options {
            ring_log2: 6,
            ..Options::default()
        })
        .unwrap();
    (device, context)
}

/// A small TLB and several engines, so that everything happens often.
fn busy() -> MachineConfig {
    let mut config = MachineConfig::default();
    config.device.tlb.sets = 8;
    config.device.tlb.ways = 2;
    config.device.engines = 2;
    config
}

/// Does one operation on memory that only the device accesses.
fn run(context: &Context<InProcess>, descriptor: Descriptor) -> Completion {
    // SAFETY: the operands are at `BASE` and up, where no Rust object is.
    let pending = unsafe { context.queue().submit_raw(descriptor) }.unwrap();
    pending.finish().unwrap().0
}

fn descriptor(opcode: Opcode, src: Iova, dst: Iova, len: u64, arg: u64) -> Descriptor {
    Descriptor {
        opcode: opcode as u8,
        src: src.0,
        dst: dst.0,
        len,
        arg,
        ..Descriptor::default()
    }
}

fn status(completion: &Completion) -> Option<Status> {
    Status::from_raw(completion.status)
}

#[test]
fn an_address_that_is_not_registered_is_a_fault_that_names_it() {
    let (device, context) = open(MachineConfig::default());
    let all = range(0..4);
    device.backing().map(all.clone()).unwrap();
    let _registration = context.register_addresses(range(0..2)).unwrap();
    // The first two pages are registered, the third is only mapped.
    let fill = descriptor(Opcode::Fill, Iova(0), Iova(BASE + 100), 3 * PAGE_SIZE, 1);
    let completion = run(&context, fill);
    assert_eq!(status(&completion), Some(Status::PageFault));
    assert_eq!(
        completion.fault_addr & !(PAGE_SIZE - 1),
        BASE + 2 * PAGE_SIZE
    );
    assert_eq!(completion.bytes, 2 * PAGE_SIZE - 100);
    assert_eq!(completion.fault, fault::WRITE);
    // The queue goes on.
    let fill = descriptor(Opcode::Fill, Iova(0), Iova(BASE), PAGE_SIZE, 1);
    assert_eq!(status(&run(&context, fill)), Some(Status::Success));
    let stats = context.stats().unwrap();
    assert_eq!((stats.ops_completed, stats.ops_faulted), (1, 1));
    assert!(stats.refused_requests >= 1);
}

#[test]
fn refused_descriptors_say_why() {
    let (_device, context) = open(MachineConfig::default());
    let good = descriptor(Opcode::Nop, Iova(0), Iova(0), 0, 0);
    for (bad, want) in [
        (Descriptor { opcode: 99, ..good }, Status::BadDescriptor),
        (
            Descriptor {
                src_segments: 1,
                ..good
            },
            Status::BadDescriptor,
        ),
        (
            descriptor(Opcode::Fill, Iova(0), Iova(BASE), (1 << 31) + 1, 0),
            Status::BadLength,
        ),
        (
            descriptor(Opcode::Fill, Iova(0), Iova(1 << 48), 8, 0),
            Status::BadAddress,
        ),
        (
            descriptor(Opcode::Copy, Iova(u64::MAX), Iova(0), 8, 0),
            Status::BadAddress,
        ),
    ] {
        assert_eq!(status(&run(&context, bad)), Some(want), "{bad:?}");
    }
}

#[test]
fn protection_is_respected_and_lifted() {
    let (device, context) = open(MachineConfig::default());
    device.backing().map(range(0..2)).unwrap();
    let _registration = context.register_addresses(range(0..2)).unwrap();
    let fill = descriptor(Opcode::Fill, Iova(0), Iova(BASE), 2 * PAGE_SIZE, 7);
    assert_eq!(status(&run(&context, fill)), Some(Status::Success));
    device.backing().protect(range(1..2), false).unwrap();
    let completion = run(&context, fill);
    assert_eq!(status(&completion), Some(Status::PageFault));
    assert_eq!(completion.fault_addr, BASE + PAGE_SIZE);
    let crc = descriptor(Opcode::Crc32c, Iova(BASE), Iova(0), 2 * PAGE_SIZE, 0);
    assert_eq!(status(&run(&context, crc)), Some(Status::Success));
    device.backing().protect(range(1..2), true).unwrap();
    assert_eq!(status(&run(&context, fill)), Some(Status::Success));
}

#[test]
fn a_replaced_page_is_fresh_and_the_old_one_is_left_alone() {
    let (device, context) = open(MachineConfig::default());
    let machine = device.backing();
    machine.map(range(0..1)).unwrap();
    let _registration = context.register_addresses(range(0..1)).unwrap();
    let fill = descriptor(Opcode::Fill, Iova(0), Iova(BASE), PAGE_SIZE, u64::MAX);
    run(&context, fill);
    let old = machine.replace(range(0..1)).unwrap();
    let crc = descriptor(Opcode::Crc32c, Iova(BASE), Iova(0), PAGE_SIZE, 0);
    assert_eq!(
        run(&context, crc).result,
        u64::from(crc32c::crc32c(&[0; 4096]))
    );
    let mut bytes = [0; 8];
    machine.peek(old[0], &mut bytes).unwrap();
    assert_eq!(bytes, [0xff; 8]);
    assert!(
        machine.peek(Gpa(old[0].0 + 4092), &mut bytes).is_err(),
        "over the end"
    );
    assert!(
        machine.peek(Gpa(1 << 32), &mut bytes).is_err(),
        "the kernel's own frame"
    );
    machine.free(old.clone()).unwrap();
    assert!(machine.free(old).is_err(), "twice");
}

#[test]
fn buffers_cannot_be_pulled_away() {
    let (device, context) = open(MachineConfig::default());
    let buffer = context.allocate(8192).unwrap();
    let at = buffer.addr()..Iova(buffer.addr().0 + 8192);
    assert!(device.backing().unmap(at.clone()).is_err());
    assert!(device.backing().replace(at.clone()).is_err());
    assert!(device.backing().protect(at, false).is_err());
}

/// Lets the threads end, also when a check fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Frames that were taken from the device, with a canary in each.
struct Watched<'a> {
    machine: &'a InProcess,
    frames: VecDeque<Gpa>,
    seen: u64,
}

impl Watched<'_> {
    const CANARY: [u8; 4096] = [0xa5; 4096];

    fn take(&mut self, frames: Vec<Gpa>) {
        for frame in frames {
            self.machine.poke(frame, &Self::CANARY).unwrap();
            self.frames.push_back(frame);
        }
        while self.frames.len() > 128 {
            self.look();
        }
    }

    fn look(&mut self) {
        if let Some(frame) = self.frames.pop_front() {
            let mut bytes = [0; 4096];
            self.machine.peek(frame, &mut bytes).unwrap();
            assert!(
                bytes == Self::CANARY,
                "the device wrote to {frame}, which was taken from it"
            );
            self.machine.free([frame]).unwrap();
            self.seen += 1;
        }
    }
}

#[test]
fn taken_memory_is_never_touched() {
    race(busy());
}

#[test]
fn taken_memory_is_never_touched_by_accesses_under_way() {
    race(MachineConfig {
        bus_delay: Duration::from_micros(300),
        ..busy()
    });
}

/// Four queues write to a region without pause, while it is unmapped, replaced and write-protected.
fn race(config: MachineConfig) {
    let (device, first) = open(config);
    let machine = device.backing();
    machine.map(range(0..PAGES)).unwrap();
    let options = Options {
        ring_log2: 5,
        ..Options::default()
    };
    let mut contexts = vec![first];
    contexts.extend((0..3).map(|_| device.context(options).unwrap()));
    let stop = AtomicBool::new(false);
    let ended = [const { AtomicU64::new(0) }; 2];

    std::thread::scope(|scope| {
        let stopped = Stop(&stop);
        for (n, context) in contexts.iter().enumerate() {
            let (stop, ended) = (&stop, &ended);
            scope.spawn(move || {
                let mut at = n as u64 * 7919;
                while !stop.load(Ordering::Relaxed) {
                    at = at
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695040888963407);
                    let offset = (at >> 33) % (PAGES * PAGE_SIZE - 3 * PAGE_SIZE);
                    let src = Iova(BASE + (at >> 13) % (PAGES * PAGE_SIZE - 3 * PAGE_SIZE));
                    let opcode = if at & 1 << 40 == 0 {
                        Opcode::Copy
                    } else {
                        Opcode::Fill
                    };
                    let len = (at >> 50) % (3 * PAGE_SIZE);
                    let completion = run(
                        context,
                        descriptor(opcode, src, Iova(BASE + offset), len, at),
                    );
                    match status(&completion) {
                        Some(Status::Success) => ended[0].fetch_add(1, Ordering::Relaxed),
                        Some(Status::PageFault) => {
                            assert!(range(0..PAGES).contains(&Iova(completion.fault_addr)));
                            ended[1].fetch_add(1, Ordering::Relaxed)
                        }
                        other => panic!("{other:?}"),
                    };
                }
            });
        }
        let mut registrations: Vec<_> = contexts
            .iter()
            .map(|context| context.register_addresses(range(0..PAGES)).unwrap())
            .collect();
        let mut watched = Watched {
            machine,
            frames: VecDeque::new(),
            seen: 0,
        };
        let begun = Instant::now();
        let mut n = 0u64;
        while begun.elapsed() < Duration::from_secs(2) {
            n += 1;
            let start = n * 31 % (PAGES - 8);
            let piece = start..start + 1 + n % 8;
            match n % 5 {
                0 => {
                    watched.take(machine.unmap(range(piece.clone())).unwrap());
                    machine.map(range(piece.clone())).unwrap();
                    for context in &contexts {
                        registrations
                            .push(context.register_addresses(range(piece.clone())).unwrap());
                    }
                }
                1 => {
                    // Read-only: nobody writes.
                    machine.protect(range(piece.clone()), false).unwrap();
                    machine.protect(range(piece.clone()), true).unwrap();
                }
                _ => watched.take(machine.replace(range(piece.clone())).unwrap()),
            }
            if n.is_multiple_of(50) {
                for context in &contexts {
                    let audit = context.audit().unwrap();
                    assert_eq!(audit.mismatches, 0, "{audit:?}");
                }
            }
        }
        while !watched.frames.is_empty() {
            watched.look();
        }
        drop(stopped);
        assert!(
            n > 100 && watched.seen > 100,
            "{n} rounds, {} frames",
            watched.seen
        );
    });
    assert_eq!(machine.stale_accesses(), 0);
    let stats = contexts[0].stats().unwrap();
    assert!(
        stats.shootdowns > 50 && ended[0].load(Ordering::Relaxed) > 50,
        "{stats:?}"
    );
}

/// A registration that ends stops the device even in the middle of a long operation.
#[test]
fn unregistered_memory_is_never_touched() {
    let delay = Duration::from_micros(200);
    let (device, context) = open(MachineConfig {
        bus_delay: delay,
        ..busy()
    });
    let machine = device.backing();
    let frames = machine.map(range(0..PAGES)).unwrap();
    for round in 0..60u64 {
        let registration = context.register_addresses(range(0..PAGES)).unwrap();
        let fill = descriptor(Opcode::Fill, Iova(0), Iova(BASE), PAGES * PAGE_SIZE, round);
        // SAFETY: the operands are at `BASE` and up, where no Rust object is.
        let pending = unsafe { context.queue().submit_raw(fill) }.unwrap();
        if round % 4 != 0 {
            std::thread::sleep(Duration::from_micros(round));
        }
        registration.unregister().unwrap();
        for frame in &frames {
            machine.poke(*frame, &Watched::CANARY).unwrap();
        }
        let completion = pending.finish().unwrap().0;
        for frame in &frames {
            let mut bytes = [0; 4096];
            machine.peek(*frame, &mut bytes).unwrap();
            assert!(
                bytes == Watched::CANARY,
                "round {round}: {frame}, {completion:?}"
            );
        }
    }
    assert_eq!(machine.stale_accesses(), 0);
}
