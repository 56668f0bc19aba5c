//! Faults between the kernel and the device: page requests, responses, interrupts, doorbells.

mod common;
use common::*;

use std::time::Duration;

use extlb_spec::page_request::Response;
use extlb_spec::pte::Pte;
use extlb_spec::work::{Descriptor, Opcode, Status, flags};
use extlb_spec::{Iova, Vector, regs};

const AT: u64 = 0x5555_0000_0000;

/// An operation on a page that is not mapped.
fn miss(guest: &Guest, process: &Process) -> u64 {
    let n = process.submit(op(Opcode::Crc32c, AT, 0, 16));
    process.ring(guest);
    guest.run();
    n
}

fn serve(guest: &Guest, process: &Process, request: &extlb_spec::page_request::PageRequest) {
    assert_eq!(request.context, process.context);
    process.map(Iova(request.iova), guest.pages.take(), true);
    guest.respond(request, Response::Success);
    guest.run();
}

#[test]
fn a_lost_request_is_noticed_only_by_who_waits_for_the_operation() {
    let guest = Guest::faulty(&["lose-request,after=1,times=1"]);
    let processes = [1, 2, 3].map(|context| guest.process(context));
    let waiting = [0, 1, 2].map(|i| miss(&guest, &processes[i]));
    // The record behind it has its slot.
    for i in [0, 2] {
        let request = guest.expect_request();
        serve(&guest, &processes[i], &request);
        assert_eq!(processes[i].status(waiting[i]), Some(Status::Success));
    }
    assert_eq!(guest.take_request(), None);
    guest.clock.advance(Duration::from_secs(60));
    guest.run();
    assert_eq!(processes[1].status(waiting[1]), Some(Status::Pending));
    let [(kind, to)] = &guest.injected()[..] else {
        panic!("one fault");
    };
    assert_eq!(*kind, "lose-request");
    assert!(to.contains("context 2"), "{to}");
    // The device takes it for sent.
    assert_eq!(guest.get(regs::PAGE_REQUESTS), 3);
}

#[test]
fn a_ring_that_loses_requests_is_as_long_as_any_other() {
    let guest = Guest::faulty(&["lose-request,every=5"]);
    let entries = 1 << PRQ_LOG2;
    // Rounds of as many contexts as there is room for: nothing but what is lost is missing.
    for round in 0..14u32 {
        let contexts = (0..entries).map(|i| round * entries / 2 + i % (entries / 2));
        let contexts: std::collections::BTreeSet<u32> = contexts.collect();
        let processes: Vec<_> = contexts
            .into_iter()
            .map(|c| guest.process(c % 64))
            .collect();
        let before = guest.injections().len();
        for process in &processes {
            miss(&guest, process);
        }
        let lost = guest.injections().len() - before;
        for _ in 0..processes.len() - lost {
            let request = guest.expect_request();
            guest.respond(&request, Response::Invalid);
        }
        assert_eq!(guest.take_request(), None);
        guest.run();
        for process in &processes {
            process.stop(&guest);
        }
        guest.run();
    }
    // More were lost than it has entries: none of them takes room for ever.
    assert!(guest.injections().len() > entries as usize);
    assert_eq!(guest.fatal(), 0);
}

#[test]
fn error_records_are_not_lost() {
    let guest = Guest::faulty(&["lose-request"]);
    let process = guest.process(1);
    process.set_tail(1000);
    process.ring(&guest);
    guest.run();
    assert_eq!(guest.expect_error().context, 1);
    assert!(guest.injected().is_empty());
}

#[test]
fn a_lost_response_leaves_the_operation_waiting_for_another() {
    let guest = Guest::faulty(&["lose-response,times=1"]);
    let process = guest.process(1);
    let n = miss(&guest, &process);
    let request = guest.expect_request();
    serve(&guest, &process, &request);
    assert_eq!(process.status(n), Some(Status::Pending));
    assert_eq!(guest.injected()[0].0, "lose-response");
    assert_eq!(guest.get(regs::STRAY_RESPONSES), 0);
    guest.respond(&request, Response::Success);
    guest.run();
    assert_eq!(process.status(n), Some(Status::Success));
}

#[test]
fn a_lost_interrupt_is_noticed_only_by_who_looks_at_the_ring() {
    let guest = Guest::faulty(&["lose-interrupt,vector=page-request"]);
    let process = guest.process(1);
    let n = miss(&guest, &process);
    assert_eq!(guest.vectors.count(Vector::PageRequest), 0);
    assert_eq!(guest.injected(), [("lose-interrupt", "PageRequest".into())]);
    let request = guest.expect_request();
    serve(&guest, &process, &request);
    assert_eq!(process.status(n), Some(Status::Success));
    // Others come through.
    let done = process.go(
        &guest,
        Descriptor {
            flags: flags::INTERRUPT,
            ..Default::default()
        },
    );
    assert_eq!(done.status, Status::Success as u32);
    assert_eq!(guest.vectors.count(Vector::Completion), 1);
}

#[test]
fn a_repeated_interrupt_finds_nothing_new() {
    let guest = Guest::faulty(&["repeat-interrupt"]);
    let process = guest.process(1);
    miss(&guest, &process);
    assert_eq!(guest.vectors.count(Vector::PageRequest), 2);
    guest.expect_request();
    assert_eq!(guest.take_request(), None);
}

#[test]
fn a_stalled_context_sees_no_work_and_stops_no_other() {
    let guest = Guest::faulty(&["stall-context,context=1,after=1,delay_us=50000"]);
    let processes = [1, 2].map(|context| guest.process(context));
    let [one, two] = &processes;
    let nop = Descriptor::default();
    assert_eq!(one.go(&guest, nop).status, Status::Success as u32);
    assert_eq!(one.go(&guest, nop).status, Status::Pending as u32);
    assert_eq!(two.go(&guest, nop).status, Status::Success as u32);
    assert_eq!(
        guest.injected(),
        [("stall-context", "context 1, tail 2".into())]
    );
    assert_eq!(one.error(), 0);
    guest.clock.advance(Duration::from_millis(49));
    one.ring(&guest);
    guest.run();
    assert_eq!(one.status(1), Some(Status::Pending));
    // It is over. (With threads, somebody rings then.)
    guest.clock.advance(Duration::from_millis(1));
    one.ring(&guest);
    guest.run();
    // Which is an occasion for the next stall.
    assert_eq!(guest.injections().len(), 2);
}

#[test]
fn a_context_that_is_stalled_for_ever_can_be_stopped() {
    let guest = Guest::faulty(&["stall-context,times=1"]);
    let process = guest.process(1);
    let n = process.submit(Descriptor::default());
    process.ring(&guest);
    guest.run();
    guest.clock.advance(Duration::from_secs(3600));
    process.ring(&guest);
    guest.run();
    assert_eq!(process.status(n), Some(Status::Pending));
    process.stop(&guest);
    guest.run();
    process.write_entry(&guest, |_| {});
    guest.sync(1);
    process.ring(&guest);
    guest.run();
    assert_eq!(process.status(n), Some(Status::Success), "another life");
}

#[test]
fn a_leaf_that_seems_read_only_costs_a_request() {
    let guest = Guest::faulty(&["flip-permission,times=1,to=read-only"]);
    let process = guest.process(1);
    let page = guest.pages.take();
    // Descriptors are read, which the flip does not mind; the first write meets it.
    process.map(Iova(AT), page, true);
    let n = process.submit(op(Opcode::Fill, 0, AT, 16));
    process.ring(&guest);
    guest.run();
    let before = process.device_pte(Iova(AT));
    assert_eq!(guest.injections().len(), 1);
    // A kernel that finds the page writable already says so, and never knows why it was asked.
    while let Some(request) = guest.take_request() {
        guest.respond(&request, Response::Success);
        guest.run();
    }
    assert_eq!(process.status(n), Some(Status::Success));
    let after = process.device_pte(Iova(AT));
    assert!(before.is_writable() && after.is_writable());
    assert_eq!(after.addr(), page);
}

#[test]
fn a_leaf_that_seems_writable_is_found_by_the_oracle() {
    let guest = Guest::faulty(&["flip-permission,to=writable,context=1"]);
    let process = guest.process(1);
    let page = guest.pages.take();
    process.map(Iova(AT), page, false);
    let done = process.go(&guest, op(Opcode::Fill, 0, AT, 16));
    // The program is told that all is well, and the page has changed.
    assert_eq!(done.status, Status::Success as u32);
    assert_eq!(guest.take_request(), None);
    let leaf = process.device_pte(Iova(AT));
    let dirty = extlb_spec::pte::bit::ACCESSED | extlb_spec::pte::bit::DIRTY;
    assert_eq!(leaf, Pte(Pte::leaf(page, false).0 | dirty));
    assert_eq!(guest.get(regs::ORACLE_SUSPECTS), 1);
    guest.clock.advance(Duration::from_millis(3001));
    guest.device.invalidation_step();
    assert_eq!(guest.get(regs::ORACLE_STALE), 1);
    assert_eq!(guest.get(regs::ORACLE_IOVA), AT);
}
