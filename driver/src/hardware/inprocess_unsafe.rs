//! Hardware: a device in this process, with no VM and no other process.
#![allow(unsafe_code)]

use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use extlb_device::Config;
use extlb_device::fault::Interposed;
use extlb_device::ports::{Ignore, Interrupts, Ports, SystemClock};
use extlb_device::runner::{Bell, Runner};
use extlb_spec::pte::leaf_size;
use extlb_spec::{Gpa, Iova, PAGE_SIZE, VECTORS, Vector};
use nix::errno::Errno;
use nix::libc;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use vm_memory::{FileOffset, MmapRegion};

use super::Hardware;
use super::inprocess_bus::Bus;
use crate::error::{Error, Result};
use crate::memory_unsafe::{Access, Fork, Memory, Sharing};

/// Bus addresses: two ranges with a hole, as behind an IOMMU, and none so low that it could be
/// good by chance.
const BUS: [Range<Gpa>; 2] = [
    Gpa(1 << 32)..Gpa(0xfe_e000_0000),
    Gpa(0xff_0000_0000)..Gpa(1 << 46),
];

/// A device in this process.
pub struct LocalDevice {
    /// Ends the device's threads when dropped, before anything else goes.
    _runner: Runner,
    device: Interposed,
    bus: Arc<Bus>,
    interrupts: Arc<Events>,
    pieces: Arc<Mutex<Pieces>>,
}

/// All memory that can be mapped, by its address in this process.
#[derive(Debug, Default)]
struct Pieces(std::collections::BTreeMap<u64, Piece>);

#[derive(Debug)]
struct Piece {
    file: Arc<File>,
    len: u64,
}

/// Interrupts as event fds.
#[derive(Debug)]
struct Events([EventFd; VECTORS as usize]);

impl Interrupts for Events {
    fn raise(&self, vector: Vector) {
        // Not blocking, and a count at its limit is as good as one more.
        let _ = self.0[vector as usize].write(1);
    }
}

fn failed(call: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Call { call, errno }
}

fn lock(pieces: &Mutex<Pieces>) -> MutexGuard<'_, Pieces> {
    pieces.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LocalDevice {
    /// Starts a device.
    pub fn new(config: Config) -> Result<Self> {
        Self::with_ports(config, |ports| ports)
    }

    /// Starts a device with something between it and its doors. What `wrap` returns reaches memory
    /// by the port that it was given only, and makes accesses of its own only within one of the
    /// device's: the promises of [`Hardware`] rest on it.
    pub(super) fn with_ports(config: Config, wrap: impl FnOnce(Ports) -> Ports) -> Result<Self> {
        let event = || {
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(failed("eventfd"))
        };
        let interrupts = Arc::new(Events([event()?, event()?, event()?, event()?]));
        let bus = Arc::new(Bus::default());
        let bell = Bell::new();
        let ports = Ports {
            memory: bus.clone(),
            interrupts: interrupts.clone(),
            clock: Arc::new(SystemClock::default()),
            trace: Arc::new(Ignore),
            wake: bell.clone(),
        };
        let device = Interposed::new(config, wrap(ports))
            .map_err(|_| Error::Argument("a device configuration that is out of range"))?;
        let runner = Runner::start(device.device(), &bell)
            .map_err(|_| Error::Argument("no thread left for the device"))?;
        Ok(Self {
            _runner: runner,
            device,
            bus,
            interrupts,
            pieces: Arc::default(),
        })
    }

    /// Accesses so far that met no mapping: what an IOMMU would report as faults.
    pub fn bus_faults(&self) -> u64 {
        self.bus.faults()
    }

    /// Faults that were injected so far, by the plan in the device's configuration.
    pub fn faults_injected(&self) -> u64 {
        self.device.injected()
    }

    fn memory(&self, file: OwnedFd, len: usize, access: Access, fork: Fork) -> Result<LocalMemory> {
        let memory = LocalMemory::map(&file, len, access, self.pieces.clone())?;
        if fork == Fork::Nothing {
            // SAFETY: of a mapping of our own; a child that lacks it has no value to reach it by.
            unsafe { madvise(memory.addr.cast(), len, MmapAdvise::MADV_DONTFORK) }
                .map_err(failed("madvise"))?;
        }
        let piece = Piece {
            file: Arc::new(file.into()),
            len: len as u64,
        };
        lock(&self.pieces).0.insert(memory.start(), piece);
        Ok(memory)
    }

    /// The file and the offset of a range that one piece of memory covers.
    fn backing(&self, addr: Iova, len: u64) -> Result<FileOffset> {
        let pieces = lock(&self.pieces);
        let piece = pieces.0.range(..=addr.0).next_back();
        let (start, piece) = piece
            .filter(|(start, piece)| {
                let offset = addr.0 - **start;
                offset < piece.len && len <= piece.len - offset
            })
            .ok_or(Error::Unsupported("memory that it has not allocated"))?;
        // The same descriptor: a process has no more than about a thousand.
        Ok(FileOffset::from_arc(piece.file.clone(), addr.0 - start))
    }
}

impl std::fmt::Debug for LocalDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.device.fmt(f)
    }
}

fn memory_file(len: usize) -> Result<OwnedFd> {
    let file = memfd_create(c"extlb-memory", MFdFlags::MFD_CLOEXEC);
    let file = file.map_err(failed("memfd_create"))?;
    let size = i64::try_from(len).map_err(|_| Error::Argument("more than a file holds"))?;
    nix::unistd::ftruncate(&file, size).map_err(failed("ftruncate"))?;
    Ok(file)
}

// SAFETY: memory is a mapping of a memory file that lives as long as the value. The device has no
// other way to memory than `bus`, which holds what was mapped, and nothing any more that was taken
// out. The device's own `reset` waits until no access is under way, after it has stopped.
unsafe impl Hardware for LocalDevice {
    type Memory = LocalMemory;

    fn name(&self) -> String {
        "device in this process".into()
    }

    fn allocate(&self, len: usize, fork: Fork) -> Result<LocalMemory> {
        self.memory(memory_file(len)?, len, Access::Exclusive, fork)
    }

    fn map_file(&self, file: &File, range: Range<u64>, sharing: Sharing) -> Result<LocalMemory> {
        if sharing == Sharing::Shared {
            // A file that is cut short would end this process, at the device's next access.
            return Err(Error::Unsupported("a shared mapping of a file"));
        }
        let len = usize::try_from(range.end.saturating_sub(range.start))
            .map_err(|_| Error::Argument("a range longer than the address space"))?;
        let whole = len.next_multiple_of(PAGE_SIZE as usize);
        let copy = File::from(memory_file(whole)?);
        let errno = |error: std::io::Error| Error::Call {
            call: "read of the file",
            errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
        };
        let mut piece = vec![0; len.min(1 << 20)];
        for start in (0..len).step_by(1 << 20) {
            let piece = &mut piece[..(len - start).min(1 << 20)];
            file.read_exact_at(piece, range.start + start as u64)
                .and_then(|()| copy.write_all_at(piece, start as u64))
                .map_err(errno)?;
        }
        self.memory(copy.into(), whole, Access::ReadOnly, Fork::Copy)
    }

    fn read(&self, bar: u8, offset: u64, width: u8) -> u64 {
        let mut bytes = [0; 8];
        let width = usize::from(width).min(8);
        self.device.mmio_read(bar, offset, &mut bytes[..width]);
        u64::from_le_bytes(bytes)
    }

    unsafe fn write(&self, bar: u8, offset: u64, width: u8, value: u64) {
        let width = usize::from(width).min(8);
        self.device
            .mmio_write(bar, offset, &value.to_le_bytes()[..width]);
    }

    fn bus_ranges(&self) -> Vec<Range<Gpa>> {
        BUS.to_vec()
    }

    unsafe fn map(&self, addr: Iova, len: u64, bus: Gpa, write: bool) -> Result<()> {
        let backing = self.backing(addr, len)?;
        let size = usize::try_from(len).map_err(|_| Error::Argument("more than can be mapped"))?;
        // A mapping of the device's own, which goes when `unmap` has taken it from the bus.
        let region = MmapRegion::from_file(backing, size)
            .map_err(|_| Error::Argument("no room to map the memory once more"))?;
        match self.bus.insert(bus, region, write) {
            true => Ok(()),
            false => Err(Error::Argument(
                "something is mapped at those bus addresses",
            )),
        }
    }

    fn unmap(&self, bus: Gpa, len: u64) -> Result<()> {
        match self.bus.remove(bus, len) {
            true => Ok(()),
            false => Err(Error::Argument("that is not what was mapped")),
        }
    }

    fn interrupt(&self, vector: Vector) -> &EventFd {
        &self.interrupts.0[vector as usize]
    }

    fn set_bus_master(&self, on: bool) -> Result<()> {
        self.device.set_bus_master(on);
        Ok(())
    }

    fn reset(&self) -> Result<()> {
        self.device.set_bus_master(false);
        self.device.reset();
        Ok(())
    }
}

/// Memory for a [`LocalDevice`].
#[derive(Debug)]
pub struct LocalMemory {
    addr: NonNull<u8>,
    len: usize,
    access: Access,
    pieces: Arc<Mutex<Pieces>>,
}

// SAFETY: an address of a mapping without any state of a thread.
unsafe impl Send for LocalMemory {}
// SAFETY: as above; access to the content is the business of those who hold the value.
unsafe impl Sync for LocalMemory {}

impl LocalMemory {
    fn start(&self) -> u64 {
        self.addr.as_ptr().addr() as u64
    }

    fn map(file: &OwnedFd, len: usize, access: Access, pieces: Arc<Mutex<Pieces>>) -> Result<Self> {
        let large = leaf_size(2) as usize;
        let align = if len >= large {
            large
        } else {
            PAGE_SIZE as usize
        };
        let size = NonZeroUsize::new(len).ok_or(Error::Argument("empty memory"))?;
        // Addresses of our own, and room to align in them.
        let room = len.checked_add(align - PAGE_SIZE as usize);
        let room = room.and_then(NonZeroUsize::new);
        let room = room.ok_or(Error::Argument("more memory than there are addresses"))?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let reserved = unsafe { mmap_anonymous(None, room, ProtFlags::PROT_NONE, flags) };
        let reserved = reserved.map_err(failed("mmap"))?.cast::<u8>();
        let before = reserved.as_ptr().align_offset(align);
        let unmap = |at: NonNull<u8>, len: usize| {
            if len > 0 {
                // SAFETY: a part of what was reserved above, which nobody has seen yet.
                let _ = unsafe { munmap(at.cast(), len) };
            }
        };
        // SAFETY: within the reserved range: `before` is less than `align`, and page-aligned.
        let addr = unsafe { reserved.add(before) };
        // SAFETY: as above.
        let end = unsafe { addr.add(len) };
        unmap(reserved, before);
        unmap(end, room.get() - before - len);
        let prot = match access {
            Access::Exclusive => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            Access::ReadOnly => ProtFlags::PROT_READ,
        };
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        let at = NonZeroUsize::new(addr.as_ptr().addr());
        // SAFETY: replaces a part of what was reserved above, which nobody has seen yet.
        match unsafe { mmap(at, size, prot, flags, file.as_fd(), 0) } {
            Ok(_) => Ok(Self {
                addr,
                len,
                access,
                pieces,
            }),
            Err(errno) => {
                unmap(addr, len);
                Err(failed("mmap")(errno))
            }
        }
    }
}

impl Drop for LocalMemory {
    fn drop(&mut self) {
        // First: what is not there any more cannot be mapped.
        lock(&self.pieces).0.remove(&self.start());
        // SAFETY: mapped by `map`, and its users are gone.
        let _ = unsafe { munmap(self.addr.cast(), self.len) };
    }
}

// SAFETY: mapped until the value is dropped, read-write if it is `Exclusive`; the file behind it is
// known to the device only, which gets it through registrations.
unsafe impl Memory for LocalMemory {
    fn addr(&self) -> NonNull<u8> {
        self.addr
    }

    fn len(&self) -> usize {
        self.len
    }

    fn access(&self) -> Access {
        self.access
    }
}
