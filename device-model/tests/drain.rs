//! The invalidation queue under load: what each acknowledgement promises and what it does not,
//! thousands of commands at once, and how long a drain takes.

mod common;
use common::*;

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use extlb_device::ports::{Dma, Event, Stop};
use extlb_device::{Config, Step};
use extlb_spec::context::flags as context_flags;
use extlb_spec::invalidation::{Command, CommandKind, KernelShadow, wait};
use extlb_spec::pte::{self, Pte, bit};
use extlb_spec::regs::FatalError;
use extlb_spec::work::{Descriptor, MAX_LEN, Opcode, Status};
use extlb_spec::{Gpa, Iova, Vector, regs};

const SRC: u64 = 0x5555_0000_0000;
const DST: u64 = 0x5555_1000_0000;
/// Where a test lets waits write, apart from each other.
const WORDS: Gpa = Gpa(0x1c0_0000);
/// A queue of the largest size.
const LARGE: (Gpa, u32) = (Gpa(0x1e0_0000), regs::MAX_RING_LOG2);

fn large_queue(config: Config) -> Guest {
    let mut guest = Guest::disabled(config);
    guest.iq = LARGE;
    guest.device.set_bus_master(true);
    guest.enable();
    guest
}

fn wait_at(index: u64, flags: u32) -> Command {
    Command {
        kind: CommandKind::Wait as u32,
        flags: flags | wait::WRITE,
        addr: WORDS.0 + index * 8,
        value: index + 1,
        ..Default::default()
    }
}

fn word(guest: &Guest, index: u64) -> u64 {
    guest.load(Gpa(WORDS.0 + index * 8))
}

#[test]
fn a_queue_of_32768_commands_is_carried_out_in_order() {
    let guest = large_queue(config());
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 8);
    let len = 1 << LARGE.1;
    let levels = [
        0,
        wait::CLEARED,
        wait::DRAINED,
        wait::CLEARED | wait::DRAINED,
    ];
    // Three times the length, so that the indices go round, always as full as can be.
    let (mut posted, mut done) = (0, 0);
    while done < 3 * len {
        // Each wait has an invalidation before it.
        while posted < 3 * len && posted < done + len / 2 {
            let page = SRC + posted % 8 * PAGE;
            guest.post(range(1, page, page + PAGE));
            guest.post(wait_at(posted, levels[posted as usize % 4]));
            posted += 1;
        }
        assert_eq!(word(&guest, posted - 1), 0);
        for _ in 0..len / 4 {
            assert_eq!(guest.device.invalidation_step(), Step::Busy);
            assert_eq!(word(&guest, done), 0, "not before its turn");
            assert_eq!(guest.device.invalidation_step(), Step::Busy);
            assert_eq!(word(&guest, done), done + 1);
            done += 1;
            if done == posted {
                break;
            }
        }
    }
    assert_eq!(guest.device.invalidation_step(), Step::Idle);
    assert_eq!(guest.get(regs::INVALIDATIONS), 3 * len);
    assert_eq!(guest.get(regs::DRAINS), 3 * len / 2);
    assert_eq!(guest.fatal(), 0);
}

#[test]
fn one_command_more_than_the_queue_holds_is_fatal_and_the_last_that_fits_is_not() {
    for (over, fatal) in [(0, 0), (1, FatalError::IqOverrun as u64)] {
        let guest = large_queue(config());
        for _ in 0..(1 << LARGE.1) + over {
            guest.post(Command {
                kind: CommandKind::Wait as u32,
                ..Default::default()
            });
        }
        while guest.device.invalidation_step() == Step::Busy {}
        assert_eq!(guest.fatal(), fatal);
    }
}

/// In the middle of a copy into a page, the kernel takes that page back, and asks on each level.
#[test]
fn posted_and_cleared_do_not_wait_for_accesses_and_drained_does() {
    let guest = Arc::new(Guest::new());
    let process = guest.process(1);
    let src = process.map_fresh(Iova(SRC), 2);
    let dst = process.map_fresh(Iova(DST), 2);
    let new = guest.pages.take();
    guest.ram.write(src[0], &[7; 4096]).unwrap();
    guest.ram.write(src[1], &[8; 4096]).unwrap();
    // The second page is in the TLB.
    process.go(&guest, op(Opcode::Fill, 0, DST + PAGE, 8));
    {
        let (inner, process, old) = (guest.clone(), process.clone(), dst[0]);
        guest.memory.hook(move |access| {
            if access != Access::Copy(src[0], old) {
                return false;
            }
            process.map(Iova(DST + PAGE), new, true);
            inner.post(range(1, DST, DST + 2 * PAGE));
            inner.post(wait_at(0, 0));
            inner.post(wait_at(1, wait::CLEARED));
            inner.post(wait_at(2, wait::DRAINED));
            inner.post(wait_at(3, 0));
            while inner.device.invalidation_step() == Step::Busy {}
            // The access goes on into the page that was taken back: only "drained" says that
            // none does. And the queue keeps its order: what is behind a drain waits with it.
            assert_eq!(inner.bytes(old, 1), [0]);
            let words = [0, 1, 2, 3].map(|i| word(&inner, i));
            assert_eq!(words, [1, 2, 0, 0]);
            true
        });
    }
    let n = process.submit(copy(SRC, DST, 2 * PAGE));
    process.ring(&guest);
    guest.run();
    assert!(guest.memory.is_done());
    assert_eq!([0, 1, 2, 3].map(|i| word(&guest, i)), [1, 2, 3, 4]);
    assert_eq!(guest.bytes(dst[0], 1), [7], "the access under way");
    // What "cleared" promised: what began afterwards used the new page.
    assert_eq!(
        (guest.bytes(new, 1), guest.bytes(dst[1], 16)[8]),
        (vec![8], 0)
    );
    assert_eq!(process.status(n), Some(Status::Success));
}

#[test]
fn the_word_is_in_ram_before_the_interrupt() {
    let guest = Arc::new(Guest::new());
    guest.process(1);
    let seen = Arc::new(AtomicU64::new(0));
    {
        let (ram, seen) = (guest.ram.clone(), seen.clone());
        guest.vectors.look(move |vector| {
            assert_eq!(vector, Vector::Invalidation);
            let word = ram.load_u64(WORDS, Ordering::SeqCst).unwrap();
            assert_eq!(word, 1, "the interrupt overtook the word");
            seen.fetch_add(1, Ordering::SeqCst);
        });
    }
    guest.post(wait_at(0, wait::DRAINED | wait::INTERRUPT));
    guest.run();
    assert_eq!(seen.load(Ordering::SeqCst), 1);
}

/// Every context is stuck in page requests that nobody answers, and the ring is full of them.
#[test]
fn shootdowns_do_not_know_of_page_requests() {
    let guest = Guest::new();
    let runs = guest.process(0);
    let stuck: Vec<_> = (1..64).map(|c| guest.process(c)).collect();
    for (i, process) in stuck.iter().enumerate() {
        match i % 4 {
            0 => process.submit(copy(SRC, DST, 1 << 20)),
            1 => process.submit(op(Opcode::Fill, 0, DST, 8)),
            // Stuck with the record, and with the ring itself.
            2 => {
                process.set_device(process.records, Pte::EMPTY);
                process.submit(Descriptor::default())
            }
            _ => {
                process.set_device(process.ring, Pte::EMPTY);
                process.submit(Descriptor::default())
            }
        };
        process.ring(&guest);
    }
    guest.run();
    let room = offset_of!(KernelShadow, prq_need_kick);
    assert_ne!(guest.kernel_word(room), 0, "the ring is full");
    for context in 0..64 {
        let ack = guest.shoot(context, 0, 1 << 40);
        for _ in 0..2 {
            assert_eq!(guest.device.invalidation_step(), Step::Busy);
        }
        assert_eq!(guest.ack(), ack);
    }
    // Neither does a context that misses nothing, nor one that is stopped.
    let done = runs.go(&guest, Descriptor::default());
    assert_eq!(done.status, Status::Success as u32);
    for process in &stuck {
        process.stop(&guest);
    }
    let ack = guest.post_wait(wait::DRAINED);
    guest.run();
    assert_eq!(guest.ack(), ack);
}

/// Maps 2 GiB at an address, by leaves of 2 MiB: the same frame again and again.
fn map_2_gib(guest: &Guest, process: &Process, iova: u64, frame: u64) {
    for at in (iova..iova + MAX_LEN).step_by(2 << 20).map(Iova) {
        // Makes the tables of the levels above; the one of level 1 gives way to the leaf.
        process.device_leaf(at);
        let mut table = process.root;
        for level in [4, 3] {
            let slot = Gpa(table.0 + pte::index(at, level) * 8);
            table = Pte(guest.ram.load_u64(slot, Ordering::SeqCst).unwrap()).addr();
        }
        let slot = Gpa(table.0 + pte::index(at, 2) * 8);
        let leaf = frame | bit::PRESENT | bit::WRITE | bit::LEAF;
        guest.ram.store_u64(slot, leaf, Ordering::SeqCst).unwrap();
    }
}

/// A drain that begins anywhere in a long operation waits for the chunk under way, and the next at
/// most; not for the context's turn, and not for the operation.
#[test]
fn a_drain_takes_no_longer_under_a_copy_of_2_gib() {
    let mut config = config();
    config.schedule.quantum = 16 << 20;
    let chunk = u64::from(config.schedule.chunk);
    let guest = Arc::new(Guest::with(config));
    let process = guest.process(1);
    // Not watched by the oracle, which would compare with a table that is not there.
    process.write_entry(&guest, |e| e.flags = context_flags::VALID);
    guest.sync(1);
    let to = SRC + (1 << 32);
    map_2_gib(&guest, &process, SRC, 0x100_0000);
    map_2_gib(&guest, &process, to, 0x120_0000);
    let (drains, worst) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    {
        let (inner, drains, worst) = (guest.clone(), drains.clone(), worst.clone());
        let (mut accesses, mut open) = (0, None);
        guest.memory.hook(move |access| {
            if !matches!(access, Access::Copy(..)) {
                return false;
            }
            accesses += 1;
            let moved = inner.get(regs::BYTES);
            if let Some((ack, before)) = open {
                if inner.ack() != ack {
                    worst.fetch_max(moved - before + 4096, Ordering::SeqCst);
                    return false;
                }
                open = None;
                drains.fetch_add(1, Ordering::SeqCst);
            }
            // In the middle of an access, of one at each place in a turn.
            if accesses % 7 == 0 {
                open = Some((inner.shoot(1, SRC, SRC + MAX_LEN), moved));
            }
            false
        });
    }
    let n = process.submit(copy(SRC, to, MAX_LEN));
    process.ring(&guest);
    while drains.load(Ordering::SeqCst) < 100 {
        assert_eq!(guest.device.engine_step(), Step::Busy);
        assert!(guest.get(regs::BYTES) < MAX_LEN, "drains wait for the end");
    }
    let worst = worst.load(Ordering::SeqCst);
    assert!(worst <= 2 * chunk, "{worst} bytes");
    assert_eq!(process.status(n), Some(Status::Pending));
    // And it can be stopped for good in the middle.
    guest.memory.hook(|_| true);
    process.stop(&guest);
    let ack = guest.post_wait(wait::DRAINED);
    guest.run();
    assert_eq!(guest.ack(), ack);
    assert_eq!(process.status(n), Some(Status::Pending));
}

/// Memory that hangs: the driver sees that no acknowledgement comes, and fences the device.
#[test]
fn a_device_that_hangs_in_memory_is_detected_and_fenced() {
    type Fence = fn(&Guest);
    let fences: [(Fence, Stop); 3] = [
        (|g| g.device.set_bus_master(false), Stop::BusMasterOff),
        (|g| g.device.reset(), Stop::Reset),
        (|g| g.set(regs::CTRL, 0), Stop::Disabled),
    ];
    for (fence, stop) in fences {
        let guest = Arc::new(Guest::new());
        let process = guest.process(1);
        let src = process.map_fresh(Iova(SRC), 1)[0];
        let dst = process.map_fresh(Iova(DST), 1)[0];
        let held = guest.memory.hold(Access::Copy(src, dst));
        let n = process.submit(copy(SRC, DST, 64));
        process.ring(&guest);
        let after = std::thread::scope(|scope| {
            let engine = scope.spawn(|| guest.device.engine_step());
            held.wait();
            // Detection: whatever time the driver allows, there is no acknowledgement.
            process.set_device(Iova(DST), Pte::EMPTY);
            let ack = guest.shoot(1, DST, DST + PAGE);
            for _ in 0..10_000 {
                guest.device.invalidation_step();
            }
            assert_ne!(guest.ack(), ack);
            // The fence: it does not say that it holds while it does not.
            let inner = guest.clone();
            let fenced = scope.spawn(move || {
                fence(&inner);
                inner.memory.accesses.load(Ordering::SeqCst)
            });
            while !slow_stop(&guest) {
                assert!(!fenced.is_finished());
                guest.clock.advance(Duration::from_millis(100));
                std::thread::yield_now();
            }
            held.release();
            engine.join().unwrap();
            fenced.join().unwrap()
        });
        for _ in 0..100 {
            process.ring(&guest);
            guest.set(regs::KICK, 1);
            guest.device.engine_step();
            guest.device.invalidation_step();
        }
        let accesses = guest.memory.accesses.load(Ordering::SeqCst);
        assert_eq!(accesses, after, "an access after the fence: {stop:?}");
        let events = guest.events.0.lock().unwrap();
        let told = |e: &Event| matches!(e, Event::Stopped(s) if *s == stop);
        assert_eq!(events.iter().filter(|e| told(e)).count(), 1);
        drop(events);
        assert_eq!(process.status(n), Some(Status::Pending));
        // A fence that can be lifted loses nothing.
        if stop == Stop::BusMasterOff {
            guest.device.set_bus_master(true);
            guest.run();
            assert_eq!(process.status(n), Some(Status::Success));
            assert_eq!(guest.ack(), 1);
        }
    }
}

fn slow_stop(guest: &Guest) -> bool {
    let events = guest.events.0.lock().unwrap();
    events.iter().any(|e| match e {
        Event::SlowStop { waited } => {
            assert!(*waited >= Duration::from_secs(1), "too early: {waited:?}");
            true
        }
        _ => false,
    })
}

/// The queue's own accesses can hang, too.
#[test]
fn a_fence_waits_for_an_acknowledgement_that_is_being_written() {
    let fences: [fn(&Guest); 3] = [
        |g| g.device.reset(),
        |g| g.device.set_bus_master(false),
        |g| g.set(regs::CTRL, 0),
    ];
    for fence in fences {
        let guest = Arc::new(Guest::new());
        guest.process(1);
        let held = guest.memory.hold(Access::Store(ACK));
        guest.post_wait(wait::DRAINED | wait::INTERRUPT);
        let (accesses, interrupts) = std::thread::scope(|scope| {
            scope.spawn(|| guest.device.invalidation_step());
            held.wait();
            let inner = guest.clone();
            let fenced = scope.spawn(move || {
                fence(&inner);
                let accesses = inner.memory.accesses.load(Ordering::SeqCst);
                (accesses, inner.vectors.total())
            });
            let begun = std::time::Instant::now();
            while begun.elapsed() < Duration::from_millis(5) {
                assert!(!fenced.is_finished());
                std::thread::yield_now();
            }
            held.release();
            fenced.join().unwrap()
        });
        guest.set(regs::KICK, 1);
        guest.device.invalidation_step();
        let now = guest.memory.accesses.load(Ordering::SeqCst);
        assert_eq!((now, guest.vectors.total()), (accesses, interrupts));
    }
}
