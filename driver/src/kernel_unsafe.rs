//! The kernel's driver as a backing: ioctls, mapped pages, memory of the process.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::time::Duration;

use extlb_spec::uapi::{self, Audit, Create, Info, Register, Stats, Unregister};
use extlb_spec::{Iova, PAGE_SIZE};
use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::error::{Error, Result};
use crate::memory_unsafe::{Access, Backing, BackingContext, Fork, Memory, Shadow, Sharing, Wake};

mod ioctl {
    use super::*;
    nix::ioctl_readwrite!(info, uapi::IOC_TYPE, uapi::INFO.number, Info);
    nix::ioctl_readwrite!(create, uapi::IOC_TYPE, uapi::CREATE.number, Create);
    nix::ioctl_readwrite!(register, uapi::IOC_TYPE, uapi::REGISTER.number, Register);
    nix::ioctl_readwrite!(
        unregister,
        uapi::IOC_TYPE,
        uapi::UNREGISTER.number,
        Unregister
    );
    nix::ioctl_readwrite!(stats, uapi::IOC_TYPE, uapi::STATS.number, Stats);
    nix::ioctl_readwrite!(audit, uapi::IOC_TYPE, uapi::AUDIT.number, Audit);
}

// The number of an ioctl carries the size of its argument: the structures are the specification's.
const _: () = {
    assert!(size_of::<Info>() == uapi::INFO.size);
    assert!(size_of::<Create>() == uapi::CREATE.size);
    assert!(size_of::<Register>() == uapi::REGISTER.size);
    assert!(size_of::<Unregister>() == uapi::UNREGISTER.size);
    assert!(size_of::<Stats>() == uapi::STATS.size);
    assert!(size_of::<Audit>() == uapi::AUDIT.size);
    assert!(uapi::IOCTLS.len() == 6);
};

/// The device behind a device node of the kernel's driver.
#[derive(Debug)]
pub struct Kernel {
    path: PathBuf,
}

impl Kernel {
    /// The device at [`uapi::DEVICE_NODE`].
    pub fn new() -> Self {
        Self::at(uapi::DEVICE_NODE)
    }

    /// The device at another node.
    pub fn at(path: impl AsRef<Path>) -> Self {
        Self {
            path: path.as_ref().to_owned(),
        }
    }

    fn open(&self) -> Result<File> {
        // Not blocking: a `read` that finds no event says so instead of sleeping.
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(&self.path)
            .map_err(|error| Error::Open {
                path: self.path.clone(),
                errno: errno_of(&error),
            })
    }
}

impl Default for Kernel {
    fn default() -> Self {
        Self::new()
    }
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// Calls the driver, again if a signal interrupted it.
fn call<T>(
    file: &File,
    what: &uapi::Ioctl,
    function: unsafe fn(libc::c_int, *mut T) -> nix::Result<libc::c_int>,
    argument: &mut T,
) -> Result<()> {
    use std::os::fd::AsRawFd;
    loop {
        // SAFETY: the file is open; `argument` is the structure that this number carries (the
        // functions are made by `ioctl_readwrite!`, sizes are asserted above), and the driver
        // writes nothing but its fields, which have no invalid values.
        match unsafe { function(file.as_raw_fd(), argument) } {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(Errno::EOPNOTSUPP) => return Err(Error::Unsupported(what.name)),
            Err(errno @ (Errno::ENODEV | Errno::EIO)) => return Err(Error::Dead { errno }),
            Err(errno) => {
                return Err(Error::Call {
                    call: what.name,
                    errno,
                });
            }
        }
    }
}

/// A page of the device file, mapped.
#[derive(Debug)]
struct DevicePage(NonNull<u8>);

impl DevicePage {
    fn map(file: &File, prot: ProtFlags, offset: u64) -> Result<Self> {
        let len = NonZeroUsize::new(PAGE_SIZE as usize).expect("pages are not empty");
        // SAFETY: a new mapping at an address of the kernel's choice.
        let page = unsafe {
            mmap(
                None,
                len,
                prot,
                MapFlags::MAP_SHARED,
                file.as_fd(),
                offset as libc::off_t,
            )
        };
        page.map(|page| Self(page.cast()))
            .map_err(|errno| Error::Call {
                call: "mmap",
                errno,
            })
    }
}

impl Drop for DevicePage {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, one page; users of it borrow `self`.
        let _ = unsafe { munmap(self.0.cast(), PAGE_SIZE as usize) };
    }
}

// SAFETY: an address of a mapping that is only accessed with atomic or volatile accesses.
unsafe impl Send for DevicePage {}
// SAFETY: as above.
unsafe impl Sync for DevicePage {}

/// A context of the kernel's driver: an open file.
#[derive(Debug)]
pub struct KernelContext {
    // Unmapped before the file is closed.
    doorbell: DevicePage,
    shadow: DevicePage,
    file: File,
    number: u32,
}

// SAFETY: `allocate` and `map_file` return `KernelMemory`, which keeps the promises of `Memory`.
unsafe impl Backing for Kernel {
    type Context = KernelContext;
    type Memory = KernelMemory;

    fn info(&self) -> Result<Info> {
        let mut info = Info::default();
        call(&self.open()?, &uapi::INFO, ioctl::info, &mut info)?;
        Ok(info)
    }

    fn allocate(&self, len: usize, fork: Fork) -> Result<KernelMemory> {
        let map = MmapOptions::new().len(len).map_anon();
        let map = map.map_err(|error| map_error(&error))?;
        if fork == Fork::Nothing {
            map.advise(memmap2::Advice::DontFork)
                .map_err(|error| map_error(&error))?;
        }
        Ok(KernelMemory {
            map: map.into(),
            access: Access::Exclusive,
        })
    }

    fn map_file(&self, file: &File, range: Range<u64>, sharing: Sharing) -> Result<KernelMemory> {
        let len = usize::try_from(range.end.saturating_sub(range.start))
            .map_err(|_| Error::Argument("a range longer than the address space"))?;
        let mut options = MmapOptions::new();
        options.offset(range.start).len(len);
        let map = match sharing {
            Sharing::Shared => options.map_raw_read_only(file),
            // SAFETY: the memory is never seen as a Rust object: `Access::ReadOnly` below.
            Sharing::Private => unsafe { options.map_copy_read_only(file) }.map(MmapRaw::from),
        };
        let map = map.map_err(|error| map_error(&error))?;
        Ok(KernelMemory {
            map,
            access: Access::ReadOnly,
        })
    }

    fn create(&self, ring: Iova, ring_log2: u32, flags: u32) -> Result<KernelContext> {
        let file = self.open()?;
        let mut create = Create {
            ring: ring.0,
            ring_log2,
            flags,
            ..Create::default()
        };
        call(&file, &uapi::CREATE, ioctl::create, &mut create)?;
        let doorbell = DevicePage::map(&file, ProtFlags::PROT_WRITE, uapi::MMAP_DOORBELL)?;
        let read_write = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let shadow = DevicePage::map(&file, read_write, uapi::MMAP_SHADOW)?;
        Ok(KernelContext {
            doorbell,
            shadow,
            file,
            number: create.context,
        })
    }
}

fn map_error(error: &std::io::Error) -> Error {
    Error::Call {
        call: "mmap",
        errno: errno_of(error),
    }
}

// SAFETY: the driver's interface promises of `UNREGISTER` what the trait does of `unregister`.
unsafe impl BackingContext for KernelContext {
    fn number(&self) -> u32 {
        self.number
    }

    fn register(&self, addr: Iova, len: u64, _: Access) -> Result<u32> {
        let mut register = Register {
            addr: addr.0,
            len,
            ..Register::default()
        };
        match call(&self.file, &uapi::REGISTER, ioctl::register, &mut register) {
            Ok(()) => Ok(register.handle),
            // It does not say with which one.
            Err(Error::Call {
                errno: Errno::EEXIST,
                ..
            }) => Err(Error::Overlap { addr }),
            Err(error) => Err(error),
        }
    }

    fn unregister(&self, handle: u32) -> Result<()> {
        let mut unregister = Unregister {
            handle,
            ..Unregister::default()
        };
        call(
            &self.file,
            &uapi::UNREGISTER,
            ioctl::unregister,
            &mut unregister,
        )
    }

    fn ring_doorbell(&self) {
        // SAFETY: the doorbell page is mapped for writing; any value may be written.
        unsafe { self.doorbell.0.cast::<u32>().write_volatile(0) };
    }

    fn shadow(&self) -> &Shadow {
        // SAFETY: one page, mapped read-write until `self` is dropped, accessed as atomics here
        // and by the device.
        unsafe { Shadow::at(self.shadow.0) }
    }

    fn wait(&self, timeout: Duration) -> Result<Wake> {
        let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
        // Rounded up: a timeout below a millisecond sleeps, it does not spin.
        let millis = timeout.as_micros().div_ceil(1000);
        let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(0) => return Ok(Wake::TimedOut),
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Wake::Event),
            Err(errno) => {
                return Err(Error::Call {
                    call: "poll",
                    errno,
                });
            }
        }
        let events = fds[0].revents().unwrap_or(PollFlags::POLLERR);
        if events.contains(PollFlags::POLLIN) {
            let mut count = [0; 8];
            match nix::unistd::read(&self.file, &mut count) {
                Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Wake::Event),
                Err(errno @ (Errno::ENODEV | Errno::EIO)) if !events.intersects(STOPPED) => {
                    return Err(Error::Dead { errno });
                }
                Err(_) if events.intersects(STOPPED) => return Ok(Wake::Stopped),
                Err(errno) => {
                    return Err(Error::Call {
                        call: "read",
                        errno,
                    });
                }
            }
        }
        Ok(if events.intersects(STOPPED) {
            Wake::Stopped
        } else {
            Wake::Event
        })
    }

    fn check(&self) -> Result<()> {
        self.stats().map(drop)
    }

    fn stats(&self) -> Result<Stats> {
        let mut stats = Stats::default();
        call(&self.file, &uapi::STATS, ioctl::stats, &mut stats)?;
        Ok(stats)
    }

    fn audit(&self) -> Result<Audit> {
        let mut audit = Audit::default();
        call(&self.file, &uapi::AUDIT, ioctl::audit, &mut audit)?;
        Ok(audit)
    }
}

const STOPPED: PollFlags = PollFlags::POLLERR
    .union(PollFlags::POLLHUP)
    .union(PollFlags::POLLNVAL);

/// Memory of the process.
#[derive(Debug)]
pub struct KernelMemory {
    map: MmapRaw,
    access: Access,
}

// SAFETY: `MmapRaw` keeps its mapping until it is dropped. Anonymous memory is private to the
// process and readable and writable; only mappings of files are `ReadOnly`.
unsafe impl Memory for KernelMemory {
    fn addr(&self) -> NonNull<u8> {
        NonNull::new(self.map.as_mut_ptr()).expect("mappings are not at 0")
    }

    fn len(&self) -> usize {
        // The kernel maps whole pages; `MmapRaw` knows the length that was asked for.
        self.map.len().next_multiple_of(PAGE_SIZE as usize)
    }

    fn access(&self) -> Access {
        self.access
    }
}
