//! A client of QEMU's monitor (QMP): one command at a time, events kept until somebody asks.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// QEMU answers within this time, or something is badly wrong.
const ANSWER: Duration = Duration::from_secs(20);
/// Events kept for [`Qmp::wait_for`]; older ones are forgotten.
const KEPT: usize = 1024;

/// A connection to a monitor.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    /// What has come of a line, if the time was up in the middle of it.
    line: Vec<u8>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects to a monitor's socket and leaves its first mode, in which it only negotiates.
    ///
    /// # Errors
    /// Among others when another client is connected: a monitor serves one at a time.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot connect to QEMU's monitor at {}", socket.display()))?;
        stream.set_write_timeout(Some(ANSWER))?;
        let mut qmp = Self {
            reader: BufReader::new(stream),
            line: Vec::new(),
            events: VecDeque::new(),
        };
        let greeting = qmp
            .read(Instant::now() + ANSWER)?
            .context("QEMU's monitor does not answer; is another client connected to it?")?;
        if greeting.get("QMP").is_none() {
            bail!("that is no monitor of QEMU: {greeting}");
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Executes a command and returns its result.
    ///
    /// # Errors
    /// What QEMU says about why it did not; or the connection is gone.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut line = serde_json::to_vec(&json!({ "execute": command, "arguments": arguments }))?;
        line.push(b'\n');
        self.reader
            .get_mut()
            .write_all(&line)
            .with_context(|| format!("cannot send {command} to QEMU"))?;
        let deadline = Instant::now() + ANSWER;
        loop {
            let message = self
                .read(deadline)?
                .with_context(|| format!("QEMU did not answer {command}"))?;
            if let Some(result) = message.get("return") {
                return Ok(result.clone());
            }
            if let Some(error) = message.get("error") {
                bail!("{command}: {}", error["desc"].as_str().unwrap_or("failed"));
            }
            self.keep(message);
        }
    }

    /// Waits for an event by this name for which `wanted` is true, those that came before included;
    /// returns its data. Events before it are forgotten.
    ///
    /// # Errors
    /// When it does not come in time, or the connection is gone.
    pub fn wait_for(
        &mut self,
        name: &str,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            while let Some(event) = self.events.pop_front() {
                if event["event"] == name && wanted(&event["data"]) {
                    return Ok(event["data"].clone());
                }
            }
            let Some(message) = self.read(deadline)? else {
                bail!("no event {name} within {} s", limit.as_secs());
            };
            self.keep(message);
        }
    }

    fn keep(&mut self, message: Value) {
        if message.get("event").is_some() {
            if self.events.len() == KEPT {
                self.events.pop_front();
            }
            self.events.push_back(message);
        }
    }

    /// The next message; `None` if the time is up.
    fn read(&mut self, deadline: Instant) -> Result<Option<Value>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.reader.get_ref().set_read_timeout(Some(left))?;
            match self.reader.read_until(b'\n', &mut self.line) {
                Ok(_) if self.line.ends_with(b"\n") => {
                    let line = std::mem::take(&mut self.line);
                    return Ok(Some(serde_json::from_slice(&line)?));
                }
                Ok(_) => bail!("QEMU closed its monitor"),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => {}
                    _ => return Err(error).context("cannot read from QEMU's monitor"),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A monitor that sends the next of `lines` for each line that it gets, the first at once.
    fn monitor(lines: &'static [&'static str]) -> (tempfile::TempDir, Result<Qmp>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut requests = BufReader::new(stream.try_clone().unwrap()).lines();
            for text in lines {
                stream.write_all(text.as_bytes()).unwrap();
                if requests.next().is_none() {
                    return;
                }
            }
        });
        let qmp = Qmp::connect(&path);
        (folder, qmp)
    }

    const GREETING: &str = "{\"QMP\":{}}\r\n";
    const DONE: &str = "{\"return\":{}}\r\n";

    #[test]
    fn events_on_the_way_to_an_answer_are_kept() {
        let (_folder, qmp) = monitor(&[
            GREETING,
            DONE,
            "{\"event\":\"A\",\"data\":{\"n\":1}}\n{\"event\":\"B\",\"data\":{\"n\":2}}\n\
             {\"event\":\"B\",\"data\":{\"n\":3}}\n{\"return\":7}\n",
            "{\"error\":{\"desc\":\"no such thing\"}}\n",
        ]);
        let mut qmp = qmp.unwrap();
        assert_eq!(qmp.execute("x", json!({})).unwrap(), 7);
        let second = Duration::from_secs(1);
        let data = qmp.wait_for("B", second, |data| data["n"] == 3).unwrap();
        assert_eq!(data["n"], 3);
        let error = qmp.execute("y", json!({})).unwrap_err();
        assert_eq!(error.to_string(), "y: no such thing");
        assert!(
            qmp.wait_for("A", Duration::from_millis(20), |_| true)
                .is_err()
        );
    }

    #[test]
    fn what_is_no_monitor_is_named() {
        assert!(monitor(&["{\"hello\":1}\n"]).1.is_err());
        assert!(monitor(&["no json\n"]).1.is_err());
        assert!(Qmp::connect(Path::new("/nonexistent/qmp")).is_err());
    }
}
