//! A guest program that treats the driver badly: hostile calls, and sudden death.
//!
//! Runs inside the guest (`extlb run -- extlb-probe …`). Prints what it did; exit code 0 means
//! that the driver answered everything with an errno and works as before.
#![allow(missing_docs)]

mod hostile;
mod kill;
mod patient;
mod proc_fs;
mod sys_unsafe;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes random calls on the device node, most of them nonsense.
    Hostile {
        /// Number of calls.
        #[arg(long, default_value_t = 20_000)]
        calls: u32,
        /// Seed; the same seed makes the same calls.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Kills processes whose memory the device works on, at random moments.
    Kill {
        /// Number of processes.
        #[arg(long, default_value_t = 40)]
        processes: u32,
        /// Seed of the moments.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Works until killed: copies in memory that is unmapped under the device all the time.
    Work,
    /// Works on a device that may be broken, and says how that ended.
    Patient {
        /// Number of operations.
        #[arg(long, default_value_t = 20)]
        rounds: u32,
        /// How long one may take, in ms.
        #[arg(long, default_value_t = 5000)]
        patience: u64,
    },
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Hostile { calls, seed } => hostile::run(calls, seed),
        Command::Kill { processes, seed } => kill::run(processes, seed),
        Command::Work => kill::work(),
        Command::Patient { rounds, patience } => {
            patient::run(rounds, std::time::Duration::from_millis(patience))
        }
    }
}
