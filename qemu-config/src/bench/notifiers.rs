//! `extlb bench notifiers`: what following a process costs, by each way.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use extlb_guest_protocol::figures::{Change, Way};
use serde::Serialize;

use super::{aligned, said_in_guest, short, write_json};
use crate::rig::{Options, Rig};

/// Options of the comparison.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Write all figures as JSON
    #[arg(long, value_name = "OUT")]
    json: Option<PathBuf>,
    /// How much memory changes, in MiB: a power of two, 32 at least
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = mebibytes)]
    size: usize,
}

fn mebibytes(text: &str) -> Result<usize> {
    let size: usize = text.parse().context("no number")?;
    ensure!(
        size.is_power_of_two() && (32..=256).contains(&size),
        "a power of two from 32 to 256: the guest has 1 GiB"
    );
    Ok(size)
}

/// All figures.
#[derive(Debug, Serialize)]
struct Report {
    mib: usize,
    /// The first has no device, and is what the others are set against.
    ways: Vec<Way>,
}

/// Does it; returns the exit code.
pub fn run(options: &Options, arguments: &Arguments) -> Result<i32> {
    if options.no_device || options.bind.is_some() || options.follow.is_some() {
        bail!("a comparison chooses how to follow the process itself");
    }
    let rig = Rig::prepare(options)?;
    let script = format!("exec extlb-tour notifiers {}", arguments.size);
    let text = said_in_guest(&rig, Vec::new(), "every way to follow a process", &script)?;
    let lines = text.lines().map(serde_json::from_str);
    let ways: Vec<Way> = lines.collect::<Result<_, _>>().context("no figures")?;
    ensure!(ways.len() > 1, "no way to follow a process in this kernel");
    let report = Report {
        mib: arguments.size,
        ways,
    };
    print!("{}", table(&report));
    write_json(arguments.json.as_deref(), &report)?;
    Ok(0)
}

/// A figure of the table: its heading, and the cell for a change, given the change with no device.
type Figure = (&'static str, fn(&Change, &Change) -> String);

/// The figures, each a block of lines of the table, a line a change.
const FIGURES: [Figure; 6] = [
    ("time, ms", |change, floor| {
        let ratio = change.ns as f64 / floor.ns.max(1) as f64;
        let text = short(change.ns as f64 / 1e6);
        match std::ptr::eq(change, floor) {
            true => text,
            false => format!("{text} (x{})", short(ratio)),
        }
    }),
    ("callbacks", |change, _| change.callbacks.to_string()),
    ("pages shot down", |change, _| change.shot.to_string()),
    ("beyond those that changed", |change, _| {
        match change.name.as_str() {
            BUSY => "-".to_owned(),
            _ => change.beyond.to_string(),
        }
    }),
    ("shootdown, us: p50, p99", |change, _| {
        match change.shootdowns {
            0 => "-".to_owned(),
            _ => format!(
                "{}, {}",
                short(change.p50_ns as f64 / 1e3),
                short(change.p99_ns as f64 / 1e3)
            ),
        }
    }),
    ("looked up again / requests", |change, _| {
        format!("{} / {}", change.retried, change.page_requests)
    }),
];

/// The only change under which the device works, so that only there a page is asked for again.
const BUSY: &str = "parts, busy";

/// The table: a block for each figure, a line for each change, a column for each way.
fn table(report: &Report) -> String {
    let Some((floor, others)) = report.ways.split_first() else {
        return String::new();
    };
    let mut rows = Vec::new();
    for (at, (heading, cell)) in FIGURES.iter().enumerate() {
        let mut head = vec![(*heading).to_owned()];
        // What is not the time is not there without a device.
        let with = report.ways.iter().skip(usize::from(at > 0));
        head.extend(with.clone().map(|way| way.way.clone()));
        if at > 0 {
            head.insert(1, String::new());
            rows.push(Vec::new());
        }
        rows.push(head);
        for none in &floor.changes {
            let mut line = vec![format!("  {}", none.name)];
            line.push(match at {
                0 => cell(none, none),
                _ => String::new(),
            });
            for way in others {
                let same = way.changes.iter().find(|change| change.name == none.name);
                line.push(same.map_or_else(|| "-".to_owned(), |change| cell(change, none)));
            }
            rows.push(line);
        }
    }
    let went = others.iter().map(|way| {
        let change = way.changes.iter().find(|change| change.name == "reclaim");
        format!(
            "{} {}",
            way.way,
            change.map_or(0, |change| change.changed >> 8)
        )
    });
    format!(
        "{}\nOf {} MiB; the device has all of it, and 16 MiB beside it that are left alone. parts: \
         64 KiB given up and touched again, 500 times.\n(xN) is the time set against no device. \
         Reclaimed, in MiB: {}.\n",
        aligned(&rows),
        report.mib,
        went.collect::<Vec<_>>().join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(name: &str, ns: u64, callbacks: u64) -> Way {
        let change = |name: &str| Change {
            name: name.to_owned(),
            ns,
            changed: 65536,
            callbacks,
            shot: 65540,
            beyond: 4,
            shootdowns: callbacks,
            p50_ns: 2000,
            p99_ns: 30_000,
            retried: 3,
            page_requests: 9,
        };
        Way {
            way: name.to_owned(),
            changes: vec![change("reclaim"), change(BUSY)],
        }
    }

    #[test]
    fn every_figure_of_every_way_is_in_the_table() {
        let ways = vec![way("no device", 2_000_000, 0), way("pte", 5_000_000, 7)];
        let text = table(&Report { mib: 256, ways });
        let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
        assert_eq!(lines[0], "time, ms                    no device  pte");
        assert_eq!(
            lines[1],
            "  reclaim                   2.00       5.00 (x2.50)"
        );
        assert_eq!(lines[5], "  reclaim                              7");
        let blocks = text.split("\n\n").collect::<Vec<_>>();
        assert!(blocks[3].ends_with("-"), "{text}");
        assert!(blocks[4].contains("2.00, 30.0"), "{text}");
        assert!(blocks[5].contains("3 / 9"), "{text}");
        assert!(text.contains("Reclaimed, in MiB: pte 256."), "{text}");
    }
}
