//! The shootdown path. Each of these fails if one link of the rule is broken: no removal from
//! the TLB, no drain, a range that is off by a page, a walk that inserts what was shot down.
#![allow(clippy::needless_range_loop)] // pages have numbers here

mod common;
use common::*;

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use extlb_device::Step;
use extlb_device::ports::Dma;
use extlb_spec::invalidation::{Command, CommandKind, InvalidationScope, KernelShadow, wait};
use extlb_spec::pte::{Pte, bit};
use extlb_spec::work::{Opcode, Status};
use extlb_spec::{Gpa, Iova, Vector, regs};

const SRC: u64 = 0x5555_0000_0000;
const DST: u64 = 0x5555_1000_0000;

/// CRC32C of a page at `addr`, as the device sees it.
fn crc(guest: &Guest, process: &Process, addr: u64) -> Option<u64> {
    let done = process.go(guest, op(Opcode::Crc32c, addr, 0, 4096));
    (done.status == Status::Success as u32).then_some(done.result)
}

fn page_of(guest: &Guest, byte: u8) -> (Gpa, u64) {
    let page = guest.pages.take();
    let bytes = [byte; 4096];
    guest.ram.write(page, &bytes).unwrap();
    (page, u64::from(crc32c::crc32c(&bytes)))
}

#[test]
fn an_invalidation_covers_its_range_and_nothing_else() {
    let guest = Guest::new();
    let process = guest.process(1);
    let other = guest.process(2);
    let old: Vec<_> = (0..8).map(|i| page_of(&guest, i)).collect();
    let new: Vec<_> = (0..8).map(|i| page_of(&guest, 0x80 | i)).collect();
    let at = |i: usize| SRC + i as u64 * PAGE;
    for i in 0..8 {
        process.map(Iova(at(i)), old[i].0, true);
        other.map(Iova(at(i)), old[i].0, true);
        assert_eq!(crc(&guest, &process, at(i)), Some(old[i].1));
        assert_eq!(crc(&guest, &other, at(i)), Some(old[i].1));
    }
    for i in 0..8 {
        process.set_device(Iova(at(i)), Pte::leaf(new[i].0, true));
        other.set_device(Iova(at(i)), Pte::leaf(new[i].0, true));
    }
    // [2, 5): the first and the last page inside are gone, their neighbours are not.
    let ack = guest.shoot(1, at(2), at(5));
    guest.run();
    assert_eq!(guest.ack(), ack);
    for i in 0..8 {
        let want = if (2..5).contains(&i) { &new } else { &old };
        assert_eq!(crc(&guest, &process, at(i)), Some(want[i].1), "page {i}");
        assert_eq!(crc(&guest, &other, at(i)), Some(old[i].1), "other, {i}");
    }
    assert_eq!(guest.get(regs::TLB_SHOT_DOWN), 3);
    // One page alone.
    guest.shoot(1, at(6), at(7));
    guest.run();
    for (i, want) in [(5, &old), (6, &new), (7, &old)] {
        assert_eq!(crc(&guest, &process, at(i)), Some(want[i].1), "page {i}");
    }
    // A range of more pages than the TLB has sets, a context, and everything.
    guest.shoot(1, at(0), at(0) + 1000 * PAGE);
    guest.run();
    (0..8).for_each(|i| assert_eq!(crc(&guest, &process, at(i)), Some(new[i].1)));
    assert_eq!(crc(&guest, &other, at(0)), Some(old[0].1));
    guest.post(Command {
        kind: CommandKind::Invalidate as u32,
        flags: InvalidationScope::Context as u32,
        context: 2,
        ..Default::default()
    });
    guest.run();
    (0..8).for_each(|i| assert_eq!(crc(&guest, &other, at(i)), Some(new[i].1)));
    for i in 0..8 {
        process.set_device(Iova(at(i)), Pte::leaf(old[i].0, true));
        other.set_device(Iova(at(i)), Pte::leaf(old[i].0, true));
    }
    guest.post(Command {
        kind: CommandKind::Invalidate as u32,
        flags: InvalidationScope::All as u32,
        ..Default::default()
    });
    guest.run();
    for i in 0..8 {
        assert_eq!(crc(&guest, &process, at(i)), Some(old[i].1));
        assert_eq!(crc(&guest, &other, at(i)), Some(old[i].1));
    }
}

#[test]
fn a_drained_wait_is_not_acknowledged_while_an_access_is_under_way() {
    let guest = Arc::new(Guest::new());
    let process = guest.process(1);
    let src = process.map_fresh(Iova(SRC), 1)[0];
    let dst = process.map_fresh(Iova(DST), 1)[0];
    let cleared = Arc::new(AtomicU64::new(0));
    {
        let (guest, process, cleared) = (guest.clone(), process.clone(), cleared.clone());
        let memory = guest.memory.clone();
        memory.hook(move |access| {
            if access != Access::Copy(src, dst) {
                return false;
            }
            // In the middle of the copy: the kernel takes the page back.
            process.set_cpu(Iova(DST), None);
            process.set_device(Iova(DST), Pte::EMPTY);
            guest.post(range(1, DST, DST + PAGE));
            let first = guest.post_wait(wait::CLEARED);
            while guest.device.invalidation_step() == Step::Busy {}
            assert_eq!(guest.ack(), first, "cleared does not wait for accesses");
            cleared.store(first, Ordering::SeqCst);
            guest.post_wait(wait::DRAINED);
            for _ in 0..1000 {
                assert_eq!(guest.device.invalidation_step(), Step::Waiting);
            }
            assert_eq!(guest.ack(), first, "drained does");
            true
        });
    }
    let n = process.submit(copy(SRC, DST, 4096));
    process.ring(&guest);
    guest.run();
    assert!(guest.memory.is_done());
    assert_eq!(guest.ack(), cleared.load(Ordering::SeqCst) + 1);
    assert_eq!(process.status(n), Some(Status::Success));
    assert_eq!(guest.get(regs::DRAINS), 1);
    assert_eq!(guest.get(regs::ORACLE_STALE), 0);
}

#[test]
fn a_drain_waits_for_the_accesses_before_it_only() {
    // An engine that enters one guard after the other must not hold a drain up for ever: the
    // drain waits for the lane to change, not to be seen empty.
    let guest = Arc::new(Guest::new());
    let process = guest.process(1);
    let src = process.map_fresh(Iova(SRC), 2);
    let dst = process.map_fresh(Iova(DST), 2);
    let inner = guest.clone();
    let mut posted = None;
    let (first, second) = (Access::Copy(src[0], dst[0]), Access::Copy(src[1], dst[1]));
    guest.memory.hook(move |access| {
        if access == first {
            posted = Some(inner.shoot(1, DST, DST + PAGE));
            assert_ne!(inner.device.invalidation_step(), Step::Idle);
            assert_eq!(inner.device.invalidation_step(), Step::Waiting);
        }
        if access == second {
            // Inside the next guard of the same lane.
            while inner.device.invalidation_step() == Step::Busy {}
            assert_eq!(Some(inner.ack()), posted);
        }
        access == second
    });
    process.submit(copy(SRC, DST, 2 * 4096));
    process.ring(&guest);
    guest.run();
    assert!(guest.memory.is_done());
}

#[test]
fn a_walk_that_was_overtaken_is_used_once_and_forgotten() {
    let guest = Arc::new(Guest::new());
    let process = guest.process(1);
    let (old, old_crc) = page_of(&guest, 1);
    let (new, new_crc) = page_of(&guest, 2);
    // Accessed is set, so that the walk has nothing to swap after it has read the leaf.
    process.map(Iova(SRC), old, false);
    process.set_device(Iova(SRC), Pte(Pte::leaf(old, false).0 | bit::ACCESSED));
    let leaf = process.device_leaf(Iova(SRC));
    {
        let (inner, process) = (guest.clone(), process.clone());
        guest.memory.hook(move |access| {
            if access != Access::Loaded(leaf) {
                return false;
            }
            // The device has read the old leaf and not used it yet.
            process.map(Iova(SRC), new, false);
            let ack = inner.shoot(1, SRC, SRC + PAGE);
            while inner.device.invalidation_step() == Step::Busy {}
            assert_ne!(inner.ack(), ack, "the walk is an access, too");
            true
        });
    }
    assert_eq!(crc(&guest, &process, SRC), Some(old_crc));
    assert!(guest.memory.is_done());
    assert_eq!(crc(&guest, &process, SRC), Some(new_crc), "not cached");
    assert_eq!(guest.get(regs::ORACLE_STALE), 0);
}

#[test]
fn a_leaf_that_is_cleared_during_a_walk_stays_cleared() {
    let guest = Arc::new(Guest::new());
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 1);
    let leaf = process.device_leaf(Iova(SRC));
    {
        let process = process.clone();
        guest.memory.hook(move |access| {
            let hit = access == Access::Loaded(leaf);
            if hit {
                process.set_device(Iova(SRC), Pte::EMPTY);
            }
            hit
        });
    }
    assert_eq!(crc(&guest, &process, SRC), None, "asks for the page");
    assert_eq!(
        process.device_pte(Iova(SRC)),
        Pte::EMPTY,
        "no bit comes back"
    );
    assert_eq!(guest.expect_request().iova, SRC);
}

#[test]
fn waits_acknowledge_in_order_and_by_the_way_asked_for() {
    let guest = Guest::new();
    guest.process(1);
    let first = guest.post_wait(0);
    let second = guest.post_wait(wait::DRAINED | wait::INTERRUPT);
    assert_eq!(guest.device.invalidation_step(), Step::Busy);
    assert_eq!(guest.ack(), first);
    assert_eq!(guest.vectors.count(Vector::Invalidation), 0);
    assert_eq!(guest.device.invalidation_step(), Step::Busy);
    assert_eq!(guest.ack(), second);
    assert_eq!(guest.vectors.count(Vector::Invalidation), 1);
    guest.post(Command {
        kind: CommandKind::Wait as u32,
        flags: wait::INTERRUPT,
        ..Default::default()
    });
    guest.run();
    assert_eq!(guest.vectors.count(Vector::Invalidation), 2);
    assert_eq!(guest.ack(), second, "nothing written unasked");
}

#[test]
fn engines_serve_the_queue_between_two_chunks() {
    let guest = Guest::new();
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 8);
    process.map_fresh(Iova(DST), 8);
    let n = process.submit(copy(SRC, DST, 8 * 4096));
    process.ring(&guest);
    let ack = guest.shoot(1, 0x1000, 0x2000);
    // Nobody steps the invalidation queue; one quantum is enough.
    guest.device.engine_step();
    assert_eq!(guest.ack(), ack);
    assert_eq!(guest.kernel_word(offset_of!(KernelShadow, iq_need_kick)), 0);
    guest.run();
    assert_eq!(process.status(n), Some(Status::Success));
    assert_eq!(guest.kernel_word(offset_of!(KernelShadow, iq_need_kick)), 1);
}

#[test]
fn a_context_that_is_stopped_mid_operation_is_silent_after_the_wait() {
    let guest = Arc::new(Guest::new());
    let process = guest.process(1);
    let src = process.map_fresh(Iova(SRC), 2);
    let dst = process.map_fresh(Iova(DST), 2);
    let accesses = Arc::new(AtomicU64::new(0));
    {
        let (inner, process, accesses) = (guest.clone(), process.clone(), accesses.clone());
        let first = Access::Copy(src[0], dst[0]);
        let mut stopped = false;
        guest.memory.hook(move |access| match access {
            Access::Copy(..) if access == first && !stopped => {
                stopped = true;
                process.stop(&inner);
                inner.post_wait(wait::DRAINED);
                while inner.device.invalidation_step() == Step::Busy {}
                false
            }
            Access::Copy(..) => {
                accesses.fetch_add(1, Ordering::SeqCst);
                false
            }
            _ => false,
        });
    }
    let n = process.submit(copy(SRC, DST, 2 * 4096));
    process.ring(&guest);
    guest.run();
    assert_eq!(guest.ack(), 1);
    assert_eq!(
        accesses.load(Ordering::SeqCst),
        0,
        "no chunk after the stop"
    );
    assert_eq!(
        process.status(n),
        Some(Status::Pending),
        "and no completion"
    );
    let before = guest.bytes(process.shadow, 4096);
    process.submit(copy(SRC, DST, 8));
    process.ring(&guest);
    guest.run();
    let mut after = guest.bytes(process.shadow, 4096);
    after[..4].copy_from_slice(&before[..4]);
    assert!(before == after, "nor a word in its shadow page");
    // A new life starts from zero.
    guest.memory.hook(|_| true);
    process.set_tail(0);
    process.write_entry(&guest, |_| {});
    guest.sync(1);
    guest.run();
    process.set_tail(1);
    process.ring(&guest);
    guest.run();
    assert_eq!(process.status(n), Some(Status::Success));
}

#[test]
fn a_changed_entry_takes_effect_in_the_middle_of_an_operation() {
    let guest = Arc::new(Guest::new());
    let process = guest.process(1);
    let src = process.map_fresh(Iova(SRC), 2);
    let dst = process.map_fresh(Iova(DST), 2);
    // Another page table, with another second page.
    let mut changed = process.clone();
    changed.root = guest.pages.take();
    changed.map(process.ring, process.ring_page, true);
    changed.map(process.records, process.records_page, true);
    changed.map(Iova(SRC + PAGE), src[1], true);
    let other = guest.pages.take();
    changed.map(Iova(DST + PAGE), other, true);
    guest.ram.write(src[1], &[7; 4096]).unwrap();
    {
        let (inner, changed) = (guest.clone(), changed.clone());
        let first = Access::Copy(src[0], dst[0]);
        guest.memory.hook(move |access| {
            if access == first {
                changed.write_entry(&inner, |_| {});
                inner.sync(1);
                while inner.device.invalidation_step() == Step::Busy {}
            }
            access == first
        });
    }
    let n = process.submit(copy(SRC, DST, 2 * 4096));
    process.ring(&guest);
    guest.run();
    assert_eq!(process.status(n), Some(Status::Success), "goes on");
    assert_eq!(guest.bytes(other, 1), [7]);
    assert_eq!(guest.bytes(dst[1], 1), [0]);
}
