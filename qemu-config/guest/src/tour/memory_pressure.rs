//! A working set larger than the guest's memory: the kernel swaps, the device follows.

use std::collections::VecDeque;
use std::time::Instant;

use anyhow::{Result, ensure};
use extlb_driver::{
    Compare, Context, Copy, Crc32c, Device, Kernel, Options, Pending, Slice, SliceMut,
};

use super::figures::Figures;
use super::pinned;
use super::random::Random;
use super::{Arguments, procfs};

/// A chunk of the working set, and the size of the pattern.
const CHUNK: usize = 1 << 20;
/// The most chunks that there can be.
const CHUNKS: usize = super::WORKING_SET as usize;
/// Chunks under way.
const DEPTH: usize = 8;
/// The pattern of a chunk begins with so many of its last bytes, at most.
const TURN: usize = 8 * CHUNKS * 2;

/// The step.
pub fn run(
    arguments: &Arguments,
    device: &Device<Kernel>,
    figures: &mut Figures,
) -> Result<String> {
    let mib = arguments.working_set;
    let total = mib as usize * CHUNK;
    let memory = procfs::meminfo_kib("MemTotal")? >> 10;
    let swap = procfs::meminfo_kib("SwapFree")? >> 10;
    ensure!(
        memory < mib,
        "the guest has {memory} MiB, more than the working set: run it with --memory {}M",
        mib / 2
    );
    ensure!(
        memory + swap > mib + 64,
        "{memory} MiB of memory and {swap} MiB of swap do not hold the working set"
    );
    let context = device.context(Options {
        ring_log2: 7,
        ..Options::default()
    })?;
    let pattern = Pattern::new(&context, arguments.seed)?;
    let mut chunks: Vec<_> = context.allocate(total)?.chunks(CHUNK).collect();
    let before = context.stats()?;
    let swapped = || -> Result<(u64, u64)> {
        Ok((
            procfs::vmstat("pswpin")? * 4,
            procfs::vmstat("pswpout")? * 4,
        ))
    };
    let (in_before, out_before) = swapped()?;
    let _read_ahead = ReadAhead::set("5");
    let begun = Instant::now();
    let told = |what: &str| println!("  {what} after {:.1} s", begun.elapsed().as_secs_f64());
    chunks = write(&context, &pattern, chunks, 0)?;
    told("written");
    for pass in 1..arguments.rounds {
        chunks = verify_and_write(&context, &pattern, chunks, pass - 1, pass)?;
        told("verified and written again");
    }
    chunks = verify(&context, &pattern, chunks, arguments.rounds - 1)?;
    told("verified");
    let elapsed = begun.elapsed();
    let (in_after, out_after) = swapped()?;
    figures.take_stats(&before, &context.stats()?);
    figures.seconds = Some(super::figures::seconds(elapsed));
    figures.bytes = Some((2 * arguments.rounds * total) as u64);
    figures.swapped_in_kib = Some(in_after - in_before);
    figures.swapped_out_kib = Some(out_after - out_before);
    figures.vm_lck_kib = Some(procfs::status_kib("VmLck")?);
    figures.vm_pin_kib = Some(procfs::status_kib("VmPin")?);
    figures.rss_after_kib = Some(procfs::status_kib("VmRSS")?);
    println!(
        "  with pte notifiers: {mib} MiB in a guest of {memory} MiB; swapped out {} MiB and in {} \
         MiB, {} page requests for {} pages, {} shootdowns",
        (out_after - out_before) >> 10,
        (in_after - in_before) >> 10,
        figures.page_requests.unwrap_or(0),
        figures.pages_filled.unwrap_or(0),
        figures.shootdowns.unwrap_or(0)
    );
    drop(chunks);
    drop(pattern);
    drop(context);

    let stale = figures.stale_accesses.unwrap_or(u64::MAX);
    ensure!(stale == 0, "{stale} stale accesses");
    ensure!(
        out_after - out_before > (mib - memory) << 10,
        "hardly anything was swapped: there was no pressure"
    );
    let outcome = pinned::must_fail(mib)?;
    println!("  with pinned memory: {outcome}");
    figures.pinned_outcome = Some(outcome.clone());
    Ok(format!(
        "{mib} MiB written and verified {} in {memory} MiB in {:.1} s; pinned, it fails: {outcome}",
        if arguments.rounds == 1 {
            "once"
        } else {
            "twice"
        },
        elapsed.as_secs_f64()
    ))
}

/// Lets the kernel read more pages at once from swap: the device goes through them in order. Set
/// back when dropped; without it things are slower, and no different.
struct ReadAhead(Option<String>);

impl ReadAhead {
    const PATH: &str = "/proc/sys/vm/page-cluster";

    fn set(log2: &str) -> Self {
        let before = std::fs::read_to_string(Self::PATH).ok();
        let _ = std::fs::write(Self::PATH, log2);
        Self(before)
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = std::fs::write(Self::PATH, before);
        }
    }
}

/// Random bytes, so that neither swap nor anything else can make them smaller. A chunk holds them
/// turned by a distance of its own: no two pages of the working set are equal.
struct Pattern {
    bytes: Slice<Kernel>,
    /// CRC32C of the part that no turn reaches.
    head_crc: u32,
}

impl Pattern {
    fn new(context: &Context<Kernel>, seed: u64) -> Result<Self> {
        let mut bytes = context.allocate(CHUNK)?;
        let mut random = Random::new(seed ^ 0x5eed);
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next().to_le_bytes());
        }
        let head_crc = crc32c::crc32c(&bytes[..CHUNK - TURN]);
        Ok(Self {
            bytes: bytes.freeze(),
            head_crc,
        })
    }

    /// Where the chunk's bytes begin in the pattern: its end, then its start.
    fn cut(chunk: usize, pass: usize) -> usize {
        CHUNK - 8 * (chunk + 1 + pass * CHUNKS)
    }

    fn parts(&self, chunk: usize, pass: usize) -> (Slice<Kernel>, Slice<Kernel>) {
        let cut = Self::cut(chunk, pass);
        (self.bytes.slice(cut..), self.bytes.slice(..cut))
    }

    fn crc(&self, chunk: usize, pass: usize) -> u32 {
        let cut = Self::cut(chunk, pass);
        let bytes = self.bytes.as_bytes().unwrap_or_default();
        let head = crc32c::crc32c_append(self.head_crc, &bytes[CHUNK - TURN..cut]);
        crc32c::crc32c_combine(crc32c::crc32c(&bytes[cut..]), head, cut)
    }

    fn byte(&self, chunk: usize, pass: usize, at: usize) -> u8 {
        let bytes = self.bytes.as_bytes().unwrap_or_default();
        bytes[(Self::cut(chunk, pass) + at) % CHUNK]
    }
}

type Chunks = Vec<SliceMut<Kernel>>;

/// Sends all chunks through `submit`, and what comes of it through `end`, some at a time.
fn pipeline<P>(
    chunks: Chunks,
    mut submit: impl FnMut(usize, SliceMut<Kernel>) -> Result<P>,
    mut end: impl FnMut(usize, P) -> Result<SliceMut<Kernel>>,
) -> Result<Chunks> {
    let mut under_way = VecDeque::new();
    let mut done = Vec::with_capacity(chunks.len());
    for (n, chunk) in chunks.into_iter().enumerate() {
        if under_way.len() == DEPTH
            && let Some((n, pending)) = under_way.pop_front()
        {
            done.push(end(n, pending)?);
        }
        under_way.push_back((n, submit(n, chunk)?));
    }
    for (n, pending) in under_way {
        done.push(end(n, pending)?);
    }
    Ok(done)
}

fn join(a: SliceMut<Kernel>, b: SliceMut<Kernel>) -> SliceMut<Kernel> {
    a.join(b).expect("halves of one chunk")
}

type Copying = Pending<Kernel, Copy, (Slice<Kernel>, SliceMut<Kernel>)>;
type Comparing = Pending<Kernel, Compare, (Slice<Kernel>, SliceMut<Kernel>)>;
type Summing = Pending<Kernel, Crc32c, SliceMut<Kernel>>;

fn start_write(
    context: &Context<Kernel>,
    pattern: &Pattern,
    n: usize,
    chunk: SliceMut<Kernel>,
    pass: usize,
) -> Result<(Copying, Copying)> {
    let (first, second) = pattern.parts(n, pass);
    let (a, b) = chunk.split_at(first.len());
    let batch = context.queue().batch();
    Ok((batch.copy(first, a)?, batch.copy(second, b)?))
}

fn end_write((a, b): (Copying, Copying)) -> Result<SliceMut<Kernel>> {
    let ((), (_, a)) = a.finish()?;
    let ((), (_, b)) = b.finish()?;
    Ok(join(a, b))
}

fn write(
    context: &Context<Kernel>,
    pattern: &Pattern,
    chunks: Chunks,
    pass: usize,
) -> Result<Chunks> {
    let submit = |n, chunk| start_write(context, pattern, n, chunk, pass);
    pipeline(chunks, submit, |_, pending| end_write(pending))
}

/// The device compares each chunk with what was written in pass `old`, and the CPU looks at a
/// byte of it; then the device writes the chunk anew.
fn verify_and_write(
    context: &Context<Kernel>,
    pattern: &Pattern,
    chunks: Chunks,
    old: usize,
    new: usize,
) -> Result<Chunks> {
    let submit = |n, chunk: SliceMut<Kernel>| -> Result<(Comparing, Comparing)> {
        let (first, second) = pattern.parts(n, old);
        let (a, b) = chunk.split_at(first.len());
        let batch = context.queue().batch();
        Ok((batch.compare(first, a)?, batch.compare(second, b)?))
    };
    pipeline(chunks, submit, |n, (a, b)| {
        let (a_differs, (_, a)) = a.finish()?;
        let (b_differs, (_, b)) = b.finish()?;
        if let Some(at) = a_differs.or(b_differs) {
            anyhow::bail!("chunk {n} differs at {at:#x} of its part");
        }
        let chunk = join(a, b);
        let at = n * 4099 % CHUNK;
        ensure!(
            chunk[at] == pattern.byte(n, old, at),
            "chunk {n}: the CPU sees another byte"
        );
        end_write(start_write(context, pattern, n, chunk, new)?)
    })
}

/// The device sums, and the CPU knows what must come.
fn verify(
    context: &Context<Kernel>,
    pattern: &Pattern,
    chunks: Chunks,
    pass: usize,
) -> Result<Chunks> {
    let submit = |_, chunk| -> Result<Summing> { Ok(context.queue().crc32c(chunk, 0)?) };
    pipeline(chunks, submit, |n, pending| {
        let (crc, chunk) = pending.finish()?;
        let expected = pattern.crc(n, pass);
        ensure!(
            crc == expected,
            "chunk {n} has CRC32C {crc:08x}, not {expected:08x}"
        );
        Ok(chunk)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_of_every_pass_is_cut_elsewhere() {
        let mut cuts: Vec<_> = (0..2)
            .flat_map(|pass| (0..CHUNKS).map(move |chunk| Pattern::cut(chunk, pass)))
            .collect();
        assert!(cuts.iter().all(|cut| (CHUNK - TURN..CHUNK).contains(cut)));
        cuts.sort_unstable();
        cuts.dedup();
        assert_eq!(cuts.len(), 2 * CHUNKS);
    }
}
