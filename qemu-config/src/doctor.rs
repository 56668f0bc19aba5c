//! `extlb doctor`: what is there, what is missing, what to do.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use serde_json::{Value, json};

use crate::outcome::UNAVAILABLE;
use crate::paths::Cache;
use crate::qemu::{OLDEST, Qemu, accel};
use crate::rig::{GivenKernel, Options};
use crate::toolbox::{self, Toolbox};
use crate::{cargo, child, kernel, sandbox};

/// Options of the doctor.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One thing looked at.
struct Finding {
    name: &'static str,
    state: State,
    text: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// There.
    Good,
    /// Not there; the rig makes it when it is needed, or does without.
    Fine,
    /// Not there, and nothing goes without.
    Missing,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Fine => "--",
            Self::Missing => "MISSING",
        }
    }
}

/// Looks at everything; returns the exit code.
pub fn run(options: &Options, arguments: &Arguments) -> Result<i32> {
    let cache = Cache::open()?;
    let findings = examine(&cache, options);
    let usable = findings
        .iter()
        .all(|finding| finding.state != State::Missing);
    if arguments.json {
        let all: Vec<Value> = findings
            .iter()
            .map(|f| json!({ "name": f.name, "state": f.state.word(), "text": f.text }))
            .collect();
        println!(
            "{}",
            serde_json::to_string_pretty(&json!({ "usable": usable, "findings": all }))?
        );
    } else {
        for finding in &findings {
            println!(
                "{:>7}  {:<16} {}",
                finding.state.word(),
                finding.name,
                finding.text
            );
        }
        let verdict = match usable {
            true => "All that is needed is there or will be made when it is needed.",
            false => "Something is missing: see above.",
        };
        println!("{verdict}");
    }
    Ok(if usable { 0 } else { UNAVAILABLE })
}

fn examine(cache: &Cache, options: &Options) -> Vec<Finding> {
    let finding = |name, state, text: String| Finding { name, state, text };
    let mut findings = Vec::new();
    let apt = toolbox::mirror();
    let can_fetch = apt.is_ok();
    findings.push(match &apt {
        Ok(site) => finding("apt", State::Good, format!("packages come from {site}")),
        Err(error) => finding("apt", State::Fine, format!("{error:#}")),
    });
    findings.push(finding(
        "cache",
        State::Good,
        cache.folder().display().to_string(),
    ));

    let (qemu, found) = examine_qemu(cache, options, can_fetch);
    findings.push(found);
    findings.push(match &qemu {
        None => finding(
            "KVM",
            State::Fine,
            format!("not tried yet; {}", accel::kvm_device()),
        ),
        Some(qemu) => match accel::kvm_works(cache, qemu) {
            Ok(Ok(())) => finding("KVM", State::Good, "runs a guest".to_owned()),
            Ok(Err(why)) => finding("KVM", State::Fine, format!("{why}; guests are emulated")),
            Err(error) => finding(
                "KVM",
                State::Fine,
                format!("{error:#}; guests are emulated"),
            ),
        },
    });
    findings.push(examine_build(cache, options, can_fetch));
    findings.push(examine_kernel(cache, options, can_fetch));
    findings.push(match static_c_library() {
        Ok(path) => finding("static C library", State::Good, path.display().to_string()),
        Err(error) => finding("static C library", State::Missing, format!("{error:#}")),
    });
    findings
}

fn examine_qemu(cache: &Cache, options: &Options, can_fetch: bool) -> (Option<Qemu>, Finding) {
    let finding = |state, text| Finding {
        name: "QEMU",
        state,
        text,
    };
    if let Some(given) = &options.qemu {
        return match Qemu::get(cache, Some(given)) {
            Ok(qemu) => {
                let text = qemu.describe();
                (Some(qemu), finding(State::Good, text))
            }
            Err(error) => (None, finding(State::Missing, format!("{error:#}"))),
        };
    }
    let machine = match Qemu::of_machine() {
        Ok(qemu) => {
            let text = qemu.describe();
            return (Some(qemu), finding(State::Good, text));
        }
        Err(error) => error,
    };
    match Toolbox::find(cache, &toolbox::QEMU).map(Qemu::of_toolbox) {
        Some(Ok(qemu)) => {
            let text = qemu.describe();
            (Some(qemu), finding(State::Good, text))
        }
        Some(Err(error)) => (None, finding(State::Missing, format!("{error:#}"))),
        None if can_fetch => {
            let text = format!("will be fetched (the machine's own: {machine:#})");
            (None, finding(State::Fine, text))
        }
        None => {
            let text = format!(
                "the machine's own cannot be used ({machine:#}) and none can be fetched; install \
                 version {OLDEST} or newer, or give one with --qemu"
            );
            (None, finding(State::Missing, text))
        }
    }
}

fn examine_build(cache: &Cache, options: &Options, can_fetch: bool) -> Finding {
    let finding = |state, text| Finding {
        name: "kernel build",
        state,
        text,
    };
    let missing = kernel::missing_tools();
    let on_machine = match missing.is_empty() {
        true => "the machine's own tools will do".to_owned(),
        false => format!("the machine lacks {}", missing.join(", ")),
    };
    // A sandbox needs a root folder; before there is a toolbox, any will show whether it is allowed.
    let root = Toolbox::find(cache, &toolbox::BUILD).map(|toolbox| toolbox.root);
    let sandbox = cargo::rig_binary(cache)
        .and_then(|rig| sandbox::check(&rig, root.as_deref().unwrap_or(Path::new("/"))));
    match (sandbox, root.is_some()) {
        (Ok(()), true) => finding(State::Good, "the toolbox, in a sandbox".to_owned()),
        (Ok(()), false) if can_fetch => finding(
            State::Fine,
            "the toolbox will be fetched; sandboxes work here".to_owned(),
        ),
        (Err(error), _) if missing.is_empty() => {
            finding(State::Fine, format!("no sandbox ({error:#}); {on_machine}"))
        }
        (result, _) => {
            let state = match options.kernel {
                Some(_) => State::Fine,
                None => State::Missing,
            };
            let why = match result {
                Ok(()) => "nothing can be fetched".to_owned(),
                Err(error) => format!("no sandbox ({error:#})"),
            };
            finding(
                state,
                format!("{why}; {on_machine}; or give a kernel with --kernel"),
            )
        }
    }
}

fn examine_kernel(cache: &Cache, options: &Options, can_fetch: bool) -> Finding {
    let finding = |state, text| Finding {
        name: "kernel",
        state,
        text,
    };
    if options.kernel == Some(GivenKernel::Stock) {
        return match (Toolbox::find(cache, &toolbox::STOCK), can_fetch) {
            (Some(stock), _) => finding(State::Good, stock.packages.join(" ")),
            (None, true) => finding(State::Fine, "Debian's; not fetched yet".to_owned()),
            (None, false) => finding(State::Missing, "Debian's cannot be fetched".to_owned()),
        };
    }
    if let Some(GivenKernel::At(given)) = &options.kernel {
        return match given.exists() {
            true => finding(State::Good, given.display().to_string()),
            false => finding(State::Missing, format!("nothing at {}", given.display())),
        };
    }
    match kernel::find(cache, options.flavour) {
        Some(image) => finding(State::Good, image.display().to_string()),
        None if can_fetch => finding(
            State::Fine,
            "will be built (about 5 minutes on 2 cores)".to_owned(),
        ),
        None => finding(
            State::Missing,
            "its source cannot be fetched; see apt".to_owned(),
        ),
    }
}

/// Where the C compiler, which is the linker of Rust programs, finds the static C library.
fn static_c_library() -> Result<PathBuf> {
    let advice = "the guest's programs are linked statically: install a C linker and the static C \
                  library (packages gcc and libc6-dev)";
    let said = child::output(Command::new("cc").arg("-print-file-name=libc.a"))
        .map_err(|error| error.context(advice))?;
    let path = PathBuf::from(said.trim());
    if !path.is_absolute() {
        anyhow::bail!("no libc.a; {advice}");
    }
    Ok(path)
}
