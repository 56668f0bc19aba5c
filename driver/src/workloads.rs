//! The same work over any backing, timed: what an operation, a copy and a registration cost.
//!
//! For comparisons within one run; the figures of a shared machine mean nothing by themselves.

use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::memory_unsafe::Backing;
use crate::{Context, Device, Options};

/// How long each workload runs.
pub const DEFAULT_TIME: Duration = Duration::from_millis(400);

/// What a workload took.
#[derive(Clone, Debug, PartialEq)]
pub struct Timing {
    /// The workload; one of [`names`].
    pub name: &'static str,
    /// How often it was done.
    pub rounds: u64,
    /// Median time of a round, in ns.
    pub p50_ns: u64,
    /// 99th percentile of the time of a round, in ns.
    pub p99_ns: u64,
    /// Operations a second, over the whole time.
    pub per_second: f64,
    /// Bytes a second, over the whole time; 0 where no data is moved.
    pub bytes_per_second: f64,
}

/// Operations of a batch.
const BATCH: usize = 64;
const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// A workload.
#[derive(Clone, Copy, Debug)]
struct Workload {
    name: &'static str,
    kind: Kind,
    /// Bytes of each operation.
    len: usize,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// An operation is waited for before the next is submitted.
    One,
    /// Submitted together, then waited for.
    Together,
    /// Memory is registered, used and taken back.
    Registration,
}

const fn workload(name: &'static str, kind: Kind, len: usize) -> Workload {
    Workload { name, kind, len }
}

/// In the order in which they are done.
const WORKLOADS: [Workload; 7] = [
    workload("nop, one at a time", Kind::One, 0),
    workload("nop, 64 at a time", Kind::Together, 0),
    workload("copy of 64 B, one at a time", Kind::One, 64),
    workload("copy of 4 KiB, 64 at a time", Kind::Together, 4 * KIB),
    workload("copy of 2 MiB, one at a time", Kind::One, 2 * MIB),
    workload(
        "register, use, take back 4 KiB",
        Kind::Registration,
        4 * KIB,
    ),
    workload(
        "register, use, take back 2 MiB",
        Kind::Registration,
        2 * MIB,
    ),
];

/// Names of the workloads.
pub fn names() -> impl Iterator<Item = &'static str> {
    WORKLOADS.iter().map(|workload| workload.name)
}

/// Does all workloads, each for about `time`.
///
/// # Errors
/// The first operation that fails ends it: a figure of work that was not done is none.
pub fn run<B: Backing>(device: &Device<B>, time: Duration) -> Result<Vec<Timing>> {
    let run = |workload: &Workload| {
        let context = device.context(Options::default())?;
        match workload.kind {
            Kind::One => one_by_one(&context, time, workload),
            Kind::Together => together(&context, time, workload),
            Kind::Registration => registration(&context, time, workload),
        }
    };
    WORKLOADS.iter().map(run).collect()
}

/// Times rounds of `operations` operations.
fn time(
    workload: &Workload,
    how_long: Duration,
    operations: u64,
    mut round: impl FnMut() -> Result<()>,
) -> Result<Timing> {
    // The first touches pages and fills translations.
    round()?;
    let mut times = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < how_long || times.len() < 10 {
        let start = Instant::now();
        round()?;
        times.push(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
    let seconds = begun.elapsed().as_secs_f64();
    times.sort_unstable();
    let rounds = times.len() as u64;
    let done = (rounds * operations) as f64;
    Ok(Timing {
        name: workload.name,
        rounds,
        p50_ns: times[times.len() / 2],
        p99_ns: times[times.len() * 99 / 100],
        per_second: done / seconds,
        bytes_per_second: done * workload.len as f64 / seconds,
    })
}

/// What is handed over in one round comes back in it, or the round fails.
const HANDED_OVER: Error = Error::Argument("a workload goes on after it has failed");

fn one_by_one<B: Backing>(
    context: &Context<B>,
    how_long: Duration,
    workload: &Workload,
) -> Result<Timing> {
    let queue = context.queue();
    let len = workload.len;
    if len == 0 {
        return time(workload, how_long, 1, || queue.nop()?.finish().map(drop));
    }
    let mut buffers = Some((context.allocate(len)?, context.allocate(len)?));
    time(workload, how_long, 1, || {
        let (src, dst) = buffers.take().ok_or(HANDED_OVER)?;
        buffers = Some(queue.copy(src, dst)?.finish()?.1);
        Ok(())
    })
}

fn together<B: Backing>(
    context: &Context<B>,
    how_long: Duration,
    workload: &Workload,
) -> Result<Timing> {
    let queue = context.queue();
    let len = workload.len;
    if len == 0 {
        return time(workload, how_long, BATCH as u64, || {
            let batch = queue.batch();
            let pending: Vec<_> = (0..BATCH).map(|_| batch.nop()).collect::<Result<_>>()?;
            batch.submit_all();
            pending
                .into_iter()
                .try_for_each(|one| one.finish().map(drop))
        });
    }
    let (src, dst) = (
        context.allocate(BATCH * len)?,
        context.allocate(BATCH * len)?,
    );
    let mut buffers: Vec<_> = src.chunks(len).zip(dst.chunks(len)).collect();
    time(workload, how_long, BATCH as u64, || {
        let batch = queue.batch();
        let submit = |(src, dst)| batch.copy(src, dst).map_err(Error::from);
        let pending: Vec<_> = buffers.drain(..).map(submit).collect::<Result<_>>()?;
        batch.submit_all();
        for one in pending {
            buffers.push(one.finish()?.1);
        }
        Ok(())
    })
}

/// What taking memory back costs when the device has used it: an operation on the memory is part
/// of each round, or there would be nothing to shoot down.
fn registration<B: Backing>(
    context: &Context<B>,
    how_long: Duration,
    workload: &Workload,
) -> Result<Timing> {
    let queue = context.queue();
    let mut mapping = context.allocate(workload.len)?.unregister()?.ok();
    time(workload, how_long, 1, || {
        let slice = context.register(mapping.take().ok_or(HANDED_OVER)?)?;
        let ((), slice) = queue.fill(slice, 7)?.finish()?;
        mapping = slice.unregister()?.ok();
        Ok(())
    })
}

impl std::fmt::Display for Timing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}: p50 {:.1} us, p99 {:.1} us, {:.0} a second",
            self.name,
            self.p50_ns as f64 / 1e3,
            self.p99_ns as f64 / 1e3,
            self.per_second
        )
    }
}
