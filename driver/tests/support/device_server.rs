//! The device server as the tests of this package start it: built together with them, so that it is
//! never older than they are. It takes the options of `extlb-device` that
//! `extlb_driver::hardware::SocketServer` gives.

use std::error::Error;

use extlb_device::Config;
use extlb_device::server::{Options, Server, announce};

fn main() -> Result<(), Box<dyn Error>> {
    let mut options = Options::default();
    let mut arguments = std::env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or("an option without a value");
        match argument.to_str() {
            Some("--once") => options.once = true,
            Some("--socket-path") => options.socket = value()?.into(),
            Some("--report") => options.report = Some(value()?.into()),
            Some("--config") => {
                options.config = Config::from_toml(&std::fs::read_to_string(value()?)?)?;
            }
            _ => return Err(format!("unknown option {argument:?}").into()),
        }
    }
    let socket = options.socket.clone();
    let server = Server::bind(options)?;
    announce(&socket);
    server.serve()?;
    Ok(())
}
