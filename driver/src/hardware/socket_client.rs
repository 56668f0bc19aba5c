//! The client's half of the vfio-user protocol 0.1, as much of it as a driver needs.
//!
//! It is its own rather than one of a crate's: memory safety rests on what a reset or an unmap is
//! answered, so a refusal must be one, an answer must be to what was asked, and neither may be
//! waited for without end.

use std::io::{IoSlice, Read};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use extlb_spec::{BAR_DOORBELLS, BAR_DOORBELLS_SIZE, BAR_REGS, BAR_REGS_SIZE, VECTORS};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::pci::CONFIG;
use crate::error::{Error, Result};

/// How long a server may take for an answer. A drain waits for accesses that are under way, which
/// wait for a processor; but not as long as this.
const LIMIT: Duration = Duration::from_secs(10);
/// No answer that is asked for here is longer.
const LONGEST: usize = 4096;

const HEADER: usize = 16;
const REPLY: u32 = 1;
const TYPE: u32 = 0xf;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// Commands, by number and name.
#[derive(Clone, Copy, Debug)]
struct Command(u16, &'static str);

const VERSION: Command = Command(1, "VERSION");
const DMA_MAP: Command = Command(2, "DMA_MAP");
const DMA_UNMAP: Command = Command(3, "DMA_UNMAP");
const DEVICE_GET_INFO: Command = Command(4, "DEVICE_GET_INFO");
const DEVICE_GET_REGION_INFO: Command = Command(5, "DEVICE_GET_REGION_INFO");
const DEVICE_GET_IRQ_INFO: Command = Command(7, "DEVICE_GET_IRQ_INFO");
const DEVICE_SET_IRQS: Command = Command(8, "DEVICE_SET_IRQS");
const REGION_READ: Command = Command(9, "REGION_READ");
const REGION_WRITE: Command = Command(10, "REGION_WRITE");
const DEVICE_RESET: Command = Command(13, "DEVICE_RESET");

const DEVICE_RESETTABLE: u32 = 1 << 0;
const DEVICE_PCI: u32 = 1 << 1;
const MSIX: u32 = 2;
const READ: u32 = 1 << 0;
const WRITE: u32 = 1 << 1;
const EVENTFDS_TO_TRIGGER: u32 = 1 << 2 | 1 << 5;

/// A connection. After the first failure of the transport it stays dead, and every call says so.
#[derive(Debug)]
pub(super) struct Client {
    stream: UnixStream,
    next_id: u16,
    dead: Option<Errno>,
    /// How long an answer may take.
    limit: Duration,
}

/// A message's body, piece by piece.
#[derive(Default)]
struct Body(Vec<u8>);

impl Body {
    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

impl Client {
    /// Connects, and makes sure that the other side is a PCI device with our BARs.
    pub(super) fn connect(path: &Path) -> Result<Self> {
        Self::connect_within(path, LIMIT)
    }

    fn connect_within(path: &Path, limit: Duration) -> Result<Self> {
        let failed = |error: std::io::Error| {
            Error::Hardware(format!(
                "{}: {error}; start a device there with extlb-device --socket-path PATH",
                path.display()
            ))
        };
        let stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_read_timeout(Some(limit)).map_err(failed)?;
        stream.set_write_timeout(Some(limit)).map_err(failed)?;
        let mut client = Self {
            stream,
            next_id: 0,
            dead: None,
            limit,
        };
        client.shake_hands()?;
        client.look_at_device()?;
        Ok(client)
    }

    fn shake_hands(&mut self) -> Result<()> {
        let capabilities = c"{\"capabilities\":{\"max_msg_fds\":8}}";
        let version = Body::default()
            .u32(1 << 16) // Major 0, minor 1.
            .bytes(capabilities.to_bytes_with_nul());
        let reply = self.call(VERSION, &version, &[])?;
        match u32_at(&reply, 0) {
            Some(version) if version & 0xffff == 0 => Ok(()),
            _ => Err(strange(VERSION, "another major version than 0")),
        }
    }

    fn look_at_device(&mut self) -> Result<()> {
        let body = Body::default().u32(16).u32(0).u32(0).u32(0);
        let reply = self.call(DEVICE_GET_INFO, &body, &[])?;
        let wanted = DEVICE_PCI | DEVICE_RESETTABLE;
        if u32_at(&reply, 4).is_none_or(|flags| flags & wanted != wanted) {
            return Err(strange(DEVICE_GET_INFO, "no PCI device that can be reset"));
        }
        let regions = [
            (u32::from(BAR_REGS), BAR_REGS_SIZE),
            (u32::from(BAR_DOORBELLS), BAR_DOORBELLS_SIZE),
            (CONFIG, 256),
        ];
        for (index, least) in regions {
            let body = Body::default().u32(32).u32(0).u32(index).u32(0);
            let reply = self.call(DEVICE_GET_REGION_INFO, &body.u64(0).u64(0), &[])?;
            if u64_at(&reply, 16).is_none_or(|size| size < least) {
                return Err(strange(DEVICE_GET_REGION_INFO, "a region is too small"));
            }
        }
        let body = Body::default().u32(16).u32(0).u32(MSIX).u32(0);
        let reply = self.call(DEVICE_GET_IRQ_INFO, &body, &[])?;
        match u32_at(&reply, 12) {
            Some(count) if count >= VECTORS => Ok(()),
            _ => Err(strange(DEVICE_GET_IRQ_INFO, "too few MSI-X vectors")),
        }
    }

    /// Reads a piece of a region.
    pub(super) fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let body = Body::default().u64(offset).u32(region);
        let reply = self.call(REGION_READ, &body.u32(data.len() as u32), &[])?;
        match reply.get(16..) {
            Some(read) if read.len() == data.len() => {
                data.copy_from_slice(read);
                Ok(())
            }
            _ => Err(self.die(Errno::EPROTO)),
        }
    }

    /// Writes a piece of a region; when it returns, the device has it.
    pub(super) fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        let body = Body::default().u64(offset).u32(region);
        let body = body.u32(data.len() as u32).bytes(data);
        self.call(REGION_WRITE, &body, &[]).map(drop)
    }

    /// Writes a piece of a region without waiting; what is sent later comes later.
    pub(super) fn post(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        let body = Body::default().u64(offset).u32(region);
        let body = body.u32(data.len() as u32).bytes(data);
        self.send(REGION_WRITE, NO_REPLY, &body, &[]).map(drop)
    }

    /// Lets the device reach a piece of a file.
    pub(super) fn map(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        at: u64,
        len: u64,
        write: bool,
    ) -> Result<()> {
        let body = Body::default()
            .u32(32)
            .u32(READ | if write { WRITE } else { 0 });
        let body = body.u64(offset).u64(at).u64(len);
        self.call(DMA_MAP, &body, &[file.as_raw_fd()]).map(drop)
    }

    /// Takes addresses back; when it returns `Ok`, no access to them is under way.
    pub(super) fn unmap(&mut self, at: u64, len: u64) -> Result<()> {
        let body = Body::default().u32(24).u32(0).u64(at).u64(len);
        self.call(DMA_UNMAP, &body, &[]).map(drop)
    }

    /// Connects the first MSI-X vectors to event fds.
    pub(super) fn set_irqs(&mut self, events: &[RawFd]) -> Result<()> {
        let body = Body::default().u32(20).u32(EVENTFDS_TO_TRIGGER).u32(MSIX);
        let body = body.u32(0).u32(events.len() as u32);
        self.call(DEVICE_SET_IRQS, &body, events).map(drop)
    }

    /// Resets the function.
    pub(super) fn reset(&mut self) -> Result<()> {
        self.call(DEVICE_RESET, &Body::default(), &[]).map(drop)
    }

    /// Why the connection is dead, if it is.
    pub(super) fn check(&self) -> Result<()> {
        match self.dead {
            Some(errno) => Err(Error::Dead { errno }),
            None => Ok(()),
        }
    }

    /// Sends a command and returns the body of its reply.
    fn call(&mut self, command: Command, body: &Body, fds: &[RawFd]) -> Result<Vec<u8>> {
        let id = self.send(command, 0, body, fds)?;
        let end = Instant::now() + self.limit;
        loop {
            let (header, body) = self.receive(end)?;
            let [found, number] = [0, 2].map(|at| u16::from_le_bytes([header[at], header[at + 1]]));
            let flags = u32_at(&header, 8).unwrap_or(0);
            let errno = u32_at(&header, 12).unwrap_or(0);
            if flags & TYPE != REPLY {
                return Err(self.die(Errno::EPROTO));
            }
            if found != id {
                // Some servers answer a posted write that they refuse. It is lost, as on a bus.
                // Anything else answers nothing that was asked.
                if flags & ERROR != 0 && number == REGION_WRITE.0 {
                    continue;
                }
                return Err(self.die(Errno::EPROTO));
            }
            return match flags & ERROR {
                0 => Ok(body),
                _ => Err(refused(command, errno)),
            };
        }
    }

    fn send(&mut self, command: Command, flags: u32, body: &Body, fds: &[RawFd]) -> Result<u16> {
        self.check()?;
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        let mut message = Vec::with_capacity(HEADER + body.0.len());
        message.extend(id.to_le_bytes());
        message.extend(command.0.to_le_bytes());
        message.extend(((HEADER + body.0.len()) as u32).to_le_bytes());
        message.extend(flags.to_le_bytes());
        message.extend([0; 4]);
        message.extend(&body.0);
        let with_fds = [ControlMessage::ScmRights(fds)];
        let mut control = if fds.is_empty() { &[][..] } else { &with_fds };
        let end = Instant::now() + self.limit;
        let mut rest = &message[..];
        while !rest.is_empty() {
            let io = [IoSlice::new(rest)];
            match sendmsg::<()>(
                self.stream.as_raw_fd(),
                &io,
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Ok(sent) => {
                    rest = &rest[sent.min(rest.len())..];
                    // They went with the first byte.
                    control = &[];
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(self.die(Errno::ETIMEDOUT)),
                Err(errno) => return Err(self.die(errno)),
            }
            if !rest.is_empty() && Instant::now() > end {
                return Err(self.die(Errno::ETIMEDOUT));
            }
        }
        Ok(id)
    }

    fn receive(&mut self, end: Instant) -> Result<([u8; HEADER], Vec<u8>)> {
        let mut header = [0; HEADER];
        self.fill(&mut header, end)?;
        let size = u32_at(&header, 4).unwrap_or(0) as usize;
        match size.checked_sub(HEADER) {
            Some(len) if len <= LONGEST => {
                let mut body = vec![0; len];
                self.fill(&mut body, end)?;
                Ok((header, body))
            }
            _ => Err(self.die(Errno::EPROTO)),
        }
    }

    fn fill(&mut self, mut buffer: &mut [u8], end: Instant) -> Result<()> {
        while !buffer.is_empty() {
            match self.stream.read(buffer) {
                Ok(0) => return Err(self.die(Errno::ECONNRESET)),
                Ok(read) => buffer = &mut buffer[read..],
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
                    return Err(self.die(match errno {
                        Errno::EAGAIN => Errno::ETIMEDOUT,
                        errno => errno,
                    }));
                }
            }
            if Instant::now() > end {
                return Err(self.die(Errno::ETIMEDOUT));
            }
        }
        Ok(())
    }

    /// Ends the connection for good: after half a message, or an answer that never came, no later
    /// one could be trusted.
    fn die(&mut self, errno: Errno) -> Error {
        self.dead = Some(errno);
        let _ = self.stream.shutdown(Shutdown::Both);
        Error::Dead { errno }
    }
}

fn refused(command: Command, errno: u32) -> Error {
    let why = match i32::try_from(errno) {
        Ok(0) | Err(_) => "its own output says why".into(),
        Ok(errno) => Errno::from_raw(errno).to_string(),
    };
    Error::Hardware(format!("the server refused {}: {why}", command.1))
}

fn strange(command: Command, what: &str) -> Error {
    Error::Hardware(format!("no extlb device: {} found {what}", command.1))
}

#[cfg(test)]
#[path = "socket_client_tests.rs"]
mod tests;
