//! While the device copies from and to a region without pause, the program unmaps it, gives pages
//! up, write-protects, forks and writes, moves and replaces it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Result, ensure};
use extlb_driver::{Device, Kernel, Options};

use super::Arguments;
use super::figures::Figures;
use super::memory_unsafe::Area;
use super::mutator::{self, Kind, Mutator};
use super::random::Random;
use super::traffic::{Areas, SINK_PAGES, Shared, Totals, Traffic};
use super::words::{Writer, word};

/// Pages of the region: 4 MiB.
const PAGES: usize = 1024;
/// Operations between two calm moments with an audit.
const BURST: u64 = 250;
/// One fork in so many operations: it is by far the slowest, as it touches every page table of
/// the process.
const FORK_EVERY: u64 = 40;

/// The step.
pub fn run(
    arguments: &Arguments,
    device: &Device<Kernel>,
    figures: &mut Figures,
) -> Result<String> {
    let context = device.context(Options {
        ring_log2: 7,
        ..Options::default()
    })?;
    let (fire, source, sink) = (
        Area::fresh(PAGES)?,
        Area::fresh(PAGES)?,
        Area::fresh(SINK_PAGES)?,
    );
    for page in 0..PAGES {
        source.store_all(page..page + 1, word(page, Writer::Copy, 0));
    }
    let _kept = [
        context.register_addresses(source.addrs(&(0..PAGES)))?,
        context.register_addresses(sink.addrs(&(0..SINK_PAGES)))?,
    ];
    let shared = Shared::new(PAGES);
    let areas = Areas {
        fire: &fire,
        source: Some(&source),
        sink: &sink,
    };
    let mut mutator = Mutator::new(&fire, &context, &shared, arguments.seed)?;
    let traffic = Traffic::new(
        areas,
        context.queue().clone(),
        &shared,
        arguments.seed,
        false,
    );
    let before = context.stats()?;
    let begun = Instant::now();
    let canary_pages = AtomicU64::new(0);
    let mut audits = (0, 0);

    let (outcome, totals) = std::thread::scope(|scope| {
        let traffic = scope.spawn(|| traffic.run());
        scope.spawn(|| {
            canary_pages.store(super::hog::run(&shared, arguments.seed), Ordering::Relaxed);
        });
        let outcome = change(
            arguments,
            &context,
            &shared,
            &mut mutator,
            &mut audits,
            begun,
        );
        shared.stop();
        (outcome, traffic.join().unwrap_or_default())
    });
    let after = context.stats()?;
    figures.take_stats(&before, &after);
    figures.seconds = Some(super::figures::seconds(begun.elapsed()));
    figures.bytes = Some(totals.bytes);
    figures.words_verified = Some(totals.words);
    figures.canary_pages = Some(canary_pages.load(Ordering::Relaxed));
    figures.audits = Some(audits.0);
    figures.audited_translations = Some(audits.1);
    figures.mutations = mutator
        .counts
        .iter()
        .map(|(kind, (count, _))| (*kind, *count))
        .collect();
    for (kind, (count, time)) in &mutator.counts {
        let each = time.as_secs_f64() * 1e6 / *count as f64;
        println!("  {kind}: {count}, {each:.0} us each");
    }
    outcome?;
    shared.check()?;
    mutator.finish()?;
    conclude(arguments, figures, &totals)
}

fn change(
    arguments: &Arguments,
    context: &extlb_driver::Context<Kernel>,
    shared: &Shared,
    mutator: &mut Mutator<'_>,
    audits: &mut (u64, u64),
    begun: Instant,
) -> Result<()> {
    // mremap, the slowest of them, less often than the others.
    const OTHERS: [Kind; 9] = [
        Kind::Unmap,
        Kind::Unmap,
        Kind::DontNeed,
        Kind::DontNeed,
        Kind::Protect,
        Kind::Protect,
        Kind::Replace,
        Kind::Replace,
        Kind::Move,
    ];
    let mut random = Random::new(arguments.seed ^ 0x6b1d);
    let mut n = 0;
    // As many operations of the device, too, however slowly they go.
    while n < arguments.operations || shared.ended() < arguments.operations {
        n += 1;
        let kind = match random.below(FORK_EVERY) {
            0 => Kind::Fork,
            _ => OTHERS[random.below(OTHERS.len() as u64) as usize],
        };
        if n % BURST != 0 {
            mutator.step(kind)?;
        } else {
            mutator.give_all_up()?;
            // Nobody changes the memory now: what the device has is what the process has, and
            // operations succeed in whole.
            let audit = context.audit()?;
            audits.0 += 1;
            audits.1 += audit.checked;
            ensure!(
                audit.mismatches == 0,
                "an audit found {} wrong translations, the first at {:#x}: the device has {:#x}, \
                 the process {:#x}",
                audit.mismatches,
                audit.iova,
                audit.device_gpa,
                audit.cpu_gpa
            );
            shared.calm_round()?;
        }
        if n % 2500 == 0 {
            println!(
                "  {n} operations on the memory, {} of the device, {:.1} s",
                shared.ended(),
                begun.elapsed().as_secs_f64()
            );
        }
    }
    shared.calm_round()
}

fn conclude(arguments: &Arguments, figures: &Figures, totals: &Totals) -> Result<String> {
    let shootdowns = figures.shootdowns.unwrap_or(0);
    println!(
        "  device: {} operations completed, {} faulted, {} MiB, {} words verified",
        totals.completed,
        totals.faulted,
        totals.bytes >> 20,
        totals.words
    );
    if let Some(latency) = &figures.shootdown_ns {
        println!("  shootdowns: {shootdowns}, {latency}");
    }
    let stale = figures.stale_accesses.unwrap_or(u64::MAX);
    ensure!(stale == 0, "{stale} stale accesses");
    ensure!(totals.completed > 0, "the device completed nothing");
    // An unpatched kernel tells an mmu notifier "everything" so often that one shootdown takes what
    // several would.
    let share = if mutator::hears_of_everything()? {
        8
    } else {
        4
    };
    ensure!(
        shootdowns * share >= arguments.operations,
        "only {shootdowns} shootdowns in {} operations: the device was hardly involved",
        arguments.operations
    );
    let mutations: u64 = figures.mutations.values().sum();
    Ok(format!(
        "{mutations} operations on the memory, {shootdowns} shootdowns, {} operations of the device \
         completed and {} faulted, 0 stale accesses",
        totals.completed, totals.faulted
    ))
}
