//! Messages out of bytes, to a device in this process: what a fuzzer calls, and the tests.

use std::cell::Cell;
use std::fs::File;
use std::os::fd::OwnedFd;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::connection::{FdsLost, Message};
use super::dispatch::Dispatcher;
use super::protocol::{Header, MAX_FDS, MAX_MESSAGE, command, message};
use super::session::Session;
use super::transport::{Endpoint, IrqRequest};
use crate::config::Config;

/// Bytes of the file that stands for guest RAM.
const RAM: u64 = 1 << 16;
/// In the byte before a message: how many file descriptors come with it, in the low bits.
const FDS: u8 = 0xf;
/// They are event fds rather than memory.
const EVENTS: u8 = 1 << 4;
/// In the first of these bytes: the client has not said its version yet.
const STRANGER: u8 = 1 << 7;

/// Takes bytes for what a client sends, gives each message to a fresh device as the server does,
/// lets the device work in between, and checks every reply. A byte comes before each message; its
/// bits say which file descriptors come with it (0 to 3: how many, 4: event fds rather than
/// memory), and, before the first message, whether the client has yet to say its version (7).
/// Returns how many messages were answered.
///
/// # Panics
/// If a reply breaks the protocol; that is what it looks for.
pub fn fuzz_messages(bytes: &[u8]) -> usize {
    thread_local! {
        /// The device of the time before, as after power-on: ten times as fast as to make one.
        static IDLE: Cell<Option<Session>> = const { Cell::new(None) };
    }
    let session = IDLE.take().or_else(|| Session::stepped(small()).ok());
    let mut session = session.expect("a device can be made");
    let greeted = bytes.first().is_none_or(|first| first & STRANGER == 0);
    let answered = talk(&mut session, bytes, greeted);
    let idle = session.unmap(None).and_then(|()| session.reset());
    if idle
        .and_then(|()| session.irqs(IrqRequest::DisableAll))
        .is_ok()
    {
        IDLE.set(Some(session));
    }
    answered
}

/// A device that is quickly made.
fn small() -> Config {
    let mut config = Config::default();
    (config.tlb.sets, config.tlb.ways) = (4, 2);
    (config.oracle.suspects, config.oracle.invalidations) = (16, 16);
    config
}

fn talk(session: &mut Session, mut bytes: &[u8], greeted: bool) -> usize {
    let mut answered = 0;
    let mut client = None;
    if greeted {
        let hello = message(0, command::VERSION, b"\0\0\0\0{\"capabilities\":{}}\0");
        match one(session, &mut client, 0, &hello) {
            Some((_, count)) => answered += count,
            None => unreachable!("a good version was refused"),
        }
    }
    while let Some((&with, rest)) = bytes.split_first() {
        let Some((used, count)) = one(session, &mut client, with, rest) else {
            break;
        };
        answered += count;
        bytes = rest.get(used..).unwrap_or_default();
        session.step();
    }
    answered
}

/// One message: bytes used, and replies. `None`: the session is over.
fn one(
    session: &mut Session,
    client: &mut Option<super::protocol::Capabilities>,
    with: u8,
    bytes: &[u8],
) -> Option<(usize, usize)> {
    let header = Header::parse(bytes.first_chunk()?);
    let size = Header::SIZE + header.body_len(MAX_MESSAGE)?;
    let asked = Message {
        header,
        body: bytes.get(Header::SIZE..size)?.to_vec(),
        fds: fds(with),
        fds_lost: (usize::from(with & FDS) > MAX_FDS).then_some(FdsLost::TooMany),
    };
    let mut replies = 0;
    let mut dispatcher = Dispatcher::resume(session, client.take());
    let handled = dispatcher.handle(asked, &mut |reply| {
        replies += 1;
        check(&header, reply);
        Ok(())
    });
    *client = dispatcher.into_client();
    let wanted = usize::from(!header.wants_no_reply());
    match handled {
        Ok(()) => assert_eq!(replies, wanted, "replies to {header:?}"),
        Err(_) => assert!(replies <= 1, "replies to {header:?}"),
    }
    handled.is_ok().then_some((size, replies))
}

/// A reply to what was asked, of the length it says, with an error that is one.
fn check(asked: &Header, reply: &[u8]) {
    let header = reply.first_chunk().map(Header::parse).expect("a header");
    assert_eq!((header.id, header.command), (asked.id, asked.command));
    assert!(header.is_reply());
    assert_eq!(header.size as usize, reply.len());
    match header.error() {
        Some(_) => {
            assert_ne!(header.error, 0, "an error that reads as success");
            assert_eq!(reply.len(), Header::SIZE, "an error with a body");
        }
        None => assert_eq!(header.error, 0),
    }
}

/// As many as there may be; what cannot be made is not sent.
fn fds(with: u8) -> Vec<OwnedFd> {
    let memory = || -> Option<OwnedFd> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"ram", flags).ok()?);
        file.set_len(RAM).ok()?;
        Some(file.into())
    };
    let event = || {
        EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map(OwnedFd::from)
            .ok()
    };
    let count = usize::from(with & FDS).min(MAX_FDS);
    let one = |_| match with & EVENTS {
        0 => memory(),
        _ => event(),
    };
    (0..count).filter_map(one).collect()
}
