//! The device as a process: a vfio-user server.

use std::process::ExitCode;

use clap::Parser;
use extlb_device::fault;
use extlb_device::record::command;
use extlb_device::server::{Address, Arguments, Server, announce, qemu_args};

/// Serves extlb devices over vfio-user, one at each socket.
///
/// Prints "listening on PATH" when a client can connect; a client that comes while another is
/// served waits. Attach a device to QEMU 10.1.1 or newer, whose guest RAM must be shared:
///
///   qemu-system-x86_64 -object memory-backend-memfd,id=m,size=1G,share=on
///     -numa node,memdev=m -m 1G
///     -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"PATH"}}'
///
/// Configuration: tlb.sets, tlb.ways, tlb.policy, tlb.seed, engines,
/// schedule.policy, schedule.quantum, schedule.chunk, poll_us, oracle.enabled, oracle.bound_ms; and debug.skip_drain, debug.bus_delay_us, fault_seed
/// and [[fault]], which break the device on purpose, for tests.
///
/// Exit codes: 0 done (--once), 1 it could not be served or the device has failed, 2 usage.
/// Of replay: 0 the same, 1 something else happened, or the file is damaged.
#[derive(Parser, Debug)]
#[command(args_conflicts_with_subcommands = true)]
#[command(version, verbatim_doc_comment, after_long_help = fault::help())]
struct CommandLine {
    #[command(flatten)]
    server: Arguments,
    /// Print QEMU's arguments for these sockets, and end.
    #[arg(long)]
    print_qemu_args: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Does a recorded run (--record) again, without guest, memory or clock, and compares.
    Replay(command::Arguments),
}

fn main() -> ExitCode {
    match run(&CommandLine::parse()) {
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

fn run(arguments: &CommandLine) -> Result<(), Box<dyn std::error::Error>> {
    if let Some(Command::Replay(replay)) = &arguments.command {
        return Ok(command::run(replay, std::io::stdout())?);
    }
    let options = arguments.server.options(None)?;
    if arguments.print_qemu_args {
        for at in &options.at {
            match at {
                Address::Path(path) => println!("{}", qemu_args(path).join(" ")),
                Address::Fd(_) => return Err("QEMU connects to a path only".into()),
            }
        }
        return Ok(());
    }
    let at = options.at.clone();
    let server = Server::bind(options)?;
    announce(&at);
    server.serve()?;
    Ok(())
}
