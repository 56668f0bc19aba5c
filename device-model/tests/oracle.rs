//! The oracle: silent on a kernel that keeps the rule, loud on each way to break it.

mod common;
use common::*;

use std::sync::Arc;
use std::time::Duration;

use extlb_device::ports::{Dma, Event};
use extlb_device::{Config, Step};
use extlb_spec::invalidation::{AuditResult, Command, CommandKind, audit, wait};
use extlb_spec::pte::Pte;
use extlb_spec::regs::{self, StaleKind};
use extlb_spec::work::{Opcode, Status};
use extlb_spec::{Gpa, Iova};

const SRC: u64 = 0x5555_0000_0000;
const BOUND: Duration = Duration::from_millis(3001);

fn guest() -> (Guest, Process, Gpa) {
    let guest = Guest::new();
    let process = guest.process(1);
    let page = process.map_fresh(Iova(SRC), 1)[0];
    (guest, process, page)
}

fn touch(guest: &Guest, process: &Process, opcode: Opcode) {
    let done = process.go(guest, op(opcode, SRC, SRC, 16));
    assert_eq!(done.status, Status::Success as u32);
}

fn expire(guest: &Guest) {
    guest.clock.advance(BOUND);
    guest.device.invalidation_step();
}

fn stale(guest: &Guest) -> u64 {
    guest.get(regs::ORACLE_STALE)
}

fn suspects(guest: &Guest) -> u64 {
    guest.get(regs::ORACLE_SUSPECTS)
}

fn kind(guest: &Guest) -> Option<StaleKind> {
    StaleKind::from_raw(guest.get(regs::ORACLE_KIND) as u32)
}

#[test]
fn a_difference_that_nothing_closes_is_stale() {
    let (guest, process, page) = guest();
    touch(&guest, &process, Opcode::Crc32c);
    // The notifier is off: the process has another page, the device is not told.
    let other = guest.pages.take();
    process.set_cpu(Iova(SRC), Some((other, true)));
    touch(&guest, &process, Opcode::Fill);
    touch(&guest, &process, Opcode::Fill);
    assert_eq!((suspects(&guest), stale(&guest)), (1, 0), "once, not yet");
    guest.clock.advance(Duration::from_millis(2900));
    guest.device.invalidation_step();
    assert_eq!(stale(&guest), 0, "the bound is not over");
    expire(&guest);
    assert_eq!(stale(&guest), 1);
    assert_eq!(kind(&guest), Some(StaleKind::NotInvalidated));
    assert_eq!(guest.get(regs::ORACLE_CONTEXT), 1);
    assert_eq!(guest.get(regs::ORACLE_IOVA), SRC);
    assert_eq!(guest.get(regs::ORACLE_DEVICE_GPA), page.0);
    assert_eq!(guest.get(regs::ORACLE_CPU_GPA), other.0);
    assert_ne!(guest.get(regs::ORACLE_FILL), 0);
    guest.set(regs::ORACLE_SELECT, 1);
    assert_eq!(guest.get(regs::ORACLE_KIND), 0, "no second record");
    let events = guest.events.0.lock().unwrap();
    assert!(matches!(&events[..], [Event::Stale(a)] if a.write && a.cpu_gpa == Some(other)));
}

#[test]
fn an_unmapped_page_shows_as_all_ones() {
    let (guest, process, _) = guest();
    process.set_cpu(Iova(SRC), None);
    touch(&guest, &process, Opcode::Crc32c);
    expire(&guest);
    assert_eq!(stale(&guest), 1);
    assert_eq!(guest.get(regs::ORACLE_CPU_GPA), u64::MAX);
}

#[test]
fn writing_where_the_process_may_only_read_is_a_difference() {
    let (guest, process, page) = guest();
    process.set_cpu(Iova(SRC), Some((page, false)));
    touch(&guest, &process, Opcode::Crc32c);
    assert_eq!(suspects(&guest), 0, "reading is fine");
    touch(&guest, &process, Opcode::Fill);
    assert_eq!(suspects(&guest), 1);
    expire(&guest);
    assert_eq!(stale(&guest), 1);
}

#[test]
fn a_shootdown_that_follows_closes_the_difference() {
    let (guest, process, _) = guest();
    touch(&guest, &process, Opcode::Crc32c);
    process.set_cpu(Iova(SRC), None);
    touch(&guest, &process, Opcode::Crc32c);
    process.set_device(Iova(SRC), Pte::EMPTY);
    guest.shoot(1, SRC, SRC + PAGE);
    guest.run();
    expire(&guest);
    assert_eq!((suspects(&guest), stale(&guest)), (1, 0));
}

#[test]
fn a_shootdown_of_the_neighbour_closes_nothing() {
    for start in [SRC - PAGE, SRC + PAGE] {
        let (guest, process, _) = guest();
        process.set_cpu(Iova(SRC), None);
        touch(&guest, &process, Opcode::Crc32c);
        guest.shoot(1, start, start + PAGE);
        guest.shoot(2, SRC, SRC + PAGE);
        guest.run();
        expire(&guest);
        assert_eq!(stale(&guest), 1);
    }
}

#[test]
fn an_invalidation_without_a_drained_wait_closes_nothing() {
    let (guest, process, _) = guest();
    process.set_cpu(Iova(SRC), None);
    touch(&guest, &process, Opcode::Crc32c);
    guest.post(range(1, SRC, SRC + PAGE));
    guest.post_wait(wait::CLEARED);
    guest.run();
    expire(&guest);
    assert_eq!(stale(&guest), 1);
}

#[test]
fn a_leaf_left_in_the_page_table_is_found_after_the_shootdown() {
    let (guest, process, _) = guest();
    touch(&guest, &process, Opcode::Crc32c);
    process.set_cpu(Iova(SRC), None);
    // The kernel forgets to clear the device's entry: the next access fills it again.
    guest.shoot(1, SRC, SRC + PAGE);
    guest.run();
    touch(&guest, &process, Opcode::Crc32c);
    expire(&guest);
    assert_eq!(stale(&guest), 1);
    assert_eq!(kind(&guest), Some(StaleKind::NotInvalidated));
}

#[test]
fn a_refill_between_an_early_notifier_and_the_change_is_found() {
    // The order of 2007: notifier, shootdown, and only then the process's own entry.
    let (guest, process, page) = guest();
    process.set_device(Iova(SRC), Pte::EMPTY);
    guest.shoot(1, SRC, SRC + PAGE);
    guest.run();
    process.set_device(Iova(SRC), Pte::leaf(page, true));
    touch(&guest, &process, Opcode::Crc32c);
    process.set_cpu(Iova(SRC), None);
    touch(&guest, &process, Opcode::Crc32c);
    expire(&guest);
    assert_eq!(stale(&guest), 1);
}

#[test]
fn a_drain_that_waits_for_the_very_access_closes_it() {
    let (guest, process, page) = guest();
    let guest = Arc::new(guest);
    touch(&guest, &process, Opcode::Crc32c);
    {
        let (inner, process) = (guest.clone(), process.clone());
        let leaf_read = Access::Read(page);
        guest.memory.hook(move |access| {
            if access == leaf_read {
                // The access has been compared already: nothing differed then.
                process.set_cpu(Iova(SRC), None);
                process.set_device(Iova(SRC), Pte::EMPTY);
                inner.shoot(1, SRC, SRC + PAGE);
                while inner.device.invalidation_step() == Step::Busy {}
            }
            access == leaf_read
        });
    }
    touch(&guest, &process, Opcode::Crc32c);
    guest.run();
    expire(&guest);
    assert_eq!((suspects(&guest), stale(&guest)), (0, 0));
}

#[test]
fn an_entry_that_is_out_only_for_a_moment_is_not_stale() {
    // An upgrade by mprotect: taken out and put back, and no flush, as none is needed.
    let (guest, process, page) = guest();
    process.set_cpu(Iova(SRC), None);
    touch(&guest, &process, Opcode::Crc32c);
    process.set_cpu(Iova(SRC), Some((page, true)));
    expire(&guest);
    assert_eq!((suspects(&guest), stale(&guest)), (1, 0));
}

#[test]
fn a_stopped_context_closes_its_differences() {
    let (guest, process, _) = guest();
    process.set_cpu(Iova(SRC), None);
    touch(&guest, &process, Opcode::Crc32c);
    process.stop(&guest);
    guest.post_wait(wait::DRAINED);
    guest.run();
    expire(&guest);
    assert_eq!((suspects(&guest), stale(&guest)), (1, 0));
}

#[test]
fn contexts_without_the_flag_and_a_disabled_oracle_compare_nothing() {
    let (guest, process, _) = guest();
    process.write_entry(&guest, |e| e.flags = 1);
    guest.sync(1);
    guest.run();
    let before = guest.get(regs::ORACLE_CHECKS);
    touch(&guest, &process, Opcode::Crc32c);
    assert_eq!(guest.get(regs::ORACLE_CHECKS), before);

    let mut config = config();
    config.oracle.enabled = false;
    let guest = Guest::with(config);
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 1);
    touch(&guest, &process, Opcode::Crc32c);
    assert_eq!(guest.get(regs::ORACLE_CHECKS), 0);
}

#[test]
fn a_full_table_is_told_and_not_silent() {
    let mut config = Config::clone(&config());
    config.oracle.suspects = 4;
    let guest = Guest::with(config);
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 8);
    for i in 0..8 {
        process.set_cpu(Iova(SRC + i * PAGE), None);
        process.go(&guest, op(Opcode::Crc32c, SRC + i * PAGE, 0, 8));
    }
    assert_eq!(suspects(&guest), 8);
    assert_eq!(guest.device.totals().oracle_overflow, 4);
    {
        let events = guest.events.0.lock().unwrap();
        assert!(matches!(&events[..], [Event::OracleOverflow]), "told once");
    }
    expire(&guest);
    assert_eq!(stale(&guest), 4);
}

#[test]
fn an_audit_compares_the_tlb_and_the_page_table() {
    let (guest, process, page) = guest();
    touch(&guest, &process, Opcode::Crc32c);
    let result = guest.pages.take();
    let run = |flags| {
        guest.ram.write(result, &[0; 64]).unwrap();
        guest.post(Command {
            kind: CommandKind::Audit as u32,
            flags,
            context: 1,
            addr: result.0,
            ..Default::default()
        });
        guest.run();
        let bytes = guest.bytes(result, 64);
        AuditResult::from_bytes(&bytes.try_into().unwrap())
    };
    let clean = run(0);
    // Ring, records and the page: in the page table, and in the TLB.
    assert_eq!((clean.checked, clean.mismatches, clean.done), (6, 0, 1));
    process.set_cpu(Iova(SRC), None);
    let dirty = run(0);
    assert_eq!((dirty.mismatches, dirty.iova), (2, SRC));
    assert_eq!((dirty.device_gpa, dirty.cpu_gpa), (page.0, u64::MAX));
    assert_eq!(stale(&guest), 0, "the driver looks again first");
    run(audit::FINAL);
    assert_eq!((stale(&guest), kind(&guest)), (2, Some(StaleKind::Audit)));
    // Only the leaf is left when the TLB has forgotten it.
    guest.shoot(1, SRC, SRC + PAGE);
    assert_eq!(run(0).mismatches, 1);
    process.set_device(Iova(SRC), Pte::EMPTY);
    assert_eq!(run(0).mismatches, 0);
}

#[test]
fn what_the_kernel_maps_above_the_process_is_not_compared() {
    const END: u64 = 1 << 47;
    let (guest, process, _) = guest();
    process.map_fresh(Iova(END - PAGE), 2);
    for iova in [END - PAGE, END] {
        process.set_cpu(Iova(iova), None);
        let done = process.go(&guest, op(Opcode::Fill, iova, iova, 16));
        assert_eq!(done.status, Status::Success as u32);
        assert_eq!(suspects(&guest), 1, "the last page of the process");
    }
    let result = guest.pages.take();
    guest.post(Command {
        kind: CommandKind::Audit as u32,
        context: 1,
        addr: result.0,
        ..Default::default()
    });
    guest.run();
    let bytes = guest.bytes(result, 64);
    let result = AuditResult::from_bytes(&bytes.try_into().unwrap());
    assert_eq!((result.mismatches, result.iova), (2, END - PAGE));
}

#[test]
fn the_report_is_bounded_by_what_the_registers_hold() {
    let guest = Guest::new();
    let process = guest.process(1);
    let count = u64::from(regs::ORACLE_RECORDS) + 8;
    process.map_fresh(Iova(SRC), count);
    for i in 0..count {
        process.set_cpu(Iova(SRC + i * PAGE), None);
        process.go(&guest, op(Opcode::Crc32c, SRC + i * PAGE, 0, 8));
    }
    expire(&guest);
    assert_eq!(stale(&guest), count);
    guest.set(regs::ORACLE_SELECT, u64::from(regs::ORACLE_RECORDS) - 1);
    assert_ne!(guest.get(regs::ORACLE_KIND), 0);
    guest.set(regs::ORACLE_SELECT, u64::from(regs::ORACLE_RECORDS));
    assert_eq!(guest.get(regs::ORACLE_KIND), 0);
}
