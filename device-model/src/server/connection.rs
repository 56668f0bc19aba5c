//! A connection: messages with their file descriptors, out of a stream and into it.
//!
//! A client may be silent for as long as it likes between two messages. Once a message has begun,
//! the rest must come within a time, and so must room for what is sent: a client that stalls
//! loses its session, and memory is never what bounds it.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
};

use super::protocol::{Header, MAX_FDS, MAX_MESSAGE};
use crate::sync::lock;

/// How long the rest of a message may take, the first message of a client, and room for a reply.
const PATIENCE: Duration = Duration::from_secs(10);
/// File descriptors that the kernel lets one message carry (SCM_MAX_FD): all are received, so that
/// all are closed.
const KERNEL_MAX_FDS: usize = 253;

/// A message.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) header: Header,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
    /// What became of those that are not here.
    pub(super) fds_lost: Option<FdsLost>,
}

impl Message {
    /// Adds file descriptors, and closes those beyond the limit at once: a message may bring new
    /// ones with each of its bytes.
    fn take(&mut self, fds: impl Iterator<Item = OwnedFd>) {
        for fd in fds {
            match self.fds.len() < MAX_FDS {
                true => self.fds.push(fd),
                false => self.fds_lost = Some(FdsLost::TooMany),
            }
        }
    }
}

/// Why file descriptors of a message are closed already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FdsLost {
    /// The client sent more than [`MAX_FDS`].
    TooMany,
    /// The kernel could not hand them over: this process has too many.
    NoRoom,
}

/// Why no message can be received any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    /// It went away in the middle.
    #[error("the client went away in the middle of a message")]
    Truncated,
    /// It does not send the rest.
    #[error("the client sent a part of a message, and not the rest in time")]
    Stalled,
    /// It has not sent the first message.
    #[error("the client did not say its version in time")]
    Silent,
    /// It does not take what is sent.
    #[error("the client does not read what is sent to it")]
    Full,
    /// The size in the header makes no sense: where the next message begins, nobody knows.
    #[error("a message of {} bytes; from {} to {} are possible", .0.size, Header::SIZE, MAX_MESSAGE)]
    Size(Header),
    /// Something with the socket.
    #[error("the socket failed: {0}")]
    Socket(#[from] io::Error),
}

impl From<rustix::io::Errno> for Broken {
    fn from(errno: rustix::io::Errno) -> Self {
        Broken::Socket(errno.into())
    }
}

/// A connected client's stream. One thread receives; any may send.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    /// Messages are sent whole.
    sending: Mutex<()>,
    patience: Duration,
}

/// Until when to wait; `None`: for ever.
type Until = Option<Instant>;

impl Connection {
    /// `patience`: how long a client may stall; 10 s, if it is not said.
    pub(super) fn new(stream: UnixStream, patience: Option<Duration>) -> Self {
        Self {
            stream,
            sending: Mutex::new(()),
            patience: patience.unwrap_or(PATIENCE),
        }
    }

    /// Ends both directions: whoever receives finds the end of the stream.
    pub(super) fn hang_up(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Receives the next message; `None`: the client has left. The first one of a client must
    /// begin in time.
    pub(super) fn receive(&self, first: bool) -> Result<Option<Message>, Broken> {
        let mut bytes = [0; Header::SIZE];
        let mut message = Message {
            header: Header::default(),
            body: Vec::new(),
            fds: Vec::new(),
            fds_lost: None,
        };
        let begin = first.then(|| Instant::now() + self.patience);
        let begun = match self.receive_some(&mut bytes, &mut message, begin) {
            Err(Broken::Stalled) => return Err(Broken::Silent),
            other => other?,
        };
        if begun == 0 {
            return Ok(None);
        }
        let end = Instant::now() + self.patience;
        self.fill(&mut bytes[begun..], &mut message, end)?;
        message.header = Header::parse(&bytes);
        let Some(len) = message.header.body_len(MAX_MESSAGE) else {
            return Err(Broken::Size(message.header));
        };
        // At most `MAX_MESSAGE`, and one message at a time.
        let mut body = vec![0; len];
        self.fill(&mut body, &mut message, end)?;
        message.body = body;
        Ok(Some(message))
    }

    fn fill(
        &self,
        mut bytes: &mut [u8],
        message: &mut Message,
        end: Instant,
    ) -> Result<(), Broken> {
        while !bytes.is_empty() {
            match self.receive_some(bytes, message, Some(end))? {
                0 => return Err(Broken::Truncated),
                received => bytes = bytes.get_mut(received..).unwrap_or_default(),
            }
        }
        Ok(())
    }

    /// Receives what there is, at least a byte; 0: the stream has ended. File descriptors belong
    /// to the message whose bytes they come with.
    fn receive_some(
        &self,
        bytes: &mut [u8],
        message: &mut Message,
        until: Until,
    ) -> Result<usize, Broken> {
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let wait = match until {
                // Without a limit the call itself may wait.
                None => RecvFlags::empty(),
                Some(_) => RecvFlags::DONTWAIT,
            };
            let flags = RecvFlags::CMSG_CLOEXEC | wait;
            let into = &mut [IoSliceMut::new(bytes)];
            match recvmsg(&self.stream, into, &mut control, flags) {
                Ok(received) => {
                    if received.flags.contains(ReturnFlags::CTRUNC) {
                        message.fds_lost = Some(FdsLost::NoRoom);
                    }
                    for piece in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(fds) = piece {
                            message.take(fds);
                        }
                    }
                    return Ok(received.bytes);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    if !self.ready(PollFlags::POLLIN, until)? {
                        return Err(Broken::Stalled);
                    }
                }
                // Killed with our bytes unread, for instance: it is gone.
                Err(rustix::io::Errno::CONNRESET) => return Ok(0),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Waits; false: it did not happen in time.
    fn ready(&self, what: PollFlags, until: Until) -> Result<bool, Broken> {
        loop {
            let timeout = match until {
                None => PollTimeout::NONE,
                Some(end) => {
                    // Rounded up, so that the time is over when the wait is.
                    let left = end.saturating_duration_since(Instant::now());
                    let left = left.as_micros().div_ceil(1000);
                    PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
                }
            };
            let mut fds = [PollFd::new(self.stream.as_fd(), what)];
            match poll(&mut fds, timeout) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(Broken::Socket(errno.into())),
            }
        }
    }

    /// Sends a message. After an error the connection is useless, and ended.
    pub(super) fn send(&self, mut message: &[u8]) -> Result<(), Broken> {
        let _turn = lock(&self.sending);
        let end = Instant::now() + self.patience;
        let sent = loop {
            if message.is_empty() {
                break Ok(());
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(&self.stream, message, flags) {
                Ok(sent) => message = message.get(sent..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => match self.ready(PollFlags::POLLOUT, Some(end)) {
                    Ok(true) => {}
                    Ok(false) => break Err(Broken::Full),
                    Err(error) => break Err(error),
                },
                Err(errno) => break Err(errno.into()),
            }
        };
        if sent.is_err() {
            // After a part of a message nothing that follows could be understood.
            self.hang_up();
        }
        sent
    }
}
