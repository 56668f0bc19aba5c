//! The driver proper: the device, its lives, and the structures that they need.
//!
//! # Locks
//! `fence`, then `state`, then a space's, then `bus`. None but `fence` is held while the device is
//! waited for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use extlb_spec::context::ContextEntry;
use extlb_spec::regs::{self, FatalError, Register, cap, status};
use extlb_spec::{BAR_REGS, Gpa, Iova, MAX_CONTEXTS, PAGE_SIZE};
use nix::errno::Errno;

use super::Config;
use super::arena::{Arena, Chunk};
use super::bus_space::BusSpace;
use super::space::{Life, Space};
use crate::error::{Error, Nonsense, Result};
use crate::hardware::Hardware;
use crate::memory_unsafe::{Fork, Memory as _};
use crate::protocol::{Bell, BusMemory as _, Invalidations, Layout, Pages, Port, Requests};

/// Pages of memory for the driver's structures that are mapped at once.
const CHUNK_PAGES: u64 = 256;
const CONTEXT_TABLE_PAGES: u64 =
    (ContextEntry::SIZE as u64 * MAX_CONTEXTS as u64).div_ceil(PAGE_SIZE);
/// Pages of the structures that every device needs, at the start of the first chunk.
const FIXED_PAGES: u64 = CONTEXT_TABLE_PAGES + Invalidations::PAGES + Requests::PAGES + 1;

/// The driver of one device.
pub(super) struct Core<H: Hardware> {
    pub(super) hardware: H,
    /// The process that owns the device. A child has a copy of this, and must leave it alone.
    owner: u32,
    config: Config,
    /// `Some` until the end.
    arena: Option<Arena<H::Memory>>,
    bus: Mutex<BusSpace>,
    pub(super) layout: Layout,
    /// Held by whoever stops or starts the device.
    fence: Mutex<()>,
    state: Mutex<State>,
    /// Rings when those who sleep on a context should look.
    pub(super) bell: Bell,
}

pub(super) struct State {
    pub(super) life: Arc<Life>,
    pub(super) spaces: BTreeMap<u32, Arc<Space>>,
    pub(super) requests: Requests,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a device can do, by its registers.
fn identify(hardware: &impl Hardware) -> Result<u32> {
    let read = |register| read(hardware, register);
    let found = read(regs::ID) as u32;
    if found == u32::MAX {
        // As every register of a device that is gone.
        let errno = Errno::ENODEV;
        return Err(Error::Dead { errno });
    }
    if found != regs::ID_VALUE {
        return Err(Error::Identity { found });
    }
    let (found, wanted) = (read(regs::VERSION) as u32, regs::VERSION_VALUE);
    // A later minor version has more, and what is here as it is.
    if found >> 16 != wanted >> 16 || found < wanted {
        return Err(Error::Interface { found, wanted });
    }
    let caps = read(regs::CAP);
    let nonsense = Error::Protocol(Nonsense::Register {
        name: regs::CAP.name,
        value: caps,
    });
    let iova_bits = (caps & cap::IOVA_BITS_MASK) >> 8;
    let ring_log2 = (caps & cap::RING_LOG2_MASK) >> 16;
    let contexts = 1u32.checked_shl((caps & cap::CONTEXTS_LOG2_MASK) as u32);
    let fits = iova_bits == u64::from(extlb_spec::addr::IOVA_BITS)
        && ring_log2 >= u64::from(Invalidations::LOG2.max(Requests::LOG2));
    match contexts {
        Some(contexts) if fits && contexts > 0 => Ok(contexts.min(MAX_CONTEXTS)),
        _ => Err(nonsense),
    }
}

fn read(hardware: &impl Hardware, register: Register) -> u64 {
    let width = register.width;
    let value = hardware.read(BAR_REGS, register.offset, width);
    // Nobody but the device says what is in the upper half of a narrow read.
    match width {
        4 => value & u64::from(u32::MAX),
        _ => value,
    }
}

impl<H: Hardware> Core<H> {
    /// Takes a device over, in whatever state somebody left it, and starts it.
    pub(super) fn new(hardware: H, config: Config) -> Result<Self> {
        let contexts = identify(&hardware)?;
        let bus = BusSpace::new(hardware.bus_ranges())?;
        // Nothing is under way when our memory appears on the bus.
        hardware.reset()?;
        let mut core = Self {
            arena: Some(Arena::new()),
            bus: Mutex::new(bus),
            layout: Layout {
                context_table: Gpa(0),
                contexts,
                invalidations: Gpa(0),
                page_requests: Gpa(0),
                shadow: Gpa(0),
            },
            fence: Mutex::new(()),
            state: Mutex::new(State {
                life: Arc::new(Life::new(Invalidations::new(
                    Gpa(0),
                    Gpa(0),
                    config.patience,
                ))),
                spaces: BTreeMap::new(),
                requests: Requests::new(Gpa(0), Gpa(0)),
            }),
            bell: Bell::default(),
            owner: std::process::id(),
            hardware,
            config,
        };
        let first = core.grow(FIXED_PAGES)?;
        let mut next = first.0;
        let mut take = |pages: u64| {
            let at = Gpa(next);
            next += pages * PAGE_SIZE;
            at
        };
        core.layout = Layout {
            context_table: take(CONTEXT_TABLE_PAGES),
            contexts,
            invalidations: take(Invalidations::PAGES),
            page_requests: take(Requests::PAGES),
            shadow: take(1),
        };
        core.boot()?;
        Ok(core)
    }

    pub(super) fn arena(&self) -> &Arena<H::Memory> {
        self.arena.as_ref().expect("only the end takes it")
    }

    pub(super) fn bus(&self) -> MutexGuard<'_, BusSpace> {
        lock(&self.bus)
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(super) fn life(&self) -> Arc<Life> {
        self.state().life.clone()
    }

    pub(super) fn contexts(&self) -> u32 {
        self.layout.contexts
    }

    /// Fails in a child of the process that owns the device.
    pub(super) fn check_owner(&self) -> Result<()> {
        if std::process::id() == self.owner {
            return Ok(());
        }
        let errno = Errno::ECHILD;
        Err(Error::Dead { errno })
    }

    /// The value of a register.
    pub(super) fn read(&self, register: Register) -> u64 {
        read(&self.hardware, register)
    }

    pub(super) fn ring_doorbell(&self, space: &Space) {
        if space.life.queue.check().is_ok() {
            self.write_doorbell(space.number);
        }
    }

    /// Resets the device and lets it run with empty rings. The caller holds `fence`, or nobody
    /// else knows the device; nobody writes to the rings.
    fn boot(&self) -> Result<()> {
        self.hardware.reset()?;
        // What the last life left is not read as this one's.
        self.life().set_silent();
        let layout = &self.layout;
        for page in 0..FIXED_PAGES {
            let at = Gpa(layout.context_table.0 + page * PAGE_SIZE);
            self.arena().write(at, &[0; PAGE_SIZE as usize])?;
        }
        self.hardware.set_bus_master(true)?;
        layout.start(|register, value| self.write(register, value));
        if let Err(error) = self.alive() {
            // It does not matter if that fails: the reset comes anyway.
            let _ = self.hardware.set_bus_master(false);
            let _ = self.hardware.reset();
            return Err(error);
        }
        let mut state = self.state();
        let patience = self.config.patience;
        let queue = Invalidations::new(layout.invalidations, layout.shadow, patience);
        state.life = Arc::new(Life::new(queue));
        state.requests = Requests::new(layout.page_requests, layout.shadow);
        state.spaces.clear();
        Ok(())
    }

    /// Ends the life of the device, with all contexts, and begins another.
    pub(super) fn restart(&self) -> Result<()> {
        self.check_owner()?;
        let _fence = lock(&self.fence);
        let old = self.life();
        let errno = Errno::ESHUTDOWN;
        old.queue.declare_dead(Error::Dead { errno });
        // From here on nobody writes to the structures of the old life: those who send commands
        // and those who make contexts look whether it is dead, under these locks.
        old.queue.close();
        drop(self.state());
        self.bell.ring();
        identify(&self.hardware)?;
        let started = self.boot();
        self.bell.ring();
        started
    }

    /// The device is not to be trusted any more: fences it off. The first reason is kept, and
    /// returned. When this returns a life that can be silent is.
    pub(super) fn kill(&self, life: &Arc<Life>, why: Error) -> Error {
        if let Err(error) = self.check_owner() {
            return error;
        }
        let why = life.queue.declare_dead(why);
        let _fence = lock(&self.fence);
        // A life that is over was followed by a reset.
        if !life.is_silent() && Arc::ptr_eq(life, &self.life()) {
            // The reset turns it off, too; but it may fail.
            let _ = self.hardware.set_bus_master(false);
            if self.hardware.reset().is_ok() {
                life.set_silent();
            }
        }
        self.bell.ring();
        why
    }

    /// Gives the device commands; see [`Invalidations::send`]. A device that fails is killed.
    pub(super) fn send(
        &self,
        life: &Arc<Life>,
        commands: &[extlb_spec::invalidation::Command],
        acknowledged: bool,
    ) -> Result<()> {
        self.check_owner()?;
        life.queue
            .send(self, commands, acknowledged)
            .map_err(|error| self.kill(life, error))
    }

    /// Fails if the device is dead, and looks whether it is.
    pub(super) fn check(&self, life: &Arc<Life>) -> Result<()> {
        self.check_owner()?;
        life.queue.check()?;
        self.alive().map_err(|error| self.kill(life, error))
    }

    /// Maps another chunk for structures; where. Its first `taken` pages are the caller's.
    fn grow(&self, taken: u64) -> Result<Gpa> {
        let len = CHUNK_PAGES * PAGE_SIZE;
        // A child has no business with them.
        let memory = self.hardware.allocate(len as usize, Fork::Nothing)?;
        let addr = Iova(memory.addr().as_ptr().addr() as u64);
        let slot = self.map(addr, len, true)?;
        let start = slot.start;
        self.arena().add(Chunk { memory, slot }, taken);
        Ok(start)
    }
}

/// Pages of the arena, which grows.
pub(super) struct ArenaPages<'a, H: Hardware>(pub(super) &'a Core<H>);

impl<H: Hardware> Pages for ArenaPages<'_, H> {
    fn zeroed(&mut self) -> Result<Gpa> {
        let page = match self.0.arena().take() {
            Some(page) => page,
            None => self.0.grow(1)?,
        };
        self.0.arena().write(page, &[0; PAGE_SIZE as usize])?;
        Ok(page)
    }

    fn give_back(&mut self, page: Gpa) {
        self.0.arena().give_back(page);
    }
}

impl<H: Hardware> Port for Core<H> {
    type Memory = Arena<H::Memory>;

    fn memory(&self) -> &Self::Memory {
        self.arena()
    }

    fn kick(&self) {
        self.write(regs::KICK, 1);
    }

    fn alive(&self) -> Result<()> {
        let errno = match self.read(regs::STATUS) as u32 {
            status::ENABLED => return Ok(()),
            status::FATAL => {
                let (error, info) = (self.read(regs::ERROR), self.read(regs::ERROR_INFO));
                let known = u32::try_from(error).ok().and_then(FatalError::from_raw);
                return Err(known.map_or(
                    Error::Protocol(Nonsense::Register {
                        name: regs::ERROR.name,
                        value: error,
                    }),
                    |error| Error::Fatal { error, info },
                ));
            }
            // It does not answer.
            u32::MAX => Errno::ENODEV,
            // Somebody else has reset it.
            0 => Errno::ECONNRESET,
            value => {
                let (name, value) = (regs::STATUS.name, value.into());
                return Err(Error::Protocol(Nonsense::Register { name, value }));
            }
        };
        Err(Error::Dead { errno })
    }
}

impl<H: Hardware> Drop for Core<H> {
    fn drop(&mut self) {
        if self.check_owner().is_err() {
            // The memory is not a child's, and its addresses may be somebody else's here.
            std::mem::forget(self.arena.take());
            return;
        }
        let _ = self.hardware.set_bus_master(false);
        let silent = self.hardware.reset().is_ok();
        let chunks = self.arena.take().map_or(Vec::new(), Arena::into_chunks);
        for chunk in chunks {
            let unmapped = self
                .hardware
                .unmap(chunk.slot.start, chunk.memory.len() as u64)
                .is_ok();
            if !(silent || unmapped) {
                // The device may still write to it.
                std::mem::forget(chunk);
            }
        }
    }
}
