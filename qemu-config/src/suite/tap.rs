//! Reading the Test Anything Protocol as the kernel's own suites speak it.

use serde::{Deserialize, Serialize};

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should.
    Pass,
    /// Otherwise.
    Fail,
    /// It could not be run.
    Skip,
}

/// What was said of a test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its name.
    pub name: String,
    /// How it ended.
    pub verdict: Verdict,
}

/// A whole report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How many tests were announced; `None` if that was not said.
    pub plan: Option<usize>,
    /// The tests, in the order in which they ended.
    pub lines: Vec<Line>,
}

impl Report {
    /// Reads a report; lines that are none of TAP's are somebody else's output.
    pub fn read(text: &str) -> Self {
        let mut report = Self::default();
        for line in text.lines() {
            if let Some(count) = line.strip_prefix("1..") {
                report.plan = count.trim().parse().ok();
            } else if let Some(line) = read_line(line) {
                report.lines.push(line);
            }
        }
        report
    }
}

/// `ok NUMBER NAME` or `not ok NUMBER NAME`, with or without a ` # REMARK`.
fn read_line(line: &str) -> Option<Line> {
    let (ok, rest) = match line.strip_prefix("not ok ") {
        Some(rest) => (false, rest),
        None => (true, line.strip_prefix("ok ")?),
    };
    let (number, rest) = rest.split_once(' ')?;
    number.parse::<u32>().ok()?;
    let (name, remark) = rest.split_once(" # ").unwrap_or((rest, ""));
    let name = name.trim().trim_start_matches("- ");
    // XFAIL and XPASS are the suite's own expectations; ours are of what happened.
    let verdict = match (ok, remark.starts_with("SKIP")) {
        (_, true) => Verdict::Skip,
        (true, _) => Verdict::Pass,
        (false, _) => Verdict::Fail,
    };
    Some(Line {
        name: name.to_owned(),
        verdict,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_and_what_is_none_is_passed_over() {
        let text = "TAP version 13\n1..4\n# Starting 4 tests\n#  RUN  a.one ...\nok 1 a.one\n\
                    not ok 2 a.two # too bad\nok 3 a.three # SKIP no such device\nok then\n\
                    ok 4 - a.four\n# Totals: pass:2\n";
        let report = Report::read(text);
        assert_eq!(report.plan, Some(4));
        let said: Vec<_> = report
            .lines
            .iter()
            .map(|line| (line.name.as_str(), line.verdict))
            .collect();
        assert_eq!(
            said,
            [
                ("a.one", Verdict::Pass),
                ("a.two", Verdict::Fail),
                ("a.three", Verdict::Skip),
                ("a.four", Verdict::Pass),
            ]
        );
    }

    #[test]
    fn nothing_is_no_plan() {
        assert_eq!(Report::read(""), Report::default());
        assert_eq!(Report::read("1..many\n").plan, None);
    }
}
