//! The driver proper: device, structures, and the order in which memory comes and goes.
//!
//! # The rule
//! Memory that a program gets back is not touched by the device any more. `Core::take_back`
//! keeps it, in this order:
//! 1. the registration is not live any more: a page request for it is refused from now on, so
//!    that nothing is asked for again;
//! 2. the device ptes are cleared in RAM (release): whoever walks from now on finds none. Nobody
//!    puts them back: only registering writes ptes, and the addresses stay reserved until 6;
//! 3. an invalidation command is posted behind that (the tail's release, the device's acquire):
//!    the device removes its translations after 2, so none comes back;
//! 4. a wait command behind it is acknowledged when every access that began before, with one of
//!    those translations, has ended. The acknowledgement is a word in RAM, loaded with acquire;
//! 5. only then is the mapping taken from the bus ([`Hardware::unmap`]), and with it the pin;
//! 6. only then are bus addresses, page table pages and the addresses of the program free.
//!
//! A device that does not acknowledge is dead: it is fenced ([`Core::kill`]), bus mastering off and
//! reset. If the reset succeeds, all accesses have ended, as its contract says, and 5 may follow. If
//! not even that is known, [`Hardware::unmap`] has the last word: when it says that the device does
//! not reach the range any more, the memory can be given back, but the bus addresses cannot (the
//! device may still have translations to them), nor the page tables; and otherwise all is lost, on
//! purpose.
//!
//! # Locks
//! `fence`, then `state`, then a space's, then `bus`. None but `fence` is held while the device is
//! waited for.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use extlb_spec::context::{ContextEntry, flags};
use extlb_spec::regs::{self, FatalError, Register, cap, status};
use extlb_spec::{BAR_DOORBELLS, BAR_REGS, DOORBELL_STRIDE, Gpa, Iova, MAX_CONTEXTS, PAGE_SIZE};
use nix::errno::Errno;

use super::Config;
use super::arena::{Arena, Chunk, SharedPage};
use super::bus_space::BusSpace;
use super::space::{Life, Space, whole_pages};
use crate::error::{Error, Nonsense, Result};
use crate::hardware::Hardware;
use crate::memory_unsafe::{Access, Fork, Memory as _};
use crate::protocol::{
    Bell, BusMemory as _, Format, Invalidations, Layout, PageTable, Pages, Port, Requests,
    invalidate, sync,
};

/// Pages of memory for the driver's structures that are mapped at once.
const CHUNK_PAGES: u64 = 256;
const CONTEXT_TABLE_PAGES: u64 =
    (ContextEntry::SIZE as u64 * MAX_CONTEXTS as u64).div_ceil(PAGE_SIZE);
/// Pages of the structures that every device needs, at the start of the first chunk.
const FIXED_PAGES: u64 = CONTEXT_TABLE_PAGES + Invalidations::PAGES + Requests::PAGES + 1;
/// Page requests of a context that may wait at once. Operations have two operands; everything
/// registered is mapped, so that there are few of them.
const CREDITS: u32 = 8;

/// The driver of one device.
pub(super) struct Core<H: Hardware> {
    pub(super) hardware: H,
    config: Config,
    /// `Some` until the end.
    arena: Option<Arena<H::Memory>>,
    bus: Mutex<BusSpace>,
    layout: Layout,
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

    fn arena(&self) -> &Arena<H::Memory> {
        self.arena.as_ref().expect("only the end takes it")
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

    /// The value of a register.
    pub(super) fn read(&self, register: Register) -> u64 {
        read(&self.hardware, register)
    }

    fn write(&self, register: Register, value: u64) {
        self.hardware
            .write(BAR_REGS, register.offset, register.width, value);
    }

    pub(super) fn ring_doorbell(&self, space: &Space) {
        if space.life.queue.check().is_ok() {
            let offset = u64::from(space.number) * DOORBELL_STRIDE;
            self.hardware.write(BAR_DOORBELLS, offset, 4, 0);
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
        life.queue
            .send(self, commands, acknowledged)
            .map_err(|error| self.kill(life, error))
    }

    /// Fails if the device is dead, and looks whether it is.
    pub(super) fn check(&self, life: &Arc<Life>) -> Result<()> {
        life.queue.check()?;
        self.alive().map_err(|error| self.kill(life, error))
    }

    /// Maps another chunk for structures; where. Its first `taken` pages are the caller's.
    fn grow(&self, taken: u64) -> Result<Gpa> {
        let len = CHUNK_PAGES * PAGE_SIZE;
        // A child has no business with them.
        let memory = self.hardware.allocate(len as usize, Fork::Nothing)?;
        let addr = Iova(memory.addr().as_ptr().addr() as u64);
        let slot = lock(&self.bus).allocate(addr, len)?;
        let start = slot.start;
        if let Err(error) = self.hardware.map(addr, len, start, true) {
            lock(&self.bus).free(slot);
            return Err(error);
        }
        self.arena().add(Chunk { memory, slot }, taken);
        Ok(start)
    }

    /// Makes a context.
    pub(super) fn create(&self, ring: Iova, ring_log2: u32) -> Result<(Arc<Space>, Shared<H>)> {
        let mut pages = ArenaPages(self);
        let shadow_page = pages.zeroed()?;
        let shadow = Shared {
            page: self.arena().shared(shadow_page)?,
            at: shadow_page,
        };
        // The device has not looked yet: the first doorbell must be rung.
        shadow
            .page
            .shadow()
            .need_kick
            .store(1u32.to_le(), Ordering::Relaxed);
        let table = match PageTable::new(Format::Device, &mut pages) {
            Ok(table) => table,
            Err(error) => {
                pages.give_back(shadow_page);
                return Err(error);
            }
        };
        let entry = ContextEntry {
            flags: flags::VALID,
            page_table: table.root().0,
            ring: ring.0,
            ring_log2,
            credits: CREDITS,
            shadow: shadow_page.0,
            ..ContextEntry::default()
        };
        let mut table = Some(table);
        let entered = self.enter(&entry, &mut table);
        let space = match entered {
            Ok(space) => space,
            Err(error) => {
                if let Some(table) = table {
                    table.free(&mut pages);
                }
                pages.give_back(shadow_page);
                return Err(error);
            }
        };
        if let Err(error) = self.send(&space.life, &[sync(space.number)], true) {
            self.stop(&space, &shadow);
            return Err(error);
        }
        Ok((space, shadow))
    }

    /// Finds a free number and writes the context's entry.
    fn enter(&self, entry: &ContextEntry, table: &mut Option<PageTable>) -> Result<Arc<Space>> {
        let mut state = self.state();
        // Under the lock: see `restart`.
        state.life.queue.check()?;
        let free = (0..self.contexts()).find(|number| !state.spaces.contains_key(number));
        let number = free.ok_or(Error::Call {
            call: "CREATE",
            errno: Errno::EBUSY,
        })?;
        self.arena().write(self.entry(number), &entry.to_bytes())?;
        let table = table.take().expect("of the caller");
        let space = Arc::new(Space::new(number, state.life.clone(), table));
        state.spaces.insert(number, space.clone());
        Ok(space)
    }

    fn entry(&self, number: u32) -> Gpa {
        let offset = u64::from(number) * ContextEntry::SIZE as u64;
        Gpa(self.layout.context_table.0 + offset)
    }

    /// Ends a context. Nobody calls for it any more.
    pub(super) fn stop(&self, space: &Arc<Space>, shadow: &Shared<H>) {
        let current = |state: &State| {
            let known = state.spaces.get(&space.number);
            known.is_some_and(|known| Arc::ptr_eq(known, space))
        };
        {
            let state = self.state();
            if current(&state) && state.life.queue.check().is_ok() {
                // It cannot fail: the table is there.
                let none = ContextEntry::default().to_bytes();
                let _ = self.arena().write(self.entry(space.number), &none);
            }
        }
        // No access of the context begins any more, and those that began have ended.
        let stopped = self.send(&space.life, &[sync(space.number)], true).is_ok();
        let silent = stopped || space.life.is_silent();
        // What the program did not take back.
        let handles = space.lock().handles();
        for handle in handles {
            let _ = self.release(space, handle, silent);
        }
        if silent {
            let mut pages = ArenaPages(self);
            if let Some(table) = space.lock().table.take() {
                table.free(&mut pages);
            }
            pages.give_back(shadow.at);
        }
        let mut state = self.state();
        if current(&state) {
            state.spaces.remove(&space.number);
        }
    }

    /// Lets a context's device use memory; see [`crate::BackingContext::register`].
    pub(super) fn register(
        &self,
        space: &Arc<Space>,
        addr: Iova,
        len: u64,
        access: Access,
    ) -> Result<u32> {
        let range = whole_pages(addr, len)?;
        let write = access == Access::Exclusive;
        space.life.queue.check()?;
        let handle = space.lock().reserve(&range, write)?;
        // Apart from what follows: the lock is taken again there.
        let slot = lock(&self.bus).allocate(addr, len);
        let mapped = slot.and_then(
            |slot| match self.hardware.map(addr, len, slot.start, write) {
                Ok(()) => Ok(slot),
                Err(error) => {
                    lock(&self.bus).free(slot);
                    Err(error)
                }
            },
        );
        let slot = match mapped {
            Ok(slot) => slot,
            Err(error) => {
                space.lock().remove(handle);
                return Err(error);
            }
        };
        // The mapping is there before the ptes that lead to it.
        let mut state = space.lock();
        let start = slot.start;
        let (_, registered) = state.get(handle)?;
        registered.slot = Some(slot);
        registered.live = true;
        let (memory, pages) = (self.arena(), &mut ArenaPages(self));
        let table = state.table.as_mut().expect("of a context that is there");
        let filled = table.set_range(memory, pages, &range, start, write);
        match filled {
            Ok(leaves) => {
                state.stats.filled_pages += leaves;
                state.stats.mapped_pages += leaves;
                state.stats.pinned_pages += len / PAGE_SIZE;
                Ok(handle)
            }
            Err(error) => {
                state.stats.pinned_pages += len / PAGE_SIZE;
                drop(state);
                // Some ptes are there, and the device may have used them.
                let _ = self.take_back(space, handle, true);
                Err(error)
            }
        }
    }

    /// Takes memory back; the order is that at the top of this file.
    pub(super) fn unregister(&self, space: &Arc<Space>, handle: u32) -> Result<()> {
        self.take_back(space, handle, false)
    }

    fn take_back(&self, space: &Arc<Space>, handle: u32, partly: bool) -> Result<()> {
        let (range, cleared) = {
            let mut state = space.lock();
            let (range, registered) = state.get(handle)?;
            if !std::mem::take(&mut registered.live) {
                return Err(Error::Call {
                    call: "UNREGISTER",
                    errno: Errno::ENOENT,
                });
            }
            let table = state.table.as_mut().expect("of a context that is there");
            let cleared = table.clear_range(self.arena(), &range);
            if let (Ok(cleared), false) = (&cleared, partly) {
                state.stats.mapped_pages = state.stats.mapped_pages.saturating_sub(cleared.leaves);
            }
            (range, cleared)
        };
        let begun = Instant::now();
        let len = range.end.0 - range.start.0;
        let command = invalidate(space.number, range.start, len);
        let acknowledged = match cleared {
            Ok(cleared) => self.send(&space.life, &[command], true).map(|()| cleared),
            // The device has spoilt its own page table.
            Err(error) => Err(self.kill(&space.life, error)),
        };
        let confirmed = acknowledged.is_ok() || space.life.is_silent();
        if let Ok(cleared) = acknowledged {
            let mut state = space.lock();
            state.count_shootdown(cleared.leaves, begun.elapsed());
            drop(state);
            let mut pages = ArenaPages(self);
            for table in cleared.tables {
                pages.give_back(table);
            }
        }
        self.release(space, handle, confirmed)
    }

    /// The end of a registration: takes the mapping from the bus. `confirmed` says that the device
    /// does not access it any more.
    fn release(&self, space: &Space, handle: u32, confirmed: bool) -> Result<()> {
        let (range, slot) = {
            let mut state = space.lock();
            let (range, registered) = state.get(handle)?;
            registered.live = false;
            (range, registered.slot.take())
        };
        let len = range.end.0 - range.start.0;
        // Without one, an earlier attempt has failed.
        let slot = slot.ok_or(Error::Dead { errno: Errno::EIO })?;
        if let Err(error) = self.hardware.unmap(slot.start, len) {
            // Lost: its addresses stay reserved.
            return Err(match confirmed {
                true => error,
                false => space.life.queue.check().err().unwrap_or(error),
            });
        }
        if confirmed {
            lock(&self.bus).free(slot);
        }
        let mut state = space.lock();
        state.stats.pinned_pages = state.stats.pinned_pages.saturating_sub(len / PAGE_SIZE);
        state.remove(handle);
        Ok(())
    }
}

/// A context's shadow page.
pub(super) struct Shared<H: Hardware> {
    pub(super) page: SharedPage<H::Memory>,
    at: Gpa,
}

/// Pages of the arena, which grows.
struct ArenaPages<'a, H: Hardware>(&'a Core<H>);

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
