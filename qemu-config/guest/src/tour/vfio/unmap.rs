//! Memory is taken back from the device while it works on it, and used for something else at once.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use extlb_driver::hardware::Hardware;
use extlb_driver::spec::work::{Completion, Descriptor, Opcode, Status, fault};
use extlb_driver::userspace::Userspace;
use extlb_driver::{Context, Device, Options, Pending, Raw};

use crate::tour::figures::{Figures, seconds};
use crate::tour::memory_unsafe::{Area, PAGE, submit};
use crate::tour::random::Random;

/// Pieces of memory that come and go.
const SLOTS: usize = 4;
/// Pages of each.
const PAGES: usize = 256;
/// Operations on a piece that are under way when it is taken back.
const FLIGHTS: usize = 16;
const ROUNDS: usize = 200;
/// With a slow emulated IOMMU, fewer rounds will do; never fewer than [`LEAST`].
const TIME: Duration = Duration::from_secs(6);
const LEAST: usize = 50;
/// What the device writes, and what the CPU writes as soon as the memory is its own again.
const DEVICE: u64 = 0xde71_ce00_de71_ce00;
const CANARY: u64 = 0xc0ff_ee00_c0ff_ee00;

struct Flight<H: Hardware> {
    pending: Pending<Userspace<H>, Raw, ()>,
    at: usize,
    len: usize,
}

/// A piece that was taken back: operations on it may not have been ended yet.
struct Taken<H: Hardware> {
    slot: usize,
    flights: Vec<Flight<H>>,
    canary: u64,
}

#[derive(Default)]
struct Totals {
    completed: u64,
    faulted: u64,
    partly: u64,
    bytes: u64,
    words: u64,
}

/// The step.
pub fn run<H: Hardware>(
    device: &Device<Userspace<H>>,
    seed: u64,
    figures: &mut Figures,
) -> Result<String> {
    let context = device.context(Options {
        ring_log2: 7,
        ..Options::default()
    })?;
    let source = Area::fresh(PAGES)?;
    source.store_all(0..PAGES, DEVICE);
    let _kept = context.register_addresses(source.addrs(&(0..PAGES)))?;
    let areas: Vec<Area> = (0..SLOTS)
        .map(|_| Area::fresh(PAGES))
        .collect::<Result<_>>()?;
    let mut random = Random::new(seed ^ 0xf19e);
    let mut totals = Totals::default();
    let mut taken = VecDeque::new();
    let mut unregistering = Duration::ZERO;
    let begun = Instant::now();
    let mut rounds = 0;
    while rounds < ROUNDS && (rounds < LEAST || begun.elapsed() < TIME) {
        let slot = rounds % SLOTS;
        if taken.len() == SLOTS - 1
            && let Some(oldest) = taken.pop_front()
        {
            end(&areas, oldest, &mut totals)?;
        }
        let area = &areas[slot];
        let registration = context.register_addresses(area.addrs(&(0..PAGES)))?;
        let flights = start(&context, &source, area, &mut random)?;
        rounds += 1;
        // The device is on this piece now.
        let since = Instant::now();
        registration.unregister()?;
        unregistering += since.elapsed();
        // From here on the memory is ours alone, whatever was under way.
        let canary = CANARY ^ random.next() & !0xff;
        areas[slot].store_all(0..PAGES, canary);
        taken.push_back(Taken {
            slot,
            flights,
            canary,
        });
    }
    for rest in taken {
        end(&areas, rest, &mut totals)?;
    }
    let stats = context.stats()?;
    figures.seconds = Some(seconds(begun.elapsed()));
    figures.operations_completed = Some(totals.completed);
    figures.operations_faulted = Some(totals.faulted);
    figures.operations = Some(totals.completed + totals.faulted);
    figures.bytes = Some(totals.bytes);
    figures.words_verified = Some(totals.words);
    figures.page_requests = Some(stats.page_requests + stats.refused_requests);
    figures.mutations = [("unregister", rounds as u64)].into();
    figures.canary_pages = Some((rounds * PAGES) as u64);
    println!(
        "  memory registered and taken back {rounds} times, {:.0} us to take {} KiB back",
        unregistering.as_secs_f64() * 1e6 / rounds as f64,
        (PAGES * PAGE) >> 10
    );
    println!(
        "  device: {} operations completed, {} faulted ({} of them in the middle), {} MiB; {} canary \
         words as they were",
        totals.completed,
        totals.faulted,
        totals.partly,
        totals.bytes >> 20,
        totals.words
    );
    ensure!(totals.completed > 0, "the device completed nothing");
    ensure!(
        totals.faulted > 0,
        "no operation met memory that was taken back: nothing was shown"
    );
    Ok(format!(
        "taken back {rounds} times under a working device: {} operations completed, {} faulted by \
         address, memory that was taken back never altered",
        totals.completed, totals.faulted
    ))
}

fn start<H: Hardware>(
    context: &Context<Userspace<H>>,
    source: &Area,
    area: &Area,
    random: &mut Random,
) -> Result<Vec<Flight<H>>> {
    let batch = context.queue().batch();
    let mut flights = Vec::new();
    for _ in 0..FLIGHTS {
        let at = random.below((PAGES * PAGE / 16) as u64) as usize * 8;
        let len = PAGE + random.below((PAGES * PAGE - at - PAGE) as u64) as usize;
        let descriptor = Descriptor {
            opcode: Opcode::Copy as u8,
            src: source.addr(0).0,
            dst: area.addr(at).0,
            len: len as u64,
            ..Descriptor::default()
        };
        flights.push(Flight {
            pending: submit(&batch, descriptor)?,
            at,
            len,
        });
    }
    drop(batch);
    // Sometimes at once, sometimes in the middle, now and then when all is done.
    let so_many = match random.below(8) {
        0 => FLIGHTS,
        _ => random.below(FLIGHTS as u64 / 2) as usize,
    };
    if let Some(last) = so_many.checked_sub(1) {
        let waited = flights[last].pending.wait_for(Duration::from_secs(10))?;
        ensure!(waited, "an operation did not end within 10 s");
    }
    Ok(flights)
}

/// Ends the operations on a piece that was taken back, and looks at it.
fn end<H: Hardware>(areas: &[Area], taken: Taken<H>, totals: &mut Totals) -> Result<()> {
    let Taken {
        slot,
        flights,
        canary,
    } = taken;
    let area = &areas[slot];
    for Flight { pending, at, len } in flights {
        let (completion, ()) = pending.finish()?;
        judge(area, at, len, &completion, totals)
            .with_context(|| format!("copy of {len} bytes to {}: {completion:?}", area.addr(at)))?;
    }
    for at in (0..PAGES * PAGE).step_by(8) {
        let found = area.load(at);
        ensure!(
            found == canary,
            "memory that was taken back was written to: {found:#x} at {}",
            area.addr(at)
        );
        totals.words += 1;
    }
    Ok(())
}

fn judge(
    area: &Area,
    at: usize,
    len: usize,
    completion: &Completion,
    totals: &mut Totals,
) -> Result<()> {
    totals.bytes += completion.bytes;
    match Status::from_raw(completion.status) {
        Some(Status::Success) => {
            ensure!(completion.bytes == len as u64, "success with bytes missing");
            totals.completed += 1;
        }
        Some(Status::PageFault) => {
            let next = area.addr(at).0 + completion.bytes;
            ensure!(
                completion.fault & fault::WRITE != 0,
                "a fault at the source, which nobody took"
            );
            ensure!(
                completion.bytes < len as u64
                    && completion.fault_addr >> 12 == next >> 12
                    && completion.fault_addr < area.addr(at).0 + len as u64,
                "the fault does not name where the operation had come to, {next:#x}"
            );
            totals.faulted += 1;
            totals.partly += u64::from(completion.bytes > 0);
        }
        _ => bail!("neither success nor a page fault"),
    }
    Ok(())
}
