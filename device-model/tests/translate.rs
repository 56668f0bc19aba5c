//! Translation as the device does it: leaves of every size, split and broken page tables, what a
//! walk reads and writes, and the statistics of it.

mod common;
use common::*;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use extlb_device::ContextStats;
use extlb_device::ports::Dma;
use extlb_spec::invalidation::{AuditResult, Command, CommandKind, wait};
use extlb_spec::pte::{self, Pte, bit, leaf_size};
use extlb_spec::regs;
use extlb_spec::work::{Opcode, Status};
use extlb_spec::{Gpa, Iova};

const AT: u64 = 0x5555_0000_0000;
/// Where large leaves point: the upper half of RAM.
const LARGE: Gpa = Gpa(RAM as u64 / 2);

fn load(guest: &Guest, at: Gpa) -> Pte {
    Pte(guest.load(at))
}

fn store(guest: &Guest, at: Gpa, value: Pte) {
    guest.store(at, value.0);
}

/// Where the entry of `level` for an address is; tables above are made.
fn entry(guest: &Guest, process: &Process, iova: u64, level: u32) -> Gpa {
    let mut table = process.root;
    for above in (level + 1..=pte::LEVELS).rev() {
        let at = Gpa(table.0 + pte::index(Iova(iova), above) * 8);
        if !load(guest, at).is_present() {
            store(guest, at, Pte::table(guest.pages.take()));
        }
        table = load(guest, at).addr();
    }
    Gpa(table.0 + pte::index(Iova(iova), level) * 8)
}

fn map(guest: &Guest, process: &Process, iova: u64, level: u32, frame: Gpa) -> Gpa {
    let at = entry(guest, process, iova, level);
    let large = if level > 1 { bit::LEAF } else { 0 };
    store(guest, at, Pte(Pte::leaf(frame, true).0 | large));
    at
}

fn without_walk_cache() -> Guest {
    let mut config = config();
    config.tlb.walk_cache = 0;
    Guest::with(config)
}

fn shoot(guest: &Guest, process: &Process, iova: u64, len: u64) {
    let value = guest.shoot(process.context, iova, iova + len);
    guest.run();
    assert_eq!(guest.ack(), value);
}

fn stats(guest: &Guest, process: &Process) -> ContextStats {
    guest.set(regs::CTX_STAT_SELECT, process.context.into());
    ContextStats {
        tlb_hits: guest.get(regs::CTX_TLB_HITS),
        tlb_misses: guest.get(regs::CTX_TLB_MISSES),
        tlb_walks: guest.get(regs::CTX_WALKS),
        walk_cache_hits: guest.get(regs::CTX_WALK_CACHE_HITS),
        tlb_evictions: guest.get(regs::CTX_TLB_EVICTIONS),
        tlb_shot_down: guest.get(regs::CTX_TLB_SHOT_DOWN),
    }
}

/// Accesses to memory that an operation makes.
fn accesses(guest: &Guest, process: &Process, opcode: Opcode, iova: u64) -> u64 {
    let before = guest.memory.accesses.load(Ordering::SeqCst);
    let done = process.go(guest, op(opcode, iova, iova, 8));
    assert_eq!(done.status, Status::Success as u32);
    guest.memory.accesses.load(Ordering::SeqCst) - before
}

#[test]
fn leaves_of_every_size_are_used_together_and_take_one_entry_each() {
    let guest = Guest::new();
    let process = guest.unwatched(1);
    let small = guest.pages.take();
    map(&guest, &process, AT, 1, small);
    let mid = AT + leaf_size(2);
    map(&guest, &process, mid, 2, LARGE);
    // The 1 GiB leaf shows all of RAM, from address 0.
    let huge = 0x40_0000_0000;
    map(&guest, &process, huge, 3, Gpa(0));
    let text: Vec<u8> = (0..1u32 << 20).map(|i| ((i * 7) >> 3) as u8).collect();
    guest.ram.write(LARGE, &text).unwrap();
    let before = stats(&guest, &process);
    let to = LARGE.0 + leaf_size(2);
    let done = process.go(&guest, copy(mid, huge + to, 1 << 20));
    assert_eq!((done.status, done.bytes), (Status::Success as u32, 1 << 20));
    assert_eq!(guest.bytes(Gpa(to), 1 << 20), text);
    process.go(&guest, copy(mid + 5, AT, 4096));
    assert_eq!(guest.bytes(small, 4096), text[5..5 + 4096]);
    let after = stats(&guest, &process);
    assert_eq!(
        after.tlb_misses - before.tlb_misses,
        5,
        "3 leaves, ring and records"
    );
    assert_eq!(after.tlb_walks, after.tlb_misses);
}

#[test]
fn the_first_use_sets_the_bits_and_no_later_one_does() {
    let guest = without_walk_cache();
    let process = guest.process(1);
    process.map_fresh(Iova(AT), 1);
    let leaf = process.device_leaf(Iova(AT));
    let run = |opcode| accesses(&guest, &process, opcode, AT);
    let forget = || shoot(&guest, &process, AT, PAGE);
    let clean = load(&guest, leaf);
    assert_eq!(clean.0 & (bit::ACCESSED | bit::DIRTY), 0);
    run(Opcode::Fill);
    let hit = run(Opcode::Fill);
    assert_eq!(run(Opcode::Crc32c), hit, "both find the entry");
    forget();
    // Four loads of a walk that finds both bits set, and nothing else.
    assert_eq!(run(Opcode::Fill), hit + 4);
    store(&guest, leaf, clean);
    forget();
    assert_eq!(run(Opcode::Fill), hit + 5, "one swap for both bits");
    let used = clean.0 | bit::ACCESSED | bit::DIRTY;
    assert_eq!(load(&guest, leaf).0, used);
    store(&guest, leaf, clean);
    forget();
    assert_eq!(run(Opcode::Crc32c), hit + 5);
    assert_eq!(load(&guest, leaf).0, clean.0 | bit::ACCESSED);
    assert_eq!(run(Opcode::Crc32c), hit);
    assert_eq!(run(Opcode::Fill), hit + 5, "the entry was not dirty");
    assert_eq!(load(&guest, leaf).0, used);
    assert_eq!(run(Opcode::Fill), hit);
}

#[test]
fn a_walk_that_knows_the_table_reads_one_entry() {
    let guest = Guest::new();
    let process = guest.process(1);
    process.map_fresh(Iova(AT), 3);
    let run = |page: u64| accesses(&guest, &process, Opcode::Crc32c, AT + page * PAGE);
    run(0);
    let hit = run(0);
    assert_eq!(run(1), hit + 2, "the leaf, and its accessed bit");
    assert_eq!(run(1), hit);
    let before = stats(&guest, &process);
    assert_eq!(run(2), hit + 2);
    assert_eq!(
        stats(&guest, &process).walk_cache_hits,
        before.walk_cache_hits + 1
    );
    // An invalidation of one leaf forgets the tables above its neighbours, too: they may go next.
    shoot(&guest, &process, AT, PAGE);
    assert_eq!(run(0), hit + 4);
}

#[test]
fn a_large_leaf_that_was_split_is_gone_with_its_first_page_invalidated() {
    let guest = Guest::new();
    let process = guest.unwatched(1);
    let at = AT + 3 * leaf_size(2);
    let large = map(&guest, &process, at, 2, LARGE);
    let pages = leaf_size(2) / PAGE;
    // Every page by itself: nothing of it may be left.
    for page in 0..pages {
        process.go(&guest, op(Opcode::Crc32c, at + page * PAGE, 0, 8));
    }
    let old = LARGE.0;
    let new = LARGE.0 + leaf_size(2);
    let mark = |frame: u64, page: u64, tag: u8| {
        guest
            .ram
            .write(Gpa(frame + page * PAGE), &[tag; 8])
            .unwrap();
    };
    let table = guest.pages.take();
    let absent = 300;
    for page in 0..pages {
        mark(old, page, 0xee);
        mark(new, page, page as u8);
        let leaf = Pte::leaf(Gpa(new + page * PAGE), true);
        let value = if page == absent { Pte::EMPTY } else { leaf };
        store(&guest, Gpa(table.0 + page * 8), value);
    }
    store(&guest, large, Pte::table(table));
    shoot(&guest, &process, at + 17 * PAGE, PAGE);
    let to = guest.pages.take();
    map(&guest, &process, AT, 1, to);
    for page in (0..pages).filter(|page| *page != absent) {
        process.go(&guest, copy(at + page * PAGE, AT, 8));
        assert_eq!(guest.bytes(to, 8), [page as u8; 8], "page {page}");
    }
    let n = process.submit(op(Opcode::Fill, 0, at + absent * PAGE, 8));
    process.ring(&guest);
    guest.run();
    assert_eq!(process.status(n), Some(Status::Pending));
    assert_eq!(guest.expect_request().iova, at + absent * PAGE);
    assert_eq!(guest.bytes(Gpa(old + absent * PAGE), 8), [0xee; 8]);
}

#[test]
fn broken_page_tables_of_every_kind_are_bus_errors() {
    let beyond = Gpa(1 << 40);
    let table = |at: Gpa, more: u64| Pte(Pte::table(at).0 | more);
    let leaf = |at: Gpa, more: u64| Pte(Pte::leaf(at, true).0 | more);
    let page = Gpa(0x20_0000);
    for (what, level, value) in [
        ("reserved bit of a small leaf", 1, leaf(page, bit::LEAF)),
        ("another", 1, leaf(page, 1 << 63)),
        ("of a table's entry", 2, table(page, bit::ACCESSED)),
        ("another", 3, table(page, bit::DIRTY)),
        ("another", 4, table(page, 1 << 8)),
        ("no leaf of that size", 4, leaf(Gpa(0), bit::LEAF)),
        ("misaligned 2 MiB", 2, leaf(Gpa(LARGE.0 + PAGE), bit::LEAF)),
        ("misaligned 1 GiB", 3, leaf(LARGE, bit::LEAF)),
        ("a leaf outside RAM", 1, leaf(beyond, 0)),
        ("a large leaf outside RAM", 2, leaf(beyond, bit::LEAF)),
        ("a table outside RAM", 2, table(beyond, 0)),
        ("another", 3, table(beyond, 0)),
        ("another", 4, table(beyond, 0)),
    ] {
        let guest = Guest::new();
        let process = guest.process(1);
        let at = entry(&guest, &process, AT, level);
        store(&guest, at, value);
        let done = process.go(&guest, op(Opcode::Crc32c, AT, 0, 8));
        assert_eq!(done.status, Status::BusError as u32, "{what}");
        assert_eq!(done.fault_addr, AT, "{what}");
        // The context goes on.
        let good = 0x1234_5000;
        process.map_fresh(Iova(good), 1);
        let done = process.go(&guest, op(Opcode::Crc32c, good, 0, 8));
        assert_eq!(done.status, Status::Success as u32, "{what}");
    }
}

#[test]
fn a_page_table_that_points_at_itself_ends_after_four_levels() {
    let guest = without_walk_cache();
    let process = guest.unwatched(1);
    let slot = 77;
    let at = Gpa(process.root.0 + slot * 8);
    store(&guest, at, Pte::table(process.root));
    let loops: u64 = (1..=4).map(|level| slot * leaf_size(level)).sum();
    process.map_fresh(Iova(AT), 1);
    process.go(&guest, op(Opcode::Crc32c, AT, 0, 8));
    let hit = accesses(&guest, &process, Opcode::Crc32c, AT);
    // At level 1 the entry is a leaf: of the root itself, and read-only.
    assert_eq!(accesses(&guest, &process, Opcode::Crc32c, loops), hit + 5);
    // Now it has the accessed bit, which is reserved in an entry of a table.
    shoot(&guest, &process, loops, PAGE);
    let done = process.go(&guest, op(Opcode::Crc32c, loops, 0, 8));
    assert_eq!(done.status, Status::BusError as u32);
}

/// Software that changes the leaf each time the device has looked at it cannot hold a guard for
/// ever, and a leaf that it took out is not used.
#[test]
fn a_leaf_that_never_stays_the_same_becomes_a_page_request() {
    let guest = without_walk_cache();
    let process = guest.unwatched(1);
    let frames = process.map_fresh(Iova(AT), 1)[0];
    let other = guest.pages.take();
    let leaf = process.device_leaf(Iova(AT));
    let ram = guest.ram.clone();
    let swaps = Arc::new(AtomicU64::new(0));
    let counted = swaps.clone();
    let mut now = false;
    guest.memory.hook(move |access| {
        match access {
            Access::Loaded(at) if at == leaf => {
                now = !now;
                let next = Pte::leaf(if now { other } else { frames }, true);
                ram.store_u64(at, next.0, Ordering::SeqCst).unwrap();
            }
            Access::Store(at) if at == leaf => {
                counted.fetch_add(1, Ordering::SeqCst);
            }
            _ => {}
        }
        false
    });
    process.submit(op(Opcode::Fill, 0, AT, 8));
    process.ring(&guest);
    guest.run();
    assert_eq!(swaps.load(Ordering::SeqCst), 64, "tries of one walk");
    let request = guest.take_request().expect("a request");
    assert_eq!(request.iova, AT);
    let bits = load(&guest, leaf).0 & (bit::ACCESSED | bit::DIRTY);
    assert_eq!(bits, 0, "nothing was used");
    assert_eq!(guest.bytes(frames, 8), guest.bytes(other, 8));
}

#[test]
fn statistics_are_told_for_each_context() {
    let mut config = config();
    (config.tlb.sets, config.tlb.ways) = (1, 4);
    let guest = Guest::with(config);
    let (one, two) = (guest.process(1), guest.process(2));
    one.map_fresh(Iova(AT), 8);
    two.map_fresh(Iova(AT), 1);
    let idle = stats(&guest, &two);
    for page in 0..8 {
        one.go(&guest, op(Opcode::Crc32c, AT + page * PAGE, 0, 8));
    }
    let first = stats(&guest, &one);
    // Ring and records stay: they are used each time. Two ways are left for the pages.
    assert_eq!((first.tlb_misses, first.tlb_walks), (10, 10));
    assert_eq!(first.tlb_evictions, 6);
    assert_eq!(first.tlb_hits, 14);
    assert_eq!(
        first.walk_cache_hits, 8,
        "not for the first page, nor the ring's"
    );
    assert_eq!(stats(&guest, &two), idle, "of another context");
    let n = one.submit(op(Opcode::Crc32c, AT + 100 * PAGE, 0, 8));
    one.ring(&guest);
    guest.run();
    assert_eq!(one.status(n), Some(Status::Pending));
    let missed = stats(&guest, &one);
    assert_eq!(missed.tlb_misses, first.tlb_misses + 1);
    assert_eq!(missed.tlb_walks, first.tlb_walks, "it found nothing");
    shoot(&guest, &one, AT, 8 * PAGE);
    assert_eq!(stats(&guest, &one).tlb_shot_down, 2, "as many as were left");
    two.go(&guest, op(Opcode::Crc32c, AT, 0, 8));
    guest.post(Command {
        kind: CommandKind::Invalidate as u32,
        flags: extlb_spec::invalidation::InvalidationScope::All as u32,
        ..Default::default()
    });
    guest.post_wait(wait::DRAINED);
    guest.run();
    let shot = [&one, &two].map(|p| stats(&guest, p).tlb_shot_down);
    assert_eq!(shot.iter().sum::<u64>(), guest.get(regs::TLB_SHOT_DOWN));
    assert!(shot[0] > 0 && shot[1] > 0, "{shot:?}");
    guest.set(regs::CTRL, regs::ctrl::RESET.into());
    assert_eq!(stats(&guest, &one), ContextStats::default());
    assert!(
        guest.device.totals().tlb_misses >= missed.tlb_misses,
        "across resets"
    );
}

#[test]
fn an_audit_looks_at_every_page_of_a_large_entry() {
    let guest = Guest::new();
    let process = guest.process(1);
    map(&guest, &process, AT, 2, LARGE);
    let pages = leaf_size(2) / PAGE;
    for page in 0..pages {
        let frame = Gpa(LARGE.0 + page * PAGE);
        process.set_cpu(Iova(AT + page * PAGE), Some((frame, true)));
    }
    process.go(&guest, op(Opcode::Fill, 0, AT + 5 * PAGE, 8));
    let result = guest.pages.take();
    let audit = || {
        guest.post(Command {
            kind: CommandKind::Audit as u32,
            context: 1,
            addr: result.0,
            ..Default::default()
        });
        guest.run();
        AuditResult::from_bytes(&guest.bytes(result, 64).try_into().unwrap())
    };
    let clean = audit();
    // In the TLB and in the page table: ring, records and the large leaf.
    assert_eq!((clean.checked, clean.mismatches), (2 * (pages + 2), 0));
    let last = AT + (pages - 1) * PAGE;
    process.set_cpu(Iova(last), None);
    let dirty = audit();
    assert_eq!((dirty.mismatches, dirty.iova), (2, last));
    assert_eq!(dirty.device_gpa, LARGE.0 + (pages - 1) * PAGE);
    // Of several the first is told.
    let first = AT + 9 * PAGE;
    process.set_cpu(Iova(first), None);
    let dirtier = audit();
    assert_eq!((dirtier.mismatches, dirtier.iova), (4, first));
    assert_eq!(guest.get(regs::ORACLE_STALE), 0);
}
