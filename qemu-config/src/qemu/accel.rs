//! Which accelerator really works.
//!
//! `/dev/kvm` may open, make a machine and a processor, and still be unable to run an ordinary
//! kernel. So KVM has to prove itself once, with a guest of a few bytes and under a time limit; the
//! answer is kept for as long as the machine stays booted.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::Qemu;
use crate::paths::{Cache, Key};
use crate::spawn_unsafe::dies_with_us;
use crate::toolbox::publish;

/// What is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Wish {
    /// KVM where it works, else TCG.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Emulation.
    Tcg,
}

/// What is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The processor's virtualisation.
    Kvm,
    /// QEMU's emulation, one thread for each virtual processor.
    Tcg,
}

impl Accelerator {
    /// As in QEMU's options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// A guest this small starts within a second, even after the firmware.
const PROOF_LIMIT: Duration = Duration::from_secs(10);
/// isa-debug-exit turns a written value v into exit code 2v + 1.
const PROOF_VALUE: u8 = 0x10;
const PROOF_CODE: i32 = 2 * PROOF_VALUE as i32 + 1;

#[derive(Serialize, Deserialize)]
struct Remembered {
    works: bool,
    why: String,
}

/// Whether KVM works here, from memory or by trying; the reason if not.
pub fn kvm_works(cache: &Cache, qemu: &Qemu) -> Result<Result<(), String>> {
    let path = memory(cache, qemu)?;
    let known = fs::read(&path)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok());
    let known: Remembered = match known {
        Some(known) => known,
        None => {
            let tried = prove(qemu)?;
            remember(cache, qemu, tried.as_ref().err().map(String::as_str))?;
            return Ok(tried);
        }
    };
    Ok(if known.works { Ok(()) } else { Err(known.why) })
}

/// Keeps the answer: `problem` is why it does not work.
pub fn remember(cache: &Cache, qemu: &Qemu, problem: Option<&str>) -> Result<()> {
    let known = Remembered {
        works: problem.is_none(),
        why: problem.unwrap_or_default().to_owned(),
    };
    publish(&memory(cache, qemu)?, &serde_json::to_vec(&known)?)
}

fn memory(cache: &Cache, qemu: &Qemu) -> Result<std::path::PathBuf> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    // Who may open the device can change without a reboot.
    let opens = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    let key = Key::new("kvm")
        .with(boot)
        .with(qemu.describe())
        .with([u8::from(opens)])
        .finish();
    cache.path(format!("kvm/{key}.json"))
}

/// Boots a sector whose only deed is to end QEMU with a known code.
fn prove(qemu: &Qemu) -> Result<Result<(), String>> {
    if let Err(error) = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        return Ok(Err(format!("/dev/kvm: {error}")));
    }
    let mut image = tempfile::NamedTempFile::new().context("cannot write a temporary file")?;
    std::io::Write::write_all(&mut image, &proof_sector())?;
    let mut command = qemu.command();
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args([
            "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "16", "-serial", "none",
        ])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .args(["-boot", "c", "-blockdev"])
        .arg(super::command::raw_file("proof", image.path(), true)?)
        .args(["-device", "ide-hd,drive=proof"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = dies_with_us(&mut command)
        .spawn()
        .context("cannot start QEMU")?;
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(match status.code() {
                Some(PROOF_CODE) => Ok(()),
                _ => Err(format!(
                    "KVM cannot run a guest here (QEMU ended with {status})"
                )),
            });
        }
        if start.elapsed() > PROOF_LIMIT {
            let _ = child.kill();
            let _ = child.wait();
            return Ok(Err("KVM starts a guest and then hangs".to_owned()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A boot sector: `mov al, PROOF_VALUE; out 0xf4, al; hlt; jmp $-1`, padded, with its signature.
fn proof_sector() -> Vec<u8> {
    let mut sector = vec![0xb0, PROOF_VALUE, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd];
    sector.resize(510, 0);
    sector.extend_from_slice(&[0x55, 0xaa]);
    sector
}

/// For people: what `/dev/kvm` looks like.
pub fn kvm_device() -> &'static str {
    if Path::new("/dev/kvm").exists() {
        "/dev/kvm is there"
    } else {
        "no /dev/kvm"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proof_is_a_boot_sector() {
        let sector = proof_sector();
        assert_eq!(sector.len(), 512);
        assert_eq!(sector[510..], [0x55, 0xaa]);
        assert_eq!(PROOF_CODE, 33);
    }
}
