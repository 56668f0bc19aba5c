//! The file of a saved state.
//!
//! ```text
//! extlb-state 1 LENGTH CRC32C\n
//! {"interface":…,"config":{…},"device":{…},"slot":{…}}
//! ```
//!
//! The first line is text: the version of the format, the bytes that follow it (decimal) and
//! their CRC32C (8 hexadecimal digits). What follows is JSON, so that it can be looked at.

use std::io::{self, BufRead, Read, Write};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::StateError;
use crate::Config;

/// Version of the format, and of what is in it.
pub const VERSION: u32 = 1;
const MAGIC: &str = "extlb-state";
/// No first line is longer.
const MAX_LINE: u64 = 64;
/// No state is longer: the largest TLB that can be configured, and all else several times over.
const MAX_BODY: u64 = 2 << 30;

/// The state of a [`crate::Device`]; made by [`crate::Device::save`] or read from a file, and
/// believed only by [`crate::Device::restore`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeviceState(pub(super) Box<RawValue>);

/// What the slot of a device keeps: it is not the core's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotState {
    /// PCI configuration space, by [`crate::pci::ConfigSpace::save`].
    pub config_space: Vec<u8>,
    /// Interrupts that wait to be unmasked, bit n for vector n.
    pub pending: u64,
}

/// A saved state, as it is in a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// Interface version of the device (`VERSION`).
    pub interface: u32,
    /// Its configuration.
    pub config: Config,
    /// The device.
    pub device: DeviceState,
    /// What is around it, if that was saved.
    pub slot: Option<SlotState>,
}

impl Saved {
    /// Writes the file.
    pub fn write(&self, mut out: impl Write) -> io::Result<()> {
        let body = serde_json::to_vec(self)?;
        let crc = crc32c::crc32c(&body);
        writeln!(out, "{MAGIC} {VERSION} {} {crc:08x}", body.len())?;
        out.write_all(&body)?;
        out.flush()
    }

    /// Reads a file: well-formed and whole, but what it says is not believed yet.
    pub fn read(mut input: impl BufRead) -> Result<Self, StateError> {
        let (len, crc) = first_line(&mut input)?;
        let mut body = Vec::new();
        // Grows with what is there, whatever the length says.
        input
            .take(len)
            .read_to_end(&mut body)
            .map_err(StateError::Read)?;
        if (body.len() as u64) < len {
            return Err(StateError::Cut);
        }
        if crc32c::crc32c(&body) != crc {
            return Err(StateError::Checksum);
        }
        serde_json::from_slice(&body).map_err(StateError::Syntax)
    }
}

/// The length of what follows, and its checksum.
fn first_line(input: &mut impl BufRead) -> Result<(u64, u32), StateError> {
    let mut line = Vec::new();
    let mut start = input.take(MAX_LINE);
    start
        .read_until(b'\n', &mut line)
        .map_err(StateError::Read)?;
    match std::str::from_utf8(&line)
        .ok()
        .and_then(|line| line.strip_suffix('\n'))
    {
        Some(line) => parse(line),
        None => Err(StateError::NotAState),
    }
}

fn parse(line: &str) -> Result<(u64, u32), StateError> {
    let mut words = line.split(' ');
    if words.next() != Some(MAGIC) {
        return Err(StateError::NotAState);
    }
    let version = words.next().and_then(|word| word.parse().ok());
    let version = version.ok_or(StateError::NotAState)?;
    if version != VERSION {
        return Err(StateError::Format(version));
    }
    let len = words.next().and_then(|word| word.parse().ok());
    let crc = words
        .next()
        .and_then(|word| u32::from_str_radix(word, 16).ok());
    match (len, crc, words.next()) {
        (Some(len), Some(crc), None) if len <= MAX_BODY => Ok((len, crc)),
        _ => Err(StateError::NotAState),
    }
}
