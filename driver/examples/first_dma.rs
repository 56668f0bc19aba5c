//! From nothing to the first DMA: the device copies a buffer, by the addresses of this program.
//!
//! ```text
//! cargo build -p extlb-driver -p extlb-device --example first_dma --bin extlb-device
//! target/debug/examples/first_dma in-process          # the device is a part of this program
//! target/debug/examples/first_dma socket              # in a process of its own, started for this
//! target/debug/examples/first_dma socket PATH         # of `extlb-device --socket-path PATH`
//! extlb run -- target/debug/examples/first_dma kernel  # in a guest, with the kernel's driver
//! extlb run --kernel stock -- target/debug/examples/first_dma vfio-group 01:00.0
//! extlb run --iommu intel --bind vfio-pci -- target/debug/examples/first_dma vfio-cdev 01:00.0
//! ```

use std::path::PathBuf;

use extlb_driver::hardware::{LocalDevice, Socket, VfioCdev, VfioGroup};
use extlb_driver::userspace::{Config, Userspace};
use extlb_driver::{Backing, Device, Error, Kernel, Options};

/// The same for every way to the device.
fn copy<B: Backing>(way: B) -> Result<(), Error> {
    let device = Device::open(way)?;
    let context = device.context(Options::default())?;
    let mut src = context.allocate(1 << 20)?;
    let dst = context.allocate(1 << 20)?;
    for (i, byte) in src.iter_mut().enumerate() {
        *byte = (i % 251) as u8;
    }
    // The buffers are handed over, and come back when the device is done.
    let ((), (src, dst)) = context.queue().copy(src, dst)?.finish()?;
    assert!(src[..] == dst[..], "the device said that it is done");
    println!("{} bytes copied by DMA", dst.len());
    Ok(())
}

/// The device server, as cargo builds it: in the folder above the examples.
fn server() -> std::io::Result<PathBuf> {
    let this = std::env::current_exe()?;
    Ok(this.with_file_name("../extlb-device"))
}

fn run(arguments: &[&str]) -> Result<(), Box<dyn std::error::Error>> {
    let config = Config::default();
    match *arguments {
        ["in-process"] => copy(Userspace::new(
            LocalDevice::new(Default::default())?,
            config,
        )?)?,
        ["socket"] => copy(Userspace::new(Socket::spawn(server()?, "")?, config)?)?,
        ["socket", path] => copy(Userspace::new(Socket::connect(path)?, config)?)?,
        ["vfio-group", device] => copy(Userspace::new(VfioGroup::open(device)?, config)?)?,
        ["vfio-cdev", device] => copy(Userspace::new(VfioCdev::open(device)?, config)?)?,
        ["kernel"] => copy(Kernel::new())?,
        _ => {
            return Err("in-process, socket [PATH], vfio-group BDF, vfio-cdev BDF, kernel?".into());
        }
    }
    Ok(())
}

fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("first_dma: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
