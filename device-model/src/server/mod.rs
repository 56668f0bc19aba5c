//! The device behind a vfio-user socket, for `vfio-user-pci` of QEMU.
//!
//! One client at a time; each has a fresh device. A second one can connect, and waits: its first
//! message is answered when the first client has left. A client that leaves, or dies, leaves a
//! device that is stopped: when the next one is served, nothing reaches the memory of the one
//! before. A client that breaks the protocol ends its own session and nothing else.

mod irqs;
mod memory_map;
mod report;
mod session;
mod transport;

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::{Config, ConfigError};
use report::Report;
use session::Session;
use transport::{Transport, VfioUser};

/// What to serve, and where.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The socket; made here, and removed at the end.
    pub socket: PathBuf,
    /// Where stale accesses and the summary go, one JSON object a line; emptied first.
    pub report: Option<PathBuf>,
    /// The device.
    pub config: Config,
    /// Return when the first client has left, rather than wait for the next.
    pub once: bool,
}

/// Why there is nothing to connect to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another server is there.
    #[error("{} is in use: stop the process that serves it, or give another path", .0.display())]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{} exists and is not a socket: remove it, or give another path", .0.display())]
    NotSocket(PathBuf),
    /// The socket cannot be made.
    #[error("cannot make the socket {}", path.display())]
    Bind {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The report cannot be written.
    #[error("cannot write the report {}", path.display())]
    Report {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The device cannot have this configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The threads of the device cannot be started.
    #[error("cannot start the device's threads")]
    Threads(#[source] std::io::Error),
    /// No more clients can be accepted.
    #[error("cannot accept a client")]
    Accept(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A server that listens.
pub struct Server {
    options: Options,
    transport: VfioUser,
    report: Arc<Report>,
}

impl Server {
    /// Makes the socket: from here on a client can connect, and is served by [`Server::serve`].
    pub fn bind(options: Options) -> Result<Self, Error> {
        options.config.check()?;
        let report = match &options.report {
            None => Report::new(Box::new(std::io::sink())),
            Some(path) => {
                let file = OpenOptions::new()
                    .create(true)
                    .write(true)
                    .truncate(true)
                    .open(path)
                    .map_err(|source| Error::Report {
                        path: path.clone(),
                        source,
                    })?;
                Report::new(Box::new(file))
            }
        };
        for warning in options.config.warnings() {
            eprintln!("extlb-device: warning: the device is broken on purpose: {warning}");
        }
        remove_stale(&options.socket)?;
        let transport = VfioUser::bind(&options.socket).map_err(|source| Error::Bind {
            path: options.socket.clone(),
            source,
        })?;
        Ok(Self {
            options,
            transport,
            report: Arc::new(report),
        })
    }

    /// Serves clients, one after the other; with `once`, one.
    pub fn serve(&self) -> Result<(), Error> {
        loop {
            let mut session = Session::new(self.options.config.clone(), self.report.clone())?;
            // On a thread of its own: what the protocol crate panics on is the client's doing,
            // and ends this session only.
            let ended = std::thread::scope(|scope| {
                let thread = std::thread::Builder::new().name("session".into());
                thread
                    .spawn_scoped(scope, || self.transport.serve(&mut session))
                    .map(|handle| handle.join())
            });
            self.report.summary(session.end());
            match ended.map_err(Error::Threads)? {
                Ok(Ok(())) => {}
                Ok(Err(transport::Ended::Client(error))) => {
                    eprintln!("extlb-device: the client's session ended with an error: {error}");
                }
                Ok(Err(transport::Ended::Listener(error))) => return Err(Error::Accept(error)),
                Err(_) => eprintln!("extlb-device: the client broke the protocol; session ended"),
            }
            if self.options.once {
                return Ok(());
            }
        }
    }
}

/// Makes the socket and serves; see [`Options`].
pub fn run(options: Options) -> Result<(), Error> {
    Server::bind(options)?.serve()
}

/// A socket that a server left behind when it was killed is in the way of the next.
fn remove_stale(path: &Path) -> Result<(), Error> {
    match std::fs::symlink_metadata(path) {
        Err(_) => Ok(()),
        Ok(meta) if !meta.file_type().is_socket() => Err(Error::NotSocket(path.into())),
        Ok(_) if UnixStream::connect(path).is_ok() => Err(Error::InUse(path.into())),
        Ok(_) => std::fs::remove_file(path).map_err(|source| Error::Bind {
            path: path.into(),
            source: source.into(),
        }),
    }
}

/// QEMU's arguments that attach the device. The guest's RAM must be shared as well, for instance
/// by `-object memory-backend-memfd,id=m,size=1G,share=on -numa node,memdev=m`.
pub fn qemu_args(socket: &Path) -> Vec<String> {
    let device = serde_json::json!({
        "driver": "vfio-user-pci",
        "socket": { "type": "unix", "path": socket.to_string_lossy() },
    });
    vec!["-device".into(), device.to_string()]
}

/// Says on standard output that the server is ready; for the binary.
pub fn announce(socket: &Path) {
    let mut out = std::io::stdout();
    // Nobody may be listening; that is no reason not to serve.
    let _ = writeln!(out, "listening on {}", socket.display()).and_then(|()| out.flush());
}
