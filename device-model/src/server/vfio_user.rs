//! The transport: vfio-user over a UNIX stream socket.

use std::sync::{Arc, OnceLock};

use super::connection::{Broken, Connection};
use super::dispatch::Dispatcher;
use super::protocol::error_reply;
use super::transport::{Ended, Endpoint, Transport};

/// One client's connection, as everybody sees it who has to do with that client.
#[derive(Debug)]
pub(super) struct Link {
    connection: Connection,
    failed: OnceLock<String>,
}

impl Link {
    pub(super) fn new(stream: std::os::unix::net::UnixStream) -> Arc<Self> {
        Arc::new(Self {
            connection: Connection::new(stream),
            failed: OnceLock::new(),
        })
    }

    /// Ends the session from this side: the client finds its socket closed.
    pub(super) fn fail(&self, why: String) {
        // The first reason counts.
        let _ = self.failed.set(why);
        self.connection.hang_up();
    }

    /// Ends the session as if the client had left: the next one is served.
    pub(super) fn hang_up(&self) {
        self.connection.hang_up();
    }

    /// Whether the session has to end, and why.
    fn check(&self) -> Result<(), Ended> {
        match self.failed.get() {
            Some(why) => Err(Ended::Here(why.clone())),
            None => Ok(()),
        }
    }
}

/// A vfio-user client.
pub(super) struct VfioUser {
    pub(super) link: Arc<Link>,
    /// The device, as messages name it.
    pub(super) name: String,
}

impl Transport for VfioUser {
    fn serve(&self, endpoint: &mut dyn Endpoint) -> Result<(), Ended> {
        let served = self.run(endpoint);
        // What the other side finds after a failure here is a consequence.
        self.link.check()?;
        served
    }
}

impl VfioUser {
    fn run(&self, endpoint: &mut dyn Endpoint) -> Result<(), Ended> {
        let connection = &self.link.connection;
        let mut dispatcher = Dispatcher::new(endpoint, &self.name, false);
        loop {
            let message = match connection.receive(dispatcher.client().is_none()) {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(()),
                Err(Broken::Size(header)) => {
                    if header.is_command() {
                        let _ = connection.send(&error_reply(&header, nix::errno::Errno::EMSGSIZE));
                    }
                    return Err(Broken::Size(header).into());
                }
                Err(broken) => return Err(broken.into()),
            };
            dispatcher.handle(message, &mut |bytes| connection.send(bytes))?;
            self.link.check()?;
        }
    }
}
