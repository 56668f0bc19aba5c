//! A guest program that changes ptes in every way there is, and sees the device follow.
//!
//! Each row gives the device memory, sees that it has it, changes it as its name says, checks that
//! the change took place, and then has the device compare its translations with the page table.
//! The rows, and which places in the kernel they exercise, are in the table of `kernel-patch/`.
//!
//! Prints KTAP. With `--expect-broken` the driver does not hear of the changes: then a row passes
//! if that is found.
#![allow(missing_docs)]

mod area_unsafe;
mod figures;
mod proc_fs;
mod rows;
mod sys_unsafe;
mod trial;
mod uffd_unsafe;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;

use crate::rows::held::HELD;
use crate::rows::{ROWS, Row};
use crate::trial::{Mode, Skip, Trial};

#[derive(Parser)]
#[command(about)]
struct Cli {
    /// Let the driver ignore the notifier during each change, and pass if that is found.
    #[arg(long)]
    expect_broken: bool,
    /// Unmap many pages in each of the ways that the kernel has, with and without batches, and
    /// print how often the device was waited for, and how long a page took.
    #[arg(long)]
    figures: bool,
    /// With `--figures`: let the driver leave batches incomplete, and pass if that is found.
    #[arg(long, requires = "figures")]
    broken_batches: bool,
    /// With `--figures`: number of pages for each.
    #[arg(long, default_value_t = 16384, requires = "figures")]
    pages: usize,
    /// With `--figures`: print JSON, an object a line.
    #[arg(long, requires = "figures")]
    json: bool,
    /// Print the names of the rows, and whether an audit finds them broken.
    #[arg(long)]
    list: bool,
    /// The rows of changes that come while the driver is about to map pages, instead of the others.
    #[arg(long, conflicts_with = "expect_broken")]
    held: bool,
    /// What another process does for a row: reclaim memory of a process, from an address to another.
    #[arg(long, hide = true, num_args = 3)]
    page_out: Vec<u64>,
    /// What another process does for a row: give the device memory, and end in this way.
    #[arg(long, hide = true)]
    live: Option<String>,
    /// Only these rows.
    #[arg(value_name = "ROW")]
    only: Vec<String>,
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let all = match cli.held {
        true => HELD,
        false => ROWS,
    };
    if cli.list {
        for row in all {
            println!("{}\t{}", row.name, row.seen.reason().unwrap_or("audit"));
        }
        return Ok(ExitCode::SUCCESS);
    }
    if !cli.page_out.is_empty() {
        rows::reclaim::as_other_process(&cli.page_out)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(how) = &cli.live {
        rows::process::live(how)?;
        return Ok(ExitCode::SUCCESS);
    }
    if cli.figures {
        proc_fs::prepare()?;
        match cli.broken_batches {
            true => figures::broken_batches()?,
            false => figures::print(cli.pages, cli.json)?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    for name in &cli.only {
        let known = all.iter().any(|row| row.name == name);
        ensure!(known, "no row is called {name:?}");
    }
    let chosen = |row: &&Row| cli.only.is_empty() || cli.only.iter().any(|name| name == row.name);
    let rows: Vec<&Row> = all.iter().filter(chosen).collect();
    let mode = match cli.expect_broken {
        true => Mode::Broken,
        false => Mode::Sound,
    };
    proc_fs::prepare()?;
    let mut failed = 0;
    println!("KTAP version 1\n1..{}", rows.len());
    for (number, row) in (1..).zip(rows) {
        failed += u32::from(!report(number, row, mode));
    }
    Ok(ExitCode::from(u8::from(failed > 0)))
}

/// Runs a row and prints its line; whether it is not a failure.
fn report(number: u32, row: &Row, mode: Mode) -> bool {
    let outcome = Trial::new(mode).and_then(|mut trial| {
        (row.run)(&mut trial)?;
        let seen = row.seen_by(trial.way);
        trial.finish(seen)
    });
    let name = row.name;
    match outcome {
        Ok(note) => println!("ok {number} {name} # {note}"),
        Err(error) => match error.downcast_ref::<Skip>() {
            Some(Skip(reason)) => println!("ok {number} {name} # SKIP {reason}"),
            None => {
                println!("not ok {number} {name} # {error:#}");
                return false;
            }
        },
    }
    true
}
