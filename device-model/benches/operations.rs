//! Throughput of operations in process, with one engine that this thread steps:
//! `cargo bench -p extlb-device --bench operations`.
//!
//! Times are of the processor, and of the device alone: descriptors are written before the clock runs. Copies are
//! to be compared with plain ones (memcpy).

mod rig;

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use extlb_device::Config;
use extlb_spec::work::{Descriptor, Opcode, flags};
use extlb_spec::{Gpa, PAGE_SIZE};
use rig::{RING, Rig, config, timed};

const SRC: u64 = 0x1000_0000_0000;
const DST: u64 = 0x2000_0000_0000;
const LEAF: u64 = 2 << 20;

fn op(opcode: Opcode, src: u64, dst: u64, len: u64) -> Descriptor {
    Descriptor {
        opcode: opcode as u8,
        src,
        dst,
        len,
        ..Default::default()
    }
}

const LEN: u64 = 16 * LEAF;

/// Copies of 32 MiB, which no second-level cache holds.
fn copies(c: &mut Criterion) {
    plain(c);
    // The default, and what drains would have to wait longer for.
    for chunk in [32 << 10, 64 << 10, 256 << 10, 2 << 20] {
        let mut config = config();
        config.schedule.chunk = chunk;
        config.schedule.quantum = config.schedule.quantum.max(chunk);
        by_device(c, &format!("chunks of {} KiB", chunk >> 10), config);
    }
    // Each page that is scattered misses the TLB by default.
    let mut config = config();
    config.tlb.sets = 8192;
    by_device(c, "a TLB that covers all", config);
}

/// What the processor does by itself: 2 MiB at a time, and pages in disorder.
fn plain(c: &mut Criterion) {
    let mut group = c.benchmark_group("copy of 32 MiB by memcpy");
    group.throughput(Throughput::Bytes(LEN));
    group.sample_size(20);
    let src = vec![1u8; LEN as usize];
    let mut dst = vec![2u8; LEN as usize];
    let mut bench = |name: &str, piece: usize, step: usize| {
        let pieces = LEN as usize / piece;
        group.bench_function(name, |b| {
            b.iter_custom(|count| {
                timed(|| {
                    for i in 0..count as usize * pieces {
                        let from = i * step % pieces * piece;
                        let to = (i + 7) * step % pieces * piece;
                        let from = &std::hint::black_box(&src)[from..from + piece];
                        dst[to..to + piece].copy_from_slice(from);
                    }
                })
            });
        });
    };
    bench("in one piece", LEN as usize, 1);
    bench("2 MiB at a time", LEAF as usize, 1);
    bench("scattered 4 KiB pages", PAGE_SIZE as usize, 4099);
}

fn by_device(c: &mut Criterion, name: &str, config: Config) {
    let mut rig = Rig::new(config, 256 << 20);
    let mut program = rig.program(1);
    let (src, dst) = (rig.pages(LEN, LEAF), rig.pages(LEN, LEAF));
    for i in 0..LEN / LEAF {
        rig.map(&program, SRC + i * LEAF, Gpa(src.0 + i * LEAF), 2);
        rig.map(&program, DST + i * LEAF, Gpa(dst.0 + i * LEAF), 2);
    }
    // The same memory once more, its pages in disorder.
    const SCATTERED: u64 = 1 << 40;
    let pages = LEN / PAGE_SIZE;
    let place = |i: u64| (i * 4099 % pages) * PAGE_SIZE;
    for i in 0..pages {
        let at = SCATTERED + i * PAGE_SIZE;
        rig.map(&program, SRC + at, Gpa(src.0 + place(i)), 1);
        rig.map(&program, DST + at, Gpa(dst.0 + place(i + 7)), 1);
    }
    let mut group = c.benchmark_group(format!("copy of 32 MiB, {name}"));
    group.throughput(Throughput::Bytes(LEN));
    group.sample_size(20);
    let mut bench = |name: &str, descriptor: Descriptor| {
        group.bench_function(name, |b| {
            b.iter_custom(|count| {
                let mut time = Duration::ZERO;
                for _ in 0..count {
                    rig.submit(&mut program, 1, |_| descriptor);
                    time += rig.finish(&program);
                }
                time
            });
        });
    };
    bench("leaves of 2 MiB", op(Opcode::Copy, SRC, DST, LEN));
    let scattered = op(Opcode::Copy, SRC + SCATTERED, DST + SCATTERED, LEN);
    bench("scattered 4 KiB pages", scattered);
    bench("CRC32C, leaves of 2 MiB", op(Opcode::Crc32c, SRC, 0, LEN));
}

/// Operations of no or of few bytes, a ring full at a time.
fn small(c: &mut Criterion) {
    let mut rig = Rig::new(config(), 64 << 20);
    let mut program = rig.program(1);
    const PAGES: u64 = 64;
    for i in 0..PAGES {
        let (a, b) = (rig.page(), rig.page());
        rig.map(&program, SRC + i * PAGE_SIZE, a, 1);
        rig.map(&program, DST + i * PAGE_SIZE, b, 1);
    }
    let mut group = c.benchmark_group("operations");
    group.throughput(Throughput::Elements(RING.into()));
    let at = |i: u32| u64::from(i) * 4032 % (PAGES * PAGE_SIZE - 64);
    let copy = move |i: u32| op(Opcode::Copy, SRC + at(i), DST + at(i) / 64 * 64, 64);
    let quiet = move |i: u32| Descriptor {
        flags: if (i + 1).is_multiple_of(RING) {
            0
        } else {
            flags::QUIET
        },
        ..copy(i)
    };
    let add = move |i: u32| op(Opcode::FetchAdd, 0, DST + at(i) / 8 * 8, 8);
    let crc = move |i: u32| op(Opcode::Crc32c, SRC + at(i), 0, 64);
    type Next<'a> = &'a dyn Fn(u32) -> Descriptor;
    let kinds: [(&str, Next<'_>); 5] = [
        ("nop", &|_| Descriptor::default()),
        ("copy of 64 bytes", &copy),
        ("copy of 64 bytes, quiet", &quiet),
        ("fetch-add", &add),
        ("CRC32C of 64 bytes", &crc),
    ];
    for (name, next) in kinds {
        group.bench_function(name, |b| {
            b.iter_custom(|count| {
                let mut time = Duration::ZERO;
                for _ in 0..count {
                    rig.submit(&mut program, RING, next);
                    time += rig.finish(&program);
                }
                time
            });
        });
    }
}

criterion_group!(benches, copies, small);
criterion_main!(benches);
