//! Every operation against the CPU's result.

use super::{Failure, Function, Suite, Verdict, end, ensure, finish, noise};
use crate::error::Error;
use crate::memory_unsafe::Backing;

pub(super) fn checks<B: Backing>() -> Vec<(&'static str, Function<B>)> {
    vec![
        (
            "operations agree with the cpu at any offset and length",
            agree,
        ),
        ("a compare finds the first difference", differences),
        ("a crc goes on from another", continued),
        ("buffers of megabytes are whole", megabytes),
        ("words are added to and swapped", words),
        ("a fence counts what did not succeed", fences),
        ("lists are gathered and scattered", lists),
        (
            "arguments are checked before the device sees them",
            arguments,
        ),
    ]
}

/// (offset of the source, offset of the destination, length): page borders, cache lines, odd ones.
const SHAPES: [(usize, usize, usize); 12] = [
    (0, 0, 0),
    (0, 0, 1),
    (1, 0, 7),
    (3, 5, 8),
    (63, 1, 65),
    (4095, 0, 2),
    (4090, 4091, 4096),
    (17, 4000, 4097),
    (0, 0, 8192),
    (1, 2, 12_287),
    (4095, 1, 20_000),
    (777, 333, 40_961),
];

fn agree<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let queue = context.queue();
    for (seed, (src_at, dst_at, len)) in SHAPES.into_iter().enumerate() {
        let seed = seed as u64;
        let shape = format!("{len} bytes from offset {src_at} to {dst_at}");
        let buffer = |at: usize, seed| -> Verdict<_> {
            let mut all = context.allocate(at + len + 5000)?;
            let bytes = noise(all.len(), seed);
            all.copy_from_slice(&bytes);
            let (before, rest) = all.split_at(at);
            let (middle, after) = rest.split_at(len);
            Ok((before, middle, after))
        };
        let (s0, src, s1) = buffer(src_at, 2 * seed)?;
        let (d0, dst, d1) = buffer(dst_at, 2 * seed + 1)?;
        let source = src.to_vec();
        let around = (d0.to_vec(), d1.to_vec());

        let ((), (src, dst)) = finish(queue.copy(src, dst)?)?;
        ensure!(dst[..] == source[..], "copy of {shape}");
        let (sum, src) = finish(queue.crc32c(src, 0)?)?;
        ensure!(sum == crc32c::crc32c(&source), "crc of {shape}");
        let (difference, (src, dst)) = finish(queue.compare(src, dst)?)?;
        ensure!(difference.is_none(), "compare of {shape}: {difference:?}");
        let pattern = 0x0123_4567_89ab_cdef ^ seed;
        let ((), dst) = finish(queue.fill(dst, pattern)?)?;
        let filled = pattern.to_le_bytes().into_iter().cycle().take(len);
        ensure!(dst.iter().copied().eq(filled), "fill of {shape}");

        ensure!(src[..] == source[..], "the source of {shape} changed");
        ensure!(
            (&d0[..], &d1[..]) == (&around.0[..], &around.1[..]),
            "what is beside the destination of {shape} changed"
        );
        drop((s0, s1));
    }
    Ok(())
}

fn differences<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let queue = context.queue();
    let len = 3 * 4096 + 100;
    let mut a = context.allocate(len)?;
    let mut b = context.allocate(len)?;
    a.copy_from_slice(&noise(len, 5));
    for at in [len - 1, 2 * 4096, 4096, 4095, 100, 0] {
        b.copy_from_slice(&a);
        b[at] ^= 0x80;
        b[len - 1] ^= 1;
        let found;
        (found, (a, b)) = finish(queue.compare(a, b)?)?;
        ensure!(found == Some(at as u64), "{found:?} instead of {at}");
    }
    Ok(())
}

fn continued<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let queue = context.queue();
    let mut all = context.allocate(10_000)?;
    all.copy_from_slice(&noise(10_000, 8));
    let all = all.freeze();
    let (first, _) = finish(queue.crc32c(all.slice(..3333), 0)?)?;
    let (both, _) = finish(queue.crc32c(all.slice(3333..), first)?)?;
    let want = crc32c::crc32c(all.as_bytes().unwrap_or(&[]));
    ensure!(both == want, "{both:#x} instead of {want:#x}");
    Ok(())
}

/// Long enough for leaves of 2 MiB, at the start and at the end and not only.
fn megabytes<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let queue = context.queue();
    let len = (5 << 20) + 12_345;
    let mut src = context.allocate(len)?;
    src.copy_from_slice(&noise(len, 11));
    let want = crc32c::crc32c(&src);
    let dst = context.allocate(len)?;
    let ((), (src, dst)) = finish(queue.copy(src, dst)?)?;
    ensure!(src[..] == dst[..], "the copy differs");
    // Across the border of two leaves, off by one.
    let (_, rest) = src.split_at((2 << 20) - 1);
    let (piece, _) = rest.split_at((2 << 20) + 2);
    let (_, rest) = dst.split_at((2 << 20) - 1);
    let (other, _) = rest.split_at((2 << 20) + 2);
    let (difference, (_, other)) = finish(queue.compare(piece, other)?)?;
    ensure!(difference.is_none(), "differs at {difference:?}");
    drop(other);
    // Memory that comes after it is fresh.
    let again = context.allocate(len)?;
    ensure!(again.iter().all(|byte| *byte == 0), "memory is not zeroed");
    let mut again = again;
    again.copy_from_slice(&noise(len, 11));
    let (sum, _) = finish(queue.crc32c(again, 0)?)?;
    ensure!(sum == want, "crc {sum:#x} instead of {want:#x}");
    Ok(())
}

fn words<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let queue = context.queue();
    let (_, rest) = context.allocate(4096)?.split_at(4080);
    let (mut word, after) = rest.split_at(8);
    word.copy_from_slice(&u64::MAX.to_le_bytes());
    let mut want = u64::MAX;
    for add in [5, 1 << 40, u64::MAX] {
        let found;
        (found, word) = finish(queue.fetch_add(word, add)?)?;
        ensure!(found == want, "{found:#x} before the add, not {want:#x}");
        want = want.wrapping_add(add);
    }
    for (expected, new) in [(want ^ 1, 1), (want, 2), (want, 3)] {
        let (found, back) = finish(queue.compare_swap(word, expected, new)?)?;
        word = back;
        ensure!(found == want, "{found:#x} before the swap, not {want:#x}");
        if found == expected {
            want = new;
        }
        ensure!(
            word[..] == want.to_le_bytes(),
            "{:?}, not {want:#x}",
            &word[..]
        );
    }
    ensure!(after.iter().all(|byte| *byte == 0), "the next word changed");
    Ok(())
}

fn fences<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let queue = context.queue();
    let (a, mut b) = (context.allocate(8)?, context.allocate(8)?);
    b[3] = 1;
    let (_, (a, b)) = finish(queue.compare(a, b)?)?;
    end(queue.fill(b, 0)?)?.into_result()?;
    for want in [1, 0] {
        let (failed, ()) = finish(queue.fence()?)?;
        ensure!(failed == want, "{failed} did not succeed, not {want}");
    }
    drop(a);
    Ok(())
}

fn lists<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let queue = context.queue();
    let pieces = |sizes: &[usize]| {
        let piece = |(seed, size): (usize, &usize)| -> Verdict<_> {
            let mut piece = context.allocate(*size + 1)?;
            piece.copy_from_slice(&noise(*size + 1, seed as u64));
            Ok(piece.split_at(*size).0)
        };
        sizes
            .iter()
            .enumerate()
            .map(piece)
            .collect::<Verdict<Vec<_>>>()
    };
    let src = pieces(&[1, 4096, 0, 9001, 63])?;
    let dst = pieces(&[8191, 2, 0, 4968])?;
    let want: Vec<u8> = src.iter().flat_map(|piece| piece.to_vec()).collect();
    let room = context.allocate(9 * 16)?;
    let ((), (_, _, dst)) = finish(queue.copy_lists(room, src, dst)?)?;
    let got: Vec<u8> = dst.iter().flat_map(|piece| piece.to_vec()).collect();
    ensure!(got == want, "the bytes differ");
    Ok(())
}

fn arguments<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let (a, b) = (context.allocate(10)?, context.allocate(11)?);
    let refused = context.queue().copy(a, b).err();
    let Some(refused) = refused else {
        return Err(Failure::Failed("unequal lengths were taken".into()));
    };
    ensure!(
        refused.error == Error::Lengths { src: 10, dst: 11 },
        "unequal lengths: {}",
        refused.error
    );
    let (a, b) = refused.buffers;
    let other = suite.context(4)?;
    match other.queue().crc32c(a, 0) {
        Err(refused) => ensure!(
            matches!(refused.error, Error::Foreign { .. }),
            "another context's buffer: {}",
            refused.error
        ),
        Ok(_) => return Err(Failure::Failed("another context's buffer was taken".into())),
    }
    for ring_log2 in [0, 13, u32::MAX] {
        ensure!(suite.context(ring_log2).is_err(), "a ring of 2^{ring_log2}");
    }
    ensure!(context.allocate(0).is_err(), "no memory at all was taken");
    // And all of it left no trace.
    end(context.queue().fill(b, 1)?)?.into_result()?;
    Ok(())
}
