//! `extlb test`: suites that somebody else wrote, or that speak the kernel's way, run in a guest and
//! compared with what is expected of them.

mod build;
mod expected;
mod tap;

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::cli::{MachineArguments, tell};
use crate::outcome::{End, FAILED};
use crate::paths;
use crate::rig::{Options, Rig};
use crate::run::{Addition, Request, run_command};
use crate::vm::{Input, Sinks};
use expected::{Compared, Expected};
use tap::{Report, Verdict};

/// A suite.
struct Suite {
    name: &'static str,
    /// The file to compile: of the kernel's source, or of `folder`.
    source: &'static str,
    /// The folder of this repository that it is in, if it is ours.
    folder: Option<&'static str>,
    /// The file of `tests/expected`.
    expected: &'static str,
    /// Words for the kernel's command line.
    append: &'static str,
    /// What is done in the guest before.
    prelude: &'static str,
}

/// The kernel's suite for devices that mirror a process's page table. Without huge pages two of its
/// tests would pass without having tested anything.
const HMM: Suite = Suite {
    name: "hmm",
    source: "tools/testing/selftests/mm/hmm-tests.c",
    folder: None,
    expected: "hmm-tests.toml",
    append: " extlb.hmm=1",
    prelude: "echo 4 > /proc/sys/vm/nr_hugepages && mount -t tmpfs tmpfs /tmp",
};

/// The driver's own, in the kernel's way.
const SELFTEST: Suite = Suite {
    name: "selftest",
    source: "extlb_test.c",
    folder: Some("driver/kernel/selftests"),
    expected: "selftest.toml",
    append: "",
    prelude: "true",
};

/// The driver's own of the same interface: what the kernel's does not ask.
const MIRROR: Suite = Suite {
    name: "mirror",
    source: "mirror_test.c",
    folder: Some("driver/kernel/selftests"),
    expected: "mirror.toml",
    append: " extlb.hmm=1",
    prelude: "true",
};

/// Where the program is in the guest.
const PROGRAM: &str = "/bin/extlb-suite";
/// How long a suite may take, boot included, unless the user says otherwise.
const LIMIT: Duration = Duration::from_secs(300);

/// Which suite.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Name {
    /// The kernel's own hmm-tests, unmodified, against /dev/hmm_dmirror* of the driver
    Hmm,
    /// What hmm-tests do not ask of /dev/hmm_dmirror0: arguments that make no sense, limits, kills
    Mirror,
    /// The driver's own tests in C (driver/kernel/selftests), against /dev/extlb0
    Selftest,
}

impl Name {
    fn suite(self) -> &'static Suite {
        match self {
            Self::Hmm => &HMM,
            Self::Mirror => &MIRROR,
            Self::Selftest => &SELFTEST,
        }
    }
}

/// Options of a suite.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The suite
    #[arg(value_enum)]
    suite: Name,
    /// Write the results as JSON
    #[arg(long, value_name = "OUT")]
    json: Option<PathBuf>,
    /// A command for the guest's shell before the suite begins
    #[arg(long, value_name = "CMD", default_value = "true")]
    before: String,
    #[command(flatten)]
    machine: MachineArguments,
}

/// What goes into the JSON file.
#[derive(Debug, Serialize)]
struct Results<'a> {
    suite: &'a str,
    as_expected: bool,
    tests: &'a [Compared],
    differences: &'a [String],
}

/// Runs the suite; returns the exit code.
pub fn run(options: &Options, arguments: &Arguments) -> Result<i32> {
    let suite = arguments.suite.suite();
    let expected = Expected::load(&paths::repo().join("tests/expected").join(suite.expected))?;
    let rig = Rig::prepare(options)?;
    let program = build::program(&rig.cache, &rig.binary, suite)?;
    let mut profile = arguments.machine.profile(options, "default")?;
    profile.append.push_str(suite.append);
    let script = format!(
        "{} && {{ {}; }} && exec {PROGRAM}",
        suite.prelude, arguments.before
    );
    let request = Request {
        add: vec![Addition {
            host: program,
            guest: PROGRAM.into(),
        }],
        profile,
        timeout: Some(arguments.machine.timeout().unwrap_or(LIMIT)),
        ..Request::new(["sh", "-c", &script])
    };
    let kept = Kept::default();
    let sinks = || Sinks {
        stdout: Box::new(kept.anew()),
        stderr: Box::new(io::stderr()),
    };
    let outcome = run_command(&rig, &request, Input::Empty, &sinks)?;
    let code = tell(&outcome);

    let report = Report::read(&kept.text());
    let tests = expected.compare(&report);
    let differences = differences(&report, &tests);
    for line in &differences {
        eprintln!("extlb: {line}");
    }
    // Tests that fail make the program fail, so its own code says nothing.
    let ended = outcome.sound() && matches!(outcome.end, End::Exited(_));
    let as_expected = ended && differences.is_empty();
    if as_expected {
        eprintln!("extlb: {}", summary(&tests));
    }
    if let Some(path) = &arguments.json {
        let results = Results {
            suite: suite.name,
            as_expected,
            tests: &tests,
            differences: &differences,
        };
        fs::write(path, serde_json::to_vec_pretty(&results)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(match (ended, as_expected) {
        (_, true) => 0,
        (true, false) => FAILED,
        (false, false) => code,
    })
}

/// In what a report is not as expected, a line each.
fn differences(report: &Report, tests: &[Compared]) -> Vec<String> {
    let mut lines: Vec<String> = tests
        .iter()
        .filter(|test| !test.holds())
        .map(told)
        .collect();
    let ended = report.lines.len();
    match report.plan {
        Some(plan) if plan == ended => {}
        Some(plan) => lines.push(format!("{plan} tests were announced, {ended} ended")),
        None => lines.push("the suite did not say how many tests it has".to_owned()),
    }
    lines
}

fn told(test: &Compared) -> String {
    let name = &test.name;
    let result = match test.result {
        Some(verdict) => word(verdict),
        None => "was not run",
    };
    match (test.expected, &test.why) {
        (None, _) => format!("{name} {result}; nothing is known of it"),
        (Some(Verdict::Pass), _) => format!("{name} {result}; it should pass"),
        (Some(expected), why) => format!(
            "{name} {result}; it should {}: {}",
            match expected {
                Verdict::Skip => "be skipped",
                _ => "fail",
            },
            why.as_deref().unwrap_or_default()
        ),
    }
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Pass => "passed",
        Verdict::Fail => "failed",
        Verdict::Skip => "was skipped",
    }
}

fn summary(tests: &[Compared]) -> String {
    let count = |verdict| {
        let same = |test: &&Compared| test.result == Some(verdict);
        tests.iter().filter(same).count()
    };
    format!(
        "{} tests, all as expected: {} passed, {} failed, {} were skipped",
        tests.len(),
        count(Verdict::Pass),
        count(Verdict::Fail),
        count(Verdict::Skip)
    )
}

/// Prints what comes, and keeps it.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Kept {
    /// For another try: what an earlier one has left does not count.
    fn anew(&self) -> Self {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        self.clone()
    }

    fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend_from_slice(bytes);
        io::stdout().write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_told_in_words() {
        let test = |result, expected, why: Option<&str>| Compared {
            name: "t".into(),
            result,
            expected,
            why: why.map(str::to_owned),
        };
        let tests = [
            test(Some(Verdict::Fail), Some(Verdict::Pass), None),
            test(Some(Verdict::Pass), Some(Verdict::Fail), Some("no memory")),
            test(None, Some(Verdict::Skip), Some("no device")),
            test(Some(Verdict::Pass), None, None),
            test(Some(Verdict::Pass), Some(Verdict::Pass), None),
        ];
        let report = Report {
            plan: Some(5),
            lines: Vec::new(),
        };
        assert_eq!(
            differences(&report, &tests),
            [
                "t failed; it should pass",
                "t passed; it should fail: no memory",
                "t was not run; it should be skipped: no device",
                "t passed; nothing is known of it",
                "5 tests were announced, 0 ended",
            ]
        );
    }
}
