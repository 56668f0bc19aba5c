//! Memory: where it comes from, that it comes and goes under load, and who owns it meanwhile.

use std::fs::File;
use std::io::Write;

use super::{Failure, Function, Suite, Verdict, ensure, finish, noise};
use crate::memory_unsafe::{Backing, Sharing};
use crate::{Follow, Iova, Options};

pub(super) fn checks<B: Backing>() -> Vec<(&'static str, Function<B>)> {
    vec![
        ("memory comes and goes under load", load),
        ("memory is registered anew and is still the same", again),
        ("pieces split and join, and the whole is taken back", pieces),
        ("a dropped operation is done nonetheless", dropped),
        ("a context may go with work under way", contexts_go),
        ("buffers outlive their context", outlive),
        ("private mappings of files are sources", |suite| {
            files(suite, Sharing::Private, true)
        }),
        ("shared mappings of files are sources", |suite| {
            files(suite, Sharing::Shared, suite.abilities.shared_files)
        }),
        ("pages follow the process", |suite| {
            follow(suite, Follow::PTE)
        }),
        ("pages follow by an mmu notifier", |suite| {
            follow(suite, Follow::MMU)
        }),
        ("pages follow by interval notifiers", |suite| {
            follow(suite, Follow::INTERVAL)
        }),
        ("pages are pinned", |suite| follow(suite, Follow::PINNED)),
        ("one context registers memory twice", twice),
    ]
}

fn load<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(5)?;
    let queue = context.queue();
    let len = 60_000;
    let mut src = context.allocate(len)?;
    src.copy_from_slice(&noise(len, 2));
    let src = src.freeze();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let stopped = || stop.load(std::sync::atomic::Ordering::Relaxed);
    let busy = || -> Verdict<u64> {
        let mut rounds = 0;
        let mut dst = context.allocate(len)?;
        while !stopped() {
            ((), (_, dst)) = finish(queue.copy(src.clone(), dst)?)?;
            ensure!(
                src.as_bytes() == Some(&dst[..]),
                "a copy under load differs"
            );
            dst.fill(0);
            rounds += 1;
        }
        Ok(rounds)
    };
    let change = || -> Verdict {
        for n in 0..60usize {
            // All sizes, so that leaves of all sizes come and go at the same addresses.
            let len = [4096, 300_000, 2 << 20, 70_000, (2 << 20) + 8192][n % 5];
            let slice = context.allocate(len)?;
            let pattern = u64::from_le_bytes([n as u8 + 1; 8]);
            let ((), slice) = finish(queue.fill(slice, pattern)?)?;
            ensure!(slice.iter().all(|byte| *byte == n as u8 + 1), "round {n}");
        }
        Ok(())
    };
    let (busy, changed) = std::thread::scope(|scope| {
        let busy = scope.spawn(busy);
        let changed = change();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        (busy.join(), changed)
    });
    changed?;
    let rounds = busy.map_err(|_| Failure::Failed("a thread panicked".into()))??;
    ensure!(rounds > 0, "there was no load");
    Ok(())
}

fn again<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let (context, other) = (suite.context(4)?, suite.context(4)?);
    let mut slice = context.allocate(100_000)?;
    slice.copy_from_slice(&noise(100_000, 3));
    let (addr, want) = (slice.addr(), crc32c::crc32c(&slice));
    for n in 0..20 {
        let mapping = slice.unregister()?.map_err(|_| alone())?;
        let context = if n % 2 == 0 { &other } else { &context };
        slice = context.register(mapping)?;
        ensure!(slice.addr() == addr, "the address changed");
        let sum;
        (sum, slice) = finish(context.queue().crc32c(slice, 0)?)?;
        ensure!(sum == want, "round {n}: crc {sum:#x} instead of {want:#x}");
    }
    Ok(())
}

fn alone() -> Failure {
    Failure::Failed("somebody else holds the memory".into())
}

fn pieces<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let (a, b) = context.allocate(100)?.split_at(30);
    let ((), a) = finish(context.queue().fill(a, 0)?)?;
    let Err(a) = a.unregister()? else {
        return Err(Failure::Failed(
            "taken back under a piece that is left".into(),
        ));
    };
    let whole = a
        .join(b)
        .map_err(|_| Failure::Failed("neighbours do not join".into()))?;
    let mapping = whole.unregister()?.map_err(|_| alone())?;
    ensure!(mapping.len() == 100, "{} bytes came back", mapping.len());
    Ok(())
}

fn dropped<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let queue = context.queue();
    let (kept, lost) = context.allocate(400_000)?.split_at(200_000);
    let before = context.stats()?.ops_completed;
    drop(queue.fill(lost, u64::MAX)?);
    let (crc, _) = finish(queue.crc32c(kept, 0)?)?;
    ensure!(
        crc == crc32c::crc32c(&vec![0; 200_000]),
        "its neighbour changed"
    );
    let done = context.stats()?.ops_completed - before;
    ensure!(done == 2, "{done} operations instead of 2");
    // Its memory comes back only after it.
    for _ in 0..30 {
        drop(queue.fill(context.allocate(1 << 20)?, 1)?);
    }
    Ok(queue.flush()?)
}

fn contexts_go<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    for round in 0..12u8 {
        let context = suite.context(5)?;
        let mut src = context.allocate(300_000)?;
        src.fill(round);
        let src = src.freeze();
        let mut pending = Vec::new();
        for _ in 0..16 {
            let dst = context.allocate(300_000)?;
            pending.push(context.queue().copy(src.clone(), dst)?);
        }
        // Some are dropped before the context, some after, one way or the other.
        let later = pending.split_off(usize::from(round));
        drop(pending);
        drop(context);
        if round % 2 == 0 {
            for pending in later {
                let ((), (_, dst)) = finish(pending)?;
                ensure!(dst.iter().all(|byte| *byte == round), "round {round}");
            }
        }
    }
    let context = suite.context(4)?;
    finish(context.queue().nop()?)?;
    let stale = context.stats()?.oracle_stale;
    ensure!(stale == 0, "{stale} stale accesses");
    Ok(())
}

fn outlive<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let mut buffer = context.allocate(5000)?;
    drop(context);
    buffer.fill(9);
    ensure!(buffer.iter().all(|byte| *byte == 9), "it lost its memory");
    Ok(())
}

fn files<B: Backing>(suite: &Suite<'_, B>, sharing: Sharing, declared: bool) -> Verdict {
    let context = suite.context(4)?;
    let content = noise(30_000, 9);
    let mut file: File = tempfile::tempfile()?;
    file.write_all(&content)?;
    let map = || suite.device.map_file(&file, 4096..30_000, sharing);
    let what = "mapping a file so";
    let mapping = suite.ability(declared, what, map())?;
    ensure!(context.register(mapping).is_err(), "as a destination");
    let src = context.register_source(map()?)?;
    ensure!(src.as_bytes().is_none(), "as a slice that nobody changes");
    let (sum, src) = finish(context.queue().crc32c(src, 0)?)?;
    let want = crc32c::crc32c(&content[4096..]);
    ensure!(sum == want, "crc {sum:#x} instead of {want:#x}");
    let dst = context.allocate(src.len())?;
    let ((), (_, dst)) = finish(context.queue().copy(src, dst)?)?;
    ensure!(dst[..] == content[4096..], "the copy differs");
    Ok(())
}

fn follow<B: Backing>(suite: &Suite<'_, B>, follow: Follow) -> Verdict {
    let options = Options {
        follow,
        ..Options::default()
    };
    let declared = suite.abilities.follow.contains(follow);
    let context = suite.device.context(options);
    let context = suite.ability(declared, &format!("{follow:?}"), context)?;
    let slice = context.allocate(1 << 20)?;
    let ((), _slice) = finish(context.queue().fill(slice, 5)?)?;
    let pinned = context.stats()?.pinned_pages;
    let want = follow == Follow::PINNED;
    ensure!((pinned >= 256) == want, "{pinned} pages are pinned");
    Ok(())
}

fn twice<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let slice = context.allocate(3 * 4096)?;
    let middle = slice.addr().0 + 4096;
    let range = Iova(middle)..Iova(middle + 4096);
    let second = context.register_addresses(range);
    let second = suite.ability(suite.abilities.overlap, "registering twice", second)?;
    let ((), slice) = finish(context.queue().fill(slice, 1)?)?;
    second.unregister()?;
    // The first one is still there.
    let ((), slice) = finish(context.queue().fill(slice, u64::MAX)?)?;
    ensure!(slice.iter().all(|byte| *byte == 0xff), "the fill has gaps");
    Ok(())
}
