//! Hardware that lies: a wrapper around honest hardware, for tests of drivers.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use extlb_device::Config;
use extlb_spec::regs::{self, Register, status};
use extlb_spec::{BAR_REGS, Gpa, Iova, Vector};
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::mutated_bus::{MutatedBus, Structures};
use super::mutated_faults::{Faults, Lie};
use super::mutated_ledger::Ledger;
use super::{Hardware, LocalDevice};
use crate::error::{Error, Result};
use crate::memory_unsafe::{Access, Fork, Memory, Sharing};

/// Hardware with a liar in front of it.
///
/// What the device says is changed on its way to the driver, by a plan ([`Faults`]): registers,
/// the answers of the hardware itself, interrupts, and (for a [`LocalDevice`]) what the device
/// writes to rings, records, shadow pages and page tables. What it does to data is not changed.
///
/// # What a driver can notice, and what not
/// A lie that the protocol rules out is an error with a name. Others look like the truth, and only
/// the order in which memory is taken back limits what they do:
/// - A completion that comes before the data ([`Lie::RecordNext`]), or of an operation that was
///   not carried out, is believed. Its memory is still registered: the device may write to it until
///   it was taken back, which takes an acknowledgement of its own.
/// - An acknowledgement that comes before the drain ([`Lie::WaitEarly`]) is believed. Then
///   [`Hardware::unmap`] stands between the device and the memory. One that nobody asked for yet
///   ([`Lie::WaitAhead`]) is an error.
/// - An acknowledgement, a completion or a wake-up that never comes is silence, which ends with the
///   driver's patience, or when the program restarts the device.
#[derive(Debug)]
pub struct Mutated<H> {
    hardware: H,
    faults: Arc<Faults>,
    structures: Arc<Structures>,
    ledger: Arc<Ledger>,
}

impl Mutated<LocalDevice> {
    /// A device in this process, whose registers and bus lie as planned.
    ///
    /// # Errors
    /// Those of [`LocalDevice::new`].
    pub fn local(config: Config, faults: &Arc<Faults>) -> Result<Self> {
        let structures = Arc::new(Structures::default());
        let hardware = LocalDevice::with_ports(config, |mut ports| {
            let bus = Arc::new(MutatedBus {
                memory: ports.memory,
                interrupts: ports.interrupts,
                faults: faults.clone(),
                structures: structures.clone(),
            });
            ports.memory = bus.clone();
            ports.interrupts = bus;
            ports
        })?;
        Ok(Self {
            hardware,
            faults: faults.clone(),
            structures,
            ledger: Arc::default(),
        })
    }
}

impl<H: Hardware> Mutated<H> {
    /// Other hardware, whose registers lie as planned. What its device writes does not.
    pub fn new(hardware: H, faults: &Arc<Faults>) -> Self {
        Self {
            hardware,
            faults: faults.clone(),
            structures: Arc::default(),
            ledger: Arc::default(),
        }
    }

    /// The honest hardware.
    pub fn honest(&self) -> &H {
        &self.hardware
    }

    /// What the driver did wrong: memory that it freed while the device had it, bus addresses that
    /// it reused while the device might know them.
    pub fn violations(&self) -> Vec<String> {
        self.ledger.violations()
    }

    fn refuse(&self, lie: Lie, call: &'static str, errno: Errno) -> Result<()> {
        let gone = self.faults.is_removed();
        match self.faults.take(lie) {
            Some(_) => Err(Error::Call { call, errno }),
            None if gone => Err(Error::Call {
                call,
                errno: Errno::ENODEV,
            }),
            None => Ok(()),
        }
    }
}

fn register(bar: u8, offset: u64, width: u8) -> Option<Register> {
    let found = |r: &&Register| bar == BAR_REGS && r.offset == offset && r.width == width;
    regs::ALL.iter().find(found).copied()
}

// SAFETY: memory, mappings and resets are those of the wrapped hardware, which keeps the promises;
// what is refused here was not done there. A bus that lies moves no data, and reaches memory by the
// bus that it wraps.
unsafe impl<H: Hardware> Hardware for Mutated<H> {
    type Memory = MutatedMemory<H::Memory>;

    fn name(&self) -> String {
        format!("{}, with lies", self.hardware.name())
    }

    fn allocate(&self, len: usize, fork: Fork) -> Result<Self::Memory> {
        let memory = self.hardware.allocate(len, fork)?;
        Ok(MutatedMemory::new(memory, &self.ledger))
    }

    fn map_file(&self, file: &File, range: Range<u64>, sharing: Sharing) -> Result<Self::Memory> {
        let memory = self.hardware.map_file(file, range, sharing)?;
        Ok(MutatedMemory::new(memory, &self.ledger))
    }

    fn read(&self, bar: u8, offset: u64, width: u8) -> u64 {
        let faults = &self.faults;
        if faults.is_removed() {
            return if width == 8 {
                u64::MAX
            } else {
                u32::MAX.into()
            };
        }
        let value = self.hardware.read(bar, offset, width);
        let Some(register) = register(bar, offset, width) else {
            return value;
        };
        let other = |lie| {
            let word = faults.word(lie, value as u32);
            word.map_or(value, |word| value & !u64::from(u32::MAX) | u64::from(word))
        };
        match register.offset {
            o if o == regs::ID.offset => other(Lie::Identity),
            o if o == regs::VERSION.offset => other(Lie::Version),
            o if o == regs::CAP.offset => other(Lie::Capabilities),
            o if o == regs::STATUS.offset => {
                let unknown = |bits: u64| 4 | bits & u64::from(u32::MAX >> 1);
                if faults.take(Lie::FatalError).is_some() {
                    status::FATAL.into()
                } else if faults.take(Lie::StatusReset).is_some() {
                    0
                } else {
                    faults.take(Lie::Status).map_or(value, unknown)
                }
            }
            _ => value,
        }
    }

    unsafe fn write(&self, bar: u8, offset: u64, width: u8, value: u64) {
        if let Some(register) = register(bar, offset, width) {
            self.structures.note(register, value);
        }
        if self.faults.is_removed() || self.faults.take(Lie::WriteLost).is_some() {
            return;
        }
        // SAFETY: the caller's promise is the same.
        unsafe { self.hardware.write(bar, offset, width, value) };
    }

    fn bus_ranges(&self) -> Vec<Range<Gpa>> {
        self.hardware.bus_ranges()
    }

    unsafe fn map(&self, addr: Iova, len: u64, bus: Gpa, write: bool) -> Result<()> {
        if self.faults.take(Lie::MapRefused).is_some() {
            let (call, errno) = ("map", Errno::EPERM);
            return Err(Error::Call { call, errno });
        }
        // SAFETY: the caller's promise is the same.
        unsafe { self.hardware.map(addr, len, bus, write) }?;
        self.ledger.mapped(addr, len, bus);
        Ok(())
    }

    fn unmap(&self, bus: Gpa, len: u64) -> Result<()> {
        if self.faults.take(Lie::UnmapRefused).is_some() {
            let (call, errno) = ("unmap", Errno::EBUSY);
            return Err(Error::Call { call, errno });
        }
        // Whoever has removed the device: the IOMMU is still there.
        self.hardware.unmap(bus, len)?;
        self.ledger.unmapped(bus);
        Ok(())
    }

    fn interrupt(&self, vector: Vector) -> &EventFd {
        self.hardware.interrupt(vector)
    }

    fn set_bus_master(&self, on: bool) -> Result<()> {
        self.refuse(Lie::BusMasterFails, "bus master", Errno::EIO)?;
        if on {
            self.ledger.runs();
        }
        self.hardware.set_bus_master(on)
    }

    fn reset(&self) -> Result<()> {
        let done = self
            .refuse(Lie::ResetFails, "reset", Errno::EIO)
            .and_then(|()| self.hardware.reset());
        self.ledger.reset(done.is_ok());
        done
    }
}

/// Memory for a [`Mutated`] device. It notes when it is freed.
#[derive(Debug)]
pub struct MutatedMemory<M: Memory> {
    memory: M,
    ledger: Arc<Ledger>,
}

impl<M: Memory> MutatedMemory<M> {
    fn new(memory: M, ledger: &Arc<Ledger>) -> Self {
        let ledger = ledger.clone();
        Self { memory, ledger }
    }
}

impl<M: Memory> Drop for MutatedMemory<M> {
    fn drop(&mut self) {
        let addr = Iova(self.memory.addr().as_ptr().addr() as u64);
        self.ledger.freed(addr, self.memory.len() as u64);
    }
}

// SAFETY: those of the memory inside, which lives as long.
unsafe impl<M: Memory> Memory for MutatedMemory<M> {
    fn addr(&self) -> NonNull<u8> {
        self.memory.addr()
    }

    fn len(&self) -> usize {
        self.memory.len()
    }

    fn access(&self) -> Access {
        self.memory.access()
    }
}
