//! Hardware that is a device in this process, with its answers mangled.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use extlb_driver::hardware::{Hardware, LocalDevice, LocalMemory};
use extlb_driver::spec::regs::{self, Register};
use extlb_driver::spec::{BAR_REGS, Gpa, Vector};
use extlb_driver::{Error, Fork, Iova, Result, Sharing};
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

/// What is wrong with it.
#[derive(Default)]
pub struct Faults {
    /// It does not answer: reads are all ones, writes are lost, it cannot be reset.
    pub gone: AtomicBool,
    /// Mappings cannot be taken back.
    pub keeps: AtomicBool,
    /// What a register reads as.
    pub lie: Mutex<Option<(Register, u64)>>,
    /// Mappings that were taken back.
    pub unmapped: AtomicU64,
    /// Resets that were done.
    pub resets: AtomicU32,
    /// Where the kernel's shadow page is on the bus.
    shadow: AtomicU64,
    mapped: Mutex<Vec<(Gpa, Iova, u64)>>,
}

impl Faults {
    /// Changes a word of the kernel's shadow page, as a device could.
    pub fn poke(&self, offset: usize, value: u32) {
        self.word(offset, |word| word.store(value.to_le(), Ordering::Release));
    }

    fn word<R>(&self, offset: usize, f: impl FnOnce(&AtomicU32) -> R) -> R {
        let at = self.shadow.load(Ordering::Relaxed);
        let mapped = self.mapped.lock().unwrap();
        let (bus, addr, _) = mapped
            .iter()
            .find(|(bus, _, len)| (bus.0..bus.0 + len).contains(&at))
            .expect("the device was started");
        let word = (addr.0 + (at - bus.0)) as usize + offset;
        // SAFETY: in memory that the driver keeps as long as it is there, and accesses as atomics.
        f(unsafe { &*(word as *const AtomicU32) })
    }
}

/// See the top of the file.
pub struct Mangled {
    pub device: LocalDevice,
    pub faults: Arc<Faults>,
}

impl Mangled {
    /// From now on it does nothing, and does not say so; until it is reset.
    pub fn freeze(&self) {
        self.device
            .set_bus_master(false)
            .expect("a device in this process");
    }
}

fn io() -> Error {
    Error::Call {
        call: "the test's hardware",
        errno: Errno::EIO,
    }
}

// SAFETY: all is done by a device that keeps the promises, or refused.
unsafe impl Hardware for Mangled {
    type Memory = LocalMemory;

    fn name(&self) -> String {
        "mangled device".into()
    }
    fn allocate(&self, len: usize, fork: Fork) -> Result<LocalMemory> {
        self.device.allocate(len, fork)
    }
    fn map_file(&self, file: &File, range: Range<u64>, sharing: Sharing) -> Result<LocalMemory> {
        self.device.map_file(file, range, sharing)
    }
    fn read(&self, bar: u8, offset: u64, width: u8) -> u64 {
        if self.faults.gone.load(Ordering::Relaxed) {
            return u64::MAX;
        }
        match *self.faults.lie.lock().unwrap() {
            Some((register, value)) if bar == BAR_REGS && register.offset == offset => value,
            _ => self.device.read(bar, offset, width),
        }
    }
    unsafe fn write(&self, bar: u8, offset: u64, width: u8, value: u64) {
        if self.faults.gone.load(Ordering::Relaxed) {
            return;
        }
        if bar == BAR_REGS && offset == regs::SHADOW.offset {
            self.faults.shadow.store(value, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise is the same.
        unsafe { self.device.write(bar, offset, width, value) };
    }
    fn bus_ranges(&self) -> Vec<Range<Gpa>> {
        self.device.bus_ranges()
    }
    unsafe fn map(&self, addr: Iova, len: u64, bus: Gpa, write: bool) -> Result<()> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.device.map(addr, len, bus, write) }?;
        self.faults.mapped.lock().unwrap().push((bus, addr, len));
        Ok(())
    }
    fn unmap(&self, bus: Gpa, len: u64) -> Result<()> {
        if self.faults.keeps.load(Ordering::Relaxed) {
            return Err(io());
        }
        self.device.unmap(bus, len)?;
        self.faults
            .mapped
            .lock()
            .unwrap()
            .retain(|(at, ..)| *at != bus);
        self.faults.unmapped.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn interrupt(&self, vector: Vector) -> &EventFd {
        self.device.interrupt(vector)
    }
    fn set_bus_master(&self, on: bool) -> Result<()> {
        match self.faults.gone.load(Ordering::Relaxed) {
            true => Err(io()),
            false => self.device.set_bus_master(on),
        }
    }
    fn reset(&self) -> Result<()> {
        if self.faults.gone.load(Ordering::Relaxed) {
            return Err(io());
        }
        self.faults.resets.fetch_add(1, Ordering::Relaxed);
        self.device.reset()
    }
}
