//! Every operation against the CPU's result, on a device in this process.

use std::time::Duration;

use extlb_driver::inprocess::{InProcess, MachineConfig};
use extlb_driver::{Context, Device, Error, Mapping, Options, Sharing};
use proptest::prelude::*;

fn device() -> Device<InProcess> {
    Device::open(InProcess::new(MachineConfig::default()).unwrap()).unwrap()
}

fn context(device: &Device<InProcess>, ring_log2: u32) -> Context<InProcess> {
    device
        .context(Options {
            ring_log2,
            ..Options::default()
        })
        .unwrap()
}

/// Bytes that differ from place to place and from seed to seed.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    (0..len).map(|_| next()).collect()
}

const MAX: usize = 40_000;

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Any offsets and lengths: what is meant is done, and nothing beside it.
    #[test]
    fn operations_agree_with_the_cpu(
        src_at in 0..5000usize,
        dst_at in 0..5000usize,
        len in 0..MAX,
        seed: u64,
        pattern: u64,
        crc: u32,
        flip in proptest::option::of(0..MAX),
    ) {
        let device = device();
        let context = context(&device, 4);
        let queue = context.queue();
        let buffer = |at: usize, seed| {
            let mut all = context.allocate(at + len + 3000).unwrap();
            all.copy_from_slice(&noise(at + len + 3000, seed));
            let (before, rest) = all.split_at(at);
            let (middle, after) = rest.split_at(len);
            (before, middle, after)
        };
        let (s0, src, s1) = buffer(src_at, seed);
        let (d0, dst, d1) = buffer(dst_at, seed ^ 0x5555);
        let (around, source) = (d0.to_vec(), src.to_vec());
        let behind = d1.to_vec();

        let ((), (src, mut dst)) = queue.copy(src, dst).unwrap().finish().unwrap();
        prop_assert_eq!(&dst[..], &source[..]);
        prop_assert_eq!(&src[..], &source[..]);

        let (sum, src) = queue.crc32c(src, crc).unwrap().finish().unwrap();
        prop_assert_eq!(sum, crc32c::crc32c_append(crc, &source));

        if let Some(byte) = flip.filter(|byte| *byte < len) {
            dst[byte] ^= 0x10;
        }
        let (difference, (src, dst)) = queue.compare(src, dst).unwrap().finish().unwrap();
        prop_assert_eq!(difference, flip.filter(|byte| *byte < len).map(|byte| byte as u64));

        let ((), dst) = queue.fill(dst, pattern).unwrap().finish().unwrap();
        let filled = pattern.to_le_bytes().into_iter().cycle();
        prop_assert!(dst.iter().copied().eq(filled.take(len)));

        prop_assert_eq!(&d0[..], &around[..]);
        prop_assert_eq!(&d1[..], &behind[..]);
        prop_assert_eq!(&src[..], &source[..]);
        drop((s0, s1));
        prop_assert_eq!(device.backing().stale_accesses(), 0);
    }
}

#[test]
fn a_batch_is_done_in_order_and_wraps_the_ring() {
    let device = device();
    let context = context(&device, 3);
    let queue = context.queue();
    let all = context.allocate(64 * 100).unwrap();
    // 64 operations through a ring of 8: the batch is longer than the ring.
    let batch = queue.batch();
    let pending: Vec<_> = all
        .chunks(100)
        .enumerate()
        .map(|(n, piece)| batch.fill(piece, u64::from_le_bytes([n as u8; 8])).unwrap())
        .collect();
    batch.submit_all();
    for (n, pending) in pending.into_iter().enumerate() {
        let ((), piece) = pending.finish().unwrap();
        assert!(piece.iter().all(|byte| *byte == n as u8), "piece {n}");
    }
    assert_eq!(queue.in_flight(), 0);
}

#[test]
fn indices_go_round_many_times() {
    let device = device();
    let context = context(&device, 1);
    for _ in 0..5000 {
        context.queue().nop().unwrap().wait().unwrap();
    }
    assert_eq!(context.stats().unwrap().ops_completed, 5000);
}

#[test]
fn an_operation_of_an_open_batch_can_be_waited_for() {
    let device = device();
    let context = context(&device, 4);
    let batch = context.queue().batch();
    let first = batch.nop().unwrap();
    let second = batch.nop().unwrap();
    second.wait().unwrap();
    first.wait().unwrap();
}

#[test]
fn a_full_ring_is_said_or_waited_for() {
    let device = device();
    let context = context(&device, 2);
    let queue = context.queue();
    // Written and not submitted: the ring stays full for certain.
    let batch = queue.batch();
    let pending: Vec<_> = (0..4).map(|_| batch.nop().unwrap()).collect();
    let buffer = context.allocate(10).unwrap();
    let refused = queue.try_submit().fill(buffer, 1).unwrap_err();
    assert_eq!(refused.error, Error::RingFull);
    // The buffer came back, and waiting for room submits what is written.
    let ((), buffer) = queue
        .fill(refused.buffers, 0x0303_0303_0303_0303)
        .unwrap()
        .finish()
        .unwrap();
    assert_eq!(buffer[..], [3; 10]);
    for pending in pending {
        assert!(pending.is_done().unwrap());
        pending.wait().unwrap();
    }
}

#[test]
fn shared_slices_are_read_by_program_and_device_at_once() {
    let device = device();
    let context = context(&device, 6);
    let queue = context.queue();
    let mut src = context.allocate(100_000).unwrap();
    src.copy_from_slice(&noise(100_000, 3));
    let src = src.freeze();
    let pending: Vec<_> = (0..10)
        .map(|n| {
            let dst = context.allocate(90_000).unwrap();
            (
                n,
                queue
                    .copy(src.slice(n * 100..n * 100 + 90_000), dst)
                    .unwrap(),
            )
        })
        .collect();
    let bytes = src.as_bytes().unwrap();
    assert_eq!(bytes, noise(100_000, 3));
    for (n, pending) in pending {
        let ((), (_, dst)) = pending.finish().unwrap();
        assert_eq!(dst[..], bytes[n * 100..n * 100 + 90_000]);
    }
    let mut back = [0; 70];
    src.read_at(5, &mut back);
    assert_eq!(back, src.as_bytes().unwrap()[5..75]);

    let clone = src.clone();
    let src = src.thaw().unwrap_err();
    drop(clone);
    let mut src = src.thaw().unwrap();
    src[0] = 1;
}

#[test]
fn files_are_sources() {
    let device = device();
    let context = context(&device, 4);
    let content = noise(30_000, 9);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &content).unwrap();
    let map = || {
        device
            .map_file(file.as_file(), 4096..30_000, Sharing::Private)
            .unwrap()
    };
    assert!(context.register(map()).is_err(), "not as a destination");
    let src = context.register_source(map()).unwrap();
    assert!(src.as_bytes().is_none());
    let (sum, src) = context.queue().crc32c(src, 0).unwrap().finish().unwrap();
    assert_eq!(sum, crc32c::crc32c(&content[4096..]));
    assert!(src.thaw().is_err());
    let error = device
        .map_file(file.as_file(), 0..4096, Sharing::Shared)
        .unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)));
}

#[test]
fn arguments_are_checked_before_the_device_sees_them() {
    let device = device();
    let context = context(&device, 4);
    let queue = context.queue();
    let (a, b) = (context.allocate(10).unwrap(), context.allocate(11).unwrap());
    let refused = queue.copy(a, b).unwrap_err();
    assert_eq!(refused.error, Error::Lengths { src: 10, dst: 11 });
    let (a, _) = refused.buffers;

    let other = device.context(Options::default()).unwrap();
    let refused = other.queue().crc32c(a, 0).unwrap_err();
    assert!(matches!(refused.error, Error::Foreign { .. }));

    assert!(context.allocate(0).is_err());
    assert!(
        device
            .context(Options {
                ring_log2: 0,
                ..Options::default()
            })
            .is_err()
    );
    assert!(
        device
            .context(Options {
                ring_log2: 13,
                ..Options::default()
            })
            .is_err()
    );
}

#[test]
fn pieces_split_and_join() {
    let device = device();
    let context = context(&device, 4);
    let (a, b) = context.allocate(100).unwrap().split_at(30);
    let (b, c) = b.split_at(30);
    let (a, c) = a.join(c).unwrap_err();
    let all = a.join(b).unwrap().join(c).unwrap();
    assert_eq!(all.len(), 100);
    let mapping: Mapping<_> = all.unregister().unwrap().unwrap();
    assert_eq!(mapping.len(), 100);
    let all = context.register(mapping).unwrap();
    let (a, b) = all.split_at(50);
    let a = a.unregister().unwrap().unwrap_err();
    drop(b);
    a.unregister().unwrap().unwrap();
}

#[test]
fn many_contexts_work_beside_each_other() {
    let device = device();
    std::thread::scope(|scope| {
        for n in 0..12u64 {
            let device = &device;
            scope.spawn(move || {
                let context = context(device, 2);
                let mut src = context.allocate(20_000).unwrap();
                src.copy_from_slice(&noise(20_000, n));
                let mut dst = context.allocate(20_000).unwrap();
                for _ in 0..20 {
                    ((), (src, dst)) = context.queue().copy(src, dst).unwrap().finish().unwrap();
                    assert_eq!(src[..], dst[..]);
                    dst.fill(0);
                }
                assert_eq!(context.audit().unwrap().mismatches, 0);
            });
        }
    });
    assert_eq!(device.backing().stale_accesses(), 0);
}

#[test]
fn threads_share_a_queue_and_every_sleeper_wakes() {
    let device = device();
    // No spinning: everybody goes to sleep at once, so that a lost wake-up would show.
    let options = Options {
        ring_log2: 4,
        spins: 0,
        ..Options::default()
    };
    let context = device.context(options).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..6 {
            let queue = context.queue().clone();
            scope.spawn(move || {
                for _ in 0..300 {
                    queue.nop().unwrap().wait().unwrap();
                }
            });
        }
    });
    assert_eq!(context.queue().missed_wakeups(), 0);
}

#[test]
fn a_wait_with_a_timeout_comes_back() {
    let device = device();
    let context = context(&device, 4);
    let pending = context.queue().nop().unwrap();
    // However long the device takes: not for ever.
    while !pending.wait_for(Duration::from_micros(50)).unwrap() {}
    pending.wait().unwrap();
}

#[test]
fn memory_comes_back_to_the_machine() {
    let machine = InProcess::new(MachineConfig::default()).unwrap();
    let device = Device::open(machine).unwrap();
    let free = device.backing().free_frames();
    for _ in 0..3 {
        let context = context(&device, 8);
        let dst = context.allocate(1 << 20).unwrap();
        context.queue().fill(dst, 7).unwrap().finish().unwrap();
    }
    // All but the tables of the process's own page table, which only grow.
    let lost = free - device.backing().free_frames();
    assert!(lost < 40, "{lost} frames are gone");
}

#[test]
fn words_are_changed_atomically_and_fences_count() {
    let device = device();
    let context = context(&device, 4);
    let queue = context.queue();
    let page = context.allocate(4096).unwrap();
    let (before, rest) = page.split_at(8);
    let (word, after) = rest.split_at(8);
    let (old, word) = queue.fetch_add(word, 40).unwrap().finish().unwrap();
    assert_eq!(old, 0);
    let (old, word) = queue.fetch_add(word, 2).unwrap().finish().unwrap();
    assert_eq!(old, 40);
    let (old, word) = queue.compare_swap(word, 1, 7).unwrap().finish().unwrap();
    assert_eq!((old, &word[..]), (42, &42u64.to_le_bytes()[..]));
    let (old, word) = queue.compare_swap(word, 42, 7).unwrap().finish().unwrap();
    assert_eq!((old, &word[..]), (42, &7u64.to_le_bytes()[..]));
    assert_eq!(queue.fence().unwrap().finish().unwrap().0, 0);
    let (difference, (before, _)) = queue.compare(before, word).unwrap().finish().unwrap();
    assert_eq!(difference, Some(0));
    assert_eq!(queue.fence().unwrap().finish().unwrap().0, 1);
    assert_eq!(queue.fence().unwrap().finish().unwrap().0, 0, "told once");
    // Not a word.
    let (odd, rest) = after.split_at(9);
    let refused = queue.fetch_add(odd, 1).unwrap_err();
    assert!(matches!(refused.error, Error::Argument(_)));
    let (odd, _) = rest.split_at(8);
    let refused = queue.compare_swap(odd, 0, 1).unwrap_err();
    assert!(matches!(refused.error, Error::Argument(_)), "at 25");
    assert!(before.iter().all(|byte| *byte == 0));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// Pieces of any number and length, in any order.
    #[test]
    fn lists_gather_and_scatter(
        sizes in proptest::collection::vec(0..5000usize, 0..12),
        cuts in proptest::collection::vec(0..40_000usize, 0..6),
        seed: u64,
    ) {
        let device = device();
        let context = context(&device, 4);
        let total: usize = sizes.iter().sum();
        let mut all = context.allocate(total + 1).unwrap();
        all.copy_from_slice(&noise(total + 1, seed));
        let mut rest = all;
        let mut src: Vec<_> = sizes.iter().map(|size| {
            let (piece, more) = std::mem::replace(&mut rest, context.allocate(1).unwrap())
                .split_at(*size);
            rest = more;
            piece
        }).collect();
        src.reverse();
        let want: Vec<u8> = src.iter().flat_map(|piece| piece.to_vec()).collect();
        let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut % (total + 1)).collect();
        cuts.extend([0, total]);
        cuts.sort_unstable();
        let dst: Vec<_> = cuts.windows(2)
            .map(|pair| context.allocate(pair[1] - pair[0] + 3).unwrap().split_at(pair[1] - pair[0]))
            .collect();
        let (dst, behind): (Vec<_>, Vec<_>) = dst.into_iter().unzip();
        let lists = context.allocate(4096).unwrap();
        let ((), (lists, src, dst)) = context.queue().copy_lists(lists, src, dst).unwrap()
            .finish().unwrap();
        let got: Vec<u8> = dst.iter().flat_map(|piece| piece.to_vec()).collect();
        prop_assert!(got == want);
        prop_assert!(behind.iter().all(|piece| piece.iter().all(|byte| *byte == 0)));
        // And back, but for a byte too many.
        let mut back = dst;
        back.push(context.allocate(1).unwrap());
        let refused = context.queue().copy_lists(lists, back, src).unwrap_err();
        let unequal = Error::Lengths { src: total + 1, dst: total };
        prop_assert_eq!(refused.error, unequal);
    }
}

#[test]
fn lists_are_checked_before_the_device_sees_them() {
    let device = device();
    let context = context(&device, 4);
    let queue = context.queue();
    let piece = || context.allocate(8).unwrap();
    let lists = context.allocate(64).unwrap();
    let (short, _) = lists.split_at(31);
    let refused = queue
        .copy_lists(short, vec![piece()], vec![piece()])
        .unwrap_err();
    assert!(matches!(refused.error, Error::Argument(_)), "no room");
    let (_, odd) = context.allocate(4096).unwrap().split_at(8);
    let refused = queue
        .copy_lists(odd, vec![piece()], vec![piece()])
        .unwrap_err();
    assert!(matches!(refused.error, Error::Argument(_)), "misaligned");
    let other = Device::open(InProcess::new(MachineConfig::default()).unwrap()).unwrap();
    let foreign = other
        .context(Options::default())
        .unwrap()
        .allocate(8)
        .unwrap();
    let lists = context.allocate(64).unwrap();
    let refused = queue
        .copy_lists(lists, vec![foreign], vec![piece()])
        .unwrap_err();
    assert!(matches!(refused.error, Error::Foreign { .. }));
}
