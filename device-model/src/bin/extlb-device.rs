//! The device as a process: a vfio-user server.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use extlb_device::Config;
use extlb_device::fault::{self, Rule};
use extlb_device::server::{Options, Server, announce, qemu_args};

/// Serves an extlb device over vfio-user.
///
/// Prints "listening on PATH" when a client can connect. Attach it to QEMU 10.1.1 or newer, whose
/// guest RAM must be shared:
///
///   qemu-system-x86_64 -object memory-backend-memfd,id=m,size=1G,share=on
///     -numa node,memdev=m -m 1G
///     -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"PATH"}}'
#[derive(Parser, Debug)]
#[command(version, verbatim_doc_comment, after_long_help = fault::help())]
struct Arguments {
    /// Where to make the UNIX socket.
    #[arg(long, value_name = "PATH")]
    socket_path: PathBuf,
    /// Where to write stale accesses and the summary, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Configuration of the device, in TOML: tlb.sets, tlb.ways, tlb.policy, tlb.seed,
    /// engines, schedule.policy, schedule.quantum, schedule.chunk, poll_us, oracle.enabled,
    /// oracle.bound_ms; and debug.skip_drain, debug.bus_delay_us, fault_seed and [[fault]], which
    /// break the device on purpose, for tests.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Break the device on purpose: KIND[,NAME=VALUE]..., for instance skip-ack,after=10,times=1.
    /// May be repeated; adds to the configuration. --help lists the kinds.
    #[arg(long, value_name = "RULE")]
    fault: Vec<Rule>,
    /// Seed of the faults.
    #[arg(long, value_name = "NUMBER")]
    fault_seed: Option<u64>,
    /// End when the first client has left.
    #[arg(long)]
    once: bool,
    /// Print QEMU's arguments for this socket, and end.
    #[arg(long)]
    print_qemu_args: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("extlb-device: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<(), Box<dyn std::error::Error>> {
    if arguments.print_qemu_args {
        println!("{}", qemu_args(&arguments.socket_path).join(" "));
        return Ok(());
    }
    let mut config = match &arguments.config {
        None => Config::default(),
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .map_err(|e| format!("cannot read {}: {e}", path.display()))?;
            Config::from_toml(&text)?
        }
    };
    config.fault.extend(arguments.fault);
    config.fault_seed = arguments.fault_seed.unwrap_or(config.fault_seed);
    let server = Server::bind(Options {
        socket: arguments.socket_path.clone(),
        report: arguments.report,
        config,
        once: arguments.once,
    })?;
    announce(&arguments.socket_path);
    server.serve()?;
    Ok(())
}
