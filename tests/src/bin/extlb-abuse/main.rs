//! A guest program that abuses the driver: hostile calls, sudden death, and the device or the
//! memory taken away in the midst of work.
//!
//! The device is never unplugged by QEMU, which ends at that with any vfio-user device that has
//! MSI-X; the kernel's own removal and rescan of the bus take the driver through the same.
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
mod cgroup;
mod forks;
mod fuzz;
mod fuzz_calls;
mod health;
mod kill;
mod offline;
mod oom;
mod proc_fs;
mod raw_context;
mod role;
mod share;
mod slabs;
mod stop;
mod sys_unsafe;
mod timeout;
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
    after_help = "From the machine (the rig puts the program into the guest); the long runs:\n  \
        extlb run --flavour debug -- target/debug/extlb-abuse fuzz --count 1000000 --threads 4\n  \
        extlb run --flavour debug -- target/debug/extlb-abuse kill --count 10000\n  \
        extlb run --memory 384M -- target/debug/extlb-abuse oom exhaust limit stop share forks --count 50\n  \
        extlb run --append movablecore=512M -- target/debug/extlb-abuse offline --count 100\n\
        The device for `timeout` is a profile with these lines, for after = 200, 800 and 1600:\n  \
        [[device.fault]]\n  kind = 'skip-ack'\n  after = 200\n  times = 8"
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

/// Who uses the device beside the abuse.
#[derive(Clone, Copy)]
enum Beside {
    /// Somebody who must not lose an operation.
    Undisturbed,
    /// Somebody who opens it again when it has gone.
    Reopens,
    /// All who use it are hit, and are looked after by the kind itself.
    Nobody,
}

/// A kind of abuse.
struct Kind {
    name: &'static str,
    about: &'static str,
    /// How many by default.
    count: u64,
    beside: Beside,
    /// What the machine must have for it; then it runs only if it is named.
    needs: Option<&'static str>,
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
        beside: Beside::Undisturbed,
        needs: None,
        run: fuzz::run,
    },
    Kind {
        name: "kill",
        about: "processes killed while the device works on their memory",
        count: 300,
        beside: Beside::Undisturbed,
        needs: None,
        run: kill::run,
    },
    Kind {
        name: "unload",
        about: "device unbound, reset, removed and driver unloaded while programs use it",
        count: 16,
        beside: Beside::Reopens,
        needs: None,
        run: unload::run,
    },
    Kind {
        name: "oom",
        about: "processes killed for lack of memory of their group",
        count: 2,
        beside: Beside::Undisturbed,
        needs: None,
        run: oom::run,
    },
    Kind {
        name: "exhaust",
        about: "processes killed for lack of memory of the machine",
        count: 2,
        beside: Beside::Undisturbed,
        needs: None,
        run: oom::exhaust,
    },
    Kind {
        name: "limit",
        about: "work on more memory than a control group may have",
        count: 1,
        beside: Beside::Undisturbed,
        needs: None,
        run: oom::limit,
    },
    Kind {
        name: "stop",
        about: "processes stopped in the midst of work, and continued or killed",
        count: 8,
        beside: Beside::Undisturbed,
        needs: None,
        run: stop::run,
    },
    Kind {
        name: "share",
        about: "memory that two processes share changed under both",
        count: 16,
        beside: Beside::Undisturbed,
        needs: None,
        run: share::run,
    },
    Kind {
        name: "forks",
        about: "fork bombs of processes with contexts",
        count: 1,
        beside: Beside::Undisturbed,
        needs: None,
        run: forks::run,
    },
    Kind {
        name: "offline",
        about: "blocks of memory taken out of the machine while the device works on them",
        count: 3,
        beside: Beside::Undisturbed,
        needs: Some("a kernel with movablecore= on its command line"),
        run: offline::run,
    },
    Kind {
        name: "timeout",
        about: "a device that does not acknowledge, with one limit after another",
        count: 3,
        beside: Beside::Nobody,
        needs: Some("a device whose plan skips acknowledgements three times, see --help"),
        run: timeout::run,
    },
];

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    if !cli.role.is_empty() {
        let words: Vec<&str> = cli.role.iter().map(String::as_str).collect();
        role::play(&words)?;
        return Ok(ExitCode::SUCCESS);
    }
    if cli.list {
        for kind in KINDS {
            print!("{}\t{}\t{}", kind.name, kind.count, kind.about);
            match kind.needs {
                None => println!(),
                Some(needs) => println!("; needs {needs}"),
            }
        }
        return Ok(ExitCode::SUCCESS);
    }
    for name in &cli.only {
        let known = KINDS.iter().any(|kind| kind.name == name);
        ensure!(known, "no kind of abuse is called {name:?}; see --list");
    }
    let chosen = |kind: &&Kind| {
        let named = cli.only.iter().any(|name| name == kind.name);
        named || cli.only.is_empty() && kind.needs.is_none()
    };
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
    let bystander = match kind.beside {
        Beside::Undisturbed => Some(Bystander::start(false)?),
        Beside::Reopens => Some(Bystander::start(true)?),
        Beside::Nobody => None,
    };
    watch.step(kind.about);
    let outcome = (kind.run)(order);
    watch.step("end the bystander");
    // What the abuse found comes first, should both have failed.
    let ended = bystander.map(Bystander::end).transpose();
    let mut figures = outcome?;
    figures.extend(ended?.unwrap_or_default());
    watch.step("look at the kernel's memory after");
    figures.extend(before.compare(order.count)?);
    Ok(figures)
}
