//! File descriptors that this process was started with.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::sync::lock;

/// Those that were taken already.
static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Takes an inherited file descriptor, which nothing else in this process may own: its number was
/// given to us by whoever started the process. Children do not inherit it again.
///
/// # Errors
/// It is not open, is one of the standard streams' outputs, or was taken before.
pub(super) fn take(fd: RawFd) -> io::Result<OwnedFd> {
    let invalid = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    if fd < 0 || fd == 1 || fd == 2 {
        return invalid("no file descriptor that a socket is handed over by");
    }
    let mut taken = lock(&TAKEN);
    if taken.contains(&fd) {
        return invalid("given twice");
    }
    // SAFETY: the number is not negative, and the borrow ends with the call, which fails if
    // nothing is open there.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let flags = FdFlag::from_bits_retain(fcntl(borrowed, FcntlArg::F_GETFD)?);
    // What was inherited has no such flag; what this process opened itself all has it.
    if flags.contains(FdFlag::FD_CLOEXEC) {
        return invalid("not inherited");
    }
    fcntl(borrowed, FcntlArg::F_SETFD(flags | FdFlag::FD_CLOEXEC))?;
    taken.insert(fd);
    // SAFETY: it is open, as `fcntl` says, and nobody else owns it: what this process has opened
    // itself closes on exec (the standard library opens nothing otherwise), which this one did
    // not, so it was inherited; and inherited ones are taken here only, each once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
