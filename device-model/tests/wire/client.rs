//! The client's half of the protocol, as a test needs it: it says what it likes, and hears all.
#![allow(dead_code)] // each test file uses its part

use std::io::{ErrorKind, IoSlice, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// Longer than the server may take for anything.
const LIMIT: Duration = Duration::from_secs(30);

pub const VERSION: u16 = 1;
pub const DMA_MAP: u16 = 2;
pub const DMA_UNMAP: u16 = 3;
pub const GET_INFO: u16 = 4;
pub const REGION_INFO: u16 = 5;
pub const REGION_IO_FDS: u16 = 6;
pub const IRQ_INFO: u16 = 7;
pub const SET_IRQS: u16 = 8;
pub const REGION_READ: u16 = 9;
pub const REGION_WRITE: u16 = 10;
pub const DMA_READ: u16 = 11;
pub const DMA_WRITE: u16 = 12;
pub const RESET: u16 = 13;
pub const WRITE_MULTI: u16 = 15;

pub const NO_REPLY: u32 = 1 << 4;
/// What QEMU 11 says of itself.
pub const QEMU: &str = "{\"capabilities\": {\"max_msg_fds\": 16, \"max_data_xfer_size\": 1048576, \
     \"migration\": {\"pgsize\": 4096, \"max_bitmap_size\": 268435456}, \"pgsizes\": 4096, \
     \"max_dma_maps\": 65535, \"write_multiple\": true}}";

/// A message as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    pub id: u16,
    pub command: u16,
    pub flags: u32,
    pub error: u32,
    pub body: Vec<u8>,
}

impl Received {
    pub fn is_reply(&self) -> bool {
        self.flags & 0xf == 1
    }
}

/// Bytes of a message.
pub fn message(id: u16, command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(id.to_le_bytes());
    bytes.extend(command.to_le_bytes());
    bytes.extend((16 + body.len() as u32).to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(body);
    bytes
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("long enough"))
}

/// The body of VERSION.
pub fn version_body(minor: u16, capabilities: &str) -> Vec<u8> {
    let mut body = vec![0, 0];
    body.extend(minor.to_le_bytes());
    body.extend(capabilities.bytes());
    body.push(0);
    body
}

/// Size, of a region.
#[derive(Clone, Copy, Debug)]
pub struct RegionInfo {
    pub flags: u32,
    pub size: u64,
}

/// Vectors, of an interrupt index.
#[derive(Clone, Copy, Debug)]
pub struct IrqInfo {
    pub flags: u32,
    pub count: u32,
}

/// A refusal is the error that the server gave.
pub type Answer<T> = Result<T, Errno>;

#[derive(Debug)]
pub struct Client {
    pub stream: UnixStream,
    next: u16,
}

impl Client {
    /// Connects, without a word.
    pub fn silent(socket: &Path) -> Self {
        Self::on(UnixStream::connect(socket).expect("connects"))
    }

    pub fn on(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(LIMIT)).expect("set");
        stream.set_write_timeout(Some(LIMIT)).expect("set");
        Self { stream, next: 0 }
    }

    /// Connects, and shakes hands.
    pub fn new(socket: &Path) -> Self {
        let mut client = Self::silent(socket);
        client.greet();
        client
    }

    pub fn greet(&mut self) {
        self.greet_as(QEMU);
    }

    pub fn greet_as(&mut self, capabilities: &str) {
        let reply = self
            .call(VERSION, &version_body(0, capabilities), &[])
            .expect("greeted");
        assert_eq!(reply[..4], [0; 4]);
    }

    pub fn send_bytes(&mut self, mut bytes: &[u8], fds: &[RawFd]) -> nix::Result<()> {
        let rights = [ControlMessage::ScmRights(fds)];
        let mut control = if fds.is_empty() { &[][..] } else { &rights };
        while !bytes.is_empty() {
            let (fd, flags) = (self.stream.as_raw_fd(), MsgFlags::MSG_NOSIGNAL);
            let sent = sendmsg::<()>(fd, &[IoSlice::new(bytes)], control, flags, None)?;
            bytes = &bytes[sent..];
            control = &[];
        }
        Ok(())
    }

    /// Sends a command; its number.
    pub fn send(&mut self, command: u16, flags: u32, body: &[u8], fds: &[RawFd]) -> u16 {
        let id = self.next;
        self.next = id.wrapping_add(1);
        self.send_bytes(&message(id, command, flags, body), fds)
            .expect("sent");
        id
    }

    /// The next message; `None` at the end, which has to come in time as well.
    pub fn receive(&mut self) -> Option<Received> {
        let mut header = [0; 16];
        match self.stream.read_exact(&mut header).map_err(|e| e.kind()) {
            Ok(()) => {}
            Err(ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => return None,
            Err(other) => panic!("neither a message nor the end: {other}"),
        }
        let size = u32_at(&header, 4) as usize;
        let mut body = vec![0; size - 16];
        self.stream.read_exact(&mut body).expect("the rest");
        Some(Received {
            id: u16::from_le_bytes([header[0], header[1]]),
            command: u16::from_le_bytes([header[2], header[3]]),
            flags: u32_at(&header, 8),
            error: u32_at(&header, 12),
            body,
        })
    }

    /// The reply to a command.
    pub fn reply(&mut self, id: u16, command: u16) -> Answer<Vec<u8>> {
        let received = self.receive().expect("a reply");
        assert_eq!((received.id, received.command), (id, command));
        assert!(received.is_reply());
        match received.flags & 1 << 5 {
            0 => Ok(received.body),
            _ => {
                assert_ne!(received.error, 0, "an error that reads as success");
                assert!(received.body.is_empty(), "an error is a header alone");
                Err(Errno::from_raw(received.error as i32))
            }
        }
    }

    pub fn call(&mut self, command: u16, body: &[u8], fds: &[RawFd]) -> Answer<Vec<u8>> {
        let id = self.send(command, 0, body, fds);
        self.reply(id, command)
    }

    pub fn region(&mut self, index: u32) -> Answer<RegionInfo> {
        let reply = self.call(REGION_INFO, &words(&[32, 0, index, 0, 0, 0, 0, 0]), &[])?;
        let size = u64::from(u32_at(&reply, 20)) << 32 | u64::from(u32_at(&reply, 16));
        Ok(RegionInfo {
            flags: u32_at(&reply, 4),
            size,
        })
    }

    pub fn get_irq_info(&mut self, index: u32) -> Answer<IrqInfo> {
        let reply = self.call(IRQ_INFO, &words(&[16, 0, index, 0]), &[])?;
        let (flags, count) = (u32_at(&reply, 4), u32_at(&reply, 12));
        Ok(IrqInfo { flags, count })
    }

    fn access(region: u32, offset: u64, count: usize) -> Vec<u8> {
        words(&[offset as u32, (offset >> 32) as u32, region, count as u32])
    }

    pub fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Answer<()> {
        let body = Self::access(region, offset, data.len());
        let reply = self.call(REGION_READ, &body, &[])?;
        assert_eq!(reply[..16], body);
        data.copy_from_slice(&reply[16..]);
        Ok(())
    }

    pub fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Answer<()> {
        let head = Self::access(region, offset, data.len());
        let reply = self.call(REGION_WRITE, &[&head, data].concat(), &[])?;
        assert_eq!(reply, head);
        Ok(())
    }

    /// A write that is not answered.
    pub fn post(&mut self, region: u32, offset: u64, data: &[u8]) {
        let head = Self::access(region, offset, data.len());
        self.send(REGION_WRITE, NO_REPLY, &[&head, data].concat(), &[]);
    }

    pub fn dma_map_as(
        &mut self,
        flags: u32,
        offset: u64,
        at: u64,
        len: u64,
        fds: &[RawFd],
    ) -> Answer<()> {
        let mut body = words(&[32, flags]);
        body.extend(
            [offset, at, len]
                .iter()
                .flat_map(|value| value.to_le_bytes()),
        );
        let reply = self.call(DMA_MAP, &body, fds)?;
        assert!(reply.is_empty());
        Ok(())
    }

    pub fn dma_map(&mut self, offset: u64, at: u64, len: u64, fd: RawFd) -> Answer<()> {
        self.dma_map_as(3, offset, at, len, &[fd])
    }

    pub fn dma_unmap(&mut self, at: u64, len: u64) -> Answer<()> {
        let mut body = words(&[24, 0]);
        body.extend([at, len].iter().flat_map(|value| value.to_le_bytes()));
        let reply = self.call(DMA_UNMAP, &body, &[])?;
        assert_eq!(reply, body);
        Ok(())
    }

    pub fn dma_unmap_all(&mut self) -> Answer<()> {
        self.call(DMA_UNMAP, &words(&[24, 2, 0, 0, 0, 0]), &[])
            .map(drop)
    }

    pub fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: &[RawFd],
    ) -> Answer<()> {
        let body = words(&[20, flags, index, start, count]);
        self.call(SET_IRQS, &body, fds).map(drop)
    }

    /// For some of the vectors from `start` on.
    pub fn set_irqs_of(&mut self, flags: u32, start: u32, chosen: &[bool]) -> Answer<()> {
        let len = chosen.len() as u32;
        let mut body = words(&[20 + len, flags | 1 << 1, 2, start, len]);
        body.extend(chosen.iter().map(|chosen| u8::from(*chosen)));
        self.call(SET_IRQS, &body, &[]).map(drop)
    }

    pub fn reset(&mut self) -> Answer<()> {
        self.call(RESET, &[], &[]).map(drop)
    }
}
