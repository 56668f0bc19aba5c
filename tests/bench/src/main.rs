//! The same workloads over one way to the device, as JSON; `extlb bench` runs it for each.

mod mmio_unsafe;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use extlb_driver::hardware::{Hardware, LocalDevice, Socket, VfioCdev, VfioGroup};
use extlb_driver::inprocess::{InProcess, MachineConfig};
use extlb_driver::userspace::{Config, Userspace};
use extlb_driver::workloads::{self, Timing};
use extlb_driver::{Backing, Device, Kernel, spec};
use serde::Serialize;

/// Times the device over one backing and prints the figures as JSON.
#[derive(Debug, Parser)]
#[command(name = "extlb-bench")]
struct Arguments {
    /// Which way to the device
    #[arg(value_enum)]
    way: Way,
    /// PCI address, for the ways through VFIO and for `bar` [default: $EXTLB_BDF]
    #[arg(long, env = "EXTLB_BDF")]
    device: Option<String>,
    /// Socket of a device server, for `socket`
    #[arg(long)]
    socket: Option<PathBuf>,
    /// How long each workload runs, in ms
    #[arg(long, default_value_t = workloads::DEFAULT_TIME.as_millis() as u64)]
    time: u64,
}

/// Ways to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Way {
    /// Device and an emulated kernel with pte notifiers in this process
    InProcessKernel,
    /// Device in this process, driven from user space
    InProcess,
    /// Device in another process, over a vfio-user socket
    Socket,
    /// VFIO by group and container
    VfioGroup,
    /// VFIO by iommufd
    VfioCdev,
    /// The kernel's driver
    Kernel,
    /// Only reads of the first word of any PCI device's BAR 0, by its PCI address
    Bar,
}

/// What one way took.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Figures {
    /// Median time of reading a register, in ns; absent where a program cannot.
    register_read_ns: Option<u64>,
    /// The workloads.
    workloads: Vec<Workload>,
}

/// What a workload took.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Workload {
    /// Its name.
    name: String,
    /// Rounds done.
    rounds: u64,
    /// Median time of a round, in ns.
    p50_ns: u64,
    /// 99th percentile, in ns.
    p99_ns: u64,
    /// Operations a second.
    per_second: f64,
    /// Bytes a second; 0 where no data is moved.
    bytes_per_second: f64,
}

impl From<Timing> for Workload {
    fn from(timing: Timing) -> Self {
        Self {
            name: timing.name.into(),
            rounds: timing.rounds,
            p50_ns: timing.p50_ns,
            p99_ns: timing.p99_ns,
            per_second: timing.per_second,
            bytes_per_second: timing.bytes_per_second,
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match measure(&arguments).and_then(|figures| Ok(serde_json::to_string(&figures)?)) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("extlb-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: &Arguments) -> Result<Figures> {
    let time = Duration::from_millis(arguments.time);
    let device = || {
        let device = arguments.device.as_deref();
        device.context("give the device's PCI address with --device")
    };
    match arguments.way {
        Way::InProcessKernel => {
            let config = MachineConfig {
                ram: 256 << 20,
                ..MachineConfig::default()
            };
            over(InProcess::new(config)?, time)
        }
        Way::InProcess => owned(LocalDevice::new(extlb_device::Config::default())?, time),
        Way::Socket => {
            let socket = arguments.socket.as_ref();
            let socket = socket.context("give the socket of a device server with --socket")?;
            owned(Socket::connect(socket)?, time)
        }
        Way::VfioGroup => owned(VfioGroup::open(device()?)?, time),
        Way::VfioCdev => owned(VfioCdev::open(device()?)?, time),
        Way::Kernel => over(Kernel::new(), time),
        Way::Bar => Ok(Figures {
            register_read_ns: Some(mmio_unsafe::read_ns(device()?, time)?),
            workloads: Vec::new(),
        }),
    }
}

/// Over a device that this program drives: its registers can be read as well.
fn owned<H: Hardware>(hardware: H, time: Duration) -> Result<Figures> {
    let userspace = Userspace::new(hardware, Config::default())?;
    let id = spec::regs::ID;
    let read = || {
        let value = userspace
            .hardware()
            .read(spec::BAR_REGS, id.offset, id.width);
        anyhow::ensure!(value == id.reset, "the device is gone");
        Ok(())
    };
    let register_read_ns = Some(median(time, read)?);
    Ok(Figures {
        register_read_ns,
        ..over(userspace, time)?
    })
}

fn over<B: Backing>(backing: B, time: Duration) -> Result<Figures> {
    let device = Device::open(backing)?;
    let timings = workloads::run(&device, time)?;
    Ok(Figures {
        register_read_ns: None,
        workloads: timings.into_iter().map(Into::into).collect(),
    })
}

/// Median time of `once`, in ns.
fn median(how_long: Duration, mut once: impl FnMut() -> Result<()>) -> Result<u64> {
    let mut times = Vec::new();
    let begun = std::time::Instant::now();
    while begun.elapsed() < how_long || times.len() < 10 {
        let start = std::time::Instant::now();
        once()?;
        times.push(start.elapsed().as_nanos() as u64);
    }
    times.sort_unstable();
    Ok(times[times.len() / 2])
}
