//! Where clients come from: a socket of our own, or one that was inherited.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use nix::sys::socket::{
    AddressFamily, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};

use super::Error;
use super::inherited_unsafe::take;
use crate::sync::lock;

/// The first inherited file descriptor, if a service manager handed some over (sd_listen_fds(3)).
const LISTEN_FDS_START: RawFd = 3;

/// Where the clients of one device come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A UNIX socket at this path; made here, and removed at the end.
    Path(PathBuf),
    /// An inherited file descriptor: a UNIX socket that listens, or one that is connected, with
    /// its one client at the other end.
    Fd(RawFd),
}

impl Address {
    /// Those that a service manager has handed to this process, by `LISTEN_FDS` and `LISTEN_PID`.
    pub fn from_environment() -> Vec<Self> {
        let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
        match (number("LISTEN_PID"), number("LISTEN_FDS")) {
            (Some(pid), Some(fds)) if pid == std::process::id() => {
                let fds = (LISTEN_FDS_START..).take(fds.min(256) as usize);
                fds.map(Address::Fd).collect()
            }
            _ => Vec::new(),
        }
    }
}

impl From<PathBuf> for Address {
    fn from(path: PathBuf) -> Self {
        Address::Path(path)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Path(path) => path.display().fmt(f),
            Address::Fd(fd) => write!(f, "fd {fd}"),
        }
    }
}

#[derive(Debug)]
enum Source {
    Listens(UnixListener),
    /// Until its client was served.
    Connected(Mutex<Option<UnixStream>>),
}

/// What clients connect to.
#[derive(Debug)]
pub(super) struct Listener {
    source: Source,
    /// The socket that was made: path, device and inode.
    made: Option<(PathBuf, u64, u64)>,
}

impl Listener {
    pub(super) fn open(address: &Address) -> Result<Self, Error> {
        match address {
            Address::Path(path) => Self::bind(path),
            Address::Fd(fd) => {
                let failed = |source| Error::Inherited { fd: *fd, source };
                let source = take(*fd).and_then(inherited).map_err(failed)?;
                Ok(Self { source, made: None })
            }
        }
    }

    fn bind(path: &Path) -> Result<Self, Error> {
        remove_stale(path)?;
        let failed = |source| Error::Bind {
            path: path.into(),
            source,
        };
        let listener = UnixListener::bind(path).map_err(failed)?;
        let meta = std::fs::symlink_metadata(path).map_err(failed)?;
        Ok(Self {
            source: Source::Listens(listener),
            made: Some((path.into(), meta.dev(), meta.ino())),
        })
    }

    /// Waits for the next client; `None`: there will be none.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        let listener = match &self.source {
            Source::Listens(listener) => listener,
            Source::Connected(stream) => return Ok(lock(stream).take()),
        };
        loop {
            match listener.accept() {
                Ok((stream, _)) => return Ok(Some(stream)),
                // Gone before it was its turn.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some((path, dev, ino)) = &self.made else {
            return;
        };
        // Somebody else's may be there by now.
        let ours = std::fs::symlink_metadata(path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == (*dev, *ino));
        if ours {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn inherited(fd: OwnedFd) -> io::Result<Source> {
    let no_unix = || io::Error::new(io::ErrorKind::InvalidInput, "not a UNIX stream socket");
    let address: SockaddrStorage = getsockname(fd.as_raw_fd())?;
    let stream = getsockopt(&fd, sockopt::SockType)? == nix::sys::socket::SockType::Stream;
    if address.family() != Some(AddressFamily::Unix) || !stream {
        return Err(no_unix());
    }
    if getsockopt(&fd, sockopt::AcceptConn)? {
        let listener = UnixListener::from(fd);
        // Whoever made it may have wanted it otherwise; here a thread waits for clients.
        listener.set_nonblocking(false)?;
        return Ok(Source::Listens(listener));
    }
    let stream = UnixStream::from(fd);
    stream.peer_addr()?;
    stream.set_nonblocking(false)?;
    Ok(Source::Connected(Mutex::new(Some(stream))))
}

/// A socket that a server left behind when it was killed is in the way of the next.
fn remove_stale(path: &Path) -> Result<(), Error> {
    match std::fs::symlink_metadata(path) {
        Err(_) => Ok(()),
        Ok(meta) if !meta.file_type().is_socket() => Err(Error::NotSocket(path.into())),
        Ok(_) if UnixStream::connect(path).is_ok() => Err(Error::InUse(path.into())),
        Ok(_) => std::fs::remove_file(path).map_err(|source| Error::Bind {
            path: path.into(),
            source,
        }),
    }
}
