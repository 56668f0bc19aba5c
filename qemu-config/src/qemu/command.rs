//! QEMU's command line.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use super::accel::Accelerator;
use extlb_guest_protocol::PORT_NAME;

/// A disk of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// By which the guest finds it; at most 20 characters.
    pub serial: &'static str,
    /// A raw image.
    pub image: PathBuf,
    /// Whether the guest may not write.
    pub read_only: bool,
}

/// What translates the addresses that devices put on the guest's bus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Iommu {
    /// Nothing: bus addresses are the guest's physical addresses.
    #[default]
    None,
    /// Intel VT-d, with interrupt remapping.
    Intel,
    /// virtio-iommu.
    Virtio,
}

/// The machine to start.
#[derive(Clone, Debug)]
pub struct Machine {
    /// What runs it.
    pub accelerator: Accelerator,
    /// Memory, in MiB.
    pub memory: u64,
    /// Number of virtual processors.
    pub smp: u32,
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// The kernel's command line.
    pub command_line: String,
    /// Disks, in order.
    pub disks: Vec<Disk>,
    /// The IOMMU.
    pub iommu: Iommu,
    /// Whether a restart of the guest is one; else QEMU ends.
    pub may_restart: bool,
    /// A socket for QEMU's monitor.
    pub monitor: Option<PathBuf>,
    /// The device server's socket, relative to QEMU's working directory or absolute.
    pub device: Option<PathBuf>,
    /// More arguments, of the user's.
    pub more: Vec<String>,
}

/// QEMU's arguments for attaching the device to a machine with `memory` MiB.
///
/// The guest's memory has to be shared: the device reads and writes it directly.
pub fn device_arguments(socket: &Path, memory: u64) -> Result<Vec<String>> {
    let mut arguments = shared_memory(memory);
    arguments.extend(["-device".to_owned(), device_value(socket)?.to_string()]);
    Ok(arguments)
}

fn device_value(socket: &Path) -> Result<serde_json::Value> {
    let socket = socket.to_str().context("the socket's path is not UTF-8")?;
    Ok(json!({
        "driver": "vfio-user-pci",
        "socket": { "type": "unix", "path": socket },
    }))
}

/// The device's name in QEMU's monitor.
pub const DEVICE_ID: &str = "extlb";
/// The name of the PCIe port that it is plugged into.
pub const PORT_ID: &str = "port1";

/// The device in a port of its own, so that it can be unplugged; the same value plugs it in again
/// through the monitor.
pub fn plugged_device(socket: &Path) -> Result<serde_json::Value> {
    let mut device = device_value(socket)?;
    device["id"] = json!(DEVICE_ID);
    device["bus"] = json!(PORT_ID);
    Ok(device)
}

fn shared_memory(memory: u64) -> Vec<String> {
    [
        "-m",
        &format!("{memory}M"),
        "-object",
        &format!("memory-backend-memfd,id=m,size={memory}M,share=on"),
        "-numa",
        "node,memdev=m",
    ]
    .map(str::to_owned)
    .into()
}

/// A `-blockdev` value for a raw file. JSON, because a path may hold commas.
pub fn raw_file(name: &str, path: &Path, read_only: bool) -> Result<String> {
    let path = path.to_str().context("the image's path is not UTF-8")?;
    Ok(json!({
        "driver": "raw",
        "node-name": name,
        "read-only": read_only,
        "file": {
            "driver": "file",
            "filename": path,
            "read-only": read_only,
            "discard": "unmap",
            // Several guests may read one image at once.
            "locking": if read_only { "off" } else { "auto" },
        },
    })
    .to_string())
}

/// Adds the arguments for `machine`. The console goes to standard output, the agent's channel is
/// the socket given as standard input.
pub fn add_arguments(command: &mut Command, machine: &Machine) -> Result<()> {
    let cpu = match machine.accelerator {
        Accelerator::Kvm => "host",
        Accelerator::Tcg => "max,la57=off",
    };
    // Interrupt remapping needs the interrupt controller in QEMU.
    let machine_type = match (machine.accelerator, machine.iommu) {
        (Accelerator::Kvm, Iommu::Intel) => "q35,kernel-irqchip=split",
        _ => "q35",
    };
    let accelerator = match machine.accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "tcg,thread=multi",
    };
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-machine", machine_type, "-accel", accelerator, "-cpu", cpu])
        .arg("-smp")
        .arg(machine.smp.to_string())
        .arg("-kernel")
        .arg(&machine.kernel)
        .arg("-initrd")
        .arg(&machine.initramfs)
        .arg("-append")
        .arg(&machine.command_line)
        .args([
            "-chardev",
            "file,id=console,path=/dev/fd/1",
            "-serial",
            "chardev:console",
        ])
        // It has to be there before the devices that it translates for.
        .args(match machine.iommu {
            Iommu::None => &[][..],
            Iommu::Intel => &[
                "-device",
                "intel-iommu,caching-mode=on,aw-bits=48,intremap=on",
            ],
            Iommu::Virtio => &["-device", "virtio-iommu-pci"],
        })
        .args(["-chardev", "socket,id=agent,fd=0"])
        .args(["-device", "virtio-serial-pci"])
        .arg("-device")
        .arg(format!("virtserialport,chardev=agent,name={PORT_NAME}"));
    for (index, disk) in machine.disks.iter().enumerate() {
        let name = format!("disk{index}");
        command
            .arg("-blockdev")
            .arg(raw_file(&name, &disk.image, disk.read_only)?);
        command.arg("-device").arg(format!(
            "virtio-blk-pci,drive={name},serial={}",
            disk.serial
        ));
    }
    if !machine.may_restart {
        command.arg("-no-reboot");
    }
    if let Some(socket) = &machine.monitor {
        let path = socket.to_str().context("the monitor's path is not UTF-8")?;
        // In these values a comma is written twice.
        let path = path.replace(',', ",,");
        let monitor = format!("unix:{path},server=on,wait=off");
        command.args(["-qmp", &monitor]);
    }
    command.args(shared_memory(machine.memory));
    if let Some(socket) = &machine.device {
        let port = format!("pcie-root-port,id={PORT_ID},chassis=1,slot=1");
        command.args(["-device", &port]).arg("-device");
        command.arg(plugged_device(socket)?.to_string());
    }
    command.args(&machine.more);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn awkward_paths_stay_in_one_piece() {
        let path = Path::new("/a,b \"c\"/image");
        let value: serde_json::Value =
            serde_json::from_str(&raw_file("x", path, true).unwrap()).unwrap();
        assert_eq!(value["file"]["filename"], "/a,b \"c\"/image");
        let arguments = device_arguments(Path::new("/a,b/socket"), 64).unwrap();
        let device: serde_json::Value = serde_json::from_str(arguments.last().unwrap()).unwrap();
        assert_eq!(device["socket"]["path"], "/a,b/socket");
        assert!(
            arguments
                .iter()
                .any(|argument| argument.contains("share=on"))
        );
    }

    #[test]
    fn emulation_has_four_levels_of_page_tables() {
        let machine = Machine {
            accelerator: Accelerator::Tcg,
            memory: 256,
            smp: 2,
            kernel: "/k".into(),
            initramfs: "/i".into(),
            command_line: "console=ttyS0".into(),
            disks: vec![Disk {
                serial: "swap",
                image: "/s".into(),
                read_only: false,
            }],
            iommu: Iommu::Intel,
            may_restart: false,
            monitor: Some("/a,b".into()),
            device: Some("device.sock".into()),
            more: Vec::new(),
        };
        let mut command = Command::new("qemu");
        add_arguments(&mut command, &machine).unwrap();
        let text: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
        assert!(text.iter().any(|a| *a == "max,la57=off"));
        let at = |what: &str| text.iter().position(|a| a.contains(what)).unwrap();
        at("-no-reboot");
        at("unix:/a,,b,server=on");
        at("virtio-blk-pci,drive=disk0,serial=swap");
        assert!(at("intel-iommu,") < at("vfio-user-pci"));
        assert!(at("pcie-root-port,id=port1") < at("vfio-user-pci"));
    }
}
