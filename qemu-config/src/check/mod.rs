//! `extlb kernel check`: the patches and the driver under the kernel's own tools.
//!
//! Each check says what it looked at and what it found in lines of ours. What may stay although a
//! checker does not like it stands, with the reason, in `kernel/check-exceptions.toml`.

mod checks;
mod findings;
mod objects;
mod tree;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::outcome::FAILED;
use crate::paths::{self, Cache};
use crate::progress::{Step, clock};
use checks::CHECKS;
use findings::{Exceptions, Finding};
use tree::{Sources, Tree};

/// Findings shown for one check.
const SHOWN: usize = 40;

/// Options of the check.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Arguments {
    /// Do this check only; may be repeated
    #[arg(long, value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::new(CHECKS.map(|check| check.name)))]
    only: Vec<String>,
    /// Name the checks, and do nothing
    #[arg(long)]
    list: bool,
    /// Build the whole kernel after each patch, too: minutes for every patch
    #[arg(long)]
    each_patch: bool,
    /// Write the results as JSON
    #[arg(long, value_name = "OUT")]
    json: Option<PathBuf>,
    /// Check the patches of this folder [default: the repository's]
    #[arg(long, value_name = "DIR")]
    patches: Option<PathBuf>,
    /// Check the driver in this folder [default: the repository's]
    #[arg(long, value_name = "DIR")]
    driver: Option<PathBuf>,
}

/// A check's result.
#[derive(Debug, Serialize)]
struct Checked {
    name: &'static str,
    passed: bool,
    /// What was looked at.
    subject: String,
    seconds: f64,
    findings: Vec<Finding>,
}

/// All results.
#[derive(Debug, Serialize)]
struct Report {
    passed: bool,
    checks: Vec<Checked>,
}

/// Does the checks; returns the exit code.
pub fn run(cache: &Cache, rig: &Path, arguments: &Arguments) -> Result<i32> {
    let wanted = CHECKS.iter().filter(|check| {
        let named = arguments.only.iter().any(|name| name == check.name);
        named || (arguments.only.is_empty() && (!check.long || arguments.each_patch))
    });
    if arguments.list {
        for check in &CHECKS {
            println!("{:12}  {}", check.name, check.what);
        }
        return Ok(0);
    }
    let exceptions = paths::repo().join("qemu-config/kernel/check-exceptions.toml");
    let exceptions = fs::read_to_string(&exceptions)
        .with_context(|| format!("cannot read {}", exceptions.display()))?;
    let exceptions = Exceptions::parse(&exceptions)?;
    if let Some(unknown) = exceptions
        .checks()
        .find(|name| CHECKS.iter().all(|check| check.name != *name))
    {
        bail!("check-exceptions.toml has an exception for {unknown:?}, which is no check");
    }
    let or_ours = |given: &Option<PathBuf>, ours: &str| {
        given.clone().unwrap_or_else(|| paths::repo().join(ours))
    };
    let sources = Sources {
        patches: or_ours(&arguments.patches, "kernel-patch/linux-6.12"),
        driver: or_ours(&arguments.driver, "driver/kernel"),
    };
    let mut tree = Tree::unpack(cache, rig, sources)?;
    let mut report = Report {
        passed: true,
        checks: Vec::new(),
    };
    for check in wanted {
        let begun = Instant::now();
        let mut step = Step::begin(format!("checking: {}", check.what));
        let (subject, found) = (check.run)(&mut tree, &mut step)
            .with_context(|| format!("the check {} cannot be done", check.name))?;
        drop(step);
        let findings = exceptions.apply(check.name, found);
        let passed = findings.is_empty();
        println!(
            "{} {}: {subject} ({})",
            if passed { "PASS" } else { "FAIL" },
            check.name,
            clock(begun.elapsed())
        );
        for finding in findings.iter().take(SHOWN) {
            println!("    {finding}");
        }
        if findings.len() > SHOWN {
            println!("    and {} more", findings.len() - SHOWN);
        }
        report.passed &= passed;
        report.checks.push(Checked {
            name: check.name,
            passed,
            subject,
            seconds: (begun.elapsed().as_secs_f64() * 10.0).round() / 10.0,
            findings,
        });
    }
    if let Some(path) = &arguments.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("{}", if report.passed { "PASS" } else { "FAIL" });
    Ok(if report.passed { 0 } else { FAILED })
}
