//! Shapes of machines, as TOML files in `qemu-config/profiles`.

use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Deserializer};

use crate::paths;

/// An amount of memory in whole MiB; written as a number of MiB or with a suffix M or G.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mebibytes(pub u64);

impl FromStr for Mebibytes {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (number, factor) = match text.strip_suffix(['G', 'g']) {
            Some(number) => (number, 1024),
            None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 1),
        };
        let number: u64 = number.parse().with_context(|| {
            format!("{text:?} is no amount of memory: give MiB (512) or a suffix (512M, 2G)")
        })?;
        match number.checked_mul(factor) {
            Some(amount @ 1..=0x10_0000) => Ok(Self(amount)),
            _ => bail!("{text} is out of range: give 1M to 1024G"),
        }
    }
}

impl fmt::Display for Mebibytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}M", self.0)
    }
}

impl<'de> Deserialize<'de> for Mebibytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Profile {
    /// Memory.
    pub memory: Mebibytes,
    /// Number of virtual processors.
    pub smp: u32,
    /// Words for the kernel's command line; those that begin with `extlb.` go to the driver.
    pub append: String,
    /// Size of a disk to swap to.
    pub swap: Option<Mebibytes>,
    /// The device's own configuration.
    pub device: extlb_device::Config,
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            memory: Mebibytes(1024),
            smp: 2,
            append: String::new(),
            swap: None,
            device: extlb_device::Config::default(),
        }
    }
}

impl Profile {
    /// Reads a profile by its name, or by its file (anything with a `/` or a `.`).
    pub fn load(name: &str) -> Result<Self> {
        let path = if name.contains(['/', '.']) {
            Path::new(name).to_path_buf()
        } else {
            paths::repo().join(format!("qemu-config/profiles/{name}.toml"))
        };
        let text = fs::read_to_string(&path)
            .with_context(|| format!("no profile at {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("in the profile {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let profile: Self = toml::from_str(text)?;
        if !(1..=8).contains(&profile.smp) {
            bail!(
                "smp = {} is out of range: the kernel knows 1 to 8 processors",
                profile.smp
            );
        }
        profile.device.check()?;
        Ok(profile)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_profiles_are_sound() {
        for name in ["default", "demo", "default-debug", "demo-debug"] {
            Profile::load(name).unwrap();
        }
        assert_eq!(Profile::load("demo").unwrap().memory, Mebibytes(256));
    }

    #[test]
    fn amounts_have_suffixes_and_bounds() {
        let amount = |text: &str| text.parse::<Mebibytes>().ok().map(|m| m.0);
        assert_eq!(amount("512"), Some(512));
        assert_eq!(amount("512M"), Some(512));
        assert_eq!(amount("2G"), Some(2048));
        for wrong in ["", "0", "x", "-1", "1K", "99999999999G", "2000000G"] {
            assert_eq!(amount(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn unknown_keys_and_impossible_machines_are_refused() {
        assert!(Profile::parse("memroy = \"1G\"").is_err());
        assert!(Profile::parse("smp = 0").is_err());
        assert!(Profile::parse("smp = 9").is_err());
        let profile = Profile::parse("smp = 8\n[device.tlb]\nways = 1\n").unwrap();
        assert_eq!(profile.device.tlb.ways, 1);
        assert!(Profile::parse("[device.tlb]\nways = 0\n").is_err());
        assert!(Profile::parse("[device]\nno_such_key = 1\n").is_err());
    }
}
