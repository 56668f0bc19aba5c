//! The vfio-user protocol 0.1, in bytes: what messages mean and how they are written. No sockets.
//!
//! Source: QEMU's `docs/interop/vfio-user.rst`; the structures are those of `<linux/vfio.h>`. All
//! integers are in the host's byte order, which is little-endian on every host that this serves.

mod capabilities;
mod errno;
mod header;
mod request;

pub(super) use capabilities::{Capabilities, offer, version_reply};
pub(super) use errno::errno_of;
pub(super) use header::{Header, command, error_reply, message, reply};
pub(super) use request::{IrqAction, IrqData, Request, RequestError, SetIrqs, WriteOne, invalid};

/// The most bytes that one message may read or write of a region: the protocol's default, which a
/// client may rely on unless it is told less.
pub(super) const MAX_DATA: usize = 1 << 20;
/// The most file descriptors that a client may send with one message. QEMU takes 16 at most.
pub(super) const MAX_FDS: usize = 8;
/// The longest message that is received: the longest request, a write of [`MAX_DATA`] bytes.
pub(super) const MAX_MESSAGE: usize = Header::SIZE + 16 + MAX_DATA;

/// Integers of a body, one after the other. `None`: the body ends before.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn u16(&mut self) -> Option<u16> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u16::from_le_bytes(*bytes))
    }

    fn u32(&mut self) -> Option<u32> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*bytes))
    }

    fn u64(&mut self) -> Option<u64> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*bytes))
    }

    /// All that is left.
    fn rest(self) -> &'a [u8] {
        self.0
    }
}
