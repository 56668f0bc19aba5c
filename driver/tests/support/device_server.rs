//! The device server as the tests of this package start it: built together with them, so that it is
//! never older than they are. It takes the options of `extlb-device`.

use std::error::Error;

use extlb_device::server::{Arguments, Server, announce};

fn main() -> Result<(), Box<dyn Error>> {
    let options = Arguments::from_command_line().options(None)?;
    let at = options.at.clone();
    let server = Server::bind(options)?;
    announce(&at);
    server.serve()?;
    Ok(())
}
