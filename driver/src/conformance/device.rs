//! The device as a whole: counters, limits, the oracle, a restart.

use nix::errno::Errno;

use super::{Failure, Function, Suite, Verdict, ensure, finish, noise};
use crate::error::Error;
use crate::memory_unsafe::Backing;

pub(super) fn checks<B: Backing>() -> Vec<(&'static str, Function<B>)> {
    vec![
        ("counters move", counters),
        ("translations agree with the process", audit),
        ("no context too many", limit),
        ("a restart begins afresh", restart),
    ]
}

fn counters<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let slice = context.allocate(10 * 4096)?;
    let before = context.stats()?;
    let ((), slice) = finish(context.queue().fill(slice, 1)?)?;
    let during = context.stats()?;
    let done = during.ops_completed - before.ops_completed;
    ensure!(done == 1, "{done} operations instead of 1");
    ensure!(during.mapped_pages > 0, "no page is mapped");
    ensure!(
        during.filled_pages >= during.mapped_pages,
        "more mapped than ever filled"
    );
    drop(slice);
    let after = context.stats()?;
    let (was, is) = (during.mapped_pages, after.mapped_pages);
    ensure!(is < was, "{is} pages are mapped, of {was} before");
    let shootdowns = after.shootdowns - during.shootdowns;
    ensure!(shootdowns > 0, "memory was taken back without a shootdown");
    ensure!(after.shootdown_max_ns > 0, "a shootdown took no time");
    let in_buckets: u64 = after.shootdown_ns.iter().sum();
    let all = after.shootdowns;
    ensure!(in_buckets == all, "{in_buckets} in the histogram, of {all}");
    ensure!(
        after.oracle_stale == 0,
        "{} stale accesses",
        after.oracle_stale
    );
    Ok(())
}

fn audit<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let slice = context.allocate(10 * 4096)?;
    let ((), _slice) = finish(context.queue().fill(slice, 1)?)?;
    let audit = suite.ability(suite.abilities.audit, "an audit", context.audit())?;
    ensure!(audit.checked > 0, "nothing was compared");
    ensure!(audit.mismatches == 0, "{audit:x?}");
    Ok(())
}

fn limit<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let most = suite.device.info().contexts;
    ensure!(most > 0, "a device without contexts");
    let mut contexts = Vec::new();
    loop {
        match suite.context(1) {
            Ok(context) => contexts.push(context),
            Err(_) if contexts.is_empty() => {
                return Err(Failure::Failed("not one context".into()));
            }
            Err(_) => break,
        }
        ensure!(contexts.len() <= most as usize, "more contexts than said");
    }
    let error = suite.device.context(crate::Options::default()).err();
    let named = matches!(
        error,
        Some(Error::Call {
            errno: Errno::EBUSY,
            ..
        })
    );
    ensure!(
        named,
        "{error:?} instead of EBUSY, with {} contexts",
        contexts.len()
    );
    // Each is one of its own, and works.
    let mut numbers: Vec<_> = contexts.iter().map(|context| context.number()).collect();
    numbers.sort_unstable();
    numbers.dedup();
    ensure!(
        numbers.len() == contexts.len(),
        "two contexts of one number"
    );
    for context in &contexts {
        finish(context.queue().nop()?)?;
    }
    drop(contexts);
    finish(suite.context(1)?.queue().nop()?)?;
    Ok(())
}

fn restart<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    for round in 0..3 {
        let context = suite.context(5)?;
        let mut src = context.allocate(2 << 20)?;
        let content = noise(2 << 20, 6);
        src.copy_from_slice(&content);
        let src = src.freeze();
        let mut pending = Vec::new();
        for _ in 0..16 {
            pending.push(
                context
                    .queue()
                    .copy(src.clone(), context.allocate(2 << 20)?)?,
            );
        }
        let restarted = suite.device.backing().restart();
        suite.ability(suite.abilities.restart, "a restart", restarted)?;

        // What was not done by then never is; and nobody waits for it.
        for pending in pending {
            match pending.wait() {
                Ok(completed) => {
                    let ((), (_, dst)) = completed.into_result()?;
                    ensure!(dst[..] == content[..], "said to be done, and is not");
                }
                Err(Error::Dead { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let error = context.queue().nop().and_then(|nop| nop.finish()).err();
        let dead = matches!(error, Some(Error::Dead { .. }));
        ensure!(dead, "a context from before the restart: {error:?}");
        let error = context.stats().err();
        ensure!(
            matches!(error, Some(Error::Dead { .. })),
            "its counters: {error:?}"
        );
        ensure!(context.allocate(4096).is_err(), "it takes memory");
        // A new one, at once, beside the old one.
        let fresh = suite.context(4)?;
        let dst = fresh.allocate(100_000)?;
        let ((), dst) = finish(fresh.queue().fill(dst, u64::MAX)?)?;
        ensure!(dst.iter().all(|byte| *byte == 0xff), "round {round}: fill");
        // The memory of the old one comes back when its queue, which holds it, is gone.
        drop(context);
        ensure!(
            src.as_bytes() == Some(&content[..]),
            "the old memory changed"
        );
        let src = src
            .thaw()
            .map_err(|_| Failure::Failed("the old queue holds it".into()))?;
        let mapping = src.unregister()?;
        let mapping = mapping.map_err(|_| Failure::Failed("the old queue holds it".into()))?;
        let (sum, _) = finish(fresh.queue().crc32c(fresh.register(mapping)?, 0)?)?;
        ensure!(sum == crc32c::crc32c(&content), "round {round}: old memory");
    }
    Ok(())
}
