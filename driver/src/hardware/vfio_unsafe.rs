//! A PCI device bound to vfio-pci: what is the same by group and by iommufd.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::Mutex;

use extlb_spec::{BAR_DOORBELLS, BAR_REGS, Gpa, Iova, VECTORS, Vector, regs};
use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use nix::sys::resource::{Resource, getrlimit};

use super::pages_unsafe::Pages;
use super::pci::{COMMAND, CONFIG, check_id, command, events, nobody};
use super::{Hardware, bus};
use crate::error::{Error, Result};
use crate::memory_unsafe::{Access, Fork, Memory, Sharing};

/// One of VFIO's two ways to a device.
///
/// # Safety
/// - [`Function::map`] gives the device the range that it is told, and nothing else is reached.
/// - [`Function::unmap`] is `Ok` when the IOMMU lets no access to the range through any more.
/// - [`Function::reset`] is `Ok` when the function was reset: no access of before is under way.
/// - [`Function::doorbells`] stays mapped as long as the value lives.
pub unsafe trait Function: Send + Sync + Sized + 'static {
    /// For names and messages.
    const WAY: &'static str;

    /// Takes the device with this address, which is bound to vfio-pci.
    fn open(device: &Address) -> Result<Self>;
    /// Reads a piece of a region; leaves `bytes` alone if the device does not answer.
    fn read(&self, region: u32, offset: u64, bytes: &mut [u8]);
    /// Writes a piece of a region; lost if the device does not answer.
    fn write(&self, region: u32, offset: u64, bytes: &[u8]);
    /// The doorbells' BAR, mapped, and its length; `None` if it cannot be mapped.
    fn doorbells(&self) -> Option<(NonNull<u8>, u64)>;
    /// Bus addresses that the IOMMU takes. Ends are rounded down to pages.
    fn ranges(&self) -> Result<Vec<Range<u64>>>;
    /// Pins memory of this process and maps it.
    fn map(&self, addr: Iova, len: u64, bus: Gpa, write: bool) -> Result<(), Refusal>;
    /// Takes a mapping back.
    fn unmap(&self, bus: Gpa, len: u64) -> Result<(), Refusal>;
    /// Connects the MSI-X vectors.
    fn connect(&self, events: &[EventFd; VECTORS as usize]) -> Result<(), Refusal>;
    /// Resets the function.
    fn reset(&self) -> Result<(), Refusal>;
}

/// Why VFIO did not do something.
#[derive(Debug)]
pub struct Refusal {
    /// The number, if it came through.
    pub errno: Option<Errno>,
    /// In words.
    pub text: String,
}

/// Where a device is.
#[derive(Debug)]
pub struct Address {
    /// As the kernel writes it: "0000:00:04.0".
    pub name: String,
    /// Its folder in sysfs.
    pub path: PathBuf,
}

/// A PCI device that this program has by VFIO, behind an IOMMU: see
/// [`VfioGroup`](super::VfioGroup) and [`VfioCdev`](super::VfioCdev).
///
/// All memory of this process can be mapped. It is locked as long as it is.
pub struct Vfio<F: Function> {
    /// Goes first: when it is closed the kernel resets the device, and unmaps and unpins all.
    function: F,
    events: [EventFd; VECTORS as usize],
    ranges: Vec<Range<Gpa>>,
    /// Orders changes of the command register.
    command: Mutex<()>,
    name: String,
}

impl<F: Function> std::fmt::Debug for Vfio<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vfio")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Address {
    /// Finds "0000:00:04.0" or "00:04.0" or a folder in sysfs, and makes sure that vfio-pci has it:
    /// the crates say less clearly what is missing.
    fn find(device: &str) -> Result<Self> {
        let problem = |what: String| Err(Error::Hardware(what));
        let path = match device {
            path if path.starts_with('/') => PathBuf::from(path),
            short if short.matches(':').count() == 1 => {
                format!("/sys/bus/pci/devices/0000:{short}").into()
            }
            name => format!("/sys/bus/pci/devices/{name}").into(),
        };
        let Ok(path) = path.canonicalize() else {
            return problem(format!(
                "{device}: no such PCI device; `lspci -D` lists them"
            ));
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = name.into_owned();
        if !path.join("iommu_group").exists() {
            return problem(format!(
                "{name} is behind no IOMMU: boot with one (intel_iommu=on)"
            ));
        }
        let driver = path.join("driver").canonicalize().ok();
        let driver = driver.as_deref().and_then(|driver| driver.file_name());
        if driver.is_none_or(|driver| driver != "vfio-pci") {
            let driver = driver.unwrap_or("no driver".as_ref()).to_string_lossy();
            return problem(format!(
                "{name} is bound to {driver}, not to vfio-pci; as root: modprobe vfio-pci; \
                 echo vfio-pci > {0}/driver_override; echo {name} > {0}/driver/unbind; \
                 echo {name} > /sys/bus/pci/drivers_probe",
                path.display()
            ));
        }
        Ok(Self { name, path })
    }
}

impl Refusal {
    fn error(self, name: &str, call: &str, len: u64) -> Error {
        match self.errno {
            Some(Errno::ENOMEM) if len > 0 => Error::LockLimit {
                len,
                limit: getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft),
            },
            Some(errno @ (Errno::ENODEV | Errno::EIO)) => Error::Dead { errno },
            Some(Errno::ENOSPC) => Error::Hardware(format!(
                "{name}: {call}: no room for one more mapping; map larger pieces, or raise \
                 /sys/module/vfio_iommu_type1/parameters/dma_entry_limit"
            )),
            _ => Error::Hardware(format!("{name}: {call}: {}", self.text)),
        }
    }
}

impl<F: Function> Vfio<F> {
    /// Takes a device: "0000:00:04.0", or its folder in sysfs.
    ///
    /// # Errors
    /// [`Error::Hardware`], whose text says what is missing: a device of this kind, an IOMMU, the
    /// binding to vfio-pci, rights; or somebody else has it.
    pub fn open(device: &str) -> Result<Self> {
        let address = Address::find(device)?;
        let function = F::open(&address)?;
        let mut id = [0xff; 4];
        function.read(CONFIG, 0, &mut id);
        check_id(id, &address.name)?;
        let events = events()?;
        let ranges = bus::usable(function.ranges()?);
        let vfio = Self {
            function,
            events,
            ranges,
            command: Mutex::new(()),
            name: format!("{} by {}", address.name, F::WAY),
        };
        // Whoever had the device before: it begins silent.
        vfio.reset()?;
        let connected = vfio.function.connect(&vfio.events);
        connected.map_err(|refusal| refusal.error(&vfio.name, "connecting interrupts", 0))?;
        Ok(vfio)
    }

    fn refused(&self, call: &'static str, len: u64) -> impl Fn(Refusal) -> Error {
        move |refusal| refusal.error(&self.name, call, len)
    }
}

/// Memory of this process.
#[derive(Debug)]
pub struct VfioMemory(Kind);

#[derive(Debug)]
enum Kind {
    Anonymous(Pages),
    File(MmapRaw),
}

// SAFETY: both kinds stay mapped until they are dropped. Anonymous memory is written to by the
// holder only (a child gets a copy or nothing: pinned pages are copied at fork); of a file nothing
// is promised but that it can be read.
unsafe impl Memory for VfioMemory {
    fn addr(&self) -> NonNull<u8> {
        match &self.0 {
            Kind::Anonymous(pages) => pages.addr(),
            Kind::File(map) => NonNull::new(map.as_mut_ptr()).expect("mappings are not at zero"),
        }
    }

    fn len(&self) -> usize {
        match &self.0 {
            Kind::Anonymous(pages) => pages.len(),
            Kind::File(map) => map.len().next_multiple_of(extlb_spec::PAGE_SIZE as usize),
        }
    }

    fn access(&self) -> Access {
        match &self.0 {
            Kind::Anonymous(_) => Access::Exclusive,
            Kind::File(_) => Access::ReadOnly,
        }
    }
}

// SAFETY: `allocate` and `map_file` return `VfioMemory`. The IOMMU lets the device reach what
// `Function::map` mapped, and nothing else. `unmap` and `reset` pass on what `Function` promises;
// bus mastering is switched off before the reset, which restores that state.
unsafe impl<F: Function> Hardware for Vfio<F> {
    type Memory = VfioMemory;

    fn name(&self) -> String {
        self.name.clone()
    }

    fn allocate(&self, len: usize, fork: Fork) -> Result<VfioMemory> {
        let pages = Pages::anonymous(len)?;
        if fork == Fork::Nothing {
            pages.not_for_children()?;
        }
        Ok(VfioMemory(Kind::Anonymous(pages)))
    }

    fn map_file(&self, file: &File, range: Range<u64>, sharing: Sharing) -> Result<VfioMemory> {
        let len = range.end.checked_sub(range.start);
        let Some(len) = len.and_then(|len| usize::try_from(len).ok()) else {
            return Err(Error::Argument("a range longer than the address space"));
        };
        let mut options = MmapOptions::new();
        options.offset(range.start).len(len);
        let map = match sharing {
            Sharing::Shared => options.map_raw_read_only(file),
            // SAFETY: the memory is never seen as a Rust object: it is `Access::ReadOnly`.
            Sharing::Private => unsafe { options.map_copy_read_only(file) }.map(MmapRaw::from),
        };
        let map = map.map_err(|error| Error::Call {
            call: "mmap",
            errno: Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO)),
        })?;
        Ok(VfioMemory(Kind::File(map)))
    }

    fn read(&self, bar: u8, offset: u64, width: u8) -> u64 {
        // By a system call, not from a mapping: a device that was unplugged or whose memory space
        // somebody has disabled then answers all ones, where a mapping would end the program
        // (SIGBUS). A read takes many times longer than the call in any case.
        let mut bytes = [0xff; 8];
        let bytes = match bytes.get_mut(..usize::from(width)) {
            Some(bytes) if matches!(width, 4 | 8) => bytes,
            _ => return nobody(width),
        };
        self.function.read(bar.into(), offset, bytes);
        bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    unsafe fn write(&self, bar: u8, offset: u64, width: u8, value: u64) {
        let bytes = value.to_le_bytes();
        let bytes = match bytes.get(..usize::from(width)) {
            Some(bytes) if matches!(width, 4 | 8) => bytes,
            _ => return,
        };
        if bar == BAR_DOORBELLS
            && width == 4
            && let Some((base, len)) = self.function.doorbells()
        {
            // The hot path: posted, without a system call.
            if offset.is_multiple_of(4) && offset < len {
                // SAFETY: within the BAR, which stays mapped as long as `self.function` lives;
                // any value may be written.
                unsafe {
                    let doorbell = base.add(offset as usize).cast::<u32>();
                    doorbell.write_volatile((value as u32).to_le());
                }
            }
            return;
        }
        self.function.write(bar.into(), offset, bytes);
    }

    fn bus_ranges(&self) -> Vec<Range<Gpa>> {
        self.ranges.clone()
    }

    unsafe fn map(&self, addr: Iova, len: u64, bus: Gpa, write: bool) -> Result<()> {
        let mapped = self.function.map(addr, len, bus, write);
        mapped.map_err(self.refused("mapping memory", len))
    }

    fn unmap(&self, bus: Gpa, len: u64) -> Result<()> {
        let unmapped = self.function.unmap(bus, len);
        unmapped.map_err(self.refused("unmapping memory", 0))
    }

    fn interrupt(&self, vector: Vector) -> &EventFd {
        &self.events[vector as usize]
    }

    fn set_bus_master(&self, on: bool) -> Result<()> {
        let _ordered = self
            .command
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut bytes = [0xff; 2];
        self.function.read(CONFIG, COMMAND, &mut bytes);
        let wanted = command(u16::from_le_bytes(bytes), on);
        self.function.write(CONFIG, COMMAND, &wanted.to_le_bytes());
        // The write has no result that comes through: look.
        let mut bytes = [0xff; 2];
        self.function.read(CONFIG, COMMAND, &mut bytes);
        match u16::from_le_bytes(bytes) {
            now if now == wanted => Ok(()),
            u16::MAX => Err(Error::Dead {
                errno: Errno::ENODEV,
            }),
            now => Err(Error::Hardware(format!(
                "{}: the command register is {now:#06x}, not {wanted:#06x}",
                self.name
            ))),
        }
    }

    fn reset(&self) -> Result<()> {
        // VFIO puts the configuration space back as it was before the reset.
        self.set_bus_master(false)?;
        self.function
            .reset()
            .map_err(self.refused("resetting the device", 0))?;
        // There are kinds of reset that reset nothing; the kernel takes what it finds.
        match self.read(BAR_REGS, regs::STATUS.offset, regs::STATUS.width) {
            0 => Ok(()),
            status if status == nobody(4) => Err(Error::Dead {
                errno: Errno::ENODEV,
            }),
            status => Err(Error::Hardware(format!(
                "{}: its status is {status:#x} after a reset",
                self.name
            ))),
        }
    }
}
