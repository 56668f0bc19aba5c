//! Errors as numbers.

use std::io::{Error, ErrorKind};

use nix::errno::Errno;

/// The number of an error; never 0.
pub(in crate::server) fn errno_of(error: &Error) -> Errno {
    if let Some(raw) = error.raw_os_error().filter(|raw| *raw > 0) {
        return Errno::from_raw(raw);
    }
    match error.kind() {
        ErrorKind::InvalidInput | ErrorKind::InvalidData => Errno::EINVAL,
        ErrorKind::AlreadyExists => Errno::EEXIST,
        ErrorKind::NotFound => Errno::ENOENT,
        ErrorKind::PermissionDenied => Errno::EACCES,
        ErrorKind::Unsupported => Errno::EOPNOTSUPP,
        ErrorKind::OutOfMemory => Errno::ENOMEM,
        ErrorKind::StorageFull => Errno::ENOSPC,
        ErrorKind::TimedOut => Errno::ETIMEDOUT,
        _ => Errno::EIO,
    }
}
