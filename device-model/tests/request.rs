//! The request path: operations by virtual address, page requests, contexts.

mod common;
use common::*;

use std::mem::offset_of;

use extlb_device::ports::Dma;
use extlb_spec::context::{ContextError, ContextShadow};
use extlb_spec::invalidation::KernelShadow;
use extlb_spec::page_request::{Response, flags as request_flags};
use extlb_spec::pte::{Pte, bit};
use extlb_spec::work::{Completion, Descriptor, Opcode, Status, flags};
use extlb_spec::{Gpa, Iova, Vector, regs};

const SRC: u64 = 0x5555_0000_0000;
const DST: u64 = 0x5555_1000_0000;

/// Bytes that differ from page to page and within one.
fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i * 7 + i / 4096 * 13 + 1) as u8)
        .collect()
}

fn fill(guest: &Guest, pages: &[Gpa], data: &[u8]) {
    for (page, bytes) in pages.iter().zip(data.chunks(4096)) {
        guest.ram.write(*page, bytes).unwrap();
    }
}

fn read(guest: &Guest, pages: &[Gpa]) -> Vec<u8> {
    pages.iter().flat_map(|p| guest.bytes(*p, 4096)).collect()
}

#[test]
fn copy_of_any_alignment_moves_exactly_its_bytes() {
    let guest = Guest::new();
    let process = guest.process(1);
    let src = process.map_fresh(Iova(SRC), 4);
    let dst = process.map_fresh(Iova(DST), 4);
    let data = pattern(4 * 4096);
    fill(&guest, &src, &data);
    for (from, to, len) in [(0, 0, 4 * 4096), (1, 5, 9000), (4095, 1, 4098), (77, 77, 0)] {
        fill(&guest, &dst, &vec![0xee; 4 * 4096]);
        let done = process.go(&guest, copy(SRC + from, DST + to, len));
        assert_eq!(done.status, Status::Success as u32);
        assert_eq!(done.bytes, len);
        let mut want = vec![0xee; 4 * 4096];
        let (from, to, len) = (from as usize, to as usize, len as usize);
        want[to..to + len].copy_from_slice(&data[from..from + len]);
        assert!(read(&guest, &dst) == want, "{from} {to} {len}");
    }
}

#[test]
fn fill_crc_compare_and_nop_give_their_results() {
    let guest = Guest::new();
    let process = guest.process(1);
    let a = process.map_fresh(Iova(SRC), 3);
    let b = process.map_fresh(Iova(DST), 3);
    let filled = process.go(
        &guest,
        Descriptor {
            arg: 0x0807_0605_0403_0201,
            ..op(Opcode::Fill, 0, SRC + 3, 8190)
        },
    );
    assert_eq!(filled.status, Status::Success as u32);
    let mut want = vec![0; 3 * 4096];
    (0..8190).for_each(|i| want[3 + i] = (i % 8 + 1) as u8);
    assert!(read(&guest, &a) == want);

    let crc = process.go(&guest, op(Opcode::Crc32c, SRC, 0, 3 * 4096));
    assert_eq!(crc.result, u64::from(crc32c::crc32c(&want)));
    let first = process.go(&guest, op(Opcode::Crc32c, SRC, 0, 5000));
    let rest = process.go(
        &guest,
        Descriptor {
            arg: first.result,
            ..op(Opcode::Crc32c, SRC + 5000, 0, 3 * 4096 - 5000)
        },
    );
    assert_eq!(rest.result, crc.result, "goes on from an earlier result");

    fill(&guest, &b, &want);
    let same = process.go(&guest, op(Opcode::Compare, SRC + 9, DST + 9, 12000));
    assert_eq!(same.status, Status::Success as u32);
    let mut other = want.clone();
    other[9000] ^= 1;
    fill(&guest, &b, &other);
    let differs = process.go(&guest, op(Opcode::Compare, SRC + 9, DST + 9, 12000));
    assert_eq!(differs.status, Status::Mismatch as u32);
    assert_eq!((differs.result, differs.bytes), (8991, 8991));

    let nop = process.go(&guest, Descriptor::default());
    assert_eq!(nop.status, Status::Success as u32);
    assert_eq!(guest.get(regs::ORACLE_STALE), 0);
    assert_eq!(guest.get(regs::ORACLE_SUSPECTS), 0);
    assert!(guest.get(regs::ORACLE_CHECKS) > 0);
}

#[test]
fn a_miss_asks_waits_without_a_guard_and_goes_on() {
    let guest = Guest::new();
    let process = guest.process(1);
    let src = process.map_fresh(Iova(SRC), 3);
    let data = pattern(3 * 4096);
    fill(&guest, &src, &data);
    process.set_device(Iova(SRC + 2 * PAGE), Pte::EMPTY);
    let dst = process.map_fresh(Iova(DST), 3);
    for i in 0..3 {
        process.set_device(Iova(DST + i * PAGE), Pte::EMPTY);
    }
    let n = process.submit(copy(SRC + 10, DST + 10, 3 * 4096 - 10));
    process.ring(&guest);
    guest.run();
    let request = guest.expect_request();
    assert_eq!(request.context, 1);
    assert_eq!(request.iova, DST, "the page, not the byte");
    assert_eq!(request.pages, 3);
    assert_eq!(request.flags, request_flags::WRITE);
    assert_eq!(guest.vectors.count(Vector::PageRequest), 1);
    // It waits: a drain is not held up.
    let ack = guest.shoot(1, DST, DST + PAGE);
    assert_ne!(
        guest.device.invalidation_step(),
        extlb_device::Step::Waiting
    );
    guest.run();
    assert_eq!(guest.ack(), ack);
    assert_eq!(process.status(n), Some(Status::Pending));
    for i in 0..2 {
        process.set_device(Iova(DST + i * PAGE), Pte::leaf(dst[i as usize], true));
    }
    guest.respond(&request, Response::Success);
    guest.run();
    // Both operands miss now, and both are asked for at once.
    let (a, b) = (guest.expect_request(), guest.expect_request());
    assert_eq!((a.iova, a.pages), (SRC + 2 * PAGE, 1));
    assert_eq!((b.iova, b.flags), (DST + 2 * PAGE, request_flags::WRITE));
    assert_ne!(a.group, b.group);
    process.map(Iova(SRC + 2 * PAGE), src[2], false);
    process.map(Iova(DST + 2 * PAGE), dst[2], true);
    guest.respond(&a, Response::Success);
    guest.run();
    assert_eq!(process.status(n), Some(Status::Pending), "waits for both");
    guest.respond(&b, Response::Success);
    guest.run();
    assert_eq!(process.status(n), Some(Status::Success));
    assert!(read(&guest, &dst)[10..] == data[10..]);
    assert_eq!(guest.get(regs::PAGE_REQUESTS), 3);
}

#[test]
fn a_refused_page_ends_the_operation_and_names_the_byte() {
    let guest = Guest::new();
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 2);
    process.map_fresh(Iova(DST), 1);
    let n = process.submit(copy(SRC, DST + 16, 8000));
    let after = process.submit(Descriptor::default());
    process.ring(&guest);
    guest.run();
    let request = guest.expect_request();
    guest.respond(&request, Response::Invalid);
    guest.run();
    let done = process.completion(n);
    assert_eq!(done.status, Status::PageFault as u32);
    assert_eq!((done.fault_addr, done.fault), (DST + PAGE, 1));
    assert_eq!(done.bytes, 4096 - 16, "all below is done");
    assert_eq!(process.status(after), Some(Status::Success), "others go on");
    assert_eq!(guest.get(regs::OPS_FAULTED), 1);
}

#[test]
fn both_operands_refused_is_one_fault_and_no_error() {
    let guest = Guest::new();
    let process = guest.process(1);
    let n = process.submit(copy(SRC, DST, 8));
    process.ring(&guest);
    guest.run();
    for _ in 0..2 {
        let request = guest.expect_request();
        guest.respond(&request, Response::Invalid);
    }
    guest.run();
    assert_eq!(process.status(n), Some(Status::PageFault));
    assert_eq!(process.completion(n).fault_addr, SRC);
    assert_eq!(process.error(), 0);
}

#[test]
fn a_read_only_page_is_asked_for_and_may_become_writable_without_an_invalidation() {
    let guest = Guest::new();
    let process = guest.process(1);
    let page = process.map_fresh(Iova(DST), 1)[0];
    process.map(Iova(DST), page, false);
    let crc = process.go(&guest, op(Opcode::Crc32c, DST, 0, 8));
    assert_eq!(crc.status, Status::Success as u32, "cached, for reading");
    let n = process.submit(op(Opcode::Fill, 0, DST, 8));
    process.ring(&guest);
    guest.run();
    let request = guest.expect_request();
    assert_eq!(request.flags, request_flags::WRITE);
    process.map(Iova(DST), page, true);
    guest.respond(&request, Response::Success);
    guest.run();
    assert_eq!(process.status(n), Some(Status::Success));
}

#[test]
fn accessed_and_dirty_bits_tell_what_was_done() {
    let guest = Guest::new();
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 1);
    process.map_fresh(Iova(DST), 1);
    let bits = |addr| process.device_pte(Iova(addr)).0 & (bit::ACCESSED | bit::DIRTY);
    assert_eq!(bits(DST), 0);
    process.go(&guest, op(Opcode::Crc32c, DST, 0, 8));
    assert_eq!(bits(DST), bit::ACCESSED, "read");
    process.go(&guest, copy(SRC, DST, 8));
    assert_eq!(bits(SRC), bit::ACCESSED);
    assert_eq!(
        bits(DST),
        bit::ACCESSED | bit::DIRTY,
        "through a clean entry"
    );
}

#[test]
fn large_leaves_are_used_piece_by_piece() {
    let guest = Guest::new();
    let process = guest.process(1);
    let base = Gpa(16 << 20);
    // A leaf of 2 MiB: one level above the table that `set_device` makes.
    let iova = Iova(0x40_0000_0000);
    let mut table = process.root;
    process.device_leaf(iova);
    for level in [4, 3] {
        let at = Gpa(table.0 + extlb_spec::pte::index(iova, level) * 8);
        table = Pte(guest.load(at)).addr();
    }
    let at = Gpa(table.0 + extlb_spec::pte::index(iova, 2) * 8);
    guest.store(at, base.0 | bit::PRESENT | bit::WRITE | bit::LEAF);
    for i in 0..512 {
        let page = Gpa(base.0 + i * PAGE);
        process.set_cpu(Iova(iova.0 + i * PAGE), Some((page, true)));
    }
    let offset = 0x12_3456;
    guest.ram.write(Gpa(base.0 + offset), b"large").unwrap();
    let crc = process.go(&guest, op(Opcode::Crc32c, iova.0 + offset, 0, 5));
    assert_eq!(crc.result, u64::from(crc32c::crc32c(b"large")));
    assert_eq!(guest.get(regs::ORACLE_SUSPECTS), 0);
}

#[test]
fn contexts_do_not_see_each_other() {
    let guest = Guest::new();
    let (one, two) = (guest.process(1), guest.process(2));
    // The same address, other pages; and one page at two addresses.
    let a = one.map_fresh(Iova(SRC), 1)[0];
    let b = two.map_fresh(Iova(SRC), 1)[0];
    one.map(Iova(DST), a, true);
    for (process, value) in [(&one, 0x11u64), (&two, 0x22)] {
        let fill = Descriptor {
            arg: value,
            ..op(Opcode::Fill, 0, SRC, 8)
        };
        assert_eq!(process.go(&guest, fill).status, Status::Success as u32);
    }
    assert_eq!(guest.bytes(a, 1), [0x11]);
    assert_eq!(guest.bytes(b, 1), [0x22]);
    let alias = one.go(&guest, op(Opcode::Compare, SRC, DST, 4096));
    assert_eq!(alias.status, Status::Success as u32);
    let n = two.submit(op(Opcode::Crc32c, DST, 0, 8));
    two.ring(&guest);
    guest.run();
    assert_eq!(guest.expect_request().context, 2, "not mapped there");
    assert_eq!(two.status(n), Some(Status::Pending));
}

#[test]
fn a_waiting_context_does_not_hold_others_up() {
    let guest = Guest::new();
    let (one, two) = (guest.process(1), guest.process(2));
    let stuck = one.submit(op(Opcode::Crc32c, SRC, 0, 8));
    one.ring(&guest);
    let done = two.go(&guest, Descriptor::default());
    assert_eq!(done.status, Status::Success as u32);
    assert_eq!(one.status(stuck), Some(Status::Pending));
}

#[test]
fn indices_wrap_around() {
    let guest = Guest::new();
    let process = guest.process(1);
    for n in 0..3 * (1 << RING_LOG2) + 1 {
        let done = process.go(&guest, Descriptor::default());
        assert_eq!(done.status, Status::Success as u32, "{n}");
        let head = process.word(offset_of!(ContextShadow, head));
        assert_eq!(head, n + 1);
    }
    // A full ring at once, and the invalidation queue many times around.
    let all: Vec<_> = (0..1 << RING_LOG2)
        .map(|_| process.submit(Descriptor::default()))
        .collect();
    process.ring(&guest);
    guest.run();
    assert!(
        all.iter()
            .all(|n| process.status(*n) == Some(Status::Success))
    );
    for _ in 0..500 {
        let ack = guest.shoot(1, SRC, SRC + PAGE);
        guest.run();
        assert_eq!(guest.ack(), ack);
    }
    assert_eq!(guest.kernel_word(offset_of!(KernelShadow, iq_head)), 1001);
}

#[test]
fn interrupts_and_their_count_come_when_asked_for() {
    let guest = Guest::new();
    let process = guest.process(1);
    process.go(&guest, Descriptor::default());
    assert_eq!(guest.vectors.count(Vector::Completion), 0);
    let asked = Descriptor {
        flags: flags::INTERRUPT,
        ..Default::default()
    };
    process.go(&guest, asked);
    process.go(&guest, asked);
    assert_eq!(guest.vectors.count(Vector::Completion), 2);
    assert_eq!(process.word(offset_of!(ContextShadow, event_seq)), 2);
}

#[test]
fn the_status_is_the_last_thing_written() {
    let guest = Guest::new();
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 1);
    let record = process.records_page;
    let ram = guest.ram.clone();
    guest.memory.hook(move |access| {
        use extlb_device::ports::Dma;
        // Just before the other fields are written: the status is still 0.
        let Access::Write(Gpa(at)) = access else {
            return false;
        };
        assert_eq!(at, record.0 + 4);
        let order = std::sync::atomic::Ordering::SeqCst;
        assert_eq!(ram.load_u32(record, order).unwrap(), 0);
        true
    });
    let done = process.go(&guest, op(Opcode::Crc32c, SRC, 0, 4096));
    assert!(guest.memory.is_done());
    assert_eq!((done.status, done.bytes), (Status::Success as u32, 4096));
}

#[test]
fn a_parked_context_asks_for_a_kick_and_polls_while_it_is_awake() {
    let config = extlb_device::Config {
        poll_us: 100,
        ..config()
    };
    let guest = Guest::with(config);
    let process = guest.process(1);
    let need_kick = || process.word(offset_of!(ContextShadow, need_kick));
    assert_eq!(need_kick(), 1);
    let n = process.submit(Descriptor::default());
    process.ring(&guest);
    while process.status(n) != Some(Status::Success) {
        guest.device.engine_step();
    }
    assert_eq!(need_kick(), 0, "polls");
    let n = process.submit(Descriptor::default());
    for _ in 0..4 {
        guest.device.engine_step();
    }
    assert_eq!(process.status(n), Some(Status::Success), "without a kick");
    guest.clock.advance(std::time::Duration::from_micros(101));
    while guest.device.engine_step() != extlb_device::Step::Idle {}
    assert_eq!(need_kick(), 1, "sleeps");
    assert_eq!(guest.kernel_word(offset_of!(KernelShadow, iq_need_kick)), 1);
}

#[test]
fn a_submission_between_the_last_look_and_the_park_is_seen() {
    let guest = Guest::new();
    let process = guest.process(1);
    // No doorbell: the context is parked by the engine in the same step in which it looks.
    let n = process.submit(Descriptor::default());
    guest.run();
    assert_eq!(
        process.status(n),
        Some(Status::Pending),
        "asleep, not kicked"
    );
    process.ring(&guest);
    guest.run();
    assert_eq!(process.status(n), Some(Status::Success));
}

#[test]
fn a_full_request_ring_loses_nothing() {
    let guest = Guest::new();
    let count = (1 << PRQ_LOG2) + 5;
    let processes: Vec<_> = (0..count).map(|c| guest.process(c)).collect();
    for process in &processes {
        process.submit(op(Opcode::Crc32c, SRC, 0, 8));
        process.ring(&guest);
    }
    guest.run();
    assert_eq!(
        guest.kernel_word(offset_of!(KernelShadow, prq_tail)),
        1 << PRQ_LOG2
    );
    assert_ne!(
        guest.kernel_word(offset_of!(KernelShadow, prq_need_kick)),
        0
    );
    let mut seen = Vec::new();
    while let Some(request) = guest.take_request() {
        seen.push(request.context);
        guest.run();
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..count).collect::<Vec<_>>());
    assert_eq!(
        guest.kernel_word(offset_of!(KernelShadow, prq_need_kick)),
        0
    );
}

#[test]
fn credits_limit_what_waits_at_once() {
    let guest = Guest::new();
    let process = guest.process(1);
    process.write_entry(&guest, |e| e.credits = 1);
    guest.sync(1);
    let n = process.submit(copy(SRC, DST, 8));
    process.ring(&guest);
    guest.run();
    let first = guest.expect_request();
    assert!(guest.take_request().is_none(), "one credit, one request");
    process.map_fresh(Iova(SRC), 1);
    guest.respond(&first, Response::Success);
    guest.run();
    let second = guest.expect_request();
    assert_eq!((first.iova, second.iova), (SRC, DST));
    process.map_fresh(Iova(DST), 1);
    guest.respond(&second, Response::Success);
    guest.run();
    assert_eq!(process.status(n), Some(Status::Success));
}

#[test]
fn stray_responses_are_counted_and_ignored() {
    let guest = Guest::new();
    let process = guest.process(1);
    let n = process.submit(op(Opcode::Crc32c, SRC, 0, 8));
    process.ring(&guest);
    guest.run();
    let request = guest.expect_request();
    let mut other = request;
    other.group ^= 0x55;
    guest.respond(&other, Response::Invalid);
    other = request;
    other.context = 9;
    guest.respond(&other, Response::Invalid);
    guest.run();
    assert_eq!(guest.get(regs::STRAY_RESPONSES), 2);
    assert_eq!(process.status(n), Some(Status::Pending));
    guest.respond(&request, Response::Invalid);
    guest.respond(&request, Response::Invalid);
    guest.run();
    assert_eq!(guest.get(regs::STRAY_RESPONSES), 3, "repeated");
    assert_eq!(process.status(n), Some(Status::PageFault));
    // A late one for an earlier life of the context.
    process.submit(op(Opcode::Crc32c, SRC, 0, 8));
    process.ring(&guest);
    guest.run();
    let late = guest.expect_request();
    process.stop(&guest);
    guest.run();
    process.write_entry(&guest, |_| {});
    guest.sync(1);
    guest.respond(&late, Response::Success);
    guest.run();
    assert_eq!(guest.get(regs::STRAY_RESPONSES), 4);
    assert_eq!(guest.fatal(), 0);
}

#[test]
fn a_failed_response_stops_the_context_only() {
    let guest = Guest::new();
    let (one, two) = (guest.process(1), guest.process(2));
    let n = one.submit(op(Opcode::Crc32c, SRC + 5, 0, 8));
    one.ring(&guest);
    guest.run();
    let request = guest.expect_request();
    guest.respond(&request, Response::Failure);
    guest.run();
    let record = guest.expect_error();
    assert_eq!(record.context, 1);
    assert_eq!(record.code, ContextError::PageRequestFailed as u32);
    assert_eq!(record.iova, SRC + 5);
    assert_eq!(one.error(), ContextError::PageRequestFailed as u32);
    assert_eq!(one.status(n), Some(Status::Pending), "no completion");
    one.ring(&guest);
    guest.run();
    assert!(guest.take_request().is_none(), "told once");
    let done = two.go(&guest, Descriptor::default());
    assert_eq!(done.status, Status::Success as u32);
}

#[test]
fn ring_and_record_are_demand_faulted_too() {
    let guest = Guest::new();
    let process = guest.process(1);
    process.set_device(process.ring, Pte::EMPTY);
    process.set_device(process.records, Pte::EMPTY);
    let n = process.submit(Descriptor::default());
    process.ring(&guest);
    guest.run();
    for (page, write) in [(process.ring, 0), (process.records, request_flags::WRITE)] {
        let request = guest.expect_request();
        assert_eq!((request.iova, request.flags), (page.0, write));
        let gpa = [process.ring_page, process.records_page][usize::from(write != 0)];
        process.set_device(page, Pte::leaf(gpa, true));
        guest.respond(&request, Response::Success);
        guest.run();
    }
    assert_eq!(process.status(n), Some(Status::Success));
    assert_eq!(
        process.completion(n),
        Completion {
            status: 1,
            ..Default::default()
        }
    );
}
