//! `extlb demo`: the tour.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use extlb_guest_protocol::{Mount, Setup};
use serde_json::{Value, json};

use crate::cli::{MachineArguments, tell};
use crate::kernel::Flavour;
use crate::outcome::{End, FAILED, GUEST_DIED};
use crate::qemu::command::Iommu;
use crate::rig::{Bind, Booted, GivenKernel, Guest, Options, Rig};
use crate::run::environment;
use crate::toolbox::{SOURCE, Toolbox};
use crate::vm::{Input, Sinks};
use crate::{compare, disks, kernel};
use extlb_guest_protocol::Exec;

/// Where the input's disk is mounted in the guest.
const MOUNT: &str = "/mnt/input";
/// Where the tour leaves its result in the guest.
const RESULT: &str = "/run/tour.json";
/// A longer result is not the tour's.
const RESULT_LIMIT: usize = 4 << 20;

/// Options of the demonstration.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Arguments {
    /// The file that the device copies and checks; by default one that the rig has anyway
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Write the result as JSON
    #[arg(long, value_name = "OUT")]
    json: Option<PathBuf>,
    /// On Debian's own kernel, the device in a program's hands by VFIO: builds no kernel
    #[arg(long, conflicts_with = "input")]
    vfio: bool,
    #[command(flatten)]
    machine: MachineArguments,
}

/// Runs the tour; returns the exit code.
pub fn run(options: &Options, arguments: &Arguments) -> Result<i32> {
    let profile = arguments.machine.profile(options, "demo")?;
    let mut options = options.clone();
    if arguments.vfio {
        options.kernel.get_or_insert(GivenKernel::Stock);
        options.iommu.get_or_insert(Iommu::Intel);
        options.bind.get_or_insert(Bind::VfioPci);
    }
    let rig = Rig::prepare(&options)?;
    let input = match &arguments.input {
        Some(input) => Some(input.clone()),
        None if arguments.vfio => None,
        None => Some(kernel::source_archive(&Toolbox::get(&rig.cache, &SOURCE)?)?),
    };
    let input_disk = input
        .as_ref()
        .map(|input| disks::input(&rig, input))
        .transpose()?;
    // What is locked cannot be swapped: with somewhere to swap to, the guest would only take longer
    // to find its end.
    let swap = profile.swap.filter(|_| !arguments.vfio);
    let swap_disk = swap.map(|size| disks::swap(&rig, size)).transpose()?;
    let deadline = arguments
        .machine
        .timeout()
        .map(|timeout| Instant::now() + timeout);

    let mut guest_disks: Vec<_> = input_disk.into_iter().collect();
    guest_disks.extend(swap_disk.iter().map(disks::TemporaryDisk::disk));
    let guest = Guest {
        memory: profile.memory.0,
        smp: profile.smp,
        append: profile.append.clone(),
        device: profile.device.clone(),
        disks: guest_disks,
        setup: Setup {
            input: input.is_some().then(|| Mount {
                serial: disks::INPUT.to_owned(),
                path: MOUNT.to_owned(),
            }),
            swap: swap_disk.as_ref().map(|_| disks::SWAP.to_owned()),
            ..Setup::default()
        },
        archive: rig.archive()?,
    };
    let (mut vm, accelerator) = match rig.boot(guest, deadline, &Sinks::inherit)? {
        Booted::Up(vm, accelerator) => (vm, accelerator),
        Booted::Dead(outcome) => return Ok(tell(&outcome)),
    };
    let input_path = format!("{MOUNT}/{}", disks::INPUT_NAME);
    let which = match arguments.vfio {
        true => &["--vfio"][..],
        false => &["--input", &input_path],
    };
    let sizes = match arguments.vfio {
        true => &[][..],
        false => sizes(options.flavour),
    };
    let argv = ["/bin/extlb-tour"]
        .iter()
        .chain(which)
        .chain(sizes)
        .chain(&["--json", RESULT]);
    let exec = Exec {
        argv: argv.map(|word| word.to_string()).collect(),
        env: environment(&[]),
        cwd: "/".to_owned(),
        tty: None,
    };
    let mut result = None;
    let end = match vm.run(exec, Input::Empty, deadline) {
        Ok(exit) => match vm.read_file(RESULT, RESULT_LIMIT, deadline) {
            Ok(read) => {
                result = Some(read);
                End::Exited(exit)
            }
            Err(stop) => stop.into(),
        },
        Err(stop) => stop.into(),
    };
    let environment = json!({
        "qemu": rig.qemu.version.to_string(),
        "accelerator": accelerator.name(),
        "kernel": vm.kernel,
        "cores": std::thread::available_parallelism().map_or(1, usize::from),
        "guest_cores": profile.smp,
        "guest_memory_mib": profile.memory.0,
        "input": input.and_then(|input| Some(input.file_name()?.to_str()?.to_owned())),
    });
    let mut outcome = vm.finish(end.clone());
    // Whether stale accesses are right or wrong is the tour's to judge: one of its steps provokes
    // them. Reports of the kernel are wrong in any step.
    let stale_count = outcome.stale_count;
    if !arguments.vfio {
        outcome.stale_accesses.clear();
        outcome.stale_count = 0;
    }
    let told = tell(&outcome);
    let End::Exited(exit) = end else {
        return Ok(told);
    };

    let (mut result, read_error) = judge(result, exit.shell_code());
    let passed = outcome.sound() && result["passed"] == json!(true);
    result["passed"] = json!(passed);
    result["environment"] = environment;
    result["device"] = json!({
        "stale_accesses": stale_count,
        "summary": outcome.device_summary,
    });
    if !outcome.kernel_reports.is_empty() {
        result["kernel_reports"] = outcome
            .kernel_reports
            .iter()
            .map(|report| json!(report.lines))
            .collect();
    }
    if arguments.vfio {
        println!("---- in comparison");
        print!(
            "{}",
            compare::table(&result, compare::kept(&rig.cache).as_ref())
        );
    } else if passed && options.flavour == Flavour::Base {
        compare::keep(&rig.cache, &result)?;
    }
    if let Some(path) = &arguments.json {
        write_json(path, &result)?;
    }
    if let Some(error) = read_error {
        eprintln!("extlb: {error}");
    }
    println!("{}", if passed { "PASS" } else { "FAIL" });
    Ok(match (passed, outcome.sound()) {
        (true, _) => 0,
        (false, true) => FAILED,
        (false, false) => GUEST_DIED,
    })
}

/// What the tour is told about how much to do: a slower kernel gets less, in a guest whose memory is
/// as scarce.
fn sizes(flavour: Flavour) -> &'static [&'static str] {
    match flavour {
        Flavour::Base => &[],
        Flavour::Debug => &[
            "--operations",
            "1000",
            "--working-set",
            "272",
            "--rounds",
            "1",
        ],
    }
}

/// The tour's result as an object with `passed` and `steps`, whatever has come; and what is wrong
/// with it. It counts as passed only if the tour says so in both ways.
fn judge(result: Option<Result<Vec<u8>>>, code: i32) -> (Value, Option<String>) {
    let failed = || json!({ "passed": false, "steps": [] });
    let text = match result {
        Some(Ok(text)) => text,
        Some(Err(error)) => {
            return (
                failed(),
                Some(format!("the tour left no result: {error:#}")),
            );
        }
        None => return (failed(), Some("the tour left no result".to_owned())),
    };
    match serde_json::from_slice::<Value>(&text) {
        Ok(mut value) if value.is_object() => {
            let says = value["passed"] == json!(true);
            if says != (code == 0) {
                value["passed"] = json!(false);
                return (
                    value,
                    Some(format!("the tour's result and exit code {code} disagree")),
                );
            }
            (value, None)
        }
        Ok(_) => (
            failed(),
            Some("the tour's result is not a JSON object".to_owned()),
        ),
        Err(error) => (
            failed(),
            Some(format!("the tour's result is no JSON: {error}")),
        ),
    }
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tour_passes_only_if_it_says_so_and_exits_so() {
        let result = |text: &str| Some(Ok(text.as_bytes().to_vec()));
        let passed = |text: &str, code| {
            let (value, error) = judge(result(text), code);
            (value["passed"] == json!(true), error.is_some())
        };
        assert_eq!(passed(r#"{"passed":true,"steps":[]}"#, 0), (true, false));
        assert_eq!(passed(r#"{"passed":false,"steps":[]}"#, 1), (false, false));
        assert_eq!(passed(r#"{"passed":true,"steps":[]}"#, 1), (false, true));
        assert_eq!(passed(r#"{"passed":false,"steps":[]}"#, 0), (false, true));
        assert_eq!(passed(r#"{"passed":"#, 0), (false, true));
        assert_eq!(passed("[]", 0), (false, true));
        assert!(judge(None, 0).1.is_some());
    }
}
