//! What the checkers say, read back; and which of it is about lines of ours.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Something that a checker found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// The file, relative to the kernel's tree or to the repository.
    pub file: String,
    /// The line, or 0.
    pub line: u32,
    /// What was said, beginning with its severity.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.text)
    }
}

/// Which lines of the kernel's tree are ours.
#[derive(Clone, Debug, Default)]
pub struct Ours {
    /// `None` for a file that the series adds: all of its lines.
    files: BTreeMap<String, Option<BTreeSet<u32>>>,
}

impl Ours {
    /// All lines of a file.
    pub fn add_file(&mut self, file: &str) {
        self.files.insert(file.to_owned(), None);
    }

    /// Some lines of a file.
    pub fn add_lines(&mut self, file: &str, lines: impl IntoIterator<Item = u32>) {
        self.files
            .insert(file.to_owned(), Some(lines.into_iter().collect()));
    }

    /// Files that are ours from the first to the last line.
    pub fn whole_files(&self) -> impl Iterator<Item = &str> {
        let whole = self.files.iter().filter(|(_, lines)| lines.is_none());
        whole.map(|(file, _)| file.as_str())
    }

    /// Whether a finding is about a line of ours.
    pub fn concerns(&self, finding: &Finding) -> bool {
        match self.files.get(&finding.file) {
            Some(None) => true,
            Some(Some(lines)) => lines.contains(&finding.line),
            None => false,
        }
    }
}

/// Reads lines `FILE:LINE: …`, `FILE:LINE:COLUMN: …` and `FILE:LINE:COLUMN-COLUMN: …`; the others are context, or talk. `at` turns
/// a path as the checker has it into one as people have it, or says that the line is no finding.
pub fn parse(output: &str, at: impl Fn(&str) -> Option<String>) -> Vec<Finding> {
    let finding = |line: &str| {
        let (file, rest) = line.split_once(':')?;
        let (number, rest) = rest.split_once(':')?;
        let number = number.parse().ok()?;
        let text = match rest.split_once(':') {
            Some((column, text)) if column.split('-').all(|n| n.parse::<u32>().is_ok()) => text,
            _ => rest,
        };
        Some(Finding {
            file: at(file)?,
            line: number,
            text: text.trim().to_owned(),
        })
    };
    let mut found: Vec<Finding> = output.lines().filter_map(finding).collect();
    // A header's is said once for each file that includes it.
    found.sort();
    found.dedup();
    found
}

/// What is known and let pass, each with its reason.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exceptions {
    #[serde(default)]
    exception: Vec<Exception>,
}

/// One of them.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exception {
    /// The check.
    pub check: String,
    /// End of the file's name.
    pub file: String,
    /// Part of the finding's text.
    pub text: String,
    /// Why it may stay.
    pub reason: String,
}

impl Exceptions {
    /// Reads the file.
    pub fn parse(text: &str) -> Result<Self> {
        let all: Self = toml::from_str(text)?;
        let silent = all.exception.iter().find(|e| e.reason.trim().is_empty());
        match silent {
            Some(exception) => Err(anyhow::anyhow!(
                "the exception for {} in {} gives no reason",
                exception.text,
                exception.file
            )),
            None => Ok(all),
        }
        .context("exceptions")
    }

    /// The checks that have exceptions.
    pub fn checks(&self) -> impl Iterator<Item = &str> {
        self.exception.iter().map(|e| e.check.as_str())
    }

    /// Takes out what may stay. An exception that nothing needs is a finding itself: it would hide
    /// the next one.
    pub fn apply(&self, check: &str, found: Vec<Finding>) -> Vec<Finding> {
        let exceptions: Vec<_> = self.exception.iter().filter(|e| e.check == check).collect();
        let excused = |exception: &Exception, finding: &Finding| {
            finding.file.ends_with(&exception.file) && finding.text.contains(&exception.text)
        };
        let unused = exceptions.iter().filter(|exception| {
            let needed = found.iter().any(|finding| excused(exception, finding));
            !needed
        });
        let unused = unused.map(|exception| Finding {
            file: exception.file.clone(),
            line: 0,
            text: format!("error: nothing needs the exception {:?}", exception.text),
        });
        let unused: Vec<_> = unused.collect();
        let left = found.into_iter().filter(|finding| {
            !exceptions
                .iter()
                .any(|exception| excused(exception, finding))
        });
        left.chain(unused).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(file: &str, line: u32, text: &str) -> Finding {
        Finding {
            file: file.into(),
            line,
            text: text.into(),
        }
    }

    #[test]
    fn findings_are_read_from_compilers_and_checkers_alike() {
        let output = "  CC      mm/a.o\n\
            /t/mm/a.c: In function 'f':\n\
            /t/mm/a.c:12:7: warning: unused variable 'x' [-Wunused-variable]\n\
            \x20  12 |   int x;\n\
            /t/mm/a.c:9:1: error: expected ';'\n\
            /t/mm/a.h:3: warning: Function parameter 'y' not described\n\
            /t/mm/b.c:23:15-20: ERROR: reference preceded by free on line 22\n\
            /t/mm/a.c:12:7: warning: unused variable 'x' [-Wunused-variable]\n\
            make[3]: *** [/t/Makefile:12: mm/a.o] Error 1\n";
        let found = parse(output, |path| path.strip_prefix("/t/").map(str::to_owned));
        let expected = [
            finding("mm/a.c", 9, "error: expected ';'"),
            finding(
                "mm/a.c",
                12,
                "warning: unused variable 'x' [-Wunused-variable]",
            ),
            finding("mm/a.h", 3, "warning: Function parameter 'y' not described"),
            finding("mm/b.c", 23, "ERROR: reference preceded by free on line 22"),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn our_lines_are_told_from_others() {
        let mut ours = Ours::default();
        ours.add_file("mm/ours.c");
        ours.add_lines("mm/shared.c", [3, 4]);
        assert!(ours.concerns(&finding("mm/ours.c", 99, "warning: x")));
        assert!(ours.concerns(&finding("mm/shared.c", 4, "warning: x")));
        assert!(!ours.concerns(&finding("mm/shared.c", 5, "warning: x")));
        assert!(!ours.concerns(&finding("mm/theirs.c", 1, "warning: x")));
    }

    #[test]
    fn an_exception_takes_out_its_own_and_must_be_needed() {
        let exception = |reason: &str| {
            Exceptions::parse(&format!(
                "[[exception]]\ncheck = \"c\"\nfile = \"a.c\"\ntext = \"odd\"\nreason = \"{reason}\"\n"
            ))
        };
        assert!(exception(" ").is_err());
        let exceptions = exception("why").unwrap();
        let found = vec![
            finding("x/a.c", 1, "warning: odd"),
            finding("x/b.c", 1, "warning: odd"),
        ];
        let left = exceptions.apply("c", found.clone());
        assert_eq!(left, [finding("x/b.c", 1, "warning: odd")]);
        // Another check's are its own.
        assert_eq!(
            exceptions.apply("d", found),
            [
                finding("x/a.c", 1, "warning: odd"),
                finding("x/b.c", 1, "warning: odd")
            ]
        );
        let unneeded = exceptions.apply("c", vec![]);
        assert!(unneeded[0].text.contains("nothing needs"), "{unneeded:?}");
    }
}
