//! A device in another process, over a vfio-user socket.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use extlb_spec::{
    BAR_DOORBELLS, BAR_DOORBELLS_SIZE, BAR_REGS, BAR_REGS_SIZE, Gpa, Iova, PAGE_SIZE, VECTORS,
    Vector,
};
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::pci::{COMMAND, CONFIG, check_id, command, events, nobody};
use super::socket_client::Client;
use super::socket_memory::{Owned, Pieces};
use super::socket_server_unsafe::SocketServer;
use super::{Hardware, bus};
use crate::error::{Error, Result};
use crate::memory_unsafe::{Access, Fork, Memory, Sharing};

/// A device that a vfio-user server has: `extlb-device --socket-path PATH`. No VM, no kernel
/// driver, no rights are needed.
///
/// The server sees of this process what [`Hardware::allocate`] and [`Hardware::map_file`] made, and
/// nothing else.
///
/// When the server dies, or does not answer for ten seconds, the device is gone for good: reads
/// give all ones, writes are lost, all other calls [`Error::Dead`].
#[derive(Debug)]
pub struct Socket {
    client: Mutex<Client>,
    events: [EventFd; VECTORS as usize],
    pieces: Arc<Pieces>,
    name: String,
    /// Ended after the connection is closed.
    server: Option<SocketServer>,
}

impl Socket {
    /// The device behind a socket. A server has one client at a time; the next one waits.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut client = Client::connect(path)?;
        let mut id = [0; 4];
        client.read(CONFIG, 0, &mut id)?;
        check_id(id, &path.to_string_lossy())?;
        let events = events()?;
        client.set_irqs(&events.each_ref().map(raw))?;
        Ok(Self {
            client: Mutex::new(client),
            events,
            pieces: Arc::new(Pieces::new()?),
            name: format!("vfio-user socket {}", path.display()),
            server: None,
        })
    }

    /// Starts a server of one's own and connects to it; see [`SocketServer::spawn`]. It ends with
    /// the value.
    pub fn spawn(binary: impl AsRef<Path>, config: &str) -> Result<Self> {
        let server = SocketServer::spawn(binary, config)?;
        let socket = Self::connect(server.path())?;
        Ok(Self {
            server: Some(server),
            ..socket
        })
    }

    /// The server, if it was started by [`Socket::spawn`].
    pub fn server(&self) -> Option<&SocketServer> {
        self.server.as_ref()
    }

    fn client(&self) -> MutexGuard<'_, Client> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn memory(&self, len: usize, access: Access) -> Result<SocketMemory> {
        let owned = self.pieces.allocate(len)?;
        Ok(SocketMemory { owned, access })
    }
}

fn raw(event: &EventFd) -> RawFd {
    event.as_fd().as_raw_fd()
}

/// Memory of this process that a server can be given.
#[derive(Debug)]
pub struct SocketMemory {
    owned: Owned,
    access: Access,
}

// SAFETY: `Pages` keeps the range mapped until the value is dropped, read-write, shared only with
// the server it is mapped for (the file has no name, and children do not get the mapping).
unsafe impl Memory for SocketMemory {
    fn addr(&self) -> NonNull<u8> {
        self.owned.pages.addr()
    }

    fn len(&self) -> usize {
        self.owned.pages.len()
    }

    fn access(&self) -> Access {
        self.access
    }
}

/// Whether an access lies within the BARs that matter, by a width that there is.
fn within(bar: u8, offset: u64, width: u8) -> bool {
    let size = match bar {
        BAR_REGS => BAR_REGS_SIZE,
        BAR_DOORBELLS => BAR_DOORBELLS_SIZE,
        _ => 0,
    };
    let end = offset.checked_add(width.into());
    matches!(width, 4 | 8) && end.is_some_and(|end| end <= size)
}

// SAFETY:
// - `allocate` and `map_file` return `SocketMemory`.
// - The server has no memory of this process but the file of `Pieces`, and the device of that what
//   `map` has sent. A range of the file serves nobody else before it was unmapped.
// - `unmap` is `Ok` after the server's answer, which comes after accesses under way have ended
//   (the protocol says so of DMA_UNMAP; the server waits in `quiesce`). A refusal or a lost answer
//   is an error.
// - `reset` is `Ok` after the server's answer, and the server answers when its device is silent.
unsafe impl Hardware for Socket {
    type Memory = SocketMemory;

    fn name(&self) -> String {
        self.name.clone()
    }

    fn allocate(&self, len: usize, _: Fork) -> Result<SocketMemory> {
        self.memory(len, Access::Exclusive)
    }

    fn map_file(&self, file: &File, range: Range<u64>, sharing: Sharing) -> Result<SocketMemory> {
        if sharing == Sharing::Shared {
            return Err(Error::Unsupported("a shared mapping of a file"));
        }
        let len = range.end.checked_sub(range.start);
        let len = len.and_then(|len| usize::try_from(len).ok());
        let pages = len.and_then(|len| len.checked_next_multiple_of(PAGE_SIZE as usize));
        let (Some(len), Some(pages)) = (len, pages) else {
            return Err(Error::Argument("a range longer than the address space"));
        };
        let memory = self.memory(pages, Access::ReadOnly)?;
        let copy = || -> std::io::Result<()> {
            let to = File::from(self.pieces.fd().try_clone()?);
            let start = memory.owned.offset();
            let mut buffer = vec![0; len.min(1 << 20)];
            let mut done = 0;
            while done < len {
                let piece = (len - done).min(buffer.len());
                file.read_exact_at(&mut buffer[..piece], range.start + done as u64)?;
                to.write_all_at(&buffer[..piece], start + done as u64)?;
                done += piece;
            }
            Ok(())
        };
        copy().map_err(|error| Error::Call {
            call: "read of the file",
            errno: Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO)),
        })?;
        Ok(memory)
    }

    fn read(&self, bar: u8, offset: u64, width: u8) -> u64 {
        let mut bytes = [0; 8];
        if !within(bar, offset, width) {
            return nobody(width);
        }
        let data = &mut bytes[..usize::from(width)];
        match self.client().read(bar.into(), offset, data) {
            Ok(()) => u64::from_le_bytes(bytes),
            Err(_) => nobody(width),
        }
    }

    unsafe fn write(&self, bar: u8, offset: u64, width: u8, value: u64) {
        if within(bar, offset, width) {
            let bytes = value.to_le_bytes();
            // Lost if the device is gone, as on a bus; the next call that has a result says so.
            let _ = self
                .client()
                .post(bar.into(), offset, &bytes[..usize::from(width)]);
        }
    }

    fn bus_ranges(&self) -> Vec<Range<Gpa>> {
        bus::usable(std::iter::once(0..u64::MAX))
    }

    /// # Errors
    /// [`Error::Unsupported`] for what this hardware has not allocated itself.
    unsafe fn map(&self, addr: Iova, len: u64, bus: Gpa, write: bool) -> Result<()> {
        let lent = self.pieces.lend(addr, len, bus);
        let offset = lent.ok_or(Error::Unsupported(
            "memory that was not allocated through it",
        ))?;
        let mut client = self.client();
        let mapped = client.map(self.pieces.fd().as_fd(), offset, bus.0, len, write);
        if let Err(Error::Hardware(_)) = mapped {
            // A refusal. After any other error nobody knows what the server has.
            self.pieces.take_back(bus, len);
        }
        mapped
    }

    fn unmap(&self, bus: Gpa, len: u64) -> Result<()> {
        self.client().unmap(bus.0, len)?;
        self.pieces.take_back(bus, len);
        Ok(())
    }

    fn interrupt(&self, vector: Vector) -> &EventFd {
        &self.events[vector as usize]
    }

    fn set_bus_master(&self, on: bool) -> Result<()> {
        let mut client = self.client();
        let mut bytes = [0; 2];
        client.read(CONFIG, COMMAND, &mut bytes)?;
        let now = command(u16::from_le_bytes(bytes), on);
        client.write(CONFIG, COMMAND, &now.to_le_bytes())
    }

    fn reset(&self) -> Result<()> {
        let mut client = self.client();
        client.reset()?;
        // The protocol does not say what a reset leaves of the event fds.
        client.set_irqs(&self.events.each_ref().map(raw))
    }
}
