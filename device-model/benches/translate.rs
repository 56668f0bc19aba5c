//! What a translation costs: TLB hits by policy, misses with and without the walk cache,
//! invalidations; beside the software TLB of vm-memory, in the same run.
//!
//! `cargo bench -p extlb-device --bench translate`
//!
//! Measures the device's own files, as a library's benchmark could not see inside.
#![allow(dead_code, missing_docs)] // the files have more than is measured; criterion's macros

#[path = "../src/sync.rs"]
mod sync;

mod config {
    pub(crate) use extlb_device::config::{Geometry, Policy, TlbConfig};
}

#[path = "../tests/stand_ins/state.rs"]
mod state;

mod ports {
    pub(crate) use extlb_device::ports::{BusError, Dma};
}

mod rig;

#[path = "../src/guard.rs"]
mod guard;
#[path = "../src/tlb/mod.rs"]
mod tlb;
#[path = "../src/walk.rs"]
mod walk;

use std::hint::black_box;
use std::sync::atomic::Ordering;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use extlb_device::GuestRam;
use extlb_device::ports::Dma;
use extlb_spec::pte::{self, Pte, bit, leaf_size};
use extlb_spec::{Gpa, Iova, PAGE_SIZE};
use vm_memory::iommu::Iotlb;
use vm_memory::{GuestAddress, Permissions};

use config::{Policy, TlbConfig};
use tlb::{Leaf, Lookup, Scope, Table, Tables, Tlb};

const AT: u64 = 0x5555_0000_0000;
/// Pages in use: half of what the TLB holds.
const PAGES: u64 = 512;
const CONTEXT: u32 = 7;

fn config(policy: Policy) -> TlbConfig {
    TlbConfig {
        policy,
        ..TlbConfig::default()
    }
}

fn page(n: u64) -> Iova {
    Iova(AT + n % PAGES * PAGE_SIZE)
}

fn leaf(iova: Iova, level: u32) -> Leaf {
    Leaf {
        frame: Gpa(iova.0 & ((1 << 36) - 1) & !(leaf_size(level) - 1)),
        level,
        writable: true,
        dirty: true,
    }
}

fn insert(tlb: &Tlb, context: u32, iova: Iova, level: u32) {
    if let Lookup::Miss(ticket) = tlb.lookup(context, iova, true) {
        tlb.insert(&ticket, leaf(iova, level), &Tables::default());
    }
}

/// A TLB with all pages cached.
fn filled(policy: Policy) -> Tlb {
    let tlb = Tlb::new(&config(policy));
    for n in 0..PAGES {
        insert(&tlb, CONTEXT, page(n), 1);
    }
    tlb
}

fn iotlb() -> Iotlb {
    let mut iotlb = Iotlb::new();
    for n in 0..PAGES {
        map(&mut iotlb, n);
    }
    iotlb
}

fn map(iotlb: &mut Iotlb, n: u64) {
    let at = GuestAddress(page(n).0);
    // Every other way round: neighbours must not merge to one range.
    let to = GuestAddress((PAGES - n % PAGES) * PAGE_SIZE);
    let mapped = iotlb.set_mapping(at, to, PAGE_SIZE as usize, Permissions::ReadWrite);
    mapped.expect("mapped");
}

/// Pages in an order that a prefetcher does not guess: the step has no factor in common with
/// their number.
fn next(n: &mut u64) -> Iova {
    *n = n.wrapping_add(197);
    page(*n)
}

/// Measures `f` by the time of the processor: what others do on the machine does not count.
fn timed_iter<R>(b: &mut criterion::Bencher<'_>, mut f: impl FnMut() -> R) {
    b.iter_custom(|count| {
        rig::timed(|| {
            for _ in 0..count {
                black_box(f());
            }
        })
    });
}

fn hits(c: &mut Criterion) {
    let mut group = c.benchmark_group("hit");
    group.throughput(Throughput::Elements(1));
    for policy in [Policy::Lru, Policy::Plru, Policy::Fifo, Policy::Random] {
        let tlb = filled(policy);
        let mut n = 0;
        group.bench_function(format!("{policy:?}").to_lowercase(), |b| {
            timed_iter(b, || {
                let Lookup::Hit(entry) = tlb.lookup(CONTEXT, next(&mut n), true) else {
                    panic!("a miss");
                };
                black_box(entry.leaf.frame)
            });
        });
    }
    let tlb = Tlb::new(&config(Policy::Lru));
    for n in 0..PAGES {
        insert(&tlb, CONTEXT, Iova(AT + n % 64 * leaf_size(2)), 2);
    }
    let mut n = 0;
    group.bench_function("lru, 2 MiB", |b| {
        timed_iter(b, || {
            n += 1;
            let iova = Iova(AT + n % 64 * leaf_size(2) + n % PAGES * PAGE_SIZE);
            let Lookup::Hit(entry) = tlb.lookup(CONTEXT, iova, true) else {
                panic!("a miss");
            };
            black_box(entry.leaf.frame)
        });
    });
    let tlb = filled(Policy::Lru);
    let guards = guard::Guards::new();
    let mut lane = guards.lane().expect("free");
    let mut n = 0;
    group.bench_function("lru, in a guard of its own", |b| {
        timed_iter(b, || {
            let _guard = lane.enter();
            black_box(matches!(
                tlb.lookup(CONTEXT, next(&mut n), true),
                Lookup::Hit(_)
            ))
        });
    });
    let iotlb = iotlb();
    let mut n = 0;
    group.bench_function("vm-memory's Iotlb", |b| {
        timed_iter(b, || {
            let at = GuestAddress(next(&mut n).0);
            let mut found = Iotlb::lookup(&iotlb, at, 64, Permissions::ReadWrite).expect("mapped");
            black_box(found.next().map(|range| range.base))
        });
    });
    group.finish();
}

/// RAM with a page table that maps all pages; the root.
fn page_table() -> (GuestRam, Gpa) {
    let ram = GuestRam::anonymous(&[(Gpa(0), 4 << 20)]).expect("RAM");
    let root = Gpa(PAGE_SIZE);
    let mut free = root.0 + PAGE_SIZE;
    for n in 0..PAGES {
        let mut table = root;
        for level in (2..=pte::LEVELS).rev() {
            let at = Gpa(table.0 + pte::index(page(n), level) * 8);
            let mut entry = Pte(ram.load_u64(at, Ordering::Relaxed).expect("in RAM"));
            if !entry.is_present() {
                entry = Pte::table(Gpa(free));
                free += PAGE_SIZE;
                ram.store_u64(at, entry.0, Ordering::Relaxed)
                    .expect("in RAM");
            }
            table = entry.addr();
        }
        let at = Gpa(table.0 + pte::index(page(n), 1) * 8);
        let used = Pte::leaf(Gpa((n + 256) * PAGE_SIZE), true).0 | bit::ACCESSED | bit::DIRTY;
        ram.store_u64(at, used, Ordering::Relaxed).expect("in RAM");
    }
    (ram, root)
}

/// Lookup, walk, insert, by the files of the device.
fn miss(tlb: &Tlb, ram: &GuestRam, root: Gpa, iova: Iova) -> Gpa {
    let Lookup::Miss(ticket) = tlb.lookup(CONTEXT, iova, true) else {
        panic!("a hit");
    };
    let root = Table {
        level: pte::LEVELS,
        at: root,
    };
    let from = tlb.table(&ticket).unwrap_or(root);
    let (leaf, tables) = walk::walk(ram, from, iova, true).expect("mapped");
    tlb.insert(&ticket, leaf, &tables);
    leaf.frame
}

fn misses(c: &mut Criterion) {
    let (ram, root) = page_table();
    let mut group = c.benchmark_group("miss and walk");
    group.throughput(Throughput::Elements(1));
    for (name, walk_cache) in [("walk cache", 64), ("no walk cache", 0)] {
        // One entry, and never the page that is asked for.
        let tlb = Tlb::new(&TlbConfig {
            sets: 1,
            ways: 1,
            walk_cache,
            ..config(Policy::Lru)
        });
        let mut n = 0;
        group.bench_function(name, |b| {
            timed_iter(b, || black_box(miss(&tlb, &ram, root, next(&mut n))));
        });
    }
    let mut iotlb = Iotlb::new();
    let mut n = 0;
    group.bench_function("vm-memory's Iotlb, no walk", |b| {
        timed_iter(b, || {
            let at = GuestAddress(next(&mut n).0);
            assert!(Iotlb::lookup(&iotlb, at, 64, Permissions::Read).is_err());
            map(&mut iotlb, n);
            iotlb.invalidate_mapping(at, PAGE_SIZE as usize);
        });
    });
    group.finish();
}

fn invalidations(c: &mut Criterion) {
    let mut group = c.benchmark_group("invalidate");
    group.throughput(Throughput::Elements(1));
    let bytes = PAGES * PAGE_SIZE;
    let page = |n: u64| Scope::Range(CONTEXT, page(n).0..page(n).0 + PAGE_SIZE);
    let range = |_| Scope::Range(CONTEXT, AT..AT + bytes);
    let scopes: [(&str, &dyn Fn(u64) -> Scope); 3] = [
        ("page", &page),
        ("range of 512 pages", &range),
        ("context", &|_| Scope::Context(CONTEXT)),
    ];
    for (name, scope) in scopes {
        let mut n = 0;
        group.bench_function(name, |b| {
            b.iter_batched_ref(
                || {
                    n += 1;
                    (filled(Policy::Lru), scope(n))
                },
                |(tlb, scope)| tlb.remove(scope, |_| {}).entries,
                BatchSize::LargeInput,
            );
        });
    }
    let mut n = 0;
    group.bench_function("page, vm-memory's Iotlb", |b| {
        b.iter_batched_ref(
            || {
                n += 1;
                (iotlb(), GuestAddress(self::page(n).0))
            },
            |(iotlb, at)| iotlb.invalidate_mapping(*at, PAGE_SIZE as usize),
            BatchSize::LargeInput,
        );
    });
    group.bench_function("all, vm-memory's Iotlb", |b| {
        b.iter_batched_ref(iotlb, Iotlb::invalidate_all, BatchSize::LargeInput);
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30);
    targets = hits, misses, invalidations
}
criterion_main!(benches);
