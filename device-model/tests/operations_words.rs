//! Fetch-add and compare-swap, fence, batch, and what is quiet.

mod common;
use common::*;

use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, Ordering};

use extlb_device::ports::Dma;
use extlb_spec::context::{ContextError, ContextShadow};
use extlb_spec::page_request::{Response, flags as request_flags};
use extlb_spec::pte::{Pte, bit};
use extlb_spec::work::{Descriptor, MAX_BATCH, Opcode, Status, fault, flags};
use extlb_spec::{Gpa, Iova, Vector, regs};

const DST: u64 = 0x5555_1000_0000;
/// Where arrays of descriptors are.
const ARRAY: u64 = 0x5555_2000_0000;

fn fetch_add(dst: u64, arg: u64) -> Descriptor {
    Descriptor {
        arg,
        ..op(Opcode::FetchAdd, 0, dst, 8)
    }
}

fn compare_swap(dst: u64, expected: u64, new: u64) -> Descriptor {
    Descriptor {
        arg: expected,
        ..op(Opcode::CompareSwap, new, dst, 8)
    }
}

#[test]
fn words_are_changed_and_the_old_value_comes_back() {
    let guest = Guest::new();
    let process = guest.process(1);
    let page = process.map_fresh(Iova(DST), 1)[0];
    let word = Gpa(page.0 + 4088);
    guest.store(word, u64::MAX);
    let done = process.go(&guest, fetch_add(DST + 4088, 3));
    assert_eq!(status(&done), Status::Success);
    assert_eq!((done.result, done.bytes), (u64::MAX, 8));
    assert_eq!(guest.load(word), 2, "modulo 2^64");
    let missed = process.go(&guest, compare_swap(DST + 4088, 3, 9));
    assert_eq!((status(&missed), missed.result), (Status::Success, 2));
    assert_eq!(guest.load(word), 2);
    let hit = process.go(&guest, compare_swap(DST + 4088, 2, 9));
    assert_eq!((status(&hit), hit.result), (Status::Success, 2));
    assert_eq!(guest.load(word), 9);
    let dirty = process.device_pte(Iova(DST)).0 & bit::DIRTY;
    assert_eq!(dirty, bit::DIRTY);
}

#[test]
fn a_swap_that_writes_nothing_needs_a_writable_page_and_makes_it_dirty() {
    let guest = Guest::new();
    let process = guest.process(1);
    let page = process.map_fresh(Iova(DST), 1)[0];
    process.map(Iova(DST), page, false);
    let n = process.submit(compare_swap(DST, 1, 2));
    process.ring(&guest);
    guest.run();
    let request = guest.expect_request();
    assert_eq!(request.flags, request_flags::WRITE);
    process.map(Iova(DST), page, true);
    guest.respond(&request, Response::Success);
    guest.run();
    assert_eq!(process.status(n), Some(Status::Success));
    assert_eq!(process.completion(n).result, 0);
    assert_eq!(guest.load(page), 0, "it was not 1");
    assert_ne!(process.device_pte(Iova(DST)).0 & bit::DIRTY, 0);
}

#[test]
fn words_that_make_no_sense_are_refused() {
    let guest = Guest::new();
    let process = guest.process(1);
    process.map_fresh(Iova(DST), 1);
    let with = |len| Descriptor {
        len,
        ..fetch_add(DST, 1)
    };
    let list = Descriptor {
        flags: flags::DST_LIST,
        ..fetch_add(DST, 1)
    };
    for (bad, want, at) in [
        (fetch_add(DST + 4, 1), Status::Misaligned, DST + 4),
        (compare_swap(DST + 1, 0, 1), Status::Misaligned, DST + 1),
        (fetch_add(1 << 48, 1), Status::BadAddress, 1 << 48),
        (compare_swap(u64::MAX, 0, 1), Status::BadAddress, u64::MAX),
        (with(4), Status::BadLength, 0),
        (with(0), Status::BadLength, 0),
        (with(16), Status::BadLength, 0),
        (list, Status::BadDescriptor, 0),
    ] {
        let done = process.go(&guest, bad);
        assert_eq!((status(&done), done.fault_addr), (want, at), "{bad:?}");
        assert_eq!(done.bytes, 0);
    }
    let page = process.map_fresh(Iova(DST), 1)[0];
    assert_eq!(guest.load(page), 0);
}

#[test]
fn an_add_happens_once_whatever_it_waits_for() {
    let guest = Guest::new();
    let process = guest.process(1);
    let page = process.map_fresh(Iova(DST), 1)[0];
    process.set_device(Iova(DST), Pte::EMPTY);
    process.set_device(process.records, Pte::EMPTY);
    let n = process.submit(fetch_add(DST, 5));
    process.ring(&guest);
    guest.run();
    assert_eq!(guest.load(page), 0, "waits for its page");
    let first = guest.expect_request();
    // The response comes, and the page is still not there: it asks again.
    guest.respond(&first, Response::Success);
    guest.run();
    let second = guest.expect_request();
    assert_eq!((second.iova, guest.load(page)), (DST, 0));
    process.map(Iova(DST), page, true);
    guest.respond(&second, Response::Success);
    guest.run();
    // Now it is done, and waits for the page of its record; that too is asked for twice.
    for again in [true, false] {
        assert_eq!(guest.load(page), 5);
        let request = guest.expect_request();
        assert_eq!(request.iova, process.records.0);
        if !again {
            process.set_device(process.records, Pte::leaf(process.records_page, true));
        }
        let shot = guest.shoot(1, DST, DST + PAGE);
        guest.respond(&request, Response::Success);
        guest.run();
        assert_eq!(guest.ack(), shot);
    }
    let done = process.completion(n);
    assert_eq!((status(&done), done.result), (Status::Success, 0));
    assert_eq!(guest.load(page), 5);
}

#[test]
fn a_refused_word_is_untouched() {
    let guest = Guest::new();
    let process = guest.process(1);
    let n = process.submit(fetch_add(DST + 8, 5));
    process.ring(&guest);
    guest.run();
    let request = guest.expect_request();
    guest.respond(&request, Response::Invalid);
    guest.run();
    let done = process.completion(n);
    assert_eq!(status(&done), Status::PageFault);
    assert_eq!((done.fault_addr, done.fault), (DST + 8, fault::WRITE));
    assert_eq!(done.bytes, 0);
}

#[test]
fn adds_are_atomic_against_the_processors() {
    let guest = Guest::new();
    let process = guest.process(1);
    let page = process.map_fresh(Iova(DST), 1)[0];
    let (stop, ram) = (AtomicBool::new(false), guest.ram.clone());
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let mut count = 0u64;
            while !stop.load(Ordering::Relaxed) {
                ram.fetch_add_u64(page, 1 << 32).unwrap();
                count += 1;
            }
            count
        });
        let mut swapped = 0;
        for _ in 0..500 {
            process.go(&guest, fetch_add(DST, 1));
            let seen = guest.load(page);
            let swap = process.go(&guest, compare_swap(DST, seen, seen + 1));
            swapped += u64::from(swap.result == seen);
        }
        stop.store(true, Ordering::Relaxed);
        let count = other.join().unwrap();
        let sum = guest.load(page);
        assert_eq!((sum >> 32, sum as u32 as u64), (count, 500 + swapped));
    });
}

#[test]
fn nothing_comes_between_the_load_and_the_store_of_a_word() {
    let guest = Guest::new();
    let process = guest.process(1);
    let page = process.map_fresh(Iova(DST), 1)[0];
    // If the device loaded the word by itself, a processor could change it just then.
    guest.memory.hook(move |access| {
        assert_ne!(access, Access::Loaded(page), "by itself");
        false
    });
    for n in 0..3 {
        assert_eq!(process.go(&guest, fetch_add(DST, 1)).result, n);
    }
    assert_eq!(process.go(&guest, compare_swap(DST, 3, 7)).result, 3);
    assert_eq!(guest.load(page), 7);
}

fn fence() -> Descriptor {
    op(Opcode::Fence, 0, 0, 0)
}

fn bad() -> Descriptor {
    Descriptor {
        opcode: 99,
        ..Default::default()
    }
}

fn quiet(descriptor: Descriptor) -> Descriptor {
    Descriptor {
        flags: descriptor.flags | flags::QUIET,
        ..descriptor
    }
}

#[test]
fn a_fence_counts_what_did_not_succeed_since_the_last() {
    let guest = Guest::new();
    let process = guest.process(1);
    process.map_fresh(Iova(DST), 2);
    let done = process.go(&guest, fence());
    assert_eq!((status(&done), done.result), (Status::Success, 0));
    process.go(&guest, quiet(fetch_add(DST, 1)));
    process.go(&guest, bad());
    // A difference is no success either.
    process.go(&guest, op(Opcode::Compare, DST, DST + PAGE, 8));
    let done = process.go(&guest, fence());
    assert_eq!((status(&done), done.result), (Status::EarlierFailed, 2));
    let done = process.go(&guest, fence());
    assert_eq!(
        (status(&done), done.result),
        (Status::Success, 0),
        "told once"
    );
    let refused = process.go(&guest, op(Opcode::Fence, 0, 0, u64::MAX));
    assert_eq!(status(&refused), Status::BadLength);
    let done = process.go(&guest, fence());
    assert_eq!((status(&done), done.result), (Status::EarlierFailed, 1));
    // A context that starts again has no past.
    process.go(&guest, bad());
    process.stop(&guest);
    guest.run();
    process.write_entry(&guest, |_| {});
    process.restart();
    guest.sync(1);
    guest.run();
    assert_eq!(process.go(&guest, fence()).result, 0);
}

#[test]
fn quiet_operations_tell_of_failures_only() {
    let guest = Guest::new();
    let process = guest.process(1);
    let page = process.map_fresh(Iova(DST), 1)[0];
    // Not even the page of the record is needed.
    process.set_device(process.records, Pte::EMPTY);
    let n = process.submit(Descriptor {
        flags: flags::QUIET | flags::INTERRUPT,
        ..fetch_add(DST, 1)
    });
    process.ring(&guest);
    guest.run();
    assert_eq!(guest.load(page), 1);
    assert_eq!(process.status(n), Some(Status::Pending));
    assert_eq!(process.word(offset_of!(ContextShadow, head)), 1);
    assert_eq!(process.word(offset_of!(ContextShadow, event_seq)), 1);
    assert_eq!(guest.vectors.count(Vector::Completion), 1);
    assert!(guest.take_request().is_none());
    process.set_device(process.records, Pte::leaf(process.records_page, true));
    let done = process.go(&guest, quiet(fetch_add(DST + 1, 1)));
    assert_eq!(status(&done), Status::Misaligned);
}

/// Puts descriptors at [`ARRAY`], over pages that are mapped as needed; their records are numbered
/// from 64 on.
fn array(guest: &Guest, process: &Process, descriptors: &[Descriptor]) -> Vec<Gpa> {
    let pages = process.map_fresh(Iova(ARRAY), (descriptors.len() as u64).div_ceil(64).max(1));
    for (i, descriptor) in descriptors.iter().enumerate() {
        let mut descriptor = *descriptor;
        if descriptor.completion == 0 {
            descriptor.completion = process.record(64 + i as u64 % 64).0;
        }
        let at = Gpa(pages[i / 64].0 + i as u64 % 64 * 64);
        guest.ram.write(at, &descriptor.to_bytes()).unwrap();
    }
    pages
}

fn batch(len: u64) -> Descriptor {
    op(Opcode::Batch, ARRAY, 0, len)
}

#[test]
fn a_batch_runs_its_descriptors_in_order() {
    let guest = Guest::new();
    let process = guest.process(1);
    let page = process.map_fresh(Iova(DST), 1)[0];
    let asks = Descriptor {
        flags: flags::INTERRUPT,
        ..fetch_add(DST, 1)
    };
    let members = [
        fetch_add(DST, 10),
        bad(),
        asks,
        quiet(fetch_add(DST, 100)),
        batch(1),
        fetch_add(DST, 1000),
    ];
    array(&guest, &process, &members);
    let before = process.submit(fetch_add(DST, 7));
    let n = process.submit(batch(6));
    let after = process.submit(fetch_add(DST, 0));
    process.ring(&guest);
    guest.run();
    let done = process.completion(n);
    assert_eq!(status(&done), Status::Success);
    assert_eq!((done.bytes, done.result), (6, 2));
    let member = |i: u64| process.completion(64 + i);
    let results = [0, 2, 5].map(|i| member(i).result);
    assert_eq!(
        (process.completion(before).result, results),
        (0, [7, 17, 118])
    );
    assert_eq!(status(&member(1)), Status::BadDescriptor);
    assert_eq!(member(3).status, 0, "quiet");
    assert_eq!(status(&member(4)), Status::NestedBatch);
    assert_eq!(process.completion(after).result, 1118);
    assert_eq!(guest.load(page), 1118);
    assert_eq!(guest.vectors.count(Vector::Completion), 1);
    assert_eq!(process.word(offset_of!(ContextShadow, head)), 3);
    // Two members failed.
    assert_eq!(process.go(&guest, fence()).result, 2);
    let done = process.go(&guest, batch(0));
    assert_eq!((status(&done), done.bytes), (Status::Success, 0));
}

#[test]
fn a_batch_may_be_long_and_its_array_is_demand_faulted() {
    let guest = Guest::new();
    let process = guest.process(1);
    let page = process.map_fresh(Iova(DST), 1)[0];
    let members = vec![quiet(fetch_add(DST, 1)); MAX_BATCH as usize];
    let pages = array(&guest, &process, &members);
    process.set_device(Iova(ARRAY + PAGE), Pte::EMPTY);
    let n = process.submit(batch(MAX_BATCH));
    let fence = process.submit(fence());
    process.ring(&guest);
    guest.run();
    assert_eq!(guest.load(page), 64, "up to the page that is missing");
    let request = guest.expect_request();
    assert_eq!((request.iova, request.flags), (ARRAY + PAGE, 0));
    process.map(Iova(ARRAY + PAGE), pages[1], true);
    guest.respond(&request, Response::Success);
    guest.run();
    let done = process.completion(n);
    assert_eq!((status(&done), done.bytes), (Status::Success, MAX_BATCH));
    assert_eq!(guest.load(page), MAX_BATCH);
    assert_eq!(process.status(fence), Some(Status::Success));
}

#[test]
fn an_array_that_cannot_be_read_is_a_fault_of_the_batch_not_of_the_context() {
    for response in [Some(Response::Invalid), None] {
        let guest = Guest::new();
        let process = guest.process(1);
        process.map_fresh(Iova(DST), 1);
        array(&guest, &process, &vec![quiet(fetch_add(DST, 1)); 128]);
        let second = match response {
            Some(_) => Pte::EMPTY,
            // Outside RAM.
            None => Pte::leaf(Gpa(1 << 40), true),
        };
        process.set_device(Iova(ARRAY + PAGE), second);
        let n = process.submit(batch(100));
        process.ring(&guest);
        guest.run();
        if let Some(response) = response {
            let request = guest.expect_request();
            guest.respond(&request, response);
            guest.run();
        }
        let done = process.completion(n);
        let want = match response {
            Some(_) => Status::PageFault,
            None => Status::BusError,
        };
        assert_eq!((status(&done), done.fault), (want, 0));
        assert_eq!((done.fault_addr, done.bytes), (ARRAY + PAGE, 64));
        // It goes on from there.
        process.map_fresh(Iova(ARRAY + PAGE), 1);
        let ack = guest.shoot(1, ARRAY, ARRAY + 2 * PAGE);
        guest.run();
        assert_eq!(guest.ack(), ack);
        assert_eq!(process.go(&guest, fence()).result, 1);
        assert_eq!(process.error(), 0);
    }
}

#[test]
fn batches_that_make_no_sense_are_refused() {
    let guest = Guest::new();
    let process = guest.process(1);
    let at = |src, len| op(Opcode::Batch, src, 0, len);
    let segments = Descriptor {
        src_segments: 1,
        ..batch(1)
    };
    let list = Descriptor {
        flags: flags::SRC_LIST,
        ..batch(1)
    };
    for (bad, want) in [
        (batch(MAX_BATCH + 1), Status::BadLength),
        (at(ARRAY + 32, 1), Status::Misaligned),
        (at((1 << 48) - 64, 2), Status::BadAddress),
        (at(u64::MAX - 63, 1), Status::BadAddress),
        (segments, Status::BadDescriptor),
        (list, Status::BadDescriptor),
    ] {
        let done = process.go(&guest, bad);
        assert_eq!((status(&done), done.bytes), (want, 0), "{bad:?}");
    }
    assert_eq!(process.error(), 0);
}

#[test]
fn a_fence_that_fails_ends_its_batch() {
    let guest = Guest::new();
    let process = guest.process(1);
    let page = process.map_fresh(Iova(DST), 1)[0];
    let members = [
        fetch_add(DST, 1),
        fence(),
        bad(),
        fetch_add(DST, 10),
        fence(),
        fetch_add(DST, 100),
    ];
    array(&guest, &process, &members);
    let done = process.go(&guest, batch(6));
    assert_eq!(status(&done), Status::EarlierFailed);
    assert_eq!((done.bytes, done.result), (5, 2));
    assert_eq!(guest.load(page), 11);
    assert_eq!(process.completion(69).status, 0, "not begun");
    // The batch itself did not succeed; its fence has told the rest.
    assert_eq!(process.go(&guest, fence()).result, 1);
}

#[test]
fn a_member_without_a_place_for_its_record_stops_the_context() {
    let guest = Guest::new();
    let process = guest.process(1);
    let member = Descriptor {
        completion: ARRAY + 8,
        ..Default::default()
    };
    array(&guest, &process, &[member]);
    let n = process.submit(batch(1));
    process.ring(&guest);
    guest.run();
    let record = guest.expect_error();
    assert_eq!(record.code, ContextError::CompletionFault as u32);
    assert_eq!(process.status(n), Some(Status::Pending));
    assert_eq!(guest.fatal(), 0);
    let other = guest.process(2);
    assert_eq!(status(&other.go(&guest, fence())), Status::Success);
}

#[test]
fn a_context_that_is_stopped_in_a_batch_starts_clean() {
    let guest = Guest::new();
    let process = guest.process(1);
    let page = process.map_fresh(Iova(DST), 1)[0];
    let missing = DST + PAGE;
    let members = [fetch_add(DST, 1), fetch_add(missing, 1), fetch_add(DST, 1)];
    array(&guest, &process, &members);
    process.submit(batch(3));
    process.ring(&guest);
    guest.run();
    assert_eq!(guest.expect_request().iova, missing);
    process.stop(&guest);
    guest.run();
    process.write_entry(&guest, |_| {});
    process.restart();
    guest.sync(1);
    guest.run();
    let done = process.go(&guest, fetch_add(DST, 0));
    assert_eq!((status(&done), done.result), (Status::Success, 1));
    assert_eq!(guest.load(page), 1);
    assert_eq!(guest.get(regs::STRAY_RESPONSES), 0);
}
