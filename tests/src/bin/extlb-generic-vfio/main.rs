//! A guest program that uses a PCI device through VFIO and knows nothing of it.
//!
//! Whatever works with this device must not depend on the order in which our own driver does
//! things, so here is somebody else's: everything is opened, read, mapped, set up, triggered and
//! reset in odd orders, twice in a row. Prints what it found; exit code 1 if something is not as
//! VFIO and PCI say.
#![allow(missing_docs)]

mod config;
mod interrupts;
mod region_unsafe;

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use iommufd_ioctls::IommuFd;
use vfio_ioctls::{VfioContainer, VfioDevice, VfioIommufd, VfioOps};

use config::MsixTable;
use interrupts::Poke;
use region_unsafe::Region;

#[derive(Parser)]
#[command(about)]
struct Cli {
    /// Address of the device, as in sysfs.
    bdf: String,
    /// Open it by its character device and iommufd rather than by group and container.
    #[arg(long)]
    cdev: bool,
    /// A write that makes the device raise an interrupt: BAR:OFFSET=VALUE:VECTOR, 4 bytes.
    #[arg(long, value_parser = Poke::parse)]
    poke: Option<Poke>,
    /// How often to do it all.
    #[arg(long, default_value_t = 2)]
    rounds: u32,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    for round in 1..=cli.rounds {
        do_everything(&cli).with_context(|| format!("round {round}"))?;
        println!("round {round}: all is as it should be");
    }
    Ok(())
}

/// Opens the device, does everything, and closes it.
fn do_everything(cli: &Cli) -> Result<()> {
    let device = open(cli)?;
    let table = config::look(&device)?;
    for bar in 0..6 {
        look_at_bar(&device, bar, &table).with_context(|| format!("BAR {bar}"))?;
    }
    interrupts::exercise(&device, cli.poke)?;
    device.reset();
    // What it looks like does not depend on what was done to it.
    config::look(&device)?;
    Ok(())
}

fn open(cli: &Cli) -> Result<VfioDevice> {
    let ops: Arc<dyn VfioOps> = match cli.cdev {
        false => Arc::new(VfioContainer::new(None)?),
        true => {
            let iommufd = Arc::new(IommuFd::new().context("open /dev/iommu")?);
            Arc::new(VfioIommufd::new(iommufd, None, None)?)
        }
    };
    let path = Path::new("/sys/bus/pci/devices").join(&cli.bdf);
    VfioDevice::new(&path, ops, true).with_context(|| format!("open {}", path.display()))
}

/// Reads all over a BAR, by calls and through a mapping; both must say the same.
fn look_at_bar(device: &VfioDevice, bar: u32, table: &MsixTable) -> Result<()> {
    let region = Region::new(device, bar)?;
    let size = region.size();
    if size == 0 {
        // The upper half of a 64-bit one, or none.
        return Ok(());
    }
    let mapping = region.map()?;
    // Every word of a small one; the first and the last of every page of a large one.
    let offsets: Vec<u64> = match size {
        ..=4096 => (0..size).step_by(4).collect(),
        _ => (0..size)
            .step_by(4096)
            .flat_map(|page| [page, page + 4092])
            .collect(),
    };
    for offset in offsets {
        let by_call = region.read(offset, 4)?;
        let by_map = u64::from(mapping.read(offset)?);
        if table.bar == bar && table.offsets.contains(&offset) {
            // The kernel keeps it from calls, and a virtual machine from mappings.
            continue;
        }
        ensure!(
            by_call == by_map,
            "at {offset:#x}: {by_call:#x} by a call, {by_map:#x} by the mapping"
        );
    }
    // Widths that a device may not like are still answered.
    for width in [1, 2, 8] {
        region.read(0, width)?;
        region.read(size - width as u64, width)?;
    }
    println!(
        "BAR {bar}: {size} bytes, first word {:#010x}",
        mapping.read(0)?
    );
    Ok(())
}
