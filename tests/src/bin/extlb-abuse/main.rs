//! A guest program that abuses the driver: hostile calls, sudden death, and the device or the
//! memory taken away in the midst of work.
//!
//! Each kind of abuse runs beside a bystander, a process with verified work for the device, which
//! must not lose an operation; each is followed by a look at what is left: contexts, objects and
//! pages of the kernel, and what kmemleak says if the kernel has it. Every step has a time limit; if
//! it runs out, the state of the machine is printed, and the program ends.
//!
//! Runs as root inside the guest (`extlb run -- extlb-abuse …`). Prints KTAP, and after each kind
//! its figures as a line of JSON behind `# json`. The same seed makes the same abuse.
#![allow(missing_docs)]

mod bystander;
mod fuzz;
mod fuzz_calls;
mod health;
mod kill;
mod proc_fs;
mod raw_context;
mod role;
mod sys_unsafe;
mod unload;
mod watch;

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;

use crate::bystander::Bystander;
use crate::health::Health;
use crate::watch::Watch;

/// Figures of a run, by name.
pub type Figures = BTreeMap<String, u64>;

#[derive(Parser)]
#[command(
    about,
    after_help = "Long runs, from the machine (the rig puts the program into the guest):\n  \
        extlb run --flavour debug -- target/debug/extlb-abuse fuzz --count 1000000 --threads 4\n  \
        extlb run --flavour debug -- target/debug/extlb-abuse kill --count 10000"
)]
struct Cli {
    /// Print the kinds of abuse, what one of their count is, and how many there are by default.
    #[arg(long)]
    list: bool,
    /// Seed; the same one makes the same abuse (of the calls: with one thread).
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many calls, processes or rounds, instead of each kind's own number.
    #[arg(long)]
    count: Option<u64>,
    /// Threads that make calls at once.
    #[arg(long, default_value_t = 1)]
    threads: u32,
    /// What another process of this program is to do.
    #[arg(long = "as", hide = true, num_args = 1.., allow_hyphen_values = true)]
    role: Vec<String>,
    /// Only these kinds.
    #[arg(value_name = "KIND")]
    only: Vec<String>,
}

/// A kind of abuse.
struct Kind {
    name: &'static str,
    about: &'static str,
    /// How many by default.
    count: u64,
    /// Whether the device goes away: the bystander then opens it again.
    device_goes: bool,
    run: fn(&Order) -> Result<Figures>,
}

/// What is asked of a kind.
pub struct Order<'a> {
    pub seed: u64,
    pub count: u64,
    pub threads: u32,
    pub watch: &'a Watch,
}

const KINDS: &[Kind] = &[
    Kind {
        name: "fuzz",
        about: "calls on the device node by an unprivileged program, most of them nonsense",
        count: 20_000,
        device_goes: false,
        run: fuzz::run,
    },
    Kind {
        name: "kill",
        about: "processes killed while the device works on their memory",
        count: 300,
        device_goes: false,
        run: kill::run,
    },
    Kind {
        name: "unload",
        about: "device unbound, reset, removed and driver unloaded while programs use it",
        count: 16,
        device_goes: true,
        run: unload::run,
    },
];

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    if !cli.role.is_empty() {
        role::play(&cli.role)?;
        return Ok(ExitCode::SUCCESS);
    }
    if cli.list {
        for kind in KINDS {
            println!("{}\t{}\t{}", kind.name, kind.count, kind.about);
        }
        return Ok(ExitCode::SUCCESS);
    }
    for name in &cli.only {
        let known = KINDS.iter().any(|kind| kind.name == name);
        ensure!(known, "no kind of abuse is called {name:?}; see --list");
    }
    let chosen = |kind: &&Kind| cli.only.is_empty() || cli.only.iter().any(|n| n == kind.name);
    let kinds: Vec<&Kind> = KINDS.iter().filter(chosen).collect();
    let mut failed = 0;
    println!("KTAP version 1\n1..{}", kinds.len());
    for (number, kind) in (1..).zip(kinds) {
        let watch = Watch::new(format!("not ok {number} {}", kind.name));
        let order = Order {
            seed: cli.seed,
            count: cli.count.unwrap_or(kind.count),
            threads: cli.threads,
            watch: &watch,
        };
        match run(kind, &order) {
            Ok(figures) => {
                println!("# json {}", serde_json::to_string(&figures)?);
                println!("ok {number} {}", kind.name);
            }
            Err(error) => {
                failed += 1;
                println!("not ok {number} {} # {error:#}", kind.name);
            }
        }
    }
    Ok(ExitCode::from(u8::from(failed > 0)))
}

/// One kind of abuse, the bystander beside it, and what is left of both.
fn run(kind: &Kind, order: &Order) -> Result<Figures> {
    let watch = order.watch;
    watch.step("look at the kernel's memory before");
    let before = Health::take()?;
    watch.step("start the bystander");
    let bystander = Bystander::start(kind.device_goes)?;
    watch.step(kind.about);
    let outcome = (kind.run)(order);
    watch.step("end the bystander");
    // What the abuse found comes first, should both have failed.
    let ended = bystander.end();
    let mut figures = outcome?;
    figures.extend(ended?);
    watch.step("look at the kernel's memory after");
    figures.extend(before.compare(order.count)?);
    Ok(figures)
}
