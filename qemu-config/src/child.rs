//! Helper programs (apt, dpkg, make, cargo …) run to their end, with progress and a kept log.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::progress::Step;
use crate::spawn_unsafe::dies_with_us;

/// How much of a failed program's output is shown.
const SHOWN_LINES: usize = 25;

/// Runs `command` with its output in `log`; `detail` feeds the step's line.
///
/// # Errors
/// When it cannot be started, or fails: then the end of its output is part of the error.
pub fn run(
    command: &mut Command,
    log: &Path,
    step: &mut Step,
    detail: impl FnMut() -> String,
) -> Result<()> {
    let status = run_to_end(command, log, step, detail)?;
    check(&name(command), status, log)
}

/// Runs `command` likewise, and leaves it to the caller what its end means.
///
/// # Errors
/// When it cannot be started.
pub fn run_to_end(
    command: &mut Command,
    log: &Path,
    step: &mut Step,
    mut detail: impl FnMut() -> String,
) -> Result<ExitStatus> {
    let output = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output);
    let mut child = dies_with_us(command)
        .spawn()
        .with_context(|| format!("cannot start {}", name(command)))?;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        step.tick(&mut detail);
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

fn check(name: &str, status: ExitStatus, log: &Path) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
    bail!(
        "{} failed ({status}); the whole output is in {}:\n{}",
        Path::new(name)
            .file_name()
            .unwrap_or_default()
            .to_string_lossy(),
        log.display(),
        last_lines(&text, SHOWN_LINES)
    );
}

/// Runs a short program and returns its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let name = name(command);
    let output = dies_with_us(command.stdin(Stdio::null()))
        .output()
        .with_context(|| format!("cannot start {name}"))?;
    if !output.status.success() {
        bail!(
            "{name} failed ({}): {}",
            output.status,
            last_lines(&String::from_utf8_lossy(&output.stderr), SHOWN_LINES)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The last lines of a text.
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Follows a growing log and counts the lines that begin as given.
pub struct LineCounter {
    path: PathBuf,
    offset: u64,
    rest: String,
    prefixes: &'static [&'static str],
    /// Lines counted so far.
    pub count: usize,
}

impl LineCounter {
    /// Counts lines in `path` that, leading blanks aside, begin with one of `prefixes`.
    pub fn new(path: &Path, prefixes: &'static [&'static str]) -> Self {
        Self {
            path: path.to_path_buf(),
            offset: 0,
            rest: String::new(),
            prefixes,
            count: 0,
        }
    }

    /// Reads on from where the last call ended.
    pub fn update(&mut self) -> usize {
        let mut new = Vec::new();
        if let Ok(mut file) = File::open(&self.path)
            && file.seek(SeekFrom::Start(self.offset)).is_ok()
            && file.read_to_end(&mut new).is_ok()
        {
            self.offset += new.len() as u64;
            self.rest.push_str(&String::from_utf8_lossy(&new));
            while let Some(end) = self.rest.find('\n') {
                let line = self.rest[..end].trim_start();
                self.count += usize::from(self.prefixes.iter().any(|p| line.starts_with(p)));
                self.rest.drain(..=end);
            }
        }
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_failing_program_shows_the_end_of_its_output() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut command = Command::new("sh");
        command.args(["-c", "seq 1 100; echo why >&2; exit 3"]);
        let error = run(&mut command, &log, &mut Step::begin("x"), String::new).unwrap_err();
        let text = format!("{error}");
        assert!(
            text.contains("exit status: 3") && text.ends_with("99\n100\nwhy"),
            "{text}"
        );
        assert!(!text.contains("\n70\n"), "{text}");
    }

    #[test]
    fn lines_are_counted_across_pieces() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut counter = LineCounter::new(&path, &["CC ", "AS "]);
        assert_eq!(counter.update(), 0);
        let mut file = File::create(&path).unwrap();
        file.write_all(b"  CC      a.o\n  LD x\n  A").unwrap();
        assert_eq!(counter.update(), 1);
        file.write_all(b"S      b.o\n").unwrap();
        assert_eq!(counter.update(), 2);
        assert_eq!(counter.update(), 2);
    }
}
