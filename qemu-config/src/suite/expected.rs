//! What a suite is expected to say, test by test, and in what a report differs from that.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::tap::{Report, Verdict};

/// A file of expectations: `"NAME" = "pass"`, or `{ fail = "why" }`, or `{ skip = "why" }`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expected {
    tests: BTreeMap<String, Entry>,
}

/// A test that does not pass has a reason.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Entry {
    Pass,
    Fail(String),
    Skip(String),
}

impl Entry {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Pass => Verdict::Pass,
            Self::Fail(_) => Verdict::Fail,
            Self::Skip(_) => Verdict::Skip,
        }
    }

    fn why(&self) -> Option<&str> {
        match self {
            Self::Pass => None,
            Self::Fail(why) | Self::Skip(why) => Some(why),
        }
    }
}

/// A test, as it was and as it should have been.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Compared {
    /// Its name.
    pub name: String,
    /// What was reported; `None` if nothing was.
    pub result: Option<Verdict>,
    /// What was expected; `None` if the test is not known.
    pub expected: Option<Verdict>,
    /// Why it is not expected to pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl Compared {
    /// Whether it is as expected.
    pub fn holds(&self) -> bool {
        self.result.is_some() && self.result == self.expected
    }
}

impl Expected {
    /// Reads a file.
    ///
    /// # Errors
    /// When there is none, or it makes no sense.
    pub fn load(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{} makes no sense", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let expected: Self = toml::from_str(text)?;
        if expected.tests.is_empty() {
            bail!("no test is named");
        }
        Ok(expected)
    }

    /// Every test that is expected or was reported, in the order of the report.
    pub fn compare(&self, report: &Report) -> Vec<Compared> {
        let mut seen = BTreeSet::new();
        let mut all: Vec<Compared> = report
            .lines
            .iter()
            .map(|line| {
                let entry = self.tests.get(&line.name);
                // A name that comes twice is not known the second time.
                let entry = entry.filter(|_| seen.insert(line.name.as_str()));
                Compared {
                    name: line.name.clone(),
                    result: Some(line.verdict),
                    expected: entry.map(Entry::verdict),
                    why: entry.and_then(Entry::why).map(str::to_owned),
                }
            })
            .collect();
        let missing = self
            .tests
            .iter()
            .filter(|(name, _)| !seen.contains(name.as_str()));
        all.extend(missing.map(|(name, entry)| Compared {
            name: name.clone(),
            result: None,
            expected: Some(entry.verdict()),
            why: entry.why().map(str::to_owned),
        }));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::super::Name;
    use super::*;
    use clap::ValueEnum;

    fn expected() -> Expected {
        let text = "[tests]\n\"a.one\" = \"pass\"\n\"a.two\" = { fail = \"no memory\" }\n\
                    \"a.three\" = { skip = \"no device\" }\n";
        Expected::parse(text).unwrap()
    }

    fn differing(report: &str) -> Vec<String> {
        let all = expected().compare(&Report::read(report));
        let wrong = all.into_iter().filter(|test| !test.holds());
        wrong.map(|test| test.name).collect()
    }

    #[test]
    fn every_difference_is_found() {
        assert!(differing("ok 1 a.one\nnot ok 2 a.two\nok 3 a.three # SKIP x\n").is_empty());
        for (report, name) in [
            (
                "not ok 1 a.one\nnot ok 2 a.two\nok 3 a.three # SKIP x\n",
                "a.one",
            ),
            ("ok 1 a.one\nok 2 a.two\nok 3 a.three # SKIP x\n", "a.two"),
            ("ok 1 a.one\nnot ok 2 a.two\nok 3 a.three\n", "a.three"),
            ("ok 1 a.one\nnot ok 2 a.two\n", "a.three"),
            (
                "ok 1 a.one\nnot ok 2 a.two\nok 3 a.three # SKIP x\nok 4 a.four\n",
                "a.four",
            ),
            (
                "ok 1 a.one\nok 1 a.one\nnot ok 2 a.two\nok 3 a.three # SKIP x\n",
                "a.one",
            ),
        ] {
            assert_eq!(differing(report), [name], "{report}");
        }
        assert_eq!(differing(""), ["a.one", "a.three", "a.two"]);
    }

    #[test]
    fn a_test_that_does_not_pass_needs_a_reason() {
        for wrong in [
            "[tests]\n\"a\" = \"fail\"\n",
            "[tests]\n\"a\" = { fail = 1 }\n",
            "[tests]\n\"a\" = \"passes\"\n",
            "[tests]\n",
            "",
        ] {
            assert!(Expected::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_files_of_the_repository_make_sense() {
        let folder = crate::paths::repo().join("tests/expected");
        for name in Name::value_variants() {
            Expected::load(&folder.join(name.suite().expected)).unwrap();
        }
    }
}
