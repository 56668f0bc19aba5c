//! The tour: what an extlb device can do that others cannot, shown and measured.

mod demand_faults;
mod figures;
mod hog;
mod load;
mod memory_pressure;
mod memory_unsafe;
mod mutator;
mod negative_control;
mod notifiers;
mod pinned;
mod procfs;
mod random;
mod small_copies;
mod traffic;
mod unmap_under_fire;
mod vfio;
mod words;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};
use extlb_driver::{Device, Kernel};
use figures::{Figures, Report, StepReport};

/// Where the guest has the input file.
const DEFAULT_INPUT: &str = "/mnt/input/input";

/// The working set of the step memory-pressure, in MiB, unless a smaller one is asked for.
const WORKING_SET: u64 = 512;

/// Shows what the device can do, step by step; exits 0 if all of it holds.
#[derive(Debug, Parser)]
#[command(name = "extlb-tour")]
struct Arguments {
    /// File for the step demand-faults, at least 64 MiB [default: /mnt/input/input]
    #[arg(long)]
    input: Option<PathBuf>,
    /// Where to write the figures, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Do this step only; may be repeated
    #[arg(long = "step", value_name = "NAME")]
    steps: Vec<String>,
    /// Operations on the memory in the step unmap-under-fire
    #[arg(long, default_value_t = 10_000)]
    operations: u64,
    /// MiB that the device works on in the step memory-pressure; more than the guest has
    #[arg(long, value_name = "MIB", default_value_t = WORKING_SET,
          value_parser = clap::value_parser!(u64).range(64..=WORKING_SET))]
    working_set: u64,
    /// How often the step memory-pressure writes and verifies all of it
    #[arg(long, value_name = "TIMES", default_value = "2", value_parser = rounds)]
    rounds: usize,
    /// The tour on an ordinary kernel: the device is bound to vfio-pci, EXTLB_BDF says where it is
    #[arg(long)]
    vfio: bool,
    /// Seed of everything that is random
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Name the steps, and do nothing
    #[arg(long)]
    list: bool,
    #[command(subcommand)]
    command: Option<Other>,
}

#[derive(Debug, Subcommand)]
enum Other {
    /// Keep the device busy until killed, so that other programs run beside it
    Load {
        /// End after this many seconds
        #[arg(long)]
        seconds: Option<u64>,
    },
    /// Measure what following a process costs, by each way; for `extlb bench notifiers`
    #[command(hide = true)]
    Notifiers {
        /// MiB that change
        mib: usize,
    },
    /// Part of the step memory-pressure: pin memory, which must fail
    #[command(hide = true)]
    PinnedChild {
        /// MiB to pin
        mib: u64,
    },
    /// Part of the step memory-pressure with --vfio: lock memory, which must fail
    #[command(hide = true)]
    VfioChild {
        /// MiB to lock
        mib: u64,
    },
}

/// The patterns of two rounds are different all over; there are no more.
fn rounds(text: &str) -> Result<usize, String> {
    match text {
        "1" => Ok(1),
        "2" => Ok(2),
        _ => Err("1 or 2".to_owned()),
    }
}

type Step = fn(&Arguments, &Device<Kernel>, &mut Figures) -> Result<String>;

/// The steps in the order in which they are done.
const STEPS: [(&str, Step); 4] = [
    ("demand-faults", demand_faults::run),
    ("unmap-under-fire", unmap_under_fire::run),
    ("memory-pressure", memory_pressure::run),
    ("negative-control", negative_control::run),
];

/// The program.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match &arguments.command {
        Some(Other::Load { seconds }) => load::run(*seconds).map(|()| true),
        Some(Other::Notifiers { mib }) => notifiers::run(*mib).map(|()| true),
        Some(Other::PinnedChild { mib }) => return pinned::child(*mib),
        Some(Other::VfioChild { mib }) => return vfio::child(*mib),
        None => tour(&arguments),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("extlb-tour: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does the steps; whether all passed.
fn tour(arguments: &Arguments) -> Result<bool> {
    let names = match arguments.vfio {
        true => vfio::STEPS.to_vec(),
        false => STEPS.map(|(name, _)| name).to_vec(),
    };
    if arguments.list {
        names.iter().for_each(|name| println!("{name}"));
        return Ok(true);
    }
    for name in &arguments.steps {
        if !names.contains(&name.as_str()) {
            bail!("there is no step {name:?}; --list names them");
        }
    }
    let mut runner = Runner {
        wanted: arguments.steps.clone(),
        report: Report {
            passed: true,
            steps: Vec::new(),
        },
    };
    if arguments.vfio {
        vfio::run(arguments, &mut runner)?;
    } else {
        let device = Device::open(Kernel::new())?;
        for (name, step) in STEPS {
            runner.step(name, |figures| step(arguments, &device, figures));
        }
    }
    let report = runner.report;
    if let Some(path) = &arguments.json {
        let text = serde_json::to_vec_pretty(&report)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(report.passed)
}

/// Does one step after the other and keeps what comes of them.
struct Runner {
    /// All, if there are none.
    wanted: Vec<String>,
    report: Report,
}

impl Runner {
    /// Does a step, if it is wanted.
    fn step(&mut self, name: &'static str, step: impl FnOnce(&mut Figures) -> Result<String>) {
        if !self.wanted.is_empty() && !self.wanted.iter().any(|wanted| wanted == name) {
            return;
        }
        println!("---- {name}");
        let mut figures = Figures::default();
        let begun = std::time::Instant::now();
        let outcome = step(&mut figures);
        figures
            .seconds
            .get_or_insert(figures::seconds(begun.elapsed()));
        let why = match outcome {
            Ok(summary) => {
                println!("PASS {name}: {summary}");
                None
            }
            Err(error) => {
                let why = format!("{error:#}");
                println!("FAIL {name}: {why}");
                Some(why)
            }
        };
        self.report.passed &= why.is_none();
        self.report.steps.push(StepReport {
            name,
            passed: why.is_none(),
            why,
            figures,
        });
    }
}
