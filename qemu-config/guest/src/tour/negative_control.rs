//! The notifier switched off: the oracle must notice, or its silence elsewhere means nothing.
//!
//! The device only reads from the memory that is taken from it. A stale write would hit a page
//! that the kernel has given to somebody else, and corrupt the guest for real: this program, or the
//! kernel. So the pages that the device writes to (the sink, the rings) are kept where they are
//! meanwhile ([`Anchored`]): with the notifier off nobody would tell the device that they moved.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use extlb_driver::{Context, Device, Kernel, Options};
use nix::sys::mman::{MlockAllFlags, mlockall, munlockall};

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

/// The kernel's half of the oracle, on a kernel that has it. Its reports would end the run; so it only
/// counts, for as long as this lives.
struct Quiet {
    before: u64,
}

const KERNELS: &str = "/sys/kernel/debug/pte_notifiers";

impl Quiet {
    fn new() -> Result<Option<Self>> {
        if !Path::new(KERNELS).exists() {
            return Ok(None);
        }
        let quiet = Self {
            before: Self::reports()?,
        };
        Self::set("Y")?;
        Ok(Some(quiet))
    }

    fn set(on: &str) -> Result<()> {
        let path = format!("{KERNELS}/quiet");
        std::fs::write(&path, on).context(path)
    }

    fn reports() -> Result<u64> {
        let path = format!("{KERNELS}/reports");
        let text = std::fs::read_to_string(&path).context(path)?;
        text.trim().parse().context("the kernel's reports")
    }

    /// Expects that there were some.
    fn check(&self) -> Result<()> {
        let found = Self::reports()? - self.before;
        ensure!(
            found > 0,
            "the kernel found no page freed while the device maps it: it is blind"
        );
        println!("  the kernel found {found} pages freed while the device maps them");
        Ok(())
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        if let Err(error) = Self::set("N") {
            eprintln!("the kernel's oracle could not be switched on again: {error:#}");
        }
    }
}

/// All that the process has mapped stays in its physical pages for as long as this lives: locked
/// against reclaim, compaction told to leave locked pages alone, no huge pages made of small ones.
struct Anchored {
    compact_unevictable: String,
}

const COMPACT_UNEVICTABLE: &str = "/proc/sys/vm/compact_unevictable_allowed";

impl Anchored {
    fn new() -> Result<Self> {
        let compact_unevictable =
            std::fs::read_to_string(COMPACT_UNEVICTABLE).context(COMPACT_UNEVICTABLE)?;
        std::fs::write(COMPACT_UNEVICTABLE, "0").context(COMPACT_UNEVICTABLE)?;
        nix::sys::prctl::set_thp_disable(true).context("PR_SET_THP_DISABLE")?;
        mlockall(MlockAllFlags::MCL_CURRENT).context("mlockall")?;
        Ok(Self {
            compact_unevictable,
        })
    }
}

impl Drop for Anchored {
    fn drop(&mut self) {
        let undone = munlockall()
            .and(nix::sys::prctl::set_thp_disable(false))
            .map_err(std::io::Error::from)
            .and(std::fs::write(
                COMPACT_UNEVICTABLE,
                &self.compact_unevictable,
            ));
        if let Err(error) = undone {
            eprintln!("memory could not be let go again: {error}");
        }
    }
}

/// The step.
pub fn run(
    arguments: &Arguments,
    device: &Device<Kernel>,
    figures: &mut Figures,
) -> Result<String> {
    let sink = Area::fresh(SINK_PAGES)?;
    // No fork may take those pages from under the device; the rings are kept from children, too.
    sink.keep_from_children()?;
    let context = device.context(Options {
        ring_log2: 7,
        ..Options::default()
    })?;
    // What is mapped so far stays where it is; the area that changes is mapped afterwards.
    let anchored = Anchored::new()?;
    let fire = Area::fresh(PAGES)?;
    for page in 0..PAGES {
        fire.store_all(page..page + 1, word(page, Writer::Program, 1));
    }
    // The context's stop takes every page from the device, whatever the switch says; only then may
    // the switch be off, and pages move.
    let quiet = Quiet::new()?;
    let ignored = Ignored::new()?;
    let outcome = take_away(arguments, &context, &fire, &sink, figures);
    drop(context);
    drop(ignored);
    drop(anchored);
    let said = outcome?;
    if let Some(quiet) = &quiet {
        quiet.check()?;
    }
    Ok(said)
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
