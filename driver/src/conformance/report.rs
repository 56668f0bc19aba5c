//! What came of the checks.

use std::fmt;
use std::time::Duration;

/// What came of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It holds.
    Passed,
    /// The backing does not have this, and says so: how.
    Unsupported(String),
    /// It does not hold: what was seen.
    Failed(String),
}

/// A check that was run.
#[derive(Clone, Debug)]
pub struct Check {
    /// What is claimed.
    pub name: &'static str,
    /// What came of it.
    pub outcome: Outcome,
    /// How long it took.
    pub took: Duration,
}

/// All checks of a backing. As text it is a table.
#[derive(Clone, Debug)]
pub struct Report {
    /// The backing.
    pub subject: String,
    /// In the order in which they ran.
    pub checks: Vec<Check>,
}

impl Report {
    /// Whether there were checks and none failed.
    pub fn is_good(&self) -> bool {
        !self.checks.is_empty() && self.failed().next().is_none()
    }

    /// Those that failed.
    pub fn failed(&self) -> impl Iterator<Item = &Check> {
        let failed = |check: &&Check| matches!(check.outcome, Outcome::Failed(_));
        self.checks.iter().filter(failed)
    }

    fn count(&self, of: fn(&Outcome) -> bool) -> usize {
        let checks = self.checks.iter();
        checks.filter(|check| of(&check.outcome)).count()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.checks.iter().map(|check| check.name.len()).max();
        let width = width.unwrap_or(0);
        writeln!(f, "{}", self.subject)?;
        for check in &self.checks {
            let (word, why) = match &check.outcome {
                Outcome::Passed => ("passed", ""),
                Outcome::Unsupported(why) => ("unsupported", why.as_str()),
                Outcome::Failed(why) => ("FAILED", why.as_str()),
            };
            let ms = check.took.as_millis();
            let line = format!("  {:width$}  {ms:>6} ms  {word:11}  {why}", check.name);
            writeln!(f, "{}", line.trim_end())?;
        }
        write!(
            f,
            "  {} passed, {} unsupported, {} failed",
            self.count(|outcome| *outcome == Outcome::Passed),
            self.count(|outcome| matches!(outcome, Outcome::Unsupported(_))),
            self.failed().count()
        )
    }
}
