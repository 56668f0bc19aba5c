//! What the VM tests share: the rig's command line as a program to run and to look at.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A call of the rig, with standard input closed.
pub fn rig(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Runs it to its end.
pub fn output(program: &str, arguments: &[&str]) -> Result<Output> {
    rig(program, arguments)
        .output()
        .with_context(|| format!("start {program}"))
}

/// Everything that a call printed, for messages of failed checks.
pub fn transcript(output: &Output) -> String {
    format!(
        "{}\n--- standard output\n{}--- standard error\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// What a script printed, by its headings: lines that begin with `== `.
pub fn sections(text: &str) -> BTreeMap<&str, &str> {
    let parts = text.split("== ").skip(1);
    parts.filter_map(|part| part.split_once('\n')).collect()
}

/// A rig under way, whose standard output is watched line by line.
pub struct Running {
    child: Child,
    lines: Receiver<String>,
}

impl Running {
    /// Starts it.
    pub fn start(program: &str, arguments: &[&str]) -> Result<Self> {
        let mut child = rig(program, arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {program}"))?;
        let stdout = child.stdout.take().context("standard output is a pipe")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, lines })
    }

    /// Waits for a line that contains `text`.
    pub fn wait_for(&self, text: &str, limit: Duration) -> Result<()> {
        loop {
            match self.lines.recv_timeout(limit) {
                Ok(line) if line.contains(text) => return Ok(()),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => bail!("no line with {text:?} in {limit:?}"),
                Err(RecvTimeoutError::Disconnected) => bail!("the rig ended before {text:?}"),
            }
        }
    }

    /// Process ids of the rig's own children whose command line contains all of `words`.
    pub fn children(&self, words: &[&str]) -> Result<Vec<i32>> {
        let own = self.child.id().to_string();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc")? {
            let path = entry?.path();
            let Some(pid) = path.file_name().and_then(|n| n.to_str()?.parse().ok()) else {
                continue;
            };
            if parent(&path).is_some_and(|ppid| ppid == own) {
                let command_line = std::fs::read(path.join("cmdline")).unwrap_or_default();
                let command_line = String::from_utf8_lossy(&command_line).replace('\0', " ");
                if words.iter().all(|word| command_line.contains(word)) {
                    found.push(pid);
                }
            }
        }
        Ok(found)
    }

    /// Process id of the rig.
    pub fn id(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits for the end, and returns exit status and standard error.
    pub fn finish(self) -> Result<Output> {
        // The reader thread drains standard output, so the rig cannot block on it.
        Ok(self.child.wait_with_output()?)
    }
}

/// Waits until a process has ended, whether or not somebody has collected its status; false if it
/// has not within `limit`.
pub fn ends_within(pid: i32, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    loop {
        match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
            Err(_) => return true,
            Ok(stat)
                if stat
                    .rsplit_once(')')
                    .is_some_and(|(_, s)| s.starts_with(" Z")) =>
            {
                return true;
            }
            Ok(_) if Instant::now() > end => return false,
            Ok(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// The parent's process id, as text: the fourth field of `stat`, after the name in parentheses.
fn parent(process: &Path) -> Option<String> {
    let stat = std::fs::read_to_string(process.join("stat")).ok()?;
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(1)
        .map(str::to_owned)
}
