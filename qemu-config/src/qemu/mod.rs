//! QEMU: which one, and how it is started.

pub mod accel;
pub mod command;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::child;
use crate::paths::Cache;
use crate::toolbox::{self, Toolbox};

/// The device model that connects to the server.
const CLIENT: &str = "vfio-user-pci";
/// Earlier versions have no vfio-user client, or one that reports a wrong class code (10.1.0).
pub const OLDEST: Version = Version(10, 1, 1);

const NAME: &str = "qemu-system-x86_64";

/// A version of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// A QEMU that can attach the device.
#[derive(Clone, Debug)]
pub struct Qemu {
    origin: Origin,
    /// Its version.
    pub version: Version,
}

#[derive(Clone, Debug)]
enum Origin {
    Machine(PathBuf),
    Toolbox(Toolbox),
}

impl Qemu {
    /// The one given; else the machine's own if it is good enough; else the toolbox's.
    pub fn get(cache: &Cache, given: Option<&Path>) -> Result<Self> {
        if let Some(program) = given {
            return Self::examine(Origin::Machine(program.to_path_buf()))
                .with_context(|| format!("the QEMU given, {}, cannot be used", program.display()));
        }
        match Self::of_machine() {
            Ok(qemu) => Ok(qemu),
            Err(_) => Self::of_toolbox(Toolbox::get(cache, &toolbox::QEMU)?),
        }
    }

    /// The machine's own, if it is good enough.
    pub fn of_machine() -> Result<Self> {
        Self::examine(Origin::Machine(NAME.into()))
    }

    /// The toolbox's.
    pub fn of_toolbox(toolbox: Toolbox) -> Result<Self> {
        Self::examine(Origin::Toolbox(toolbox)).context("the fetched QEMU cannot be used")
    }

    fn examine(origin: Origin) -> Result<Self> {
        let mut qemu = Self {
            origin,
            version: Version(0, 0, 0),
        };
        let said = child::output(qemu.command().arg("--version"))?;
        qemu.version = parse_version(&said).with_context(|| format!("no version in: {said}"))?;
        if qemu.version < OLDEST {
            bail!("version {} is older than {OLDEST}", qemu.version);
        }
        let devices = child::output(qemu.command().args(["-device", "help"]))?;
        if !devices.contains(&format!("\"{CLIENT}\"")) {
            bail!("version {} was built without {CLIENT}", qemu.version);
        }
        Ok(qemu)
    }

    /// A command that starts it.
    pub fn command(&self) -> Command {
        match &self.origin {
            Origin::Machine(program) => Command::new(program),
            Origin::Toolbox(toolbox) => {
                let mut command = toolbox.command(&format!("usr/bin/{NAME}"));
                for share in ["usr/share/qemu", "usr/share/seabios"] {
                    command.arg("-L").arg(toolbox.root.join(share));
                }
                let modules = toolbox.root.join("usr/lib/x86_64-linux-gnu/qemu");
                command.env("QEMU_MODULE_DIR", modules);
                command
            }
        }
    }

    /// For people: version and where it is from.
    pub fn describe(&self) -> String {
        match &self.origin {
            Origin::Machine(program) => format!("{} ({})", self.version, program.display()),
            Origin::Toolbox(_) => format!("{} (from the toolbox)", self.version),
        }
    }
}

fn parse_version(said: &str) -> Option<Version> {
    let words = said
        .lines()
        .next()?
        .strip_prefix("QEMU emulator version ")?;
    let number = words.split_whitespace().next()?;
    let mut parts = number.split('.').map(|part| part.parse::<u32>().ok());
    Some(Version(
        parts.next()??,
        parts.next()??,
        parts.next().flatten().unwrap_or(0),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_ordered() {
        let said = "QEMU emulator version 10.1.1 (Debian 1:10.1.1+ds-1)\nCopyright";
        assert_eq!(parse_version(said), Some(Version(10, 1, 1)));
        assert_eq!(
            parse_version("QEMU emulator version 11.1\n"),
            Some(Version(11, 1, 0))
        );
        assert_eq!(parse_version("something else 10.1.1"), None);
        assert!(Version(10, 1, 0) < OLDEST && Version(9, 9, 9) < OLDEST);
        assert!(Version(10, 2, 0) > OLDEST && Version(11, 0, 0) > OLDEST);
    }
}
