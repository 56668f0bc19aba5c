//! `extlb device`: the device server alone.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use extlb_device::Config;
use extlb_device::fault::{self, Rule};
use extlb_device::server::{Options, Server};

use crate::profile::Mebibytes;
use crate::qemu::command::device_arguments;

/// Options of the server.
#[derive(Debug, clap::Args)]
#[command(after_long_help = fault::help())]
pub struct Arguments {
    /// Listen on this UNIX socket
    #[arg(long, value_name = "PATH", default_value = "extlb.sock")]
    socket: PathBuf,
    /// Write what happens as JSON, one object in each line
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Read the device's configuration (TOML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Break the device on purpose: KIND[,NAME=VALUE]..., for instance skip-ack,after=10,times=1
    ///
    /// May be repeated; adds to the configuration ([[fault]], fault_seed).
    #[arg(long, value_name = "RULE")]
    fault: Vec<Rule>,
    /// Seed of the faults
    #[arg(long, value_name = "NUMBER")]
    fault_seed: Option<u64>,
    /// End when the first client goes
    #[arg(long)]
    once: bool,
    /// Memory of the machine in the arguments for QEMU that are printed
    #[arg(long, default_value = "1G")]
    memory: Mebibytes,
}

/// Serves until the client goes (with `--once`) or a signal ends it.
pub fn serve(arguments: &Arguments) -> Result<i32> {
    let mut config = match &arguments.config {
        Some(path) => read_config(path)?,
        None => Config::default(),
    };
    config.fault.extend(arguments.fault.iter().cloned());
    config.fault_seed = arguments.fault_seed.unwrap_or(config.fault_seed);
    let server = Server::bind(Options {
        socket: arguments.socket.clone(),
        report: arguments.report.clone(),
        config,
        once: arguments.once,
    })?;
    // Only now can a client connect: who reads this line may go on.
    let socket = fs::canonicalize(&arguments.socket)?;
    let mut text = format!("listening on {}\n", socket.display());
    if !arguments.once {
        let arguments = quoted(&device_arguments(&socket, arguments.memory.0)?);
        text +=
            &format!("To attach the device, start QEMU (10.1.1 or newer) with:\n  {arguments}\n");
    }
    // Who has seen enough may have closed it; that is no reason not to serve.
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    server.serve()?;
    Ok(0)
}

fn read_config(path: &Path) -> Result<Config> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Config::from_toml(&text).with_context(|| format!("in {}", path.display()))
}

/// Words for a shell.
fn quoted(words: &[String]) -> String {
    let plain = |word: &str| {
        word.bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_=,./".contains(&byte))
    };
    let quote = |word: &String| match plain(word) {
        true => word.clone(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    };
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn arguments_survive_a_shell() {
        let words = ["-m", "1G", "{\"a\":1}", "it's"].map(str::to_owned);
        assert_eq!(quoted(&words), r#"-m 1G '{"a":1}' 'it'\''s'"#);
    }
}
