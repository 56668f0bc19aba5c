//! QEMU's command line.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use super::accel::Accelerator;
use extlb_guest::protocol::PORT_NAME;

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
    /// The device server's socket, relative to QEMU's working directory or absolute.
    pub device: Option<PathBuf>,
}

/// QEMU's arguments for attaching the device to a machine with `memory` MiB.
///
/// The guest's memory has to be shared: the device reads and writes it directly.
pub fn device_arguments(socket: &Path, memory: u64) -> Result<Vec<String>> {
    let socket = socket.to_str().context("the socket's path is not UTF-8")?;
    let device = json!({
        "driver": "vfio-user-pci",
        "socket": { "type": "unix", "path": socket },
    });
    let mut arguments = shared_memory(memory);
    arguments.extend(["-device".to_owned(), device.to_string()]);
    Ok(arguments)
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
    let accelerator = match machine.accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "tcg,thread=multi",
    };
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
        ])
        .args(["-machine", "q35", "-accel", accelerator, "-cpu", cpu])
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
    match &machine.device {
        Some(socket) => command.args(device_arguments(socket, machine.memory)?),
        None => command.args(shared_memory(machine.memory)),
    };
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
            device: Some("device.sock".into()),
        };
        let mut command = Command::new("qemu");
        add_arguments(&mut command, &machine).unwrap();
        let text: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
        assert!(text.iter().any(|a| *a == "max,la57=off"));
        assert!(
            text.iter()
                .any(|a| *a == "virtio-blk-pci,drive=disk0,serial=swap")
        );
    }
}
