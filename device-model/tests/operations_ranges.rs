//! Copy, fill, CRC32C and compare on ranges that overlap, on lists, and on large leaves.

mod common;
use common::*;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use extlb_device::Device;
use extlb_device::ports::Dma;
use extlb_spec::page_request::{Response, flags as request_flags};
use extlb_spec::pte::{self, Pte, bit};
use extlb_spec::work::{Descriptor, MAX_SEGMENTS, Opcode, Segment, Status, fault, flags};
use extlb_spec::{Gpa, Iova, regs};
use proptest::prelude::*;

const SRC: u64 = 0x5555_0000_0000;
const DST: u64 = 0x5555_1000_0000;
const LISTS: u64 = 0x5555_2000_0000;
const PAGES: u64 = 5;
const SIZE: usize = (PAGES * PAGE) as usize;

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed | 1 << 63;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    };
    (0..len).map(|_| next()).collect()
}

fn put(guest: &Guest, pages: &[Gpa], data: &[u8]) {
    for (page, bytes) in pages.iter().zip(data.chunks(PAGE as usize)) {
        guest.ram.write(*page, bytes).unwrap();
    }
}

fn get(guest: &Guest, pages: &[Gpa]) -> Vec<u8> {
    let bytes = |page: &Gpa| guest.bytes(*page, PAGE as usize);
    pages.iter().flat_map(bytes).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn an_overlapping_copy_is_a_memmove(
        src in 0usize..2 * 4096, shift in -4200i64..4200, len in 0usize..8000,
    ) {
        let dst = (src as i64 + shift).max(0) as usize;
        let guest = Guest::new();
        let process = guest.process(1);
        let pages = process.map_fresh(Iova(SRC), PAGES);
        let mut want = noise(SIZE, 1);
        put(&guest, &pages, &want);
        let done = process.go(&guest, copy(SRC + src as u64, SRC + dst as u64, len as u64));
        prop_assert_eq!((status(&done), done.bytes), (Status::Success, len as u64));
        want.copy_within(src..src + len, dst);
        prop_assert!(get(&guest, &pages) == want, "{} {} {}", src, dst, len);
    }

    /// Wherever it stops, what the completion says is true, and it can go on from there.
    #[test]
    fn an_overlapping_copy_that_faults_can_go_on(
        src in 0usize..4096, shift in 1usize..9000, len in 1usize..7000, missing in 0..PAGES,
    ) {
        let dst = src + shift;
        let guest = Guest::new();
        let process = guest.process(1);
        let pages = process.map_fresh(Iova(SRC), PAGES);
        let before = noise(SIZE, 2);
        put(&guest, &pages, &before);
        process.set_device(Iova(SRC + missing * PAGE), Pte::EMPTY);
        let whole = copy(SRC + src as u64, SRC + dst as u64, len as u64);
        let n = process.submit(whole);
        process.ring(&guest);
        guest.run();
        let mut wrote = 0;
        if let Some(request) = guest.take_request() {
            prop_assert_eq!(request.iova, SRC + missing * PAGE);
            guest.respond(&request, Response::Invalid);
            guest.run();
            let done = process.completion(n);
            prop_assert_eq!(status(&done), Status::PageFault);
            let down = shift < len;
            prop_assert_eq!(done.fault & fault::FROM_END != 0, down);
            prop_assert_eq!(done.fault_addr & !0xfff, SRC + missing * PAGE);
            wrote = done.bytes as usize;
            let mut partly = before.clone();
            let done_part = match down {
                true => len - wrote..len,
                false => 0..wrote,
            };
            let from = &before[src..src + len][done_part.clone()];
            partly[dst..dst + len][done_part].copy_from_slice(from);
            prop_assert!(get(&guest, &pages) == partly, "all said to be done, and no more");
            process.map(Iova(SRC + missing * PAGE), pages[missing as usize], true);
            let rest = match down {
                true => copy(whole.src, whole.dst, whole.len - done.bytes),
                false => copy(whole.src + done.bytes, whole.dst + done.bytes, whole.len - done.bytes),
            };
            let done = process.go(&guest, rest);
            prop_assert_eq!(status(&done), Status::Success);
        }
        let mut want = before;
        want.copy_within(src..src + len, dst);
        prop_assert!(get(&guest, &pages) == want, "after {} of {} bytes", wrote, len);
    }

    #[test]
    fn lists_are_used_piece_by_piece(
        cuts in proptest::collection::vec(0usize..6000, 0..6),
        others in proptest::collection::vec(0usize..6000, 0..6),
        lists in 1u8..4,
    ) {
        let guest = Guest::new();
        let process = guest.process(1);
        let src = process.map_fresh(Iova(SRC), 2 * PAGES);
        let dst = process.map_fresh(Iova(DST), 2 * PAGES);
        process.map_fresh(Iova(LISTS), 2);
        let (a, b) = (noise(2 * SIZE, 3), noise(2 * SIZE, 4));
        put(&guest, &src, &a);
        put(&guest, &dst, &b);
        const LEN: usize = 6000;
        // Pieces of LEN bytes in all, laid out in reverse with gaps of 7 bytes.
        let pieces = |base: u64, cuts: &[usize]| -> Vec<Segment> {
            let mut at: Vec<usize> = cuts.to_vec();
            at.extend([0, LEN]);
            at.sort_unstable();
            let mut place = base + 100;
            let mut pieces: Vec<_> = at.windows(2).rev().map(|pair| {
                let len = (pair[1] - pair[0]) as u64;
                let segment = Segment { addr: place, len };
                place += len + 7;
                segment
            }).collect();
            pieces.reverse();
            pieces
        };
        let (src_list, dst_list) = (lists & 1 != 0, lists & 2 != 0);
        let plain = |base| vec![Segment { addr: base, len: LEN as u64 }];
        let from = if src_list { pieces(SRC, &cuts) } else { plain(SRC) };
        let to = if dst_list { pieces(DST, &others) } else { plain(DST) };
        write_list(&process, LISTS, &from);
        write_list(&process, LISTS + PAGE, &to);
        let with = |opcode: Opcode| {
            let uses_src = src_list && opcode != Opcode::Fill;
            let uses_dst = dst_list && opcode != Opcode::Crc32c;
            let flag = |used, flag| if used { flag } else { 0 };
            Descriptor {
                flags: flag(uses_src, flags::SRC_LIST) | flag(uses_dst, flags::DST_LIST),
                src_segments: if uses_src { from.len() as u32 } else { 0 },
                dst_segments: if uses_dst { to.len() as u32 } else { 0 },
                ..op(
                    opcode,
                    if uses_src { LISTS } else { SRC },
                    if uses_dst { LISTS + PAGE } else { DST },
                    LEN as u64,
                )
            }
        };
        let gather = |data: &[u8], base: u64, list: &[Segment]| -> Vec<u8> {
            list.iter().flat_map(|s| {
                let at = (s.addr - base) as usize;
                data[at..at + s.len as usize].to_vec()
            }).collect()
        };
        let scatter = |data: &mut [u8], list: &[Segment], bytes: &[u8]| {
            let mut bytes = bytes;
            for segment in list {
                let (now, rest) = bytes.split_at(segment.len as usize);
                let at = (segment.addr - DST) as usize;
                data[at..at + now.len()].copy_from_slice(now);
                bytes = rest;
            }
        };
        let crc = process.go(&guest, with(Opcode::Crc32c));
        prop_assert_eq!(status(&crc), Status::Success);
        let gathered = gather(&a, SRC, &from);
        prop_assert_eq!(crc.result, u64::from(crc32c::crc32c(&gathered)));

        let mut want = b;
        let copied = process.go(&guest, with(Opcode::Copy));
        prop_assert_eq!((status(&copied), copied.bytes), (Status::Success, LEN as u64));
        scatter(&mut want, &to, &gathered);
        prop_assert!(get(&guest, &dst) == want);

        let same = process.go(&guest, with(Opcode::Compare));
        prop_assert_eq!(status(&same), Status::Success);

        let arg = 0x0807_0605_0403_0201;
        let filled = process.go(&guest, Descriptor { arg, ..with(Opcode::Fill) });
        prop_assert_eq!(status(&filled), Status::Success);
        let pattern: Vec<u8> = arg.to_le_bytes().into_iter().cycle().take(LEN).collect();
        scatter(&mut want, &to, &pattern);
        prop_assert!(get(&guest, &dst) == want);

        let differs = process.go(&guest, with(Opcode::Compare));
        let first = (0..LEN).find(|i| gathered[*i] != pattern[*i]).expect("noise");
        prop_assert_eq!((status(&differs), differs.result), (Status::Mismatch, first as u64));
        prop_assert!(get(&guest, &src) == a, "the source is as it was");
    }
}

fn write_list(process: &Process, at: u64, segments: &[Segment]) {
    for (i, segment) in segments.iter().enumerate() {
        process.poke(Iova(at + i as u64 * 16), &segment.to_bytes());
    }
}

fn from_list(segments: u32, len: u64) -> Descriptor {
    Descriptor {
        flags: flags::SRC_LIST,
        src_segments: segments,
        ..copy(LISTS, DST, len)
    }
}

#[test]
fn lists_that_do_not_fit_are_refused() {
    let guest = Guest::new();
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 1);
    process.map_fresh(Iova(DST), 1);
    process.map_fresh(Iova(LISTS), 1);
    let segment = |addr, len| Segment { addr, len };
    write_list(
        &process,
        LISTS,
        &[
            segment(SRC, 10),
            segment(SRC, 0),
            segment(SRC, 6),
            segment(1 << 48, 4),
        ],
    );
    let second = LISTS + 32;
    for (bad, want, at, bytes) in [
        (from_list(3, 17), Status::BadSegments, LISTS + 48, 16),
        (from_list(3, 15), Status::BadSegments, second, 10),
        (from_list(3, 10), Status::BadSegments, second, 10),
        (from_list(2, 9), Status::BadSegments, LISTS, 0),
        (from_list(0, 1), Status::BadSegments, LISTS, 0),
        (
            from_list(MAX_SEGMENTS + 1, 16),
            Status::BadSegments,
            LISTS,
            0,
        ),
        (from_list(u32::MAX, 16), Status::BadSegments, LISTS, 0),
        (from_list(4, 20), Status::BadAddress, 1 << 48, 16),
    ] {
        let done = process.go(&guest, bad);
        let found = (status(&done), done.fault_addr, done.bytes);
        assert_eq!(found, (want, at, bytes), "{bad:?}");
    }
    let at = |src| Descriptor {
        src,
        ..from_list(1, 16)
    };
    let descriptor = |flags, src_segments, opcode| Descriptor {
        flags,
        src_segments,
        ..op(opcode, LISTS, DST, 16)
    };
    for (bad, want) in [
        (at(LISTS + 8), Status::Misaligned),
        (at((1 << 48) - 8), Status::BadAddress),
        (at(u64::MAX - 15), Status::BadAddress),
        (descriptor(0, 1, Opcode::Copy), Status::BadDescriptor),
        (
            descriptor(flags::DST_LIST, 1, Opcode::Copy),
            Status::BadDescriptor,
        ),
        (
            descriptor(flags::SRC_LIST, 1, Opcode::Fill),
            Status::BadDescriptor,
        ),
        (
            descriptor(flags::DST_LIST, 0, Opcode::Crc32c),
            Status::BadDescriptor,
        ),
        (
            descriptor(flags::SRC_LIST, 1, Opcode::Nop),
            Status::BadDescriptor,
        ),
        (
            descriptor(flags::SRC_LIST, 1, Opcode::Fence),
            Status::BadDescriptor,
        ),
    ] {
        let done = process.go(&guest, bad);
        assert_eq!((status(&done), done.bytes), (want, 0), "{bad:?}");
    }
    let fits = process.go(&guest, from_list(3, 16));
    assert_eq!(status(&fits), Status::Success);
    let nothing = process.go(&guest, from_list(0, 0));
    assert_eq!(status(&nothing), Status::Success);
    assert_eq!(process.error(), 0);
}

#[test]
fn a_list_of_nothing_is_read_to_its_end_step_by_step() {
    let guest = Guest::new();
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 1);
    process.map_fresh(Iova(DST), 1);
    let pages = process.map_fresh(Iova(LISTS), u64::from(MAX_SEGMENTS) * 16 / PAGE);
    let last = Segment { addr: SRC, len: 8 };
    write_list(&process, LISTS + u64::from(MAX_SEGMENTS - 1) * 16, &[last]);
    let done = process.go(&guest, from_list(MAX_SEGMENTS, 8));
    assert_eq!((status(&done), done.bytes), (Status::Success, 8));
    let done = process.go(&guest, from_list(MAX_SEGMENTS, 0));
    assert_eq!(status(&done), Status::BadSegments, "8 bytes are too many");
    // The list is demand-faulted, and a list that is not there is a fault of the operation.
    for response in [Response::Success, Response::Invalid] {
        process.set_device(Iova(LISTS + 5 * PAGE), Pte::EMPTY);
        let ack = guest.shoot(1, LISTS, LISTS + 16 * PAGE);
        guest.run();
        assert_eq!(guest.ack(), ack);
        let n = process.submit(from_list(MAX_SEGMENTS, 8));
        process.ring(&guest);
        guest.run();
        let request = guest.expect_request();
        assert_eq!((request.iova, request.flags), (LISTS + 5 * PAGE, 0));
        if response == Response::Success {
            process.map(Iova(LISTS + 5 * PAGE), pages[5], true);
        }
        guest.respond(&request, response);
        guest.run();
        let done = process.completion(n);
        match response {
            Response::Success => assert_eq!(status(&done), Status::Success),
            _ => {
                assert_eq!(status(&done), Status::PageFault);
                assert_eq!((done.fault_addr, done.fault), (LISTS + 5 * PAGE, 0));
            }
        }
    }
    assert_eq!(process.error(), 0);
}

#[test]
fn a_crc_goes_on_after_a_fault() {
    let guest = Guest::new();
    let process = guest.process(1);
    let pages = process.map_fresh(Iova(SRC), PAGES);
    let data = noise(SIZE, 5);
    put(&guest, &pages, &data);
    process.set_device(Iova(SRC + 2 * PAGE), Pte::EMPTY);
    let n = process.submit(op(Opcode::Crc32c, SRC + 9, 0, SIZE as u64 - 9));
    process.ring(&guest);
    guest.run();
    let request = guest.expect_request();
    assert_eq!(request.flags & request_flags::WRITE, 0);
    guest.respond(&request, Response::Invalid);
    guest.run();
    let part = process.completion(n);
    assert_eq!(
        (status(&part), part.bytes),
        (Status::PageFault, 2 * PAGE - 9)
    );
    process.map(Iova(SRC + 2 * PAGE), pages[2], true);
    let rest = Descriptor {
        arg: part.result,
        ..op(
            Opcode::Crc32c,
            SRC + 9 + part.bytes,
            0,
            SIZE as u64 - 9 - part.bytes,
        )
    };
    let done = process.go(&guest, rest);
    assert_eq!(done.result, u64::from(crc32c::crc32c(&data[9..])));
}

/// A leaf of 2 MiB at `iova`; the context is not watched by the oracle, so that it is used as one.
fn large(guest: &Guest, process: &Process, iova: u64, base: Gpa) {
    process.device_leaf(Iova(iova));
    let mut table = process.root;
    for level in [4, 3] {
        let at = Gpa(table.0 + pte::index(Iova(iova), level) * 8);
        table = Pte(guest.ram.load_u64(at, Ordering::SeqCst).unwrap()).addr();
    }
    let at = Gpa(table.0 + pte::index(Iova(iova), 2) * 8);
    let leaf = base.0 | bit::PRESENT | bit::WRITE | bit::LEAF;
    guest.ram.store_u64(at, leaf, Ordering::SeqCst).unwrap();
}

const LEAF: u64 = 2 << 20;
const A: u64 = 0x40_0000_0000;
const B: u64 = 0x41_0000_0000;

#[test]
fn large_leaves_are_moved_in_chunks_and_exactly() {
    let guest = Guest::new();
    let process = guest.unwatched(1);
    let (a, b) = (Gpa(16 << 20), Gpa(18 << 20));
    large(&guest, &process, A, a);
    large(&guest, &process, B, b);
    let data = noise(LEAF as usize, 6);
    guest.ram.write(a, &data).unwrap();
    let copies = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let seen = copies.clone();
    guest.memory.hook(move |access| {
        if matches!(access, Access::Copy(..)) {
            seen.fetch_add(1, Ordering::SeqCst);
        }
        false
    });
    let len = LEAF - 4099;
    let done = process.go(&guest, copy(A + 3, B + 4096, len));
    assert_eq!((status(&done), done.bytes), (Status::Success, len));
    assert!(guest.bytes(Gpa(b.0 + 4096), len as usize) == data[3..3 + len as usize]);
    assert_eq!(guest.bytes(b, 4096), vec![0; 4096]);
    let copies = copies.load(Ordering::SeqCst);
    assert!(
        (LEAF / (64 << 10)..2 * LEAF / (64 << 10)).contains(&copies),
        "{copies}"
    );
    let crc = process.go(&guest, op(Opcode::Crc32c, A + 1, 0, LEAF - 1));
    assert_eq!(crc.result, u64::from(crc32c::crc32c(&data[1..])));
    let same = process.go(&guest, op(Opcode::Compare, A + 3, B + 4096, len));
    assert_eq!(status(&same), Status::Success);
    guest
        .ram
        .write(Gpa(b.0 + 4096 + 1_234_567), &[!data[1_234_570]])
        .unwrap();
    let differs = process.go(&guest, op(Opcode::Compare, A + 3, B + 4096, len));
    assert_eq!(
        (status(&differs), differs.result),
        (Status::Mismatch, 1_234_567)
    );
    let fill = Descriptor {
        arg: 0x0807_0605_0403_0201,
        ..op(Opcode::Fill, 0, B + 5, LEAF - 5)
    };
    assert_eq!(status(&process.go(&guest, fill)), Status::Success);
    let filled = guest.bytes(b, LEAF as usize);
    let mut rest = filled[5..].iter().enumerate();
    assert!(rest.all(|(i, byte)| *byte == (i % 8 + 1) as u8));
}

#[test]
fn where_ram_ends_in_a_leaf_is_found_to_the_page() {
    // RAM ends in the middle of the leaf: all before is done, and the page is named.
    let guest = Guest::new();
    let process = guest.unwatched(1);
    large(&guest, &process, A, Gpa(16 << 20));
    large(&guest, &process, B, Gpa(RAM as u64 - LEAF));
    large(&guest, &process, B + LEAF, Gpa(RAM as u64));
    let data = noise(LEAF as usize, 7);
    guest.ram.write(Gpa(16 << 20), &data).unwrap();
    let done = process.go(&guest, copy(A, B + LEAF / 2, LEAF));
    assert_eq!((status(&done), done.bytes), (Status::BusError, LEAF / 2));
    assert_eq!(done.fault_addr, B + LEAF);
    let half = guest.bytes(Gpa(RAM as u64 - LEAF / 2), LEAF as usize / 2);
    assert!(half == data[..LEAF as usize / 2]);
    assert_eq!(guest.get(regs::BUS_ERRORS), 1);
    for opcode in [Opcode::Crc32c, Opcode::Fill, Opcode::Compare] {
        let done = process.go(&guest, op(opcode, B + LEAF / 2, B + LEAF / 2, LEAF));
        assert_eq!((status(&done), done.bytes), (Status::BusError, LEAF / 2));
        assert_eq!(done.fault_addr, B + LEAF, "{opcode:?}");
    }
}

#[test]
fn where_ram_ends_is_found_to_the_page_in_the_midst_of_a_leaf() {
    let end = RAM as u64 - LEAF + 300 * PAGE;
    let guest = Guest::over(&[(Gpa(0), end as usize)], |ports| {
        Arc::new(Device::new(config(), ports).unwrap())
    });
    guest.device.set_bus_master(true);
    guest.enable();
    let process = guest.process(1);
    process.write_entry(&guest, |e| e.flags &= !extlb_spec::context::flags::ORACLE);
    guest.sync(1);
    large(&guest, &process, A, Gpa(16 << 20));
    large(&guest, &process, B, Gpa(RAM as u64 - LEAF));
    for (opcode, src, dst) in [
        (Opcode::Copy, A, B),
        (Opcode::Copy, B, A),
        (Opcode::Crc32c, B, 0),
        (Opcode::Fill, 0, B),
        (Opcode::Compare, B, B),
    ] {
        let done = process.go(&guest, op(opcode, src, dst, LEAF));
        let found = (status(&done), done.bytes, done.fault_addr);
        let there = 300 * PAGE;
        assert_eq!(found, (Status::BusError, there, B + there), "{opcode:?}");
    }
}

#[test]
fn a_leaf_over_two_pieces_of_ram_is_moved_all_the_same() {
    let first = (24 << 20) + 5 * PAGE;
    let rest = RAM as u64 - first;
    let ram = [(Gpa(0), first as usize), (Gpa(first), rest as usize)];
    let guest = Guest::over(&ram, |ports| {
        Arc::new(Device::new(config(), ports).unwrap())
    });
    guest.device.set_bus_master(true);
    guest.enable();
    let process = guest.process(1);
    process.write_entry(&guest, |e| e.flags &= !extlb_spec::context::flags::ORACLE);
    guest.sync(1);
    guest.run();
    large(&guest, &process, A, Gpa(16 << 20));
    large(&guest, &process, B, Gpa(24 << 20));
    let data = noise(LEAF as usize, 8);
    guest.ram.write(Gpa(16 << 20), &data).unwrap();
    let done = process.go(&guest, copy(A + 1, B + 2, LEAF - 2));
    assert_eq!((status(&done), done.bytes), (Status::Success, LEAF - 2));
    let crc = process.go(&guest, op(Opcode::Crc32c, B + 2, 0, LEAF - 2));
    assert_eq!(
        crc.result,
        u64::from(crc32c::crc32c(&data[1..LEAF as usize - 1]))
    );
    assert_eq!(guest.get(regs::BUS_ERRORS), 0);
}
