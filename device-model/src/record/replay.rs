//! Replay: a new device makes the recorded calls again, and does the same, or it is told where
//! it does not.

use std::io::Read;

use extlb_spec::regs::VERSION_VALUE;

use super::entry::{Call, MAX_MMIO, Return};
use super::log::{LogError, Reader};
use super::player::{Player, Stop};
use super::recorder::summary;
use crate::config::ConfigError;
use crate::{Config, Device, Totals};

/// Is shown each entry of the log as it is reached: its number, and what it says.
pub type Seen = dyn FnMut(u64, &str) + Send;

/// How to replay.
#[derive(Default)]
pub struct Options {
    /// Stop before the entry with this number.
    pub until: Option<u64>,
    /// A device with this configuration rather than the recorded one: shows where it begins to
    /// matter.
    pub config: Option<Config>,
    /// Is shown each entry.
    pub seen: Option<Box<Seen>>,
}

/// How far a replay went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// To the end of the run.
    Complete,
    /// To the end of a file that was cut off: whoever recorded it was killed.
    Cut,
    /// As far as was asked for.
    Until,
}

/// A replay that found no difference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Replayed {
    /// Entries of the log that were followed.
    pub entries: u64,
    /// Calls among them.
    pub calls: u64,
    /// How far it went.
    pub ended: Ended,
    /// What the device did.
    pub totals: Totals,
}

/// The first thing that the device did otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Number of the entry of the log that differs.
    pub entry: u64,
    /// Calls so far.
    pub calls: u64,
    /// The call under way.
    pub call: Option<String>,
    /// What the log has.
    pub logged: String,
    /// What the device did.
    pub replayed: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            entry,
            calls,
            call,
            logged,
            replayed,
        } = self;
        write!(f, "entry {entry}, ")?;
        match call {
            Some(call) => write!(f, "call {calls} ({call})")?,
            None => write!(f, "after call {calls}")?,
        }
        write!(f, ":\n  recorded: {logged}\n  replayed: {replayed}")
    }
}

/// Why a run was not replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The file.
    #[error(transparent)]
    Log(#[from] LogError),
    /// It was recorded by a device with another interface.
    #[error(
        "recorded by a device with interface {}.{}, and this one has {}.{}",
        .0 >> 16, .0 & 0xffff, VERSION_VALUE >> 16, VERSION_VALUE & 0xffff
    )]
    Interface(u32),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The device does something else than it did.
    #[error("the device does not do what was recorded: {0}")]
    Differs(Box<Difference>),
}

/// Replays a recorded run. There is no memory and no clock: what the device asks for comes from
/// the log, and what it does is compared with it.
pub fn replay(log: Box<dyn Read + Send>, options: Options) -> Result<Replayed, ReplayError> {
    let (reader, header) = Reader::new(log)?;
    if header.interface != VERSION_VALUE {
        return Err(ReplayError::Interface(header.interface));
    }
    let mut config = match options.config {
        Some(config) => config,
        None => Config::from_toml(&header.config)?,
    };
    // Only takes time, of which there is none here.
    config.debug.bus_delay_us = 0;
    let player = Player::new(reader, options.until, options.seen);
    let device = Device::new(config, player.ports())?;
    while let Some(call) = player.next_call(|| summary(&device.totals())) {
        player.returned(&make(&device, call));
    }
    let totals = device.totals();
    let (stop, entries, calls) = player.end();
    let ended = match stop {
        Some(Stop::Differs(difference)) => return Err(ReplayError::Differs(difference)),
        Some(Stop::Log(error)) => return Err(error.into()),
        Some(Stop::Until) => Ended::Until,
        Some(Stop::Cut) | None => Ended::Cut,
        Some(Stop::End) => Ended::Complete,
    };
    Ok(Replayed {
        entries,
        calls,
        ended,
        totals,
    })
}

/// Makes a call.
fn make(device: &Device, call: Call) -> Return {
    match call {
        Call::MmioRead { bar, offset, len } => {
            let mut data = vec![0; len.min(MAX_MMIO) as usize];
            device.mmio_read(bar, offset, &mut data);
            Return::Data(data)
        }
        Call::MmioWrite { bar, offset, data } => {
            device.mmio_write(bar, offset, &data);
            Return::Nothing
        }
        Call::SetBusMaster(on) => {
            device.set_bus_master(on);
            Return::Nothing
        }
        Call::Reset => {
            device.reset();
            Return::Nothing
        }
        Call::Quiesce => {
            device.quiesce();
            Return::Nothing
        }
        Call::EngineStep => device.engine_step().into(),
        Call::InvalidationStep => device.invalidation_step().into(),
    }
}
