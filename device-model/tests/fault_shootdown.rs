//! Faults of shootdowns: acknowledgements and invalidations that are not what they should be.

mod common;
use common::*;

use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::Duration;

use extlb_device::Step;
use extlb_device::ports::Dma as _;
use extlb_spec::invalidation::{AuditResult, Command, CommandKind, audit, wait};
use extlb_spec::pte::Pte;
use extlb_spec::regs::{self, StaleKind};
use extlb_spec::work::{Opcode, Status};
use extlb_spec::{Gpa, Iova, Vector};

const SRC: u64 = 0x5555_0000_0000;
const DST: u64 = 0x5555_1000_0000;

fn wait_and_run(guest: &Guest, flags: u32) -> u64 {
    let value = guest.post_wait(flags);
    guest.run();
    value
}

#[test]
fn a_skipped_acknowledgement_never_comes() {
    let guest = Guest::faulty(&["skip-ack,after=1,times=1"]);
    assert_eq!(wait_and_run(&guest, wait::DRAINED), guest.ack());
    let skipped = wait_and_run(&guest, wait::DRAINED | wait::INTERRUPT);
    guest.clock.advance(Duration::from_secs(60));
    guest.run();
    assert_eq!(guest.ack(), skipped - 1);
    // All that whoever polls the word can notice is silence; the interrupt says otherwise.
    assert_eq!(guest.vectors.count(Vector::Invalidation), 1);
    let to = format!("acknowledgement {skipped:#x} at {ACK}");
    assert_eq!(guest.injected(), [("skip-ack", to)]);
    assert_eq!(guest.fatal(), 0);
    assert_eq!(wait_and_run(&guest, wait::DRAINED), guest.ack());
}

#[test]
fn a_delayed_acknowledgement_comes_late_and_holds_up_no_other() {
    let guest = Guest::faulty(&["delay-ack,times=1,delay_us=50000"]);
    let slow = Gpa(ACK.0 + 8);
    guest.post(Command {
        kind: CommandKind::Wait as u32,
        flags: wait::WRITE | wait::DRAINED,
        addr: slow.0,
        value: 77,
        ..Default::default()
    });
    let word = || guest.ram.load_u64(slow, Ordering::SeqCst).unwrap();
    assert_eq!(wait_and_run(&guest, wait::DRAINED), guest.ack());
    assert_eq!(word(), 0);
    guest.clock.advance(Duration::from_millis(50));
    guest.run();
    assert_eq!(word(), 77);
    assert_eq!(guest.injections().len(), 1);
}

#[test]
fn what_was_delayed_is_not_written_after_a_reset() {
    let guest = Guest::faulty(&["delay-ack,times=1,delay_us=50000"]);
    wait_and_run(&guest, wait::DRAINED);
    guest.set(regs::CTRL, regs::ctrl::RESET.into());
    guest.clock.advance(Duration::from_secs(1));
    guest.run();
    guest.enable();
    guest.run();
    assert_eq!(guest.ack(), 0);
}

#[test]
fn a_repeated_acknowledgement_overwrites_the_one_that_followed() {
    let guest = Guest::faulty(&["duplicate-ack,times=1"]);
    let first = wait_and_run(&guest, wait::DRAINED);
    assert_eq!(guest.ack(), first);
    wait_and_run(&guest, wait::DRAINED);
    // Who waits for "at least mine" on a word that all share sees it go back.
    assert_eq!(guest.ack(), first);
    assert_eq!(wait_and_run(&guest, wait::DRAINED), guest.ack());
}

#[test]
fn two_acknowledgements_change_places() {
    let guest = Guest::faulty(&["reorder-ack,times=1"]);
    let first = wait_and_run(&guest, wait::DRAINED);
    assert_eq!(guest.ack(), 0, "nothing follows yet");
    wait_and_run(&guest, wait::DRAINED);
    assert_eq!(guest.ack(), first, "the earlier one came last");
    assert_eq!(wait_and_run(&guest, wait::DRAINED), guest.ack());

    let guest = Guest::faulty(&["reorder-ack,times=1,delay_us=1000"]);
    let first = wait_and_run(&guest, wait::DRAINED);
    guest.clock.advance(Duration::from_millis(1));
    guest.run();
    assert_eq!(guest.ack(), first, "nothing followed in time");
}

/// Asks for a drain while a copy is on the bus. Whether it was acknowledged before the copy ended,
/// and which stale access the oracle reports.
fn drain_meets_a_copy(plan: &[&str]) -> (bool, Option<StaleKind>) {
    let guest = Guest::faulty(plan);
    let process = guest.process(1);
    let src = process.map_fresh(Iova(SRC), 1)[0];
    let dst = process.map_fresh(Iova(DST), 1)[0];
    let (inside, at_copy) = channel();
    let (release, released) = channel::<()>();
    guest.memory.hook(move |access| {
        let hit = access == Access::Copy(src, dst);
        if hit {
            inside.send(()).unwrap();
            released.recv().unwrap();
        }
        hit
    });
    process.submit(copy(SRC, DST, 64));
    process.ring(&guest);
    let ack = guest.post_wait(wait::DRAINED);
    let early = std::thread::scope(|scope| {
        // The command is served here; the engine must not find it before the copy.
        guest.set_kernel_word(0, ack as u32);
        scope.spawn(|| guest.device.engine_step());
        at_copy.recv().unwrap();
        guest.set_kernel_word(0, ack as u32 + 1);
        guest.device.invalidation_step();
        let early = guest.ack() == ack;
        release.send(()).unwrap();
        early
    });
    guest.run();
    assert_eq!(guest.ack(), ack);
    (
        early,
        StaleKind::from_raw(guest.get(regs::ORACLE_KIND) as u32),
    )
}

#[test]
fn an_early_acknowledgement_is_noticed_by_nobody_inside_the_device() {
    assert_eq!(drain_meets_a_copy(&[]), (false, None));
    // The device itself did drain, so its oracle has nothing to report.
    assert_eq!(drain_meets_a_copy(&["early-ack"]), (true, None));
}

#[test]
fn a_drain_that_is_skipped_is_a_stale_access() {
    let outlived = Some(StaleKind::OutlivedDrain);
    assert_eq!(drain_meets_a_copy(&["skip-drain"]), (true, outlived));
}

/// Takes two pages from the process, and lets the device use them. Statuses of the two accesses,
/// and the guest for whoever looks on.
fn take_two_pages(plan: &[&str]) -> (Guest, [u32; 2]) {
    let guest = Guest::faulty(plan);
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 2);
    let touch = |at| process.go(&guest, op(Opcode::Crc32c, at, 0, 16)).status;
    for at in [SRC, SRC + PAGE] {
        assert_eq!(touch(at), Status::Success as u32);
    }
    for at in [SRC, SRC + PAGE] {
        process.set_cpu(Iova(at), None);
        process.set_device(Iova(at), Pte::EMPTY);
    }
    let ack = guest.shoot(1, SRC, SRC + 2 * PAGE);
    guest.run();
    assert_eq!(guest.ack(), ack);
    // Backwards: an operation that misses holds up those behind it.
    let statuses = [SRC + PAGE, SRC].map(touch);
    (guest, statuses)
}

#[test]
fn a_tlb_entry_that_is_left_out_is_found_by_the_oracle() {
    let pending = Status::Pending as u32;
    let (guest, statuses) = take_two_pages(&[]);
    assert_eq!(statuses, [pending; 2]);
    assert_eq!(guest.get(regs::TLB_SHOT_DOWN), 2);

    let (guest, statuses) = take_two_pages(&["skip-tlb-entry,context=1"]);
    assert_eq!(guest.get(regs::TLB_SHOT_DOWN), 1);
    let [(kind, to)] = &guest.injected()[..] else {
        panic!("one fault");
    };
    assert_eq!(*kind, "skip-tlb-entry");
    assert!(to.contains("context 1"), "{to}");
    // Which of the two is left is the seed's choice; with this one, the last. It is used.
    assert_eq!(statuses, [Status::Success as u32, pending]);
    guest.clock.advance(Duration::from_millis(3001));
    guest.device.invalidation_step();
    let kind = StaleKind::from_raw(guest.get(regs::ORACLE_KIND) as u32);
    assert_eq!(kind, Some(StaleKind::NotInvalidated));
    assert_eq!(guest.get(regs::ORACLE_IOVA), SRC + PAGE);
}

#[test]
fn a_tlb_entry_that_is_left_out_is_found_by_an_audit() {
    let guest = Guest::faulty(&["skip-tlb-entry"]);
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 1);
    let done = process.go(&guest, op(Opcode::Crc32c, SRC, 0, 16));
    assert_eq!(done.status, Status::Success as u32);
    process.set_cpu(Iova(SRC), None);
    process.set_device(Iova(SRC), Pte::EMPTY);
    guest.shoot(1, SRC, SRC + PAGE);
    let at = guest.pages.take();
    guest.post(Command {
        kind: CommandKind::Audit as u32,
        flags: audit::FINAL,
        context: 1,
        addr: at.0,
        ..Default::default()
    });
    guest.run();
    let found = guest.bytes(at, AuditResult::SIZE);
    let found = AuditResult::from_bytes(found.as_slice().try_into().unwrap());
    assert_eq!((found.mismatches, found.iova), (1, SRC));
}

#[test]
fn the_whole_context_is_invalidated_in_any_case() {
    let guest = Guest::faulty(&["skip-tlb-entry"]);
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 1);
    process.go(&guest, op(Opcode::Crc32c, SRC, 0, 16));
    guest.post(Command {
        kind: CommandKind::Invalidate as u32,
        flags: extlb_spec::invalidation::InvalidationScope::Context as u32,
        context: 1,
        ..Default::default()
    });
    guest.run();
    assert!(guest.injected().is_empty());
    assert!(guest.get(regs::TLB_SHOT_DOWN) >= 1);
    assert_eq!(guest.device.engine_step(), Step::Idle);
}
