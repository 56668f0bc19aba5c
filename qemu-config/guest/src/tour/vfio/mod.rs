//! The tour on an ordinary kernel: the device belongs to a program, by VFIO, and what it may touch
//! is locked.

mod first_dma;
mod pressure;
mod unmap;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use extlb_driver::Device;
use extlb_driver::hardware::{Hardware, VfioCdev, VfioGroup};
use extlb_driver::userspace::{Config, Userspace};

use super::{Arguments, Runner, procfs};

/// Steps by name, in the order in which they are done. The second only where the kernel has iommufd.
pub const STEPS: [&str; 4] = [
    "first-dma",
    "first-dma-iommufd",
    "unmap-under-fire",
    "memory-pressure",
];

/// Where the kernel has device nodes for iommufd.
const CDEVS: &str = "/dev/vfio/devices";

/// Does the steps that are wanted.
pub fn run(arguments: &Arguments, runner: &mut Runner) -> Result<()> {
    let bdf = bdf()?;
    runner.step(STEPS[0], |figures| {
        first_dma::run(&open(VfioGroup::open(&bdf)?)?, figures)
    });
    if Path::new(CDEVS).exists() {
        runner.step(STEPS[1], |figures| {
            first_dma::run(&open(VfioCdev::open(&bdf)?)?, figures)
        });
    } else {
        println!("  (this kernel has no iommufd: by group and container only)");
    }
    runner.step(STEPS[2], |figures| {
        unmap::run(&open(VfioGroup::open(&bdf)?)?, arguments.seed, figures)
    });
    runner.step(STEPS[3], |figures| pressure::run(&bdf, figures));
    Ok(())
}

/// Part of the step memory-pressure.
pub fn child(mib: u64) -> ExitCode {
    pressure::child(mib)
}

/// Where the device is on the bus; the agent says it.
fn bdf() -> Result<String> {
    std::env::var("EXTLB_BDF").context("EXTLB_BDF does not say where the device is")
}

fn open<H: Hardware>(hardware: H) -> Result<Device<Userspace<H>>> {
    Ok(Device::open(Userspace::new(hardware, Config::default())?)?)
}

/// What this process has locked, in KiB: VFIO's containers count in the first, iommufd in the
/// second.
fn locked_kib() -> Result<(u64, u64)> {
    Ok((procfs::status_kib("VmLck")?, procfs::status_kib("VmPin")?))
}
