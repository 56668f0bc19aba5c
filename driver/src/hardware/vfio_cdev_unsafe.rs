//! VFIO by iommufd and the device's own node (`/dev/vfio/devices/vfioN`), by the crates vfio-ioctls
//! and iommufd-ioctls.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};
use std::ptr::NonNull;
use std::sync::Arc;

use extlb_spec::{BAR_DOORBELLS, Gpa, Iova, VECTORS};
use iommufd_bindings as ib;
use iommufd_ioctls::{IommuFd, IommufdError, IommufdIoas};
use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use vfio_ioctls::{VfioDevice, VfioError, VfioIommufd};

use super::vfio_unsafe::{Address, Function, Refusal};
use crate::error::{Error, Result};

/// The device by its own node.
pub struct Cdev {
    doorbells: Option<MmapRaw>,
    /// Closed before the address space that it is attached to.
    device: VfioDevice,
    ioas: Arc<IommufdIoas>,
    iommufd: Arc<IommuFd>,
}

/// `VFIO_PCI_MSIX_IRQ_INDEX`, and the flag of a region that can be mapped (`linux/vfio.h`).
const MSIX: u32 = 2;
const REGION_MMAP: u32 = 1 << 2;
/// Ranges that there is room for; the kernel says if there are more.
const MAX_RANGES: usize = 64;

mod ioctl {
    use iommufd_bindings as ib;
    nix::ioctl_readwrite_bad!(
        iova_ranges,
        nix::request_code_none!(ib::IOMMUFD_TYPE, ib::IOMMUFD_CMD_IOAS_IOVA_RANGES),
        ib::iommu_ioas_iova_ranges
    );
    // VFIO_DEVICE_RESET. The crate's own call of it returns nothing.
    nix::ioctl_none_bad!(device_reset, nix::request_code_none!(b';', 111));
}

fn by_errno(errno: Errno) -> Refusal {
    Refusal {
        errno: Some(errno),
        text: errno.to_string(),
    }
}

fn by_iommufd(error: IommufdError) -> Refusal {
    let number = match &error {
        IommufdError::IommuIoasMap(error) | IommufdError::IommuIoasUnmap(error) => {
            Some(error.errno())
        }
        _ => None,
    };
    Refusal {
        errno: number.map(Errno::from_raw),
        text: error.to_string(),
    }
}

impl Cdev {
    fn iommu(&self) -> BorrowedFd<'_> {
        // SAFETY: the file is open as long as `self.iommufd` lives, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.iommufd.as_raw_fd()) }
    }

    fn map_doorbells(device: &VfioDevice) -> Option<MmapRaw> {
        let region = u32::from(BAR_DOORBELLS);
        if device.get_region_flags(region) & REGION_MMAP == 0 {
            return None;
        }
        let len = usize::try_from(device.get_region_size(region)).ok()?;
        let offset = device.get_region_offset(region);
        let options = MmapOptions::new().len(len).offset(offset).to_owned();
        options.map_raw(device.as_raw_fd()).ok()
    }
}

// SAFETY: IOMMU_IOAS_MAP pins the pages of the range and maps them; IOMMU_IOAS_UNMAP returns after
// the IOMMU has forgotten them (the kernel unpins the pages on the strength of it), and the length
// that it has unmapped is checked. VFIO_DEVICE_RESET returns after the reset, and is called here,
// with its result. The doorbells' mapping is the value's own.
unsafe impl Function for Cdev {
    const WAY: &'static str = "VFIO device node and iommufd";

    fn open(device: &Address) -> Result<Self> {
        let problem = |what: &str, error: &dyn std::fmt::Display| {
            Error::Hardware(format!("{}: {what}: {error}", device.name))
        };
        let no_iommufd = "/dev/iommu cannot be had (modprobe iommufd; or take the VFIO group)";
        let file = OpenOptions::new().read(true).write(true).open("/dev/iommu");
        let file = file.map_err(|error| problem(no_iommufd, &error))?;
        let iommufd = Arc::new(IommuFd::new_from_fd(file));
        let ioas = IommufdIoas::new(iommufd.clone());
        let ioas = Arc::new(ioas.map_err(|error| problem("no address space", &error))?);
        let ops = VfioIommufd::new(iommufd.clone(), Some(ioas.clone()), None);
        let ops = ops.map_err(|error| problem("no address space", &error))?;
        let opened = VfioDevice::new(&device.path, Arc::new(ops), true).map_err(|error| {
            let what = match error {
                VfioError::InvalidVfioDev => {
                    "this kernel has no device nodes (CONFIG_VFIO_DEVICE_CDEV); take the VFIO group"
                }
                _ => "the device node cannot be had; may you open it, and is it free?",
            };
            problem(what, &error)
        })?;
        Ok(Self {
            doorbells: Self::map_doorbells(&opened),
            device: opened,
            ioas,
            iommufd,
        })
    }

    fn read(&self, region: u32, offset: u64, bytes: &mut [u8]) {
        // What goes wrong is logged and leaves `bytes` alone; so does a range that is not there,
        // except for one whose end wraps.
        if offset < u64::MAX - 8 {
            self.device.region_read(region, bytes, offset);
        }
    }

    fn write(&self, region: u32, offset: u64, bytes: &[u8]) {
        if offset < u64::MAX - 8 {
            self.device.region_write(region, bytes, offset);
        }
    }

    fn doorbells(&self) -> Option<(NonNull<u8>, u64)> {
        let map = self.doorbells.as_ref()?;
        Some((NonNull::new(map.as_mut_ptr())?, map.len() as u64))
    }

    fn ranges(&self) -> Result<Vec<Range<u64>>> {
        let mut found = [ib::iommu_iova_range::default(); MAX_RANGES];
        let mut argument = ib::iommu_ioas_iova_ranges {
            size: size_of::<ib::iommu_ioas_iova_ranges>() as u32,
            ioas_id: self.ioas.id(),
            num_iovas: MAX_RANGES as u32,
            allowed_iovas: found.as_mut_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the structure that this number carries; the kernel writes at most `num_iovas`
        // ranges to `found`, which has as many.
        let called = unsafe { ioctl::iova_ranges(self.iommu().as_raw_fd(), &mut argument) };
        called.map_err(|errno| Error::Call {
            call: "IOMMU_IOAS_IOVA_RANGES",
            errno,
        })?;
        let found = found.iter().take(argument.num_iovas as usize);
        Ok(found
            .map(|range| range.start..range.last.saturating_add(1))
            .collect())
    }

    fn map(&self, addr: Iova, len: u64, bus: Gpa, write: bool) -> Result<(), Refusal> {
        let mut flags = ib::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
            | ib::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE;
        if write {
            flags |= ib::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE;
        }
        let map = ib::iommu_ioas_map {
            size: size_of::<ib::iommu_ioas_map>() as u32,
            flags,
            ioas_id: self.ioas.id(),
            user_va: addr.0,
            length: len,
            iova: bus.0,
            ..Default::default()
        };
        // Not by the crate's `vfio_dma_map`, which maps for writing only.
        self.iommufd.map_iommu_ioas(&map).map_err(by_iommufd)
    }

    fn unmap(&self, bus: Gpa, len: u64) -> Result<(), Refusal> {
        let mut unmap = ib::iommu_ioas_unmap {
            size: size_of::<ib::iommu_ioas_unmap>() as u32,
            ioas_id: self.ioas.id(),
            iova: bus.0,
            length: len,
        };
        let unmapped = self.iommufd.unmap_iommu_ioas(&mut unmap);
        unmapped.map_err(by_iommufd)?;
        match unmap.length == len {
            true => Ok(()),
            false => Err(by_errno(Errno::EINVAL)),
        }
    }

    fn connect(&self, events: &[EventFd; VECTORS as usize]) -> Result<(), Refusal> {
        let mut copies = Vec::new();
        for event in events {
            let copy = event.as_fd().try_clone_to_owned();
            let copy = copy.map_err(|_| by_errno(Errno::EMFILE))?;
            // SAFETY: an event fd of our own, given away here.
            copies.push(unsafe { vmm_sys_util::eventfd::EventFd::from_raw_fd(copy.into_raw_fd()) });
        }
        let connected = self.device.enable_irq(MSIX, copies.iter().collect());
        connected.map_err(|error| Refusal {
            errno: None,
            text: error.to_string(),
        })
    }

    fn reset(&self) -> Result<(), Refusal> {
        // SAFETY: a call without an argument, on the device's open file.
        let reset = unsafe { ioctl::device_reset(self.device.as_raw_fd()) };
        reset.map(drop).map_err(by_errno)
    }
}
