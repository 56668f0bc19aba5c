//! The device behind a vfio-user socket, for `vfio-user-pci` of QEMU.
//!
//! One client at a time; each has a fresh device. A second one can connect, and waits: its first
//! message is answered when the first client has left. A client that leaves, or dies, leaves a
//! device that is stopped: when the next one is served, nothing reaches the memory of the one
//! before. A client that breaks the protocol ends its own session and nothing else.
//!
//! Several sockets have a device each, and clients that know nothing of each other.

mod arguments;
mod connection;
mod dispatch;
mod dma;
mod driven;
mod fuzz;
mod inbox;
mod inherited_unsafe;
mod irqs;
mod listener;
mod memory_map;
mod protocol;
mod report;
mod session;
mod transport;
mod vfio_user;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::config::{Config, ConfigError};
use crate::record::RecordError;
pub use arguments::{Arguments, ArgumentsError};
pub use dma::DmaMessages;
#[doc(hidden)]
pub use fuzz::fuzz_messages;
pub use listener::Address;
use listener::Listener;
pub use memory_map::Unsealed;
use report::{Report, Sink};
use session::Session;
use transport::{Ended, Transport};
use vfio_user::{Link, VfioUser};

/// What to serve, and where.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where clients come from; each has a device of its own.
    pub at: Vec<Address>,
    /// Where stale accesses and the summary go, one JSON object a line; emptied first.
    pub report: Option<PathBuf>,
    /// Where the run of the first client's device goes, for [`crate::record::replay`]; those of
    /// later clients go to files beside it, with `.2`, `.3` and so on at the end of the name. One
    /// thread drives each device then.
    pub record: Option<PathBuf>,
    /// The devices.
    pub config: Config,
    /// Return when the first client of each has left, rather than wait for the next.
    pub once: bool,
    /// How memory is reached that the client gives without a file.
    pub dma_messages: DmaMessages,
    /// What to do with memory in files that may shrink.
    pub unsealed: Unsealed,
    /// How long a client may take for its first message, for the rest of one that has begun, and
    /// to make room for a reply; 10 s, if it is not said.
    pub patience: Option<Duration>,
}

/// Why there is nothing to connect to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No address is given.
    #[error("no socket to serve: give a path (--socket-path) or a file descriptor (--fd)")]
    Nowhere,
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
        source: std::io::Error,
    },
    /// The inherited file descriptor is of no use.
    #[error("cannot serve file descriptor {fd}")]
    Inherited {
        /// Its number.
        fd: std::os::fd::RawFd,
        /// Why.
        source: std::io::Error,
    },
    /// The report cannot be written.
    #[error("cannot write the report {}", path.display())]
    Report {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A run cannot be recorded.
    #[error("cannot record to {}", path.display())]
    Record {
        /// Its file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Likewise.
    #[error(transparent)]
    Recorder(#[from] RecordError),
    /// The device cannot have this configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The threads of the device cannot be started.
    #[error("cannot start the device's threads")]
    Threads(#[source] std::io::Error),
    /// No more clients can be accepted.
    #[error("cannot accept a client")]
    Accept(#[source] std::io::Error),
    /// The device itself has failed, with `once`.
    #[error("{0}")]
    Failed(String),
}

/// A server that listens.
#[derive(Debug)]
pub struct Server {
    options: Options,
    places: Vec<Place>,
    /// Runs recorded so far.
    recorded: AtomicU32,
}

/// One of its sockets.
#[derive(Debug)]
struct Place {
    name: String,
    listener: Listener,
    report: Arc<Report>,
}

impl Server {
    /// Makes the sockets: from here on clients can connect, and are served by [`Server::serve`].
    pub fn bind(options: Options) -> Result<Self, Error> {
        options.config.check()?;
        if options.at.is_empty() {
            return Err(Error::Nowhere);
        }
        let sink = match &options.report {
            None => Sink::new(Box::new(std::io::sink())),
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
                Sink::new(Box::new(file))
            }
        };
        for warning in options.config.warnings() {
            eprintln!("extlb-device: warning: the device is broken on purpose: {warning}");
        }
        let open = |address: &Address| {
            let name = address.to_string();
            Ok(Place {
                listener: Listener::open(address)?,
                report: Arc::new(Report::new(sink.clone(), &name)),
                name,
            })
        };
        let places = options.at.iter().map(open).collect::<Result<_, Error>>()?;
        Ok(Self {
            options,
            places,
            recorded: AtomicU32::new(0),
        })
    }

    /// Serves clients, one after the other at each socket; with `once`, one at each. Returns when
    /// all sockets are through, with the first error of any.
    pub fn serve(&self) -> Result<(), Error> {
        if let [place] = &self.places[..] {
            return self.serve_at(place);
        }
        std::thread::scope(|scope| {
            let start = |place| {
                let thread = std::thread::Builder::new().name("device".into());
                thread.spawn_scoped(scope, move || {
                    let served = self.serve_at(place);
                    if let Err(error) = &served {
                        eprintln!("extlb-device: {}: not served any more: {error}", place.name);
                    }
                    served
                })
            };
            let threads: Vec<_> = self.places.iter().map(start).collect();
            let ends = threads.into_iter().map(|thread| match thread {
                Ok(thread) => thread
                    .join()
                    .unwrap_or_else(|_| Err(Error::Failed("the server has failed".into()))),
                Err(error) => Err(Error::Threads(error)),
            });
            // All are waited for.
            ends.collect::<Vec<_>>().into_iter().collect()
        })
    }

    /// A file for the run of the next client's device, if it is to be recorded.
    fn record(&self) -> Result<Option<Box<dyn Write + Send>>, Error> {
        let Some(path) = &self.options.record else {
            return Ok(None);
        };
        let mut path = path.clone();
        let number = self.recorded.fetch_add(1, Ordering::Relaxed) + 1;
        if number > 1 {
            path.as_mut_os_string().push(format!(".{number}"));
        }
        match File::create(&path) {
            Ok(file) => Ok(Some(Box::new(file))),
            Err(source) => Err(Error::Record { path, source }),
        }
    }

    fn serve_at(&self, place: &Place) -> Result<(), Error> {
        let name = &place.name;
        while let Some(stream) = place.listener.accept().map_err(Error::Accept)? {
            let report = place.report.clone();
            let link = Link::new(stream, name, report.clone(), &self.options);
            let mut session = Session::new(&self.options, report, &link, self.record()?)?;
            let transport = VfioUser(link);
            // On a thread of its own: nothing that a client sends is known to make it panic; if
            // something does, it ends this session only.
            let ended = std::thread::scope(|scope| {
                let thread = std::thread::Builder::new().name("session".into());
                thread
                    .spawn_scoped(scope, || transport.serve(&mut session))
                    .map(|handle| handle.join())
            });
            // Before the socket is closed: who finds it closed finds the report as well.
            place.report.summary(session.end());
            drop(transport);
            let failed = match ended.map_err(Error::Threads)? {
                Ok(Ok(())) => None,
                Ok(Err(Ended::Here(why))) => Some(why),
                Ok(Err(error)) => {
                    eprintln!("extlb-device: {name}: the client's session has ended: {error}");
                    None
                }
                Err(_) => Some("the session's thread has panicked".into()),
            };
            if let Some(why) = &failed {
                eprintln!(
                    "extlb-device: {name}: the session has ended, the device has failed: {why}"
                );
            }
            match failed {
                Some(why) if self.options.once => return Err(Error::Failed(why)),
                _ if self.options.once => return Ok(()),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Makes the sockets and serves; see [`Options`].
pub fn run(options: Options) -> Result<(), Error> {
    Server::bind(options)?.serve()
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

/// Says on standard output that the server is ready, a line for each address; for binaries.
pub fn announce(at: &[Address]) {
    let text: String = at.iter().map(|at| format!("listening on {at}\n")).collect();
    let mut out = std::io::stdout();
    // Nobody may be listening; that is no reason not to serve.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
