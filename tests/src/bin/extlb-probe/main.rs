//! A guest program that works on a device that may be broken, and says how that ended.
//!
//! Runs inside the guest (`extlb run -- extlb-probe …`). Abuse of the driver is `extlb-abuse`.
#![allow(missing_docs)]

mod patient;

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
        Command::Patient { rounds, patience } => {
            patient::run(rounds, std::time::Duration::from_millis(patience))
        }
    }
}
