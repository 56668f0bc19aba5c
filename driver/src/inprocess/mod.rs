//! The library against a device in the same process, with no kernel driver and no VM.
//!
//! [`InProcess`] plays the kernel: it owns guest RAM, one process's address space with its page
//! table, the contexts, the invalidation queue and the page request ring, and drives a real
//! device with real threads. What it allocates is mapped twice, at the process's addresses and
//! as guest RAM, so that program and device work on the same bytes.
//!
//! Beside that it offers memory that only the device accesses, and operations on it, so that the
//! path of a shootdown can be raced by tests: [`InProcess::map`] and what follows it.

mod backing_unsafe;
mod frames;
mod hardware;
mod machine;
mod page_requests;
mod ram;
mod ram_unsafe;
mod space;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use extlb_device::ports::Dma as _;
use extlb_spec::uapi::{self, Info};
use extlb_spec::{Gpa, Iova, MAX_CONTEXTS, PAGE_SIZE, context, uapi::create};

pub use backing_unsafe::{InProcessContext, InProcessMemory};
use machine::Machine;
use ram::broken;
use space::{Raw, Space};

use crate::error::{Error, Result};

/// A device in this process, and the kernel it needs.
#[derive(Clone, Debug)]
pub struct InProcess {
    machine: Arc<Machine>,
}

/// What the machine is like.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// Bytes of guest RAM, a multiple of the page size.
    pub ram: u64,
    /// Seed of the order in which frames are handed out.
    pub seed: u64,
    /// The device.
    pub device: extlb_device::Config,
    /// How long the device's bus takes for a piece of data. Long times make accesses that are
    /// under way when memory is taken back a matter of course instead of a rare coincidence.
    pub bus_delay: Duration,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            ram: 64 << 20,
            seed: 1,
            device: extlb_device::Config::default(),
            bus_delay: Duration::ZERO,
        }
    }
}

impl InProcess {
    /// Makes a machine and starts its device.
    pub fn new(config: MachineConfig) -> Result<Self> {
        Ok(Self {
            machine: Machine::start(config)?,
        })
    }

    fn info(&self) -> Info {
        Info {
            version: uapi::UAPI_VERSION,
            create_flags: create::FOLLOW_PTE,
            contexts: MAX_CONTEXTS,
            oracle: 1,
            max_ring_log2: context::MAX_WORK_RING_LOG2,
            ..Info::default()
        }
    }

    /// Frames of RAM that are free.
    pub fn free_frames(&self) -> usize {
        self.machine.lock().frames.free()
    }

    /// Stale accesses that the device's oracle has found.
    pub fn stale_accesses(&self) -> u64 {
        self.machine.hardware.read(extlb_spec::regs::ORACLE_STALE)
    }

    /// Shootdowns so far.
    pub fn shootdowns(&self) -> u64 {
        self.machine.invalidations.waits.load(Ordering::Relaxed)
    }

    /// Maps fresh zeroed pages at `range`, for the device only: the program reaches them with
    /// [`InProcess::peek`] and [`InProcess::poke`]. Page-aligned; must be free.
    pub fn map(&self, range: Range<Iova>) -> Result<Vec<Gpa>> {
        self.free_range(&range)?;
        self.machine.map(&range, false)
    }

    /// Unmaps pages made by [`InProcess::map`]; registrations end there. When it returns the
    /// device does not touch the frames, which are the caller's until
    /// [`InProcess::free`].
    pub fn unmap(&self, range: Range<Iova>) -> Result<Vec<Gpa>> {
        self.raw_range(&range)?;
        self.machine.unmap(&range)
    }

    /// Gives pages made by [`InProcess::map`] fresh zeroed frames, as `MADV_DONTNEED` does. When
    /// it returns the device does not touch the old frames, which are the caller's.
    pub fn replace(&self, range: Range<Iova>) -> Result<Vec<Gpa>> {
        self.raw_range(&range)?;
        self.machine.replace(&range)
    }

    /// Forbids or allows writing to pages made by [`InProcess::map`]. When it returns the device
    /// does not write to forbidden ones.
    pub fn protect(&self, range: Range<Iova>, write: bool) -> Result<()> {
        self.raw_range(&range)?;
        self.machine.protect(&range, write)
    }

    /// Gives frames back to the machine that `unmap` and `replace` gave to the caller.
    pub fn free(&self, frames: impl IntoIterator<Item = Gpa>) -> Result<()> {
        let mut space = self.machine.lock();
        for frame in frames {
            if space.raw.get(&frame) != Some(&Raw::Callers) {
                return Err(Error::Argument("that frame is not the caller's to free"));
            }
            space.raw.remove(&frame);
            space.frames.give_back(frame);
        }
        Ok(())
    }

    /// Reads within a frame that `map`, `unmap` or `replace` told of.
    pub fn peek(&self, from: Gpa, to: &mut [u8]) -> Result<()> {
        let _space = self.raw_frame(from, to.len())?;
        self.machine.ram.read(from, to).map_err(broken)
    }

    /// Writes within a frame that `map`, `unmap` or `replace` told of.
    pub fn poke(&self, to: Gpa, from: &[u8]) -> Result<()> {
        let _space = self.raw_frame(to, from.len())?;
        self.machine.ram.write(to, from).map_err(broken)
    }

    /// Other frames are those of buffers and of the kernel itself.
    fn raw_frame(&self, at: Gpa, len: usize) -> Result<MutexGuard<'_, Space>> {
        let space = self.machine.lock();
        let within = len as u64 <= PAGE_SIZE - at.page_offset();
        match within && space.raw.contains_key(&at.page()) {
            true => Ok(space),
            false => Err(Error::Argument("those addresses are not the caller's")),
        }
    }

    fn aligned(range: &Range<Iova>) -> Result<()> {
        let good = range.start.is_aligned(PAGE_SIZE)
            && range.end.is_aligned(PAGE_SIZE)
            && range.start < range.end
            && range.end.0 <= extlb_spec::addr::IOVA_END;
        good.then_some(()).ok_or(Error::Argument(
            "a range must be whole pages, and not empty",
        ))
    }

    fn free_range(&self, range: &Range<Iova>) -> Result<()> {
        Self::aligned(range)?;
        let space = self.machine.lock();
        match space.pages.range(range.clone()).next() {
            None => Ok(()),
            Some(_) => Err(Error::Argument("something is mapped there")),
        }
    }

    /// Memory that buffers own is not to be had: they would be left with nothing behind them.
    fn raw_range(&self, range: &Range<Iova>) -> Result<()> {
        Self::aligned(range)?;
        let space = self.machine.lock();
        match space.pages.range(range.clone()).any(|(_, page)| page.owned) {
            false => Ok(()),
            true => Err(Error::Argument("that memory belongs to a buffer")),
        }
    }

    /// What a file's mapping holds: a copy, made now.
    fn load(file: &File, range: &Range<u64>) -> Result<Vec<u8>> {
        let len = usize::try_from(range.end - range.start)
            .map_err(|_| Error::Argument("a range longer than the address space"))?;
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, range.start)
            .map_err(|error| Error::Call {
                call: "read of the file",
                errno: nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO)),
            })?;
        Ok(bytes)
    }
}
