//! Commands and options.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};

use crate::kernel::{self, Flavour};
use crate::outcome::{Outcome, UNAVAILABLE};
use crate::profile::{Mebibytes, Profile};
use crate::rig::{GivenKernel, Options, Rig};
use crate::run::{Addition, Request, run_command};
use crate::vm::{Input, Sinks, window};
use crate::{bench, cargo, check, demo, device, doctor, paths, sandbox, signals, suite};

/// A device that works on a process's memory by its virtual addresses, and a guest to watch it in.
///
/// Exit codes: the command's own; 1 a demonstration failed; 2 wrong usage; 69 the rig cannot run;
/// 70 the guest died or its kernel reported a fault; 124 the time was up.
#[derive(Debug, Parser)]
#[command(name = "extlb", version)]
struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what the device does and prove it (the default)
    Demo(demo::Arguments),
    /// Run a command in a guest with the device
    Run(RunArguments),
    /// A shell in a guest with the device
    Shell(ShellArguments),
    /// Run a suite in a guest, print its TAP, and compare it with what is expected
    ///
    /// What is expected, and why a test does not pass, is in tests/expected. Exit code 0 if all is
    /// as expected, 1 if not: also if a test passes that is not expected to.
    Test(suite::Arguments),
    /// Say what is there, what is missing, and what to do
    Doctor(doctor::Arguments),
    /// Compare, in one run and one table
    #[command(subcommand)]
    Bench(bench::Subject),
    /// The guest's kernel
    #[command(subcommand)]
    Kernel(KernelCommand),
    /// The device alone, for a QEMU of your own
    Device(device::Arguments),
    #[command(hide = true)]
    Sandbox(sandbox::Arguments),
}

#[derive(Debug, Subcommand)]
enum KernelCommand {
    /// Build it, unless it is in the cache, and say where it is
    Build,
    /// Build a module of your own against it, and say where the module is
    Module {
        /// The folder with its source and Kbuild
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
    /// Check the patches and the driver with the kernel's own tools (checkpatch, sparse, …); takes
    /// some minutes. Exit code 1 if they find anything
    Check(check::Arguments),
}

/// The machine, beyond its profile.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct MachineArguments {
    /// Memory of the guest (512M, 2G)
    #[arg(long)]
    memory: Option<Mebibytes>,
    /// Number of virtual processors
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=8))]
    smp: Option<u32>,
    /// Words for the kernel's command line; extlb.NAME=VALUE sets a parameter of the driver
    #[arg(long, value_name = "ARGS", allow_hyphen_values = true)]
    append: Vec<String>,
    /// End the guest after this many seconds (exit code 124)
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
}

impl MachineArguments {
    /// The profile chosen, or the one named here, with what the arguments change.
    pub fn profile(&self, options: &Options, default: &str) -> Result<Profile> {
        let default = match options.kernel {
            Some(GivenKernel::Stock) => default.to_owned(),
            _ => options.flavour.profile(default),
        };
        let mut profile = Profile::load(options.profile.as_ref().unwrap_or(&default))?;
        profile.memory = self.memory.unwrap_or(profile.memory);
        profile.smp = self.smp.unwrap_or(profile.smp);
        for words in &self.append {
            profile.append.push(' ');
            profile.append.push_str(words);
        }
        Ok(profile)
    }

    /// How long the run may take.
    pub fn timeout(&self) -> Option<Duration> {
        self.timeout.map(Duration::from_secs)
    }
}

/// A package's name, and nothing that apt would take for an option or a file.
fn package_name(text: &str) -> Result<String, &'static str> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let good = text.bytes().next().is_some_and(plain)
        && text
            .bytes()
            .all(|byte| plain(byte) || b"+-.".contains(&byte));
    match good && !text.ends_with(['+', '-']) {
        true => Ok(text.to_owned()),
        false => Err("a package's name has small letters, digits, '+', '-' and '.' only"),
    }
}

#[derive(Debug, clap::Args)]
struct RunArguments {
    /// Put a file or folder of this machine into the guest
    #[arg(long, value_name = "HOST_PATH[:GUEST_PATH]", value_parser = Addition::parse)]
    add: Vec<Addition>,
    /// Put a Debian package into the guest, with all that it depends on (pciutils)
    #[arg(long, value_name = "NAME", value_parser = package_name)]
    package: Vec<String>,
    #[command(flatten)]
    machine: MachineArguments,
    /// The command: the guest's own, or this machine's (taken along with its shared libraries)
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

#[derive(Debug, clap::Args)]
struct ShellArguments {
    /// Put a file or folder of this machine into the guest
    #[arg(long, value_name = "HOST_PATH[:GUEST_PATH]", value_parser = Addition::parse)]
    add: Vec<Addition>,
    /// Put a Debian package into the guest, with all that it depends on (pciutils)
    #[arg(long, value_name = "NAME", value_parser = package_name)]
    package: Vec<String>,
    #[command(flatten)]
    machine: MachineArguments,
}

/// Runs the command that the arguments name; returns the exit code.
pub fn main() -> i32 {
    cargo::this_is_the_rig();
    let cli = Cli::parse();
    match execute(cli) {
        Ok(code) => code,
        Err(error) => {
            signals::restore_terminal();
            eprintln!("extlb: {error:#}");
            UNAVAILABLE
        }
    }
}

fn execute(cli: Cli) -> Result<i32> {
    let options = cli.options;
    let command = match cli.command {
        // These two must stay free of other threads, or serve until their client goes.
        Some(Command::Sandbox(arguments)) => match sandbox::enter(&arguments)? {},
        Some(Command::Device(arguments)) => return device::serve(&arguments),
        Some(command) => command,
        None => Command::Demo(demo::Arguments::default()),
    };
    signals::handle()?;
    match command {
        Command::Demo(arguments) => demo::run(&options, &arguments),
        Command::Run(arguments) => run(&options, arguments),
        Command::Shell(arguments) => shell(&options, arguments),
        Command::Test(arguments) => suite::run(&options, &arguments),
        Command::Doctor(arguments) => doctor::run(&options, &arguments),
        Command::Bench(subject) => bench::run(&options, &subject),
        Command::Kernel(KernelCommand::Build) => build_kernel(options.flavour),
        Command::Kernel(KernelCommand::Module { folder }) => build_module(&options, &folder),
        Command::Kernel(KernelCommand::Check(arguments)) => {
            let cache = paths::Cache::open()?;
            check::run(&cache, &cargo::rig_binary(&cache)?, &arguments)
        }
        Command::Device(_) | Command::Sandbox(_) => unreachable!("dealt with above"),
    }
}

fn run(options: &Options, arguments: RunArguments) -> Result<i32> {
    let request = Request {
        add: arguments.add,
        packages: arguments.package,
        profile: arguments.machine.profile(options, "default")?,
        timeout: arguments.machine.timeout(),
        ..Request::new(arguments.command)
    };
    let rig = Rig::prepare(options)?;
    let input = Input::Forwarded { terminal: false };
    Ok(tell(&run_command(&rig, &request, input, &Sinks::inherit)?))
}

fn shell(options: &Options, arguments: ShellArguments) -> Result<i32> {
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let request = Request {
        add: arguments.add,
        packages: arguments.package,
        profile: arguments.machine.profile(options, "default")?,
        timeout: arguments.machine.timeout(),
        tty: terminal.then(window),
        ..Request::new(["/bin/sh", "-l"])
    };
    let rig = Rig::prepare(options)?;
    if terminal {
        signals::raw_terminal()?;
    }
    let outcome = run_command(
        &rig,
        &request,
        Input::Forwarded { terminal },
        &Sinks::inherit,
    );
    signals::restore_terminal();
    Ok(tell(&outcome?))
}

/// Says what there is to say, and returns the exit code.
pub fn tell(outcome: &Outcome) -> i32 {
    for line in outcome.explanation() {
        eprintln!("{line}");
    }
    outcome.code()
}

fn build_kernel(flavour: Flavour) -> Result<i32> {
    let cache = paths::Cache::open()?;
    let (image, driver) = kernel::get(&cache, &cargo::rig_binary(&cache)?, flavour, true)?;
    println!("{}", image.display());
    if let Some(driver) = driver {
        println!("{}", driver.display());
    }
    Ok(0)
}

fn build_module(options: &Options, folder: &Path) -> Result<i32> {
    let cache = paths::Cache::open()?;
    let given = match &options.kernel {
        Some(GivenKernel::Stock) => bail!("no modules are built for Debian's own kernel here"),
        Some(GivenKernel::At(tree)) => Some(tree.as_path()),
        None => None,
    };
    let rig = cargo::rig_binary(&cache)?;
    let module = kernel::module(&cache, &rig, options.flavour, given, folder)?;
    println!("{}", module.display());
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn hidden_commands_do_not_clash_with_global_options() {
        let words = "extlb sandbox --root / --mount /a /b --cwd / -- true";
        let cli = Cli::try_parse_from(words.split(' ')).unwrap();
        assert!(matches!(cli.command, Some(Command::Sandbox(_))));
    }

    #[test]
    fn a_commands_own_options_are_left_alone() {
        let cli = Cli::try_parse_from(["extlb", "run", "--smp", "4", "--", "ls", "--memory", "-l"]);
        let Some(Command::Run(run)) = cli.unwrap().command else {
            panic!("not run")
        };
        assert_eq!(run.machine.smp, Some(4));
        assert_eq!(run.command, ["ls", "--memory", "-l"]);
        for wrong in [
            &["extlb", "run"][..],
            &["extlb", "run", "--smp", "0", "--", "x"],
            &["extlb", "run", "--memory", "lots", "--", "x"],
            &["extlb", "no-such-command"],
        ] {
            assert_eq!(
                Cli::try_parse_from(wrong).unwrap_err().exit_code(),
                2,
                "{wrong:?}"
            );
        }
    }
}
