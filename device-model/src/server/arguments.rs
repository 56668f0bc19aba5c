//! The command line of a server, for the binaries that are one.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use super::{Address, DmaMessages, Options, Unsealed};
use crate::config::{Config, ConfigError};
use crate::fault::Rule;

/// What to serve, and where.
#[derive(Clone, Debug, Default, clap::Parser)]
pub struct Arguments {
    /// Make a UNIX socket here and serve a device there. Given several times, each has a device
    /// of its own.
    #[arg(long, value_name = "PATH", visible_alias = "socket")]
    pub socket_path: Vec<PathBuf>,
    /// Serve a device at this inherited file descriptor: a UNIX socket that listens, or one that
    /// is connected to its one client. May be given several times. Without any of both, sockets
    /// are taken that a service manager hands over (LISTEN_FDS).
    #[arg(long, value_name = "FD")]
    pub fd: Vec<RawFd>,
    /// Write stale accesses, errors and a summary of each client here, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Record the run of the first client's device here, to be replayed by `extlb-device replay`;
    /// those of later clients in files beside it, named .2, .3 and so on. Slows the device.
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// Read the configuration of the devices here (TOML).
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How to reach memory that the client gives without a file: not at all, or by asking it, with
    /// messages as the protocol has them (standard) or as QEMU has them. There no access is
    /// atomic: queues and page tables have to be elsewhere.
    #[arg(long, value_name = "HOW", default_value = "off")]
    pub dma_messages: DmaMessages,
    /// What to do with guest memory in a file that may shrink, which would end the server: map it
    /// all the same, read and write the file (no access is atomic then), or refuse it.
    #[arg(long, value_name = "HOW", default_value = "map")]
    pub unsealed_memory: Unsealed,
    /// Break the devices on purpose: KIND[,NAME=VALUE]..., for instance skip-ack,after=10,times=1.
    /// May be repeated; adds to the configuration. --help lists the kinds.
    #[arg(long, value_name = "RULE")]
    pub fault: Vec<Rule>,
    /// Seed of the faults.
    #[arg(long, value_name = "NUMBER")]
    pub fault_seed: Option<u64>,
    /// End when the first client of each device has left.
    #[arg(long)]
    pub once: bool,
}

/// The configuration cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ArgumentsError {
    /// Its file.
    #[error("cannot read {}", path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// What is in it.
    #[error("in {}", path.display())]
    Config {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: ConfigError,
    },
}

impl Arguments {
    /// Those of this process, if it takes no others. Ends it with a message if they make no
    /// sense.
    pub fn from_command_line() -> Self {
        clap::Parser::parse()
    }

    /// The same as the server takes it. `default`: the socket if none is named in any way.
    pub fn options(&self, default: Option<&Path>) -> Result<Options, ArgumentsError> {
        let paths = self.socket_path.iter().cloned().map(Address::Path);
        let mut at: Vec<_> = paths
            .chain(self.fd.iter().copied().map(Address::Fd))
            .collect();
        if at.is_empty() {
            at = Address::from_environment();
        }
        if at.is_empty() {
            at.extend(default.map(|path| Address::Path(path.into())));
        }
        let mut config = match &self.config {
            Some(path) => read_config(path)?,
            None => Config::default(),
        };
        config.fault.extend(self.fault.iter().cloned());
        config.fault_seed = self.fault_seed.unwrap_or(config.fault_seed);
        Ok(Options {
            at,
            report: self.report.clone(),
            record: self.record.clone(),
            config,
            once: self.once,
            dma_messages: self.dma_messages,
            unsealed: self.unsealed_memory,
            patience: None,
        })
    }
}

fn read_config(path: &Path) -> Result<Config, ArgumentsError> {
    let text = std::fs::read_to_string(path).map_err(|source| ArgumentsError::Read {
        path: path.into(),
        source,
    })?;
    Config::from_toml(&text).map_err(|source| ArgumentsError::Config {
        path: path.into(),
        source,
    })
}
