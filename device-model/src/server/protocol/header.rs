//! The header, which every message begins with.

use nix::errno::Errno;

use super::Fields;

/// Numbers of the commands that are known by name here.
pub(in crate::server) mod command {
    pub(in crate::server) const VERSION: u16 = 1;
    pub(in crate::server) const DMA_MAP: u16 = 2;
    pub(in crate::server) const DMA_UNMAP: u16 = 3;
    pub(in crate::server) const DEVICE_GET_INFO: u16 = 4;
    pub(in crate::server) const DEVICE_GET_REGION_INFO: u16 = 5;
    pub(in crate::server) const DEVICE_GET_REGION_IO_FDS: u16 = 6;
    pub(in crate::server) const DEVICE_GET_IRQ_INFO: u16 = 7;
    pub(in crate::server) const DEVICE_SET_IRQS: u16 = 8;
    pub(in crate::server) const REGION_READ: u16 = 9;
    pub(in crate::server) const REGION_WRITE: u16 = 10;
    pub(in crate::server) const DMA_READ: u16 = 11;
    pub(in crate::server) const DMA_WRITE: u16 = 12;
    pub(in crate::server) const DEVICE_RESET: u16 = 13;
    pub(in crate::server) const DIRTY_PAGES: u16 = 14;
    pub(in crate::server) const REGION_WRITE_MULTI: u16 = 15;
    pub(in crate::server) const DEVICE_FEATURE: u16 = 16;
    pub(in crate::server) const MIG_DATA_READ: u16 = 17;
    pub(in crate::server) const MIG_DATA_WRITE: u16 = 18;
}

/// Bits of the flags: the low four are the type.
const TYPE: u32 = 0xf;
const TYPE_COMMAND: u32 = 0;
const TYPE_REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// A header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::server) struct Header {
    /// Chosen by whoever sends a command; its reply has the same.
    pub(in crate::server) id: u16,
    pub(in crate::server) command: u16,
    /// Bytes of the message, these included.
    pub(in crate::server) size: u32,
    pub(in crate::server) flags: u32,
    /// Of an error reply.
    pub(in crate::server) error: u32,
}

impl Header {
    /// Bytes of a header.
    pub(in crate::server) const SIZE: usize = 16;

    pub(in crate::server) fn parse(bytes: &[u8; Self::SIZE]) -> Self {
        let mut fields = Fields(bytes);
        let mut header = || {
            Some(Self {
                id: fields.u16()?,
                command: fields.u16()?,
                size: fields.u32()?,
                flags: fields.u32()?,
                error: fields.u32()?,
            })
        };
        // All of it is there.
        header().unwrap_or_default()
    }

    fn write(&self, to: &mut Vec<u8>) {
        to.extend(self.id.to_le_bytes());
        to.extend(self.command.to_le_bytes());
        to.extend(self.size.to_le_bytes());
        to.extend(self.flags.to_le_bytes());
        to.extend(self.error.to_le_bytes());
    }

    /// Bytes that follow. `None`: fewer than a header, or more than `limit` altogether.
    pub(in crate::server) fn body_len(&self, limit: usize) -> Option<usize> {
        let size = usize::try_from(self.size).ok()?;
        (size <= limit).then(|| size.checked_sub(Self::SIZE))?
    }

    pub(in crate::server) fn is_command(&self) -> bool {
        self.flags & TYPE == TYPE_COMMAND
    }

    pub(in crate::server) fn is_reply(&self) -> bool {
        self.flags & TYPE == TYPE_REPLY
    }

    /// Whether whoever sent the command does not want a reply, not even of an error.
    pub(in crate::server) fn wants_no_reply(&self) -> bool {
        self.flags & NO_REPLY != 0
    }

    /// The error of a reply, if it is one of an error.
    pub(in crate::server) fn error(&self) -> Option<Errno> {
        let errno = i32::try_from(self.error).map_or(Errno::UnknownErrno, Errno::from_raw);
        (self.flags & ERROR != 0).then_some(errno)
    }
}

/// A message with a body.
fn whole(header: Header, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(Header::SIZE + body.len());
    let size = (Header::SIZE + body.len()) as u32;
    Header { size, ..header }.write(&mut bytes);
    bytes.extend(body);
    bytes
}

/// A command of ours.
pub(in crate::server) fn message(id: u16, command: u16, body: &[u8]) -> Vec<u8> {
    let header = Header {
        id,
        command,
        flags: TYPE_COMMAND,
        ..Header::default()
    };
    whole(header, body)
}

/// The reply to a command that was carried out.
pub(in crate::server) fn reply(to: &Header, body: &[u8]) -> Vec<u8> {
    let header = Header {
        flags: TYPE_REPLY,
        error: 0,
        ..*to
    };
    whole(header, body)
}

/// The reply to a command that was refused: a header alone. The error is never 0, which clients
/// take for success.
pub(in crate::server) fn error_reply(to: &Header, errno: Errno) -> Vec<u8> {
    let errno = match errno as i32 {
        known if known > 0 => known,
        _ => Errno::EIO as i32,
    };
    let header = Header {
        flags: TYPE_REPLY | ERROR,
        error: errno as u32,
        ..*to
    };
    whole(header, &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_below_the_header_or_above_the_limit_has_no_body() {
        let of = |size| Header {
            size,
            ..Header::default()
        };
        assert_eq!(of(15).body_len(64), None);
        assert_eq!(of(16).body_len(64), Some(0));
        assert_eq!(of(64).body_len(64), Some(48));
        assert_eq!(of(65).body_len(64), None);
        assert_eq!(of(u32::MAX).body_len(64), None);
    }

    #[test]
    fn an_error_reply_is_a_header_with_an_error_that_is_not_zero() {
        let asked = Header {
            id: 7,
            command: 9,
            size: 100,
            ..Header::default()
        };
        for (errno, wire) in [(Errno::EINVAL, 22), (Errno::UnknownErrno, 5)] {
            let bytes = error_reply(&asked, errno);
            let header = Header::parse(bytes.first_chunk().expect("a header"));
            assert_eq!((header.id, header.command, header.size), (7, 9, 16));
            assert!(header.is_reply() && !header.is_command());
            assert_eq!(header.error, wire);
            assert_eq!(header.error(), Some(Errno::from_raw(wire as i32)));
        }
        let bytes = reply(&asked, &[1, 2]);
        let header = Header::parse(bytes.first_chunk().expect("a header"));
        assert_eq!((header.size, header.error()), (18, None));
    }
}
