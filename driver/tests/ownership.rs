//! Whatever a program does with what it holds, memory outlives the device's work on it.

use std::mem;

use extlb_driver::inprocess::{InProcess, MachineConfig};
use extlb_driver::{Device, Options, Slice};

fn device() -> Device<InProcess> {
    Device::open(InProcess::new(MachineConfig::default()).unwrap()).unwrap()
}

#[test]
fn operations_that_nobody_waits_for_are_done_nonetheless() {
    let device = device();
    let context = device.context(Options::default()).unwrap();
    let queue = context.queue();
    let (kept, lost) = context.allocate(400_000).unwrap().split_at(200_000);
    drop(queue.fill(lost, u64::MAX).unwrap());
    let (crc, _) = queue.crc32c(kept, 0).unwrap().finish().unwrap();
    assert_eq!(crc, crc32c::crc32c(&vec![0; 200_000]));
    assert_eq!(context.stats().unwrap().ops_completed, 2);
}

#[test]
fn memory_of_a_dropped_operation_is_freed_after_it() {
    let device = device();
    let context = device.context(Options::default()).unwrap();
    let before = device.backing().free_frames();
    for _ in 0..50 {
        drop(
            context
                .queue()
                .fill(context.allocate(1 << 20).unwrap(), 1)
                .unwrap(),
        );
        // 50 MiB of 64: this fits only if the memory comes back.
        context.queue().flush().unwrap();
    }
    let after = device.backing().free_frames();
    assert!(
        before - after < 64,
        "{} frames are still taken",
        before - after
    );
    assert_eq!(device.backing().stale_accesses(), 0);
}

#[test]
fn memory_of_a_forgotten_operation_is_never_reused() {
    let device = device();
    let context = device.context(Options::default()).unwrap();
    let dst = context.allocate(8192).unwrap();
    let addr = dst.addr().0;
    mem::forget(context.queue().fill(dst, 1).unwrap());
    context.queue().flush().unwrap();
    // The buffer is leaked with its owner: nothing else is ever mapped there.
    for _ in 0..200 {
        let other = context.allocate(8192).unwrap();
        assert!(other.addr().0.abs_diff(addr) >= 8192);
        mem::forget(other);
    }
}

#[test]
fn a_queue_may_be_dropped_with_work_under_way() {
    let device = device();
    for round in 0..40 {
        let context = device
            .context(Options {
                ring_log2: 5,
                ..Options::default()
            })
            .unwrap();
        let mut src = context.allocate(300_000).unwrap();
        src.fill(round);
        let src: Slice<_> = src.freeze();
        let mut pending: Vec<_> = (0..20)
            .map(|_| {
                let dst = context.allocate(300_000).unwrap();
                context.queue().copy(src.clone(), dst).unwrap()
            })
            .collect();
        // Some are dropped before the context, some after, one way or the other.
        let later = pending.split_off(usize::from(round % 20));
        drop(pending);
        drop(context);
        if round % 2 == 0 {
            for pending in later {
                let ((), (_, dst)) = pending.finish().unwrap();
                assert!(dst.iter().all(|byte| *byte == round));
            }
        }
    }
    assert_eq!(device.backing().stale_accesses(), 0);
}

#[test]
fn a_slice_cannot_be_written_while_the_device_reads_it() {
    let device = device();
    let context = device.context(Options::default()).unwrap();
    let src = context.allocate(1 << 20).unwrap().freeze();
    let batch = context.queue().batch();
    let pending = batch.crc32c(src.clone(), 0).unwrap();
    // Not submitted yet, so certainly not done; and its pending half is gone.
    drop(pending);
    let src = src.thaw().unwrap_err();
    batch.submit_all();
    context.queue().flush().unwrap();
    src.thaw().unwrap();
}

#[test]
fn buffers_outlive_their_context() {
    let device = device();
    let context = device.context(Options::default()).unwrap();
    let mut buffer = context.allocate(5000).unwrap();
    drop(context);
    buffer.fill(9);
    assert!(buffer.iter().all(|byte| *byte == 9));
}
