//! The command that replays a recorded run.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::{Ended, Options, ReplayError, Replayed, replay};
use crate::Config;
use crate::config::ConfigError;
use crate::sync::lock;

/// Which run to replay, and how.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// The run, as --record wrote it.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Stop before the entry with this number.
    #[arg(long, value_name = "NUMBER")]
    pub until: Option<u64>,
    /// Print each entry as it is reached: calls, and below each what the device did.
    #[arg(long)]
    pub print: bool,
    /// Let a device with this configuration (TOML) do it, rather than the one that was recorded:
    /// shows where it begins to matter.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Why there is no replay, or a bad end of it.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The configuration.
    #[error("in {}", path.display())]
    Config {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: ConfigError,
    },
    /// The run.
    #[error(transparent)]
    Replay(#[from] ReplayError),
}

fn unreadable(path: &Path) -> impl FnOnce(std::io::Error) -> CommandError + '_ {
    |source| CommandError::Read {
        path: path.into(),
        source,
    }
}

/// Replays, and says on `out` how far it went.
pub fn run(arguments: &Arguments, out: impl Write + Send + 'static) -> Result<(), CommandError> {
    let config = match &arguments.config {
        None => None,
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(unreadable(path))?;
            let config = Config::from_toml(&text);
            Some(config.map_err(|source| CommandError::Config {
                path: path.clone(),
                source,
            })?)
        }
    };
    let file = File::open(&arguments.file).map_err(unreadable(&arguments.file))?;
    let out = Arc::new(Mutex::new(BufWriter::new(out)));
    let listing = out.clone();
    let options = Options {
        until: arguments.until,
        config,
        seen: arguments.print.then(|| -> Box<super::Seen> {
            // Who does not read on loses the listing, and not the result.
            Box::new(move |number, line| {
                let _ = writeln!(lock(&listing), "{number:>8} {line}");
            })
        }),
    };
    let replayed = replay(Box::new(BufReader::new(file)), options);
    let mut out = lock(&out);
    if let Ok(replayed) = &replayed {
        let _ = writeln!(out, "{}", summary(replayed));
    }
    let _ = out.flush();
    replayed?;
    Ok(())
}

fn summary(replayed: &Replayed) -> String {
    let Replayed {
        entries,
        calls,
        ended,
        totals: _,
    } = replayed;
    let how = match ended {
        Ended::Complete => "to the end of the run",
        Ended::Cut => "as far as the file goes: it is cut off, as who recorded it did not end",
        Ended::Until => "as far as was asked for",
    };
    format!("the same in all {entries} entries ({calls} calls), {how}")
}
