//! `extlb device`: the device server alone.

use std::path::PathBuf;

use anyhow::Result;

/// Options of the server.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Listen on this UNIX socket
    #[arg(long, value_name = "PATH", default_value = "extlb.sock")]
    pub socket: PathBuf,
    /// Write what happens as JSON, one object in each line
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Read the device's configuration (TOML)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// End when the first client goes
    #[arg(long)]
    pub once: bool,
}

/// Serves until the client goes (with `--once`) or a signal ends it.
pub fn serve(_arguments: &Arguments) -> Result<i32> {
    anyhow::bail!("the device server is not part of this build");
}
