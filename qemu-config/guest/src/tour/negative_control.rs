//! The notifier switched off: the oracle must notice, or its silence elsewhere means nothing.
//!
//! The device only reads from the memory that is taken from it. A stale write would hit a page
//! that the kernel has given to somebody else, and corrupt the guest for real.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use extlb_driver::{Context, Device, Kernel, Options};

use super::Arguments;
use super::figures::Figures;
use super::memory_unsafe::Area;
use super::mutator::{Kind, Mutator};
use super::traffic::{Areas, SINK_PAGES, Shared, Traffic};
use super::words::{Writer, word};

const DEBUGFS: &str = "/sys/kernel/debug/extlb/extlb0";
const PAGES: usize = 512;
const OPERATIONS: usize = 400;
/// The oracle gives an invalidation 3 s to come; this is with room for a busy host.
const PATIENCE: Duration = Duration::from_secs(12);

/// The notifier ignored, for as long as this lives.
struct Ignored;

impl Ignored {
    fn set(on: bool) -> Result<()> {
        let path = format!("{DEBUGFS}/ignore_notifier");
        std::fs::write(&path, if on { "1" } else { "0" }).context(path)
    }

    fn new() -> Result<Self> {
        Self::set(true)?;
        Ok(Self)
    }
}

impl Drop for Ignored {
    fn drop(&mut self) {
        if let Err(error) = Self::set(false) {
            eprintln!("the notifier could not be switched on again: {error:#}");
        }
    }
}

/// The step.
pub fn run(
    arguments: &Arguments,
    device: &Device<Kernel>,
    figures: &mut Figures,
) -> Result<String> {
    let (fire, sink) = (Area::fresh(PAGES)?, Area::fresh(SINK_PAGES)?);
    // The device writes there, and to its rings: no fork may take those pages from under it.
    sink.keep_from_children()?;
    for page in 0..PAGES {
        fire.store_all(page..page + 1, word(page, Writer::Program, 1));
    }
    // Dropped in reverse: registrations, then the context, whose stop takes every page from the
    // device whatever the switch says; only then the switch.
    let ignored = Ignored::new()?;
    let context = device.context(Options {
        ring_log2: 7,
        ..Options::default()
    })?;
    let outcome = take_away(arguments, &context, &fire, &sink, figures);
    drop(context);
    drop(ignored);
    outcome
}

fn take_away(
    arguments: &Arguments,
    context: &Context<Kernel>,
    fire: &Area,
    sink: &Area,
    figures: &mut Figures,
) -> Result<String> {
    let _kept = context.register_addresses(sink.addrs(&(0..SINK_PAGES)))?;
    let shared = Shared::new(PAGES);
    let mut mutator = Mutator::new(fire, context, &shared, arguments.seed)?;
    let areas = Areas {
        fire,
        source: None,
        sink,
    };
    let traffic = Traffic::new(
        areas,
        context.queue().clone(),
        &shared,
        arguments.seed,
        true,
    );
    let before = context.stats()?;
    let begun = Instant::now();

    let (outcome, totals) = std::thread::scope(|scope| {
        let traffic = scope.spawn(|| traffic.run());
        let outcome = provoke(context, &shared, &mut mutator, before.oracle_stale);
        shared.stop();
        (outcome, traffic.join().unwrap_or_default())
    });
    let noticed_after = begun.elapsed();
    let audit = context.audit()?;
    figures.take_stats(&before, &context.stats()?);
    figures.bytes = Some(totals.bytes);
    figures.words_verified = Some(totals.words);
    figures.mutations = mutator
        .counts
        .iter()
        .map(|(kind, (count, _))| (*kind, *count))
        .collect();
    figures.audit_mismatches = Some(audit.mismatches);
    outcome?;
    shared.check()?;

    let path = format!("{DEBUGFS}/oracle");
    let oracle = std::fs::read_to_string(&path).context(path)?;
    let records = oracle
        .lines()
        .filter(|line| line.starts_with("stale access"));
    figures.oracle_records = records.take(8).map(str::to_owned).collect();
    figures
        .oracle_records
        .iter()
        .take(3)
        .for_each(|record| println!("  {record}"));
    println!(
        "  audit: {} of {} translations are wrong; the first: {:#x}, the device has {:#x}, the \
         process {:#x}",
        audit.mismatches, audit.checked, audit.iova, audit.device_gpa, audit.cpu_gpa
    );
    println!(
        "  words read from pages that were not the process's any more: {}",
        totals.wrong_words
    );
    ensure!(audit.mismatches > 0, "an audit found nothing wrong");
    ensure!(
        !figures.oracle_records.is_empty(),
        "the oracle keeps no record of what it found"
    );
    let stale = figures.stale_accesses.unwrap_or(0);
    Ok(format!(
        "with the notifier off the oracle found {stale} stale accesses within {:.1} s, and an \
         audit {} wrong translations",
        noticed_after.as_secs_f64(),
        audit.mismatches
    ))
}

fn provoke(
    context: &Context<Kernel>,
    shared: &Shared,
    mutator: &mut Mutator<'_>,
    stale_before: u64,
) -> Result<()> {
    const KINDS: [Kind; 6] = [
        Kind::DontNeed,
        Kind::Unmap,
        Kind::Replace,
        Kind::DontNeed,
        Kind::Protect,
        Kind::Replace,
    ];
    // All pages are with the device before any is taken away.
    shared.calm_round()?;
    for n in 0..OPERATIONS {
        let kind = if n % 40 == 39 {
            Kind::Fork
        } else {
            KINDS[n % KINDS.len()]
        };
        mutator.step(kind)?;
        if n % 16 == 0 {
            // Lets the device come by.
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let begun = Instant::now();
    while context.stats()?.oracle_stale == stale_before {
        shared.check()?;
        ensure!(
            begun.elapsed() < PATIENCE,
            "the notifier is off, and the oracle found no stale access in {} s: it is blind",
            PATIENCE.as_secs()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
