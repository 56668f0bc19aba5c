//! The in-process kernel as a backing.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use extlb_device::ports::Dma as _;
use extlb_spec::context::{ContextEntry, flags};
use extlb_spec::uapi::{Audit, Info, Stats, create};
use extlb_spec::{Gpa, Iova, PAGE_SIZE, regs};

use super::InProcess;
use super::machine::Machine;
use super::ram::{broken, zeroed};
use super::ram_unsafe::Window;
use crate::error::{Error, Result};
use crate::memory_unsafe::{Access, Backing, BackingContext, Fork, Memory, Shadow, Sharing, Wake};

// SAFETY: `allocate` and `map_file` return `InProcessMemory`, which keeps the promises of `Memory`.
unsafe impl Backing for InProcess {
    type Context = InProcessContext;
    type Memory = InProcessMemory;

    fn info(&self) -> Result<Info> {
        Ok(self.info())
    }

    fn allocate(&self, len: usize, _: Fork) -> Result<InProcessMemory> {
        self.memory(len, None)
    }

    fn map_file(
        &self,
        file: &File,
        range: Range<u64>,
        sharing: Sharing,
    ) -> Result<InProcessMemory> {
        if sharing == Sharing::Shared {
            return Err(Error::Unsupported("a shared mapping of a file"));
        }
        let bytes = Self::load(file, &range)?;
        self.memory(
            bytes.len().next_multiple_of(PAGE_SIZE as usize),
            Some(&bytes),
        )
    }

    fn create(&self, ring: Iova, ring_log2: u32, flags: u32) -> Result<InProcessContext> {
        if flags & !create::FOLLOW_PTE != 0 {
            return Err(Error::Unsupported("pinning"));
        }
        InProcessContext::new(self.machine.clone(), ring, ring_log2)
    }
}

impl InProcess {
    fn memory(&self, len: usize, content: Option<&[u8]>) -> Result<InProcessMemory> {
        let machine = self.machine.clone();
        let window = machine.file.reserve(len / PAGE_SIZE as usize)?;
        let start = window.iova();
        let range = start..Iova(start.0 + len as u64);
        let frames = machine.map(&range, true)?;
        let access = if content.is_some() {
            Access::ReadOnly
        } else {
            Access::Exclusive
        };
        // From here on dropping the value undoes all.
        let memory = InProcessMemory {
            machine,
            window: Some(window),
            range,
            access,
        };
        for (page, frame) in frames.iter().enumerate() {
            memory.machine.file.show(memory.window(), page, *frame)?;
            let bytes = content.unwrap_or(&[]).chunks(PAGE_SIZE as usize).nth(page);
            memory
                .machine
                .ram
                .write(*frame, bytes.unwrap_or(&[]))
                .map_err(broken)?;
        }
        Ok(memory)
    }
}

/// Memory of the in-process "process".
#[derive(Debug)]
pub struct InProcessMemory {
    machine: Arc<Machine>,
    /// `Some` until the end.
    window: Option<Window>,
    range: Range<Iova>,
    access: Access,
}

impl InProcessMemory {
    fn window(&self) -> &Window {
        self.window.as_ref().expect("only the end takes the window")
    }
}

impl Drop for InProcessMemory {
    fn drop(&mut self) {
        match self.machine.unmap(&self.range) {
            // The device does not touch the frames any more: unmap them here too, then reuse.
            Ok(frames) => {
                drop(self.window.take());
                let mut space = self.machine.lock();
                frames
                    .into_iter()
                    .for_each(|frame| space.frames.give_back(frame));
            }
            // The device is dead, or its threads are: frames and addresses are never reused.
            Err(_) => std::mem::forget(self.window.take()),
        }
    }
}

// SAFETY: the window is unmapped when the value is dropped, all its pages show frames (`memory`)
// that the machine keeps for it until then, and `InProcess` refuses to operate on them.
unsafe impl Memory for InProcessMemory {
    fn addr(&self) -> NonNull<u8> {
        self.window().addr()
    }

    fn len(&self) -> usize {
        self.window().len()
    }

    fn access(&self) -> Access {
        self.access
    }
}

/// A context of the in-process kernel.
#[derive(Debug)]
pub struct InProcessContext {
    machine: Arc<Machine>,
    number: u32,
    shadow: Option<Window>,
    shadow_frame: Gpa,
    /// `event_seq` when events were last taken; the lock orders sleepers.
    taken: Mutex<u32>,
}

impl InProcessContext {
    fn new(machine: Arc<Machine>, ring: Iova, ring_log2: u32) -> Result<Self> {
        let shadow = machine.file.reserve(1)?;
        let mut space = machine.lock();
        let number = machine.free_number(&space)?;
        let shadow_frame = zeroed(&machine.ram, &mut space.frames)?;
        machine.file.show(&shadow, 0, shadow_frame)?;
        let page_table = space.add_context(&machine.ram, number)?.0;
        let cpu_page_table = space.cpu.root().0;
        drop(space);
        // The device has not looked yet: the first doorbell must be rung.
        shadow.shadow().need_kick.store(1, Ordering::Relaxed);
        let context = Self {
            machine,
            number,
            shadow: Some(shadow),
            shadow_frame,
            taken: Mutex::new(0),
        };
        let entry = ContextEntry {
            flags: flags::VALID | flags::ORACLE,
            page_table,
            ring: ring.0,
            ring_log2,
            credits: 8,
            shadow: shadow_frame.0,
            cpu_page_table,
            ..ContextEntry::default()
        };
        context.machine.sync_context(number, &entry)?;
        Ok(context)
    }
}

impl Drop for InProcessContext {
    fn drop(&mut self) {
        match self.machine.stop_context(self.number) {
            Ok(()) => {
                drop(self.shadow.take());
                self.machine.lock().frames.give_back(self.shadow_frame);
            }
            // Nobody can say that the device is silent: nothing of it is ever reused.
            Err(_) => std::mem::forget(self.shadow.take()),
        }
    }
}

// SAFETY: `Machine::unregister` returns `Ok` after the device ptes were cleared, invalidated and
// in-flight accesses were drained, which is what the trait promises.
unsafe impl BackingContext for InProcessContext {
    fn number(&self) -> u32 {
        self.number
    }

    fn register(&self, addr: Iova, len: u64, _: Access) -> Result<u32> {
        let end = addr
            .checked_add(len)
            .ok_or(Error::Argument("a range that wraps"))?;
        InProcess::aligned(&(addr..end))?;
        let mut space = self.machine.lock();
        let registered = space.contexts.get_mut(&self.number);
        Ok(registered
            .ok_or(Error::Argument("no such context"))?
            .add(addr..end))
    }

    fn unregister(&self, handle: u32) -> Result<()> {
        self.machine.unregister(self.number, handle)
    }

    fn ring_doorbell(&self) {
        self.machine.hardware.ring_doorbell(self.number);
    }

    fn shadow(&self) -> &Shadow {
        self.shadow
            .as_ref()
            .expect("only the end takes the window")
            .shadow()
    }

    fn wait(&self, timeout: Duration) -> Result<Wake> {
        let deadline = Instant::now() + timeout;
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            // The count is taken before the words are looked at: an interrupt for what this look
            // misses raises it above what is waited with.
            let seen = self.machine.events.contexts.count();
            let shadow = self.shadow();
            let event_seq = u32::from_le(shadow.event_seq.load(Ordering::Acquire));
            if event_seq != *taken {
                *taken = event_seq;
                return Ok(Wake::Event);
            }
            if shadow.error.load(Ordering::Acquire) != 0 {
                return Ok(Wake::Stopped);
            }
            if Instant::now() >= deadline {
                return Ok(Wake::TimedOut);
            }
            self.machine.events.contexts.wait(seen, deadline);
        }
    }

    fn check(&self) -> Result<()> {
        self.machine.check()
    }

    fn stats(&self) -> Result<Stats> {
        let space = self.machine.lock();
        let mut stats = Stats::default();
        if let Some(registered) = space.contexts.get(&self.number) {
            stats.page_requests = registered.page_requests;
            stats.refused_requests = registered.refused_requests;
            stats.filled_pages = registered.filled_pages;
            stats.mapped_pages = registered.mapped_pages;
        }
        drop(space);
        let shootdowns = self
            .machine
            .shootdowns
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        stats.shootdowns = shootdowns.count;
        stats.shot_pages = shootdowns.pages;
        stats.shootdown_max_ns = shootdowns.max_ns;
        stats.shootdown_ns = shootdowns.ns;
        let read = |register| self.machine.hardware.read(register);
        stats.ops_completed = read(regs::OPS_COMPLETED);
        stats.ops_faulted = read(regs::OPS_FAULTED);
        stats.oracle_checks = read(regs::ORACLE_CHECKS);
        stats.oracle_suspects = read(regs::ORACLE_SUSPECTS);
        stats.oracle_stale = read(regs::ORACLE_STALE);
        Ok(stats)
    }

    fn audit(&self) -> Result<Audit> {
        self.machine.audit(self.number)
    }
}
