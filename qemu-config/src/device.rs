//! `extlb device`: the device server alone.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::Result;
use extlb_device::fault;
use extlb_device::server::{self, Address, Server};

use crate::profile::Mebibytes;
use crate::qemu::command::device_arguments;

/// Options of the server.
#[derive(Debug, clap::Args)]
#[command(after_long_help = fault::help())]
// The flattened ones are a group of that name already.
#[group(skip)]
pub struct Arguments {
    #[command(flatten)]
    server: server::Arguments,
    /// Memory of the machine in the arguments for QEMU that are printed
    #[arg(long, default_value = "1G")]
    memory: Mebibytes,
}

/// Serves until the clients go (with `--once`) or a signal ends it.
pub fn serve(arguments: &Arguments) -> Result<i32> {
    let options = arguments.server.options(Some(Path::new("extlb.sock")))?;
    let (at, once) = (options.at.clone(), options.once);
    let server = Server::bind(options)?;
    // Only now can a client connect: who reads these lines may go on.
    let mut text = String::new();
    for at in &at {
        let Address::Path(socket) = at else {
            text += &format!("listening on {at}\n");
            continue;
        };
        let socket = fs::canonicalize(socket)?;
        text += &format!("listening on {}\n", socket.display());
        if !once {
            let words = quoted(&device_arguments(&socket, arguments.memory.0)?);
            text += &format!("To attach it, start QEMU (10.1.1 or newer) with:\n  {words}\n");
        }
    }
    // Who has seen enough may have closed it; that is no reason not to serve.
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    server.serve()?;
    Ok(0)
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
