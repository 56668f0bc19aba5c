//! Faults on the way of data: bits that flip, accesses that are slow, or met by a reset.

mod common;
use common::*;

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use extlb_device::Step;
use extlb_spec::work::{Descriptor, Opcode, Status};
use extlb_spec::{Iova, regs};

const SRC: u64 = 0x5555_0000_0000;
const DST: u64 = 0x5555_1000_0000;

fn flipped(a: &[u8], b: &[u8]) -> u32 {
    let bits = a.iter().zip(b).map(|(a, b)| (a ^ b).count_ones());
    bits.sum()
}

#[test]
fn poisoned_data_is_noticed_by_a_checksum_or_a_comparison_and_by_nobody_else() {
    let guest = Guest::faulty(&["poison-data,times=1"]);
    let process = guest.process(1);
    let src = process.map_fresh(Iova(SRC), 1)[0];
    let dst = process.map_fresh(Iova(DST), 1)[0];
    let done = process.go(&guest, copy(SRC, DST, PAGE));
    assert_eq!(done.status, Status::Success as u32);
    let (from, to) = (guest.bytes(src, 4096), guest.bytes(dst, 4096));
    assert_eq!(flipped(&from, &to), 1);
    let compared = process.go(&guest, op(Opcode::Compare, SRC, DST, PAGE));
    assert_eq!(compared.status, Status::Mismatch as u32);
    let sum = |at| process.go(&guest, op(Opcode::Crc32c, at, 0, PAGE)).result;
    assert_ne!(sum(SRC), sum(DST));
    // Nothing else: no error, no counter, no stale access.
    assert_eq!(guest.fatal(), 0);
    for register in [regs::BUS_ERRORS, regs::ORACLE_STALE, regs::ORACLE_SUSPECTS] {
        assert_eq!(guest.get(register), 0, "{}", register.name);
    }
    let to = format!("copy of 4096 bytes at {dst}");
    assert_eq!(guest.injected(), [("poison-data", to)]);
}

#[test]
fn the_seed_decides_which_bit() {
    let poisoned = |opcode: Opcode, seed| {
        let mut config = config();
        config.fault = vec!["poison-data".parse().unwrap()];
        config.fault_seed = seed;
        let guest = Guest::with(config);
        let process = guest.process(1);
        process.map_fresh(Iova(SRC), 1);
        let dst = process.map_fresh(Iova(DST), 1)[0];
        let done = process.go(&guest, op(opcode, SRC, DST, PAGE));
        assert_eq!(done.status, Status::Success as u32);
        (done.result, guest.bytes(dst, 4096))
    };
    for opcode in [Opcode::Copy, Opcode::Fill, Opcode::Crc32c] {
        let first = poisoned(opcode, 1);
        assert_eq!(first, poisoned(opcode, 1), "{opcode:?}");
        assert_ne!(first, poisoned(opcode, 2), "{opcode:?}");
    }
    assert_eq!(flipped(&poisoned(Opcode::Fill, 1).1, &[0; 4096]), 1);
}

/// Waits for what another thread is going to do.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "it did not happen: {what}");
        std::thread::yield_now();
    }
}

/// Drains while one data access takes long: whether the acknowledgement came before it ended, and
/// how often the device had to be asked.
fn drain_against(plan: &str) -> (bool, u64) {
    let guest = Guest::faulty(&[plan]);
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 1);
    let dst = process.map_fresh(Iova(DST), 1)[0];
    let n = process.submit(Descriptor {
        arg: u64::MAX,
        ..op(Opcode::Fill, 0, DST, PAGE)
    });
    process.ring(&guest);
    let (begun, seen) = channel();
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            begun.send(()).unwrap();
            guest.device.engine_step()
        });
        seen.recv().unwrap();
        eventually("the access begins", || !guest.injections().is_empty());
        let ack = guest.post_wait(extlb_spec::invalidation::wait::DRAINED);
        let mut waited = 0;
        loop {
            let step = guest.device.invalidation_step();
            if guest.ack() == ack {
                // An access that has ended has written.
                let written = guest.bytes(dst, 1) != [0];
                break (!written, waited);
            }
            waited += u64::from(step == Step::Waiting);
            std::thread::yield_now();
        }
    });
    guest.run();
    assert_eq!(process.status(n), Some(Status::Success));
    result
}

#[test]
fn a_drain_waits_for_memory_that_is_slow_or_hangs() {
    for plan in [
        "slow-memory,times=1,delay_us=300000",
        "hang-bus,times=1,delay_us=300000",
    ] {
        let (early, waited) = drain_against(plan);
        assert!(!early, "{plan}");
        assert!(waited > 0, "{plan}: the test tests nothing");
    }
}

#[test]
fn a_reset_in_the_middle_of_an_access_waits_for_it_and_leaves_silence() {
    let guest = Guest::faulty(&["reset-mid-dma,after=1,times=1"]);
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 4);
    process.map_fresh(Iova(DST), 4);
    let n = process.submit(copy(SRC, DST, 4 * PAGE));
    process.ring(&guest);
    guest.device.engine_step();
    assert_eq!(guest.injected()[0].0, "reset-mid-dma");
    eventually("the reset is done", || guest.get(regs::STATUS) == 0);
    guest.run();
    // Half of it is done; nobody says so. The totals say what was moved.
    assert_eq!(process.status(n), Some(Status::Pending));
    assert_eq!(guest.device.totals().bytes, 2 * PAGE);
    // Software that looks sees a device that is not enabled, and starts it again.
    guest.enable();
    let fresh = guest.process(2).go(&guest, Descriptor::default());
    assert_eq!(fresh.status, Status::Success as u32);
}

#[test]
fn a_device_without_a_server_has_nobody_to_disconnect() {
    let guest = Guest::faulty(&["disconnect-mid-dma"]);
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 1);
    process.map_fresh(Iova(DST), 1);
    let done = process.go(&guest, copy(SRC, DST, PAGE));
    assert_eq!(done.status, Status::Success as u32);
    assert!(guest.injections().is_empty());
}
