//! A guest program that runs the suite that every backing has to pass, over the real thing.
//!
//! Prints a table; exit code 1 if a check failed, or if the backing can do more or less than it
//! declares.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use extlb_driver::conformance::{Abilities, Report, run};
use extlb_driver::hardware::{VfioCdev, VfioGroup};
use extlb_driver::userspace::{Config, Userspace};
use extlb_driver::{Backing, Device, Follow, Kernel};

#[derive(Parser)]
#[command(about)]
struct Cli {
    /// The way to the device.
    #[arg(long, value_enum)]
    backing: Way,
    /// Address of the device, for VFIO.
    #[arg(long, default_value = "")]
    device: String,
    /// Only checks whose name contains this.
    #[arg(long)]
    filter: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Way {
    Kernel,
    VfioGroup,
    VfioCdev,
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let report = match cli.backing {
        Way::Kernel => {
            // Which ways to follow a process there are depends on the kernel; the driver says it.
            let flags = Kernel::new().info()?.create_flags;
            // What is pinned stays what it is: there is nothing to compare.
            let follow = std::fs::read_to_string("/sys/module/extlb/parameters/follow")?;
            let abilities = Abilities {
                audit: follow.trim() != "pinned",
                follow: Follow::from_bits(flags).context("the driver has ways unknown here")?,
                ..Abilities::KERNEL
            };
            over(Kernel::new(), "kernel", &abilities, &cli)?
        }
        Way::VfioGroup => {
            let hardware = VfioGroup::open(&cli.device)?;
            let driver = Userspace::new(hardware, Config::default())?;
            over(driver, "VFIO by group", &Abilities::USERSPACE, &cli)?
        }
        Way::VfioCdev => {
            let hardware = VfioCdev::open(&cli.device)?;
            let driver = Userspace::new(hardware, Config::default())?;
            over(driver, "VFIO by iommufd", &Abilities::USERSPACE, &cli)?
        }
    };
    println!("{report}");
    Ok(match report.is_good() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn over<B: Backing>(backing: B, subject: &str, abilities: &Abilities, cli: &Cli) -> Result<Report> {
    let device = Device::open(backing).context("open the device")?;
    Ok(run(subject, &device, abilities, cli.filter.as_deref()))
}
