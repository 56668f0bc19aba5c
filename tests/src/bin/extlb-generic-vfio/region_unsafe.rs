//! Regions of a VFIO device, by calls and by mappings.
#![allow(unsafe_code)]

use std::fs::File;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use memmap2::{MmapOptions, MmapRaw};
use vfio_bindings::bindings::vfio::{VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ};
use vfio_ioctls::VfioDevice;

/// A region. It has a handle of its own, which must be gone before the device is closed.
pub struct Region<'a> {
    file: File,
    index: u32,
    /// Of the region in the file.
    start: u64,
    size: u64,
    flags: u32,
    device: PhantomData<&'a VfioDevice>,
}

impl<'a> Region<'a> {
    /// The region with this number; its size is 0 if there is none.
    pub fn new(device: &'a VfioDevice, index: u32) -> Result<Self> {
        // SAFETY: the device outlives the call and does not close its descriptor meanwhile.
        let fd = unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) };
        Ok(Self {
            file: fd.try_clone_to_owned()?.into(),
            index,
            start: device.get_region_offset(index),
            size: device.get_region_size(index),
            flags: device.get_region_flags(index),
            device: PhantomData,
        })
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads `width` bytes, at most 8, little-endian.
    pub fn read(&self, offset: u64, width: usize) -> Result<u64> {
        ensure!(
            self.flags & VFIO_REGION_INFO_FLAG_READ != 0,
            "region {} cannot be read",
            self.index
        );
        let mut bytes = [0; 8];
        let part = bytes.get_mut(..width).context("at most 8 bytes")?;
        self.file
            .read_exact_at(part, self.start + offset)
            .with_context(|| {
                format!("read {width} bytes of region {} at {offset:#x}", self.index)
            })?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes the lowest `width` bytes, at most 8, little-endian.
    pub fn write(&self, offset: u64, width: usize, value: u64) -> Result<()> {
        let bytes = value.to_le_bytes();
        let part = bytes.get(..width).context("at most 8 bytes")?;
        self.file
            .write_all_at(part, self.start + offset)
            .with_context(|| format!("write {value:#x} to region {} at {offset:#x}", self.index))
    }

    /// Maps all of it.
    pub fn map(&self) -> Result<Mapping> {
        ensure!(
            self.flags & VFIO_REGION_INFO_FLAG_MMAP != 0,
            "region {} cannot be mapped",
            self.index
        );
        let pages = MmapOptions::new()
            .offset(self.start)
            .len(usize::try_from(self.size)?)
            .map_raw(&self.file)
            .with_context(|| format!("map region {}", self.index))?;
        Ok(Mapping(pages))
    }
}

/// A mapped region.
pub struct Mapping(MmapRaw);

impl Mapping {
    /// Reads 4 bytes; `offset` is a multiple of 4.
    pub fn read(&self, offset: u64) -> Result<u32> {
        let offset = usize::try_from(offset)?;
        let inside = offset.is_multiple_of(4) && offset + 4 <= self.0.len();
        ensure!(inside, "offset {offset:#x}");
        // SAFETY: within the mapping and aligned, both checked above; nothing but volatile
        // accesses is made of it, so that it does not matter that the device changes it.
        let value = unsafe { self.0.as_ptr().add(offset).cast::<u32>().read_volatile() };
        Ok(u32::from_le(value))
    }
}
