//! The device server of one guest: its start, and the report that it leaves.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::folder::RunFolder;
use crate::child::last_lines;
use crate::spawn_unsafe::dies_with_us;

/// Names in the run folder.
pub const SOCKET: &str = "device.sock";
pub const REPORT: &str = "device.jsonl";
pub const LOG: &str = "device.log";
const CONFIG: &str = "device.toml";

/// The device server has to listen within this time.
const START: Duration = Duration::from_secs(20);

/// How the device server is started.
#[derive(Clone, Debug)]
pub struct DeviceServer {
    /// The rig's binary.
    pub rig: std::path::PathBuf,
    /// The device's configuration.
    pub config: extlb_device::Config,
    /// Whether it may be unplugged and plugged in again: else its end is the guest's.
    pub hot_plug: bool,
}

/// Starts it, and waits until it listens.
pub fn start(server: &DeviceServer, folder: &RunFolder) -> Result<Child> {
    fs::write(folder.path().join(CONFIG), toml::to_string(&server.config)?)?;
    let log = folder.path().join(LOG);
    let output = File::create(&log)?;
    let mut command = Command::new(&server.rig);
    command
        .current_dir(folder.path())
        .args(["device", "--socket", SOCKET, "--report", REPORT])
        .args(["--config", CONFIG])
        .args((!server.hot_plug).then_some("--once"))
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output);
    let mut child = dies_with_us(&mut command)
        .spawn()
        .context("cannot start the device")?;
    let start = Instant::now();
    while !folder.path().join(SOCKET).exists() {
        if let Some(status) = child.try_wait()? {
            let said = fs::read_to_string(&log).unwrap_or_default();
            bail!(
                "the device did not start ({status}): {}",
                last_lines(&said, 20)
            );
        }
        if start.elapsed() > START {
            let _ = child.kill();
            let _ = child.wait();
            bail!("the device did not listen within {} s", START.as_secs());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(child)
}

/// Waits until a server that serves one client after the other is through with all of them: it serves
/// this one after those before it.
pub fn wait_until_idle(folder: &RunFolder, limit: Duration) -> Result<()> {
    let mut client = UnixStream::connect(folder.short(SOCKET))?;
    client.shutdown(std::net::Shutdown::Write)?;
    client.set_read_timeout(Some(limit))?;
    client.read_to_end(&mut Vec::new())?;
    Ok(())
}

/// The stale accesses and the summary in the device's report. A line cut short by a death is
/// skipped.
pub fn read_report(path: &Path) -> (Vec<Value>, Option<Value>) {
    /// Lines kept; a broken notifier makes thousands.
    const KEPT: usize = 10_000;
    let Ok(file) = File::open(path) else {
        return (Vec::new(), None);
    };
    let (mut stale, mut summary) = (Vec::new(), None);
    for line in BufReader::new(file).lines().map_while(Result::ok) {
        let Ok(event) = serde_json::from_str::<Value>(&line) else {
            continue;
        };
        match event.get("event").and_then(Value::as_str) {
            Some("stale_access") if stale.len() < KEPT => stale.push(event),
            Some("summary") => summary = Some(added(summary, event)),
            _ => {}
        }
    }
    (stale, summary)
}

/// The sum of two summaries, if there are two: one for each time that the device was plugged in.
fn added(before: Option<Value>, mut summary: Value) -> Value {
    if let (Some(Value::Object(before)), Value::Object(summary)) = (before, &mut summary) {
        for (name, value) in before {
            let sum = value
                .as_u64()
                .zip(summary.get(&name).and_then(Value::as_u64));
            if let Some((a, b)) = sum {
                summary.insert(name, a.saturating_add(b).into());
            }
        }
    }
    summary
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_that_was_cut_short_still_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report");
        fs::write(
            &path,
            "{\"event\":\"summary\",\"operations\":2}\n{\"event\":\"stale_access\",\"iova\":1}\nnot json\n\
             {\"event\":\"summary\",\"operations\":5}\n{\"event\":\"stale_acc",
        )
        .unwrap();
        let (stale, summary) = read_report(&path);
        assert_eq!(stale.len(), 1);
        assert_eq!(summary.unwrap()["operations"], 7);
        assert_eq!(read_report(&folder.path().join("none")), (Vec::new(), None));
    }
}
