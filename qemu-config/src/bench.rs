//! `extlb bench`: figures to compare, all from one run.

mod notifiers;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::cargo;
use crate::child;
use crate::progress::Step;
use crate::qemu::command::Iommu;
use crate::rig::{Bind, GivenKernel, Options, Rig};
use crate::run::{Addition, Request, run_command};
use crate::spawn_unsafe::dies_with_us;
use crate::vm::{Input, Sinks};

/// The benchmark's program in the guest.
const PROGRAM: &str = "/bin/extlb-bench";
/// PCI ids of QEMU's own teaching device, in sysfs.
const EDU: &str = "0x11e8";

/// What to compare.
#[derive(Debug, clap::Subcommand)]
pub enum Subject {
    /// The ways to the device: the same small operations, copies and registrations over each
    Backings(Arguments),
    /// The ways to follow a process: the same changes of its memory by each, and with no device
    Notifiers(notifiers::Arguments),
}

/// Options of a comparison.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Write all figures as JSON
    #[arg(long, value_name = "OUT")]
    json: Option<PathBuf>,
    /// How long each workload runs, in ms
    #[arg(long, value_name = "MS", default_value_t = 400)]
    time: u64,
}

/// What one way took, as the benchmark's program says it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Figures {
    /// Median time of reading a register, in ns; absent where a program cannot.
    register_read_ns: Option<u64>,
    /// The workloads.
    workloads: Vec<Workload>,
}

/// What a workload took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Workload {
    name: String,
    rounds: u64,
    p50_ns: u64,
    p99_ns: u64,
    per_second: f64,
    bytes_per_second: f64,
}

/// One way to the device.
#[derive(Debug, Serialize)]
struct Way {
    /// For the table's head.
    name: &'static str,
    /// Where it was measured.
    place: &'static str,
    #[serde(flatten)]
    figures: Figures,
}

/// All figures.
#[derive(Debug, Serialize)]
struct Report {
    /// The first is the one that the others are set against.
    ways: Vec<Way>,
    /// A device inside QEMU, in the same guest as VFIO: median time of reading its register, in ns.
    edu_register_read_ns: u64,
    environment: BTreeMap<&'static str, String>,
}

/// Does it; returns the exit code.
pub fn run(options: &Options, subject: &Subject) -> Result<i32> {
    let arguments = match subject {
        Subject::Backings(arguments) => arguments,
        Subject::Notifiers(arguments) => return notifiers::run(options, arguments),
    };
    let report = backings(options, arguments.time)?;
    print!("{}", table(&report));
    write_json(arguments.json.as_deref(), &report)?;
    Ok(0)
}

fn write_json(path: Option<&Path>, report: &impl Serialize) -> Result<()> {
    let Some(path) = path else {
        return Ok(());
    };
    let text = serde_json::to_vec_pretty(report)?;
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn backings(options: &Options, time: u64) -> Result<Report> {
    if options.no_device || options.kernel.is_some() || options.bind.is_some() {
        bail!("a comparison chooses kernels and drivers itself");
    }
    let patched = Rig::prepare(options)?;
    let program = cargo::bench_program(&patched.cache)?;
    let stock = Rig::prepare(&Options {
        kernel: Some(GivenKernel::Stock),
        qemu_arg: vec!["-device".into(), "edu".into()],
        ..options.clone()
    })?;
    let bound = Rig::prepare(&Options {
        iommu: Some(Iommu::Intel),
        bind: Some(Bind::VfioPci),
        ..options.clone()
    })?;
    let mut ways = on_this_machine(&patched, &program, time)?;

    let script = format!(
        "{PROGRAM} --time {time} vfio-group && \
         for d in /sys/bus/pci/devices/*; do \
         if [ $(cat $d/device) = {EDU} ]; then exec {PROGRAM} --device ${{d##*/}} bar; fi; done"
    );
    let [group, edu] = in_guest(&stock, &program, "Debian's own kernel", &script)?;
    // Debian's kernel has no iommufd.
    let cdev_script = format!("{PROGRAM} --time {time} vfio-cdev");
    let [cdev] = in_guest(
        &bound,
        &program,
        "the patched kernel and an IOMMU",
        &cdev_script,
    )?;
    let kernel_script = format!("{PROGRAM} --time {time} kernel");
    let [kernel] = in_guest(&patched, &program, "the patched kernel", &kernel_script)?;
    ways.extend([
        way("VFIO group", "stock guest", group),
        way("VFIO cdev", "patched guest", cdev),
        way("/dev/extlb0", "patched guest", kernel),
    ]);
    Ok(Report {
        ways,
        edu_register_read_ns: edu.register_read_ns.context("no time for the edu device")?,
        environment: [
            ("qemu", patched.qemu.version.to_string()),
            (
                "cores",
                std::thread::available_parallelism()
                    .map_or(1, usize::from)
                    .to_string(),
            ),
        ]
        .into(),
    })
}

fn way(name: &'static str, place: &'static str, figures: Figures) -> Way {
    Way {
        name,
        place,
        figures,
    }
}

/// The ways that need no guest.
fn on_this_machine(rig: &Rig, program: &Path, time: u64) -> Result<Vec<Way>> {
    let step = Step::begin("timing the device on this machine");
    let run = |arguments: &[&str]| -> Result<Figures> {
        let mut command = Command::new(program);
        command.args(["--time", &time.to_string()]).args(arguments);
        figures(&child::output(&mut command)?)
    };
    let place = "no guest";
    let mut ways = vec![
        way("in process", place, run(&["in-process"])?),
        way("in process, notified", place, run(&["in-process-kernel"])?),
    ];
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("device.sock");
    let _server = serve(rig, &socket)?;
    let path = socket
        .to_str()
        .context("the folder for temporary files is not UTF-8")?;
    ways.push(way("socket", place, run(&["socket", "--socket", path])?));
    step.done();
    Ok(ways)
}

/// A device server; killed when dropped.
struct Server(std::process::Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(rig: &Rig, socket: &Path) -> Result<Server> {
    let mut command = Command::new(&rig.binary);
    command.args(["device", "--once", "--socket"]).arg(socket);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let child = dies_with_us(&mut command).spawn();
    let mut server = Server(child.context("cannot start the device")?);
    // Its first line says that a client can connect.
    let mut line = String::new();
    let stdout = server.0.stdout.take().context("the device has no output")?;
    io::BufRead::read_line(&mut io::BufReader::new(stdout), &mut line)?;
    if line.is_empty() {
        bail!("the device did not start");
    }
    Ok(server)
}

fn figures(line: &str) -> Result<Figures> {
    serde_json::from_str(line.trim()).with_context(|| format!("no figures: {line:?}"))
}

/// What a guest's program says, kept.
#[derive(Clone, Debug, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs a script in a guest; the `N` lines of figures that it prints.
fn in_guest<const N: usize>(
    rig: &Rig,
    program: &Path,
    name: &str,
    script: &str,
) -> Result<[Figures; N]> {
    let add = vec![Addition {
        host: program.to_owned(),
        guest: PROGRAM.into(),
    }];
    let text = said_in_guest(rig, add, name, script)?;
    let all: Vec<Figures> = text.lines().map(figures).collect::<Result<_>>()?;
    let found = all.len();
    all.try_into()
        .map_err(|_| anyhow::anyhow!("{N} lines of figures were expected, {found} came"))
}

/// Runs a script in a guest, which has to succeed; what it printed.
fn said_in_guest(rig: &Rig, add: Vec<Addition>, name: &str, script: &str) -> Result<String> {
    let step = Step::begin(format!("timing the device in a guest with {name}"));
    let request = Request {
        add,
        ..Request::new(["sh", "-c", script])
    };
    let kept = Kept::default();
    let sinks = || Sinks {
        stdout: Box::new(kept.clone()),
        stderr: Box::new(io::stderr()),
    };
    let outcome = run_command(rig, &request, Input::Empty, &sinks)?;
    if outcome.code() != 0 {
        let lines = outcome.explanation().join("\n");
        bail!(
            "the guest with {name} ended with {}\n{lines}",
            outcome.code()
        );
    }
    step.done();
    let text = kept.0.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The table: a line for each workload, a column for each way; the first column in its unit, the
/// others as well, with what they are of the first.
fn table(report: &Report) -> String {
    let mut rows = vec![
        std::iter::once(String::new())
            .chain(report.ways.iter().map(|way| way.name.to_owned()))
            .collect::<Vec<_>>(),
        std::iter::once(String::new())
            .chain(report.ways.iter().map(|way| way.place.to_owned()))
            .collect(),
    ];
    let read = |way: &Way| match way.figures.register_read_ns {
        Some(ns) => format!("{} us", short(ns as f64 / 1e3)),
        None => "-".to_owned(),
    };
    let mut line = vec!["read a register".to_owned()];
    line.extend(report.ways.iter().map(read));
    rows.push(line);
    let first = report
        .ways
        .first()
        .map_or(&[][..], |way| &way.figures.workloads);
    for workload in first {
        let mut line = vec![workload.name.clone()];
        for way in &report.ways {
            let same = |other: &&Workload| other.name == workload.name;
            let cell = way.figures.workloads.iter().find(same);
            line.push(cell.map_or_else(|| "-".to_owned(), |other| cell_of(other, workload)));
        }
        rows.push(line);
    }
    let mut text = aligned(&rows);
    let _ = writeln!(
        text,
        "\nTimes are medians of a round; (xN) is the time set against the first column.\n\
         For scale: a read of a register of the edu device, inside QEMU, takes {} us in the same \
         guest as VFIO.",
        short(report.edu_register_read_ns as f64 / 1e3)
    );
    text
}

fn cell_of(workload: &Workload, first: &Workload) -> String {
    let mut text = format!("{} us", short(workload.p50_ns as f64 / 1e3));
    if !std::ptr::eq(workload, first) {
        let ratio = workload.p50_ns as f64 / first.p50_ns.max(1) as f64;
        let _ = write!(text, " (x{})", short(ratio));
    }
    text
}

/// Three digits, as far as they mean something.
fn short(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(String::len).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(read: Option<u64>, p50_ns: u64) -> Figures {
        Figures {
            register_read_ns: read,
            workloads: vec![Workload {
                name: "nop".into(),
                rounds: 10,
                p50_ns,
                p99_ns: p50_ns,
                per_second: 1.0,
                bytes_per_second: 0.0,
            }],
        }
    }

    #[test]
    fn every_way_is_set_against_the_first() {
        let report = Report {
            ways: vec![
                way("in process", "no guest", measured(Some(50), 2000)),
                way("kernel", "guest", measured(None, 12_000)),
            ],
            edu_register_read_ns: 260,
            environment: BTreeMap::new(),
        };
        let text = table(&report);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[2], "read a register  0.05 us     -");
        assert_eq!(lines[3], "nop              2.00 us     12.0 us (x6.00)");
        assert!(text.contains("0.26 us in the same guest"));
    }
}
