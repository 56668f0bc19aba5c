//! Queues and contexts: many operations, many threads, and nobody sleeps for ever.

use std::time::{Duration, Instant};

use super::{Failure, Function, PATIENCE, Suite, Verdict, ensure, finish, noise};
use crate::error::Error;
use crate::memory_unsafe::Backing;
use crate::{Options, Slice};

pub(super) fn checks<B: Backing>() -> Vec<(&'static str, Function<B>)> {
    vec![
        ("many operations are under way at once", many),
        ("ring indices go round", round),
        ("a full ring is said, or waited for", full),
        ("a batch longer than the ring is done in order", batch),
        (
            "an operation of an open batch can be waited for",
            open_batch,
        ),
        ("threads share a queue", threads),
        ("sleepers are woken", sleepers),
        ("contexts work beside each other", contexts),
        ("a wait with a timeout comes back", timeout),
    ]
}

fn many<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(7)?;
    let queue = context.queue();
    let len = 30_000;
    let mut src = context.allocate(len)?;
    src.copy_from_slice(&noise(len, 1));
    let src = src.freeze();
    let mut pending = Vec::new();
    for n in 0..100 {
        let dst = context.allocate(len - 200)?;
        pending.push(queue.copy(src.slice(n..n + len - 200), dst)?);
    }
    // The program reads it at the same time.
    let bytes = src.as_bytes().unwrap_or(&[]);
    for (n, pending) in pending.into_iter().enumerate() {
        let ((), (_, dst)) = finish(pending)?;
        ensure!(dst[..] == bytes[n..n + len - 200], "copy {n} differs");
    }
    ensure!(queue.in_flight() == 0, "{} are left", queue.in_flight());
    Ok(())
}

fn round<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(1)?;
    for _ in 0..1000 {
        finish(context.queue().nop()?)?;
    }
    Ok(())
}

fn full<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(2)?;
    let queue = context.queue();
    // Written and not submitted: the ring stays full for certain.
    let batch = queue.batch();
    let pending = (0..4).map(|_| batch.nop()).collect::<Result<Vec<_>, _>>()?;
    let buffer = context.allocate(10)?;
    let Err(refused) = queue.try_submit().fill(buffer, 1) else {
        return Err(Failure::Failed(
            "a fifth operation of four was taken".into(),
        ));
    };
    ensure!(refused.error == Error::RingFull, "{}", refused.error);
    // The buffer came back, and waiting for room submits what is written.
    let ((), buffer) = finish(queue.fill(refused.buffers, 0x0303_0303_0303_0303)?)?;
    ensure!(buffer[..] == [3; 10], "{:?}", &buffer[..]);
    for pending in pending {
        ensure!(pending.is_done()?, "an earlier operation is not done");
        finish(pending)?;
    }
    Ok(())
}

fn batch<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(3)?;
    let batch = context.queue().batch();
    let mut pending = Vec::new();
    for (n, piece) in context.allocate(64 * 100)?.chunks(100).enumerate() {
        pending.push(batch.fill(piece, u64::from_le_bytes([n as u8; 8]))?);
    }
    batch.submit_all();
    for (n, pending) in pending.into_iter().enumerate() {
        let ((), piece) = finish(pending)?;
        ensure!(piece.iter().all(|byte| *byte == n as u8), "piece {n}");
    }
    Ok(())
}

fn open_batch<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let batch = context.queue().batch();
    let (first, second) = (batch.nop()?, batch.nop()?);
    finish(second)?;
    finish(first)?;
    Ok(())
}

/// What threads came to: the first that is not good.
fn all(verdicts: Vec<std::thread::Result<Verdict>>) -> Verdict {
    for verdict in verdicts {
        verdict.map_err(|_| Failure::Failed("a thread panicked".into()))??;
    }
    Ok(())
}

fn threads<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let work = |n: u64| -> Verdict {
        let queue = context.queue().clone();
        let mut src = context.allocate(9000)?;
        src.copy_from_slice(&noise(9000, n));
        let mut dst = context.allocate(9000)?;
        for _ in 0..40 {
            ((), (src, dst)) = finish(queue.copy(src, dst)?)?;
            ensure!(src[..] == dst[..], "thread {n}: the copy differs");
            dst.fill(0);
        }
        Ok(())
    };
    all(in_threads(6, &work))
}

fn in_threads<'a>(
    count: u64,
    work: &'a (dyn Fn(u64) -> Verdict + Sync + 'a),
) -> Vec<std::thread::Result<Verdict>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..count).map(|n| scope.spawn(move || work(n))).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    })
}

/// No spinning: everybody goes to sleep at once, so that a lost interrupt shows.
fn sleepers<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.device.context(Options {
        ring_log2: 4,
        spins: 0,
        ..Options::default()
    })?;
    // One at a time, with a pause in which a device that polls goes to sleep too.
    for pause in [0, 1, 3, 5] {
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(pause));
            finish(context.queue().nop()?)?;
        }
    }
    let work = |_| -> Verdict {
        for _ in 0..100 {
            finish(context.queue().nop()?)?;
        }
        Ok(())
    };
    all(in_threads(4, &work))?;
    // A coincidence with a sleeper's own look once a second is possible, and rare.
    let missed = context.queue().missed_wakeups();
    ensure!(missed <= 1, "{missed} sleepers were not woken");
    Ok(())
}

fn contexts<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let work = |n: u64| -> Verdict {
        let context = suite.context(2)?;
        let mut src = context.allocate(20_000)?;
        src.copy_from_slice(&noise(20_000, n));
        let src: Slice<_> = src.freeze();
        let mut dst = context.allocate(20_000)?;
        for _ in 0..10 {
            ((), (_, dst)) = finish(context.queue().copy(src.clone(), dst)?)?;
            ensure!(src.as_bytes() == Some(&dst[..]), "context {n}: differs");
            dst.fill(0);
        }
        Ok(())
    };
    all(in_threads(8, &work))
}

fn timeout<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let pending = context.queue().nop()?;
    let begun = Instant::now();
    while !pending.wait_for(Duration::from_micros(50))? {
        ensure!(begun.elapsed() < PATIENCE, "an operation does not end");
    }
    pending.wait()?;
    Ok(())
}
