//! Page requests: groups, credits, overflow and every way in which an answer can come.

mod common;
use common::*;

use std::collections::HashSet;
use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use extlb_device::Step;
use extlb_spec::context::ContextError;
use extlb_spec::invalidation::{KernelShadow, wait};
use extlb_spec::page_request::{PageRequest, Response};
use extlb_spec::pte::Pte;
use extlb_spec::work::{Descriptor, Opcode, Status};
use extlb_spec::{Gpa, Iova, regs};

const SRC: u64 = 0x5555_0000_0000;
const DST: u64 = 0x5555_1000_0000;

fn read(addr: u64) -> Descriptor {
    op(Opcode::Crc32c, addr, 0, 8)
}

/// Submits, and runs until the device waits; the request.
fn miss(guest: &Guest, process: &Process, descriptor: Descriptor) -> (u64, PageRequest) {
    let n = process.submit(descriptor);
    process.ring(guest);
    guest.run();
    (n, guest.expect_request())
}

fn answer(guest: &Guest, request: &PageRequest, response: Response) {
    guest.respond(request, response);
    guest.run();
}

/// Starts a context that was stopped, with an empty queue.
fn start(guest: &Guest, process: &Process) {
    process.restart();
    process.write_entry(guest, |_| {});
    guest.sync(process.context);
    guest.run();
}

#[test]
fn a_group_is_one_record_and_its_number_does_not_come_back() {
    let guest = Guest::new();
    let process = guest.process(1);
    let mut groups = HashSet::new();
    let mut late = Vec::new();
    for life in 0..4 {
        for _ in 0..3 {
            // Both operands: two groups, each answered for itself.
            let n = process.submit(copy(SRC, DST, 8));
            process.ring(&guest);
            guest.run();
            let (a, b) = (guest.expect_request(), guest.expect_request());
            assert!(groups.insert(a.group) && groups.insert(b.group), "{life}");
            answer(&guest, &a, Response::Invalid);
            assert_eq!(process.status(n), Some(Status::Pending), "waits for both");
            answer(&guest, &b, Response::Invalid);
            assert_eq!(process.status(n), Some(Status::PageFault));
        }
        // What comes for an earlier life answers nobody.
        let (n, waiting) = miss(&guest, &process, read(SRC));
        assert!(groups.insert(waiting.group));
        for late in &late {
            let strays = guest.get(regs::STRAY_RESPONSES);
            answer(&guest, late, Response::Invalid);
            assert_eq!(guest.get(regs::STRAY_RESPONSES), strays + 1);
        }
        assert_eq!(process.status(n), Some(Status::Pending));
        late.push(waiting);
        match life {
            0 => {
                process.stop(&guest);
                guest.run();
            }
            // Of a device that forgot everything else.
            1 => guest.set(regs::CTRL, 0),
            _ => guest.device.reset(),
        }
        if life > 0 {
            guest.enable();
        }
        start(&guest, &process);
    }
}

#[test]
fn of_several_answers_to_a_group_the_first_counts() {
    for (first, second) in [
        (Response::Success, Response::Invalid),
        (Response::Invalid, Response::Success),
        (Response::Success, Response::Failure),
    ] {
        let guest = Guest::new();
        let process = guest.process(1);
        let n = process.submit(copy(SRC, DST, 8));
        process.ring(&guest);
        guest.run();
        let (a, b) = (guest.expect_request(), guest.expect_request());
        process.map_fresh(Iova(SRC), 1);
        process.map_fresh(Iova(DST), 1);
        // The second comes while the other group is still open, and once more when it is not.
        answer(&guest, &a, first);
        answer(&guest, &a, second);
        assert_eq!(guest.get(regs::STRAY_RESPONSES), 1);
        assert_eq!(process.status(n), Some(Status::Pending));
        answer(&guest, &b, Response::Success);
        answer(&guest, &a, second);
        answer(&guest, &b, second);
        assert_eq!(guest.get(regs::STRAY_RESPONSES), 3);
        let want = match first {
            Response::Success => Status::Success,
            _ => Status::PageFault,
        };
        assert_eq!(process.status(n), Some(want), "{first:?}, then {second:?}");
        assert_eq!((process.error(), guest.fatal()), (0, 0));
    }
}

#[test]
fn answers_come_in_any_order_and_the_worst_decides() {
    use Response::*;
    for (to_src, to_dst, want) in [
        (Success, Success, Some(Status::Success)),
        (Success, Invalid, Some(Status::PageFault)),
        (Invalid, Success, Some(Status::PageFault)),
        (Failure, Invalid, None),
        (Invalid, Failure, None),
    ] {
        for reversed in [false, true] {
            let guest = Guest::new();
            let process = guest.process(1);
            let n = process.submit(copy(SRC + 16, DST + 32, 8));
            process.ring(&guest);
            guest.run();
            let (src, dst) = (guest.expect_request(), guest.expect_request());
            assert_eq!((src.iova, dst.iova), (SRC, DST));
            process.map_fresh(Iova(SRC), 1);
            process.map_fresh(Iova(DST), 1);
            let mut answers = [(src, to_src), (dst, to_dst)];
            if reversed {
                answers.reverse();
            }
            for (request, response) in &answers {
                assert_eq!(process.status(n), Some(Status::Pending));
                assert!(guest.take_request().is_none(), "asks once");
                answer(&guest, request, *response);
            }
            let Some(want) = want else {
                let record = guest.expect_error();
                assert_eq!(record.code, ContextError::PageRequestFailed as u32);
                assert_eq!(process.status(n), Some(Status::Pending));
                continue;
            };
            assert_eq!(process.status(n), Some(want));
            let fault = match (to_src, to_dst) {
                (Invalid, _) => SRC + 16,
                (_, Invalid) => DST + 32,
                _ => 0,
            };
            assert_eq!(process.completion(n).fault_addr, fault);
        }
    }
}

#[test]
fn a_refused_group_is_not_asked_for_again_and_a_served_one_only_if_it_is_not_there() {
    let guest = Guest::new();
    let process = guest.process(1);
    let (n, request) = miss(&guest, &process, read(SRC));
    // Success without a page: the device walks, and asks again, under another number.
    answer(&guest, &request, Response::Success);
    let again = guest.expect_request();
    assert_eq!(again.iova, request.iova);
    assert_ne!(again.group, request.group);
    assert_eq!(process.status(n), Some(Status::Pending));
    answer(&guest, &again, Response::Invalid);
    assert_eq!(process.status(n), Some(Status::PageFault));
    process.ring(&guest);
    guest.run();
    assert!(guest.take_request().is_none());
    assert_eq!(guest.get(regs::PAGE_REQUESTS), 2);
}

#[test]
fn an_answer_while_the_device_is_stopped_waits_for_it() {
    let guest = Guest::new();
    let process = guest.process(1);
    let (n, request) = miss(&guest, &process, read(SRC));
    guest.device.set_bus_master(false);
    process.map_fresh(Iova(SRC), 1);
    answer(&guest, &request, Response::Success);
    assert_eq!(process.status(n), Some(Status::Pending));
    guest.device.set_bus_master(true);
    guest.run();
    assert_eq!(process.status(n), Some(Status::Success));
    assert!(guest.take_request().is_none(), "not asked for again");
    assert_eq!(guest.get(regs::STRAY_RESPONSES), 0);
}

#[test]
fn a_changed_context_goes_on_waiting_for_the_same_group() {
    let guest = Guest::new();
    let process = guest.process(1);
    let (n, request) = miss(&guest, &process, read(SRC));
    process.write_entry(&guest, |e| e.credits = 1);
    guest.sync(1);
    guest.run();
    assert!(guest.take_request().is_none(), "not asked for again");
    process.map_fresh(Iova(SRC), 1);
    answer(&guest, &request, Response::Success);
    assert_eq!(process.status(n), Some(Status::Success));
}

#[test]
fn a_context_that_is_stopped_while_it_waits_is_done_with_its_requests() {
    let guest = Guest::new();
    let process = guest.process(1);
    let (n, request) = miss(&guest, &process, read(SRC));
    process.stop(&guest);
    guest.run();
    process.map_fresh(Iova(SRC), 1);
    answer(&guest, &request, Response::Success);
    assert_eq!(guest.get(regs::STRAY_RESPONSES), 1);
    assert_eq!(process.status(n), Some(Status::Pending), "never completes");
    start(&guest, &process);
    let done = process.go(&guest, read(SRC));
    assert_eq!(done.status, Status::Success as u32);
}

/// Makes contexts 10 and up fill the request ring.
fn fill_ring(guest: &Guest) -> Vec<Process> {
    let count = 1 << PRQ_LOG2;
    let processes: Vec<_> = (10..10 + count).map(|c| guest.process(c)).collect();
    for process in &processes {
        process.submit(read(SRC));
        process.ring(guest);
    }
    guest.run();
    let tail = guest.kernel_word(offset_of!(KernelShadow, prq_tail));
    assert_eq!(tail, 1 << PRQ_LOG2);
    processes
}

/// Between the kernel's store to the head and its look at `prq_need_kick` another context may take
/// the room: the kernel must be asked for a kick all the same.
#[test]
fn who_waits_for_room_is_told_of_it_even_if_another_takes_the_room() {
    let guest = Guest::new();
    let (one, two) = (guest.process(1), guest.process(2));
    fill_ring(&guest);
    one.submit(read(SRC));
    one.ring(&guest);
    guest.run();
    let head = offset_of!(KernelShadow, prq_head);
    guest.set_kernel_word(head, guest.kernel_word(head) + 1);
    guest.prq_head.fetch_add(1, Ordering::SeqCst);
    two.submit(read(SRC));
    two.ring(&guest);
    guest.run();
    let mut seen = Vec::new();
    while let Some(request) = guest.take_request() {
        seen.push(request.context);
        guest.run();
    }
    assert_eq!(seen.len(), (1 << PRQ_LOG2) + 1);
    assert!(seen.contains(&1) && seen.contains(&2), "{seen:?}");
}

#[test]
fn a_request_that_waits_for_room_dies_with_its_context() {
    let guest = Guest::new();
    let (one, two) = (guest.process(1), guest.process(2));
    let before = fill_ring(&guest).len();
    for process in [&one, &two] {
        process.submit(read(SRC));
        process.ring(&guest);
    }
    guest.run();
    one.stop(&guest);
    guest.run();
    let mut seen = Vec::new();
    while let Some(request) = guest.take_request() {
        seen.push(request.context);
        guest.run();
    }
    assert_eq!(seen.len(), before + 1);
    assert_eq!(seen.last(), Some(&2), "in turn, and none of the dead");
    assert_eq!(
        guest.kernel_word(offset_of!(KernelShadow, prq_need_kick)),
        0
    );
}

#[test]
fn an_error_record_waits_for_room_too() {
    let guest = Guest::new();
    let process = guest.process(1);
    fill_ring(&guest);
    process.set_tail(1000);
    process.ring(&guest);
    guest.run();
    // The program knows at once.
    assert_eq!(process.error(), ContextError::RingOverrun as u32);
    let mut last = None;
    while let Some(record) = guest.take_request() {
        last = Some(record);
        guest.run();
    }
    let record = last.expect("records");
    assert_eq!((record.context, record.code), (1, 2));
}

#[test]
fn a_head_that_makes_no_sense_costs_its_writer_and_nothing_is_overwritten() {
    // One that lags behind by less than the ring is long looks like a slow reader, and is one.
    for nonsense in [1, 1 << PRQ_LOG2, 1 << 31, u32::MAX - (1 << PRQ_LOG2)] {
        let guest = Guest::new();
        let process = guest.process(1);
        let head = offset_of!(KernelShadow, prq_head);
        guest.set_kernel_word(head, nonsense);
        let before = guest.bytes(PRQ, 4096);
        let n = process.submit(read(SRC));
        process.ring(&guest);
        guest.run();
        let tail = guest.kernel_word(offset_of!(KernelShadow, prq_tail));
        assert_eq!(tail, 0, "{nonsense:#x}");
        assert!(guest.bytes(PRQ, 4096) == before);
        let need_kick = offset_of!(KernelShadow, prq_need_kick);
        assert_ne!(guest.kernel_word(need_kick), 0);
        // Shootdowns do not care.
        let ack = guest.shoot(1, SRC, SRC + PAGE);
        guest.run();
        assert_eq!(guest.ack(), ack);
        // Mended, it goes on.
        guest.set_kernel_word(head, 0);
        guest.set(regs::KICK, 1);
        guest.run();
        let request = guest.expect_request();
        process.map_fresh(Iova(SRC), 1);
        answer(&guest, &request, Response::Success);
        assert_eq!(process.status(n), Some(Status::Success));
    }
}

/// What the kernel relies on when it gives the number of a context to somebody else.
#[test]
fn when_the_drain_after_a_stop_is_acknowledged_every_record_is_in_the_ring() {
    for fails in [false, true] {
        let guest = Arc::new(Guest::new());
        let process = guest.process(1);
        let acked = Arc::new(AtomicU64::new(0));
        {
            let (inner, process, acked) = (guest.clone(), process.clone(), acked.clone());
            guest.memory.hook(move |access| {
                if access != Access::Write(PRQ) {
                    return false;
                }
                // The record is about to be written: the kernel stops the context.
                process.stop(&inner);
                let ack = inner.post_wait(wait::DRAINED);
                for _ in 0..100 {
                    inner.device.invalidation_step();
                }
                acked.store(u64::from(inner.ack() == ack), Ordering::SeqCst);
                true
            });
        }
        if fails {
            process.set_tail(1000);
        } else {
            process.submit(read(SRC));
        }
        process.ring(&guest);
        guest.run();
        assert!(guest.memory.is_done());
        assert_eq!(
            acked.load(Ordering::SeqCst),
            0,
            "before the record was there"
        );
        assert_eq!(guest.ack(), 1);
        let record = guest.take_request().expect("the record");
        assert_eq!(record.context, 1);
        guest.respond(&record, Response::Success);
        start(&guest, &process);
        assert!(guest.take_request().is_none(), "and none after");
        process.map_fresh(Iova(SRC), 1);
        let done = process.go(&guest, read(SRC));
        assert_eq!(done.status, Status::Success as u32);
    }
}

/// The other order: the stop comes between the miss and the record.
#[test]
fn a_context_that_is_stopped_before_its_record_is_written_sends_none() {
    let guest = Arc::new(Guest::new());
    let process = guest.process(1);
    let leaf = process.device_leaf(Iova(SRC));
    {
        let (inner, process) = (guest.clone(), process.clone());
        guest.memory.hook(move |access| {
            if access != Access::Loaded(leaf) {
                return false;
            }
            process.stop(&inner);
            while inner.device.invalidation_step() == Step::Busy {}
            true
        });
    }
    process.submit(read(SRC));
    process.ring(&guest);
    guest.run();
    assert!(guest.memory.is_done());
    assert!(guest.take_request().is_none());
    assert_eq!(guest.get(regs::PAGE_REQUESTS), 0);
}

#[test]
fn a_context_that_fails_while_it_is_changed_tells_its_program_all_the_same() {
    let guest = Arc::new(Guest::new());
    let process = guest.process(1);
    let tail = Gpa(process.shadow.0);
    {
        let (inner, process) = (guest.clone(), process.clone());
        guest.memory.hook(move |access| {
            let hit = access == Access::Load(tail);
            if hit {
                process.write_entry(&inner, |e| e.credits = 1);
                inner.sync(1);
                while inner.device.invalidation_step() == Step::Busy {}
            }
            hit
        });
    }
    process.set_tail(1000);
    process.ring(&guest);
    guest.run();
    assert!(guest.memory.is_done());
    assert_eq!(guest.expect_error().code, ContextError::RingOverrun as u32);
    assert_eq!(process.error(), ContextError::RingOverrun as u32);
    assert!(guest.take_request().is_none(), "told once");
}

#[test]
fn a_group_names_what_the_operation_is_going_to_need() {
    let guest = Guest::new();
    let process = guest.process(1);
    for (addr, len, pages) in [
        (SRC + 4095, 1, 1),
        (SRC + 4095, 2, 2),
        (SRC, 63 * PAGE + 1, 64),
        (SRC + 8, 1 << 31, 64),
    ] {
        let (n, request) = miss(&guest, &process, op(Opcode::Crc32c, addr, 0, len));
        assert_eq!((request.iova, request.pages), (SRC, pages));
        answer(&guest, &request, Response::Invalid);
        assert_eq!(process.completion(n).fault_addr, addr);
    }
    // From the page that is missing on.
    process.map_fresh(Iova(SRC), 3);
    process.set_device(Iova(SRC + 2 * PAGE), Pte::EMPTY);
    let (_, request) = miss(&guest, &process, op(Opcode::Crc32c, SRC, 0, 5 * PAGE));
    assert_eq!((request.iova, request.pages), (SRC + 2 * PAGE, 3));
}
