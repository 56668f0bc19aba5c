//! The machine: RAM, device, and a kernel that has one process.
//!
//! # The rule
//! Once a frame may be reused, the device cannot touch it. Everything that takes a page from the
//! process goes through [`Machine::take_back`], in this order: cpu pte changed, device ptes
//! cleared in RAM, translations invalidated, in-flight accesses drained, acknowledged; then the
//! frame is the caller's. All of it under the lock of the address space, under which device ptes
//! are filled too, and only from what the address space says: so none comes back in between.
//! Serving the acknowledgement needs nothing that the lock protects.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use extlb_device::GuestRam;
use extlb_device::ports::{Dma as _, Interrupts};
use extlb_spec::context::ContextEntry;
use extlb_spec::invalidation::{AuditResult, Command};
use extlb_spec::page_request::Response;
use extlb_spec::uapi::Audit;
use extlb_spec::{Gpa, Iova, MAX_CONTEXTS, PAGE_SIZE, Vector, histogram, regs};
use nix::errno::Errno;

use super::frames::Frames;
use super::hardware::Hardware;
use super::ram::{Zeroed, broken, zeroed};
use super::ram_unsafe::{MemoryFile, RAM_BASE};
use super::space::{Page, Space, pages};
use super::{MachineConfig, page_requests};
use crate::error::{Error, Result};
use crate::protocol::{
    Bell, Invalidations, Layout, Port, Requests, audit, invalidate, respond, sync,
};

const CONTEXT_TABLE_FRAMES: u64 =
    (ContextEntry::SIZE as u64 * MAX_CONTEXTS as u64).div_ceil(PAGE_SIZE);
const MAX_RAM: u64 = 4 << 30;

/// What everything else hangs on.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) ram: GuestRam,
    pub(super) file: MemoryFile,
    pub(super) space: Mutex<Space>,
    pub(super) invalidations: Invalidations,
    pub(super) hardware: Hardware,
    pub(super) context_table: Gpa,
    pub(super) events: Arc<Events>,
    pub(super) shootdowns: Mutex<Shootdowns>,
}

/// Statistics of shootdowns.
#[derive(Debug)]
pub(super) struct Shootdowns {
    pub(super) count: u64,
    pub(super) pages: u64,
    pub(super) max_ns: u64,
    pub(super) ns: [u64; histogram::BUCKETS],
}

impl Default for Shootdowns {
    fn default() -> Self {
        Self {
            count: 0,
            pages: 0,
            max_ns: 0,
            ns: [0; histogram::BUCKETS],
        }
    }
}

/// Where interrupts go.
#[derive(Debug, Default)]
pub(super) struct Events {
    /// For the thread that serves page requests.
    pub(super) requests: Bell,
    /// For programs that sleep on a context: completions, and errors of contexts and device.
    pub(super) contexts: Bell,
}

impl Interrupts for Events {
    fn raise(&self, vector: Vector) {
        match vector {
            Vector::Completion => self.contexts.ring(),
            Vector::PageRequest => self.requests.ring(),
            Vector::Error => {
                self.requests.ring();
                self.contexts.ring();
            }
            // Acknowledgements are polled.
            Vector::Invalidation => {}
        }
    }
}

impl Machine {
    /// Boots: lays out RAM, starts the device and the thread that serves page requests.
    pub(super) fn start(config: MachineConfig) -> Result<Arc<Self>> {
        if config.ram == 0 || !config.ram.is_multiple_of(PAGE_SIZE) || config.ram > MAX_RAM {
            return Err(Error::Argument("RAM must be whole pages, at most 4 GiB"));
        }
        let (file, ram) = MemoryFile::new(config.ram)?;
        let mut frames = Frames::new(RAM_BASE, config.ram, config.seed);
        let layout = Layout {
            context_table: frames.take_run(CONTEXT_TABLE_FRAMES)?,
            contexts: MAX_CONTEXTS,
            invalidations: frames.take_run(Invalidations::PAGES)?,
            page_requests: frames.take_run(Requests::PAGES)?,
            shadow: frames.take()?,
        };
        let events = Arc::new(Events::default());
        let mut device = config.device;
        if !config.bus_delay.is_zero() {
            let delay = u64::try_from(config.bus_delay.as_micros());
            device.debug.bus_delay_us = delay.unwrap_or(u64::MAX);
        }
        let hardware = Hardware::start(device, Arc::new(ram.clone()), events.clone(), &layout)?;
        let machine = Arc::new(Self {
            space: Mutex::new(Space::new(&ram, frames)?),
            invalidations: Invalidations::new(
                layout.invalidations,
                layout.shadow,
                Invalidations::PATIENCE,
            ),
            context_table: layout.context_table,
            shootdowns: Mutex::default(),
            ram,
            file,
            hardware,
            events,
        });
        page_requests::spawn(&machine, Requests::new(layout.page_requests, layout.shadow))?;
        Ok(machine)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Commands for the device; see [`Invalidations::send`].
    pub(super) fn send(&self, commands: &[Command], acknowledged: bool) -> Result<()> {
        self.invalidations.send(self, commands, acknowledged)
    }

    /// Takes a range from the device of every context, and from the process as `change` says.
    /// Returns what `change` does, when the device is done with the range.
    fn take_back<R>(
        &self,
        space: &mut Space,
        range: &Range<Iova>,
        change: impl FnOnce(&mut Space) -> Result<R>,
    ) -> Result<R> {
        // 1. The cpu ptes.
        let result = change(space)?;
        // 2. The device ptes, in RAM. A device that walks from now on finds none.
        let numbers: Vec<u32> = space.contexts.keys().copied().collect();
        for number in numbers {
            if let Some(registered) = space.contexts.get_mut(&number) {
                let cleared = registered.clear(&self.ram, range, false)?;
                self.shoot_down(number, range, cleared)?;
            }
        }
        Ok(result)
    }

    /// 3 to 5: invalidates, drains, waits for the acknowledgement.
    pub(super) fn shoot_down(&self, number: u32, range: &Range<Iova>, cleared: u64) -> Result<()> {
        if cleared == 0 {
            // Translations come from device ptes, and this context had none here.
            return Ok(());
        }
        let start = Instant::now();
        self.send(
            &[invalidate(number, range.start, range.end.0 - range.start.0)],
            true,
        )?;
        let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let mut shootdowns = self
            .shootdowns
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        shootdowns.count += 1;
        shootdowns.pages += cleared;
        shootdowns.max_ns = shootdowns.max_ns.max(ns);
        shootdowns.ns[histogram::bucket(ns)] += 1;
        Ok(())
    }

    /// Maps fresh zeroed pages, read-write.
    pub(super) fn map(&self, range: &Range<Iova>, owned: bool) -> Result<Vec<Gpa>> {
        let mut space = self.lock();
        let mut frames = Vec::new();
        for at in pages(range) {
            let frame = zeroed(&self.ram, &mut space.frames)?;
            frames.push(frame);
            space.map(
                &self.ram,
                at,
                Page {
                    frame,
                    write: true,
                    owned,
                },
            )?;
        }
        Ok(frames)
    }

    /// Takes pages from the process. The frames are the caller's; registrations end there.
    pub(super) fn unmap(&self, range: &Range<Iova>) -> Result<Vec<Gpa>> {
        let mut space = self.lock();
        let frames = self.take_back(&mut space, range, |space| {
            let mut frames = Vec::new();
            for at in pages(range) {
                frames.extend(space.unmap(&self.ram, at)?);
            }
            Ok(frames)
        })?;
        for registered in space.contexts.values_mut() {
            registered.trim(range);
        }
        Ok(frames)
    }

    /// Replaces pages by fresh zeroed ones, as `MADV_DONTNEED` does at the next touch. The old
    /// frames are the caller's; registrations stay.
    pub(super) fn replace(&self, range: &Range<Iova>) -> Result<Vec<Gpa>> {
        let mut space = self.lock();
        self.take_back(&mut space, range, |space| {
            let mut frames = Vec::new();
            for at in pages(range) {
                let Some(old) = space.pages.get(&at).copied() else {
                    continue;
                };
                let frame = zeroed(&self.ram, &mut space.frames)?;
                space.map(
                    &self.ram,
                    at,
                    Page {
                        frame,
                        write: true,
                        owned: old.owned,
                    },
                )?;
                frames.push(old.frame);
            }
            Ok(frames)
        })
    }

    /// Forbids or allows writing.
    pub(super) fn protect(&self, range: &Range<Iova>, write: bool) -> Result<()> {
        let mut space = self.lock();
        self.take_back(&mut space, range, |space| {
            for at in pages(range) {
                if let Some(page) = space.pages.get(&at).copied() {
                    space.map(&self.ram, at, Page { write, ..page })?;
                }
            }
            Ok(())
        })
    }

    /// Ends a registration: pages that no other one covers are taken from the context's device.
    pub(super) fn unregister(&self, number: u32, handle: u32) -> Result<()> {
        let mut space = self.lock();
        let Some(registered) = space.contexts.get_mut(&number) else {
            return Err(Error::Argument("no such context"));
        };
        let ranges = registered.remove(handle);
        let ranges = ranges.ok_or(Error::Call {
            call: "UNREGISTER",
            errno: Errno::ENOENT,
        })?;
        for range in ranges {
            let cleared = registered.clear(&self.ram, &range, true)?;
            self.shoot_down(number, &range, cleared)?;
        }
        Ok(())
    }

    /// Serves a page request.
    pub(super) fn serve(
        &self,
        number: u32,
        first: Iova,
        count: u32,
        group: u32,
        write: bool,
    ) -> Result<()> {
        let mut space = self.lock();
        let mut served = false;
        for n in 0..count.max(1) {
            let Some(at) = first.page().checked_add(u64::from(n) * PAGE_SIZE) else {
                break;
            };
            let filled = space.fill(&self.ram, number, at, write)?;
            served |= filled && n == 0;
            if !filled {
                break;
            }
        }
        if let Some(registered) = space.contexts.get_mut(&number) {
            registered.page_requests += 1;
            registered.refused_requests += u64::from(!served);
        }
        drop(space);
        let response = if served {
            Response::Success
        } else {
            Response::Invalid
        };
        self.send(&[respond(number, group, response)], false)
    }

    /// Writes a context's entry and lets the device read it.
    pub(super) fn sync_context(&self, number: u32, entry: &ContextEntry) -> Result<()> {
        let at = u64::from(number) * ContextEntry::SIZE as u64;
        self.ram
            .write(Gpa(self.context_table.0 + at), &entry.to_bytes())
            .map_err(broken)?;
        self.send(&[sync(number)], true)
    }

    /// Stops a context and gives its memory back. When it returns the device is silent.
    pub(super) fn stop_context(&self, number: u32) -> Result<()> {
        self.sync_context(number, &ContextEntry::default())?;
        let mut space = self.lock();
        if let Some(registered) = space.contexts.remove(&number) {
            registered
                .device
                .free(&mut Zeroed::new(&self.ram, &mut space.frames));
        }
        Ok(())
    }

    pub(super) fn free_number(&self, space: &Space) -> Result<u32> {
        (0..MAX_CONTEXTS)
            .find(|number| !space.contexts.contains_key(number))
            .ok_or(Error::Call {
                call: "CREATE",
                errno: Errno::EBUSY,
            })
    }

    /// Compares translations; nothing changes meanwhile.
    pub(super) fn audit(&self, number: u32) -> Result<Audit> {
        let mut space = self.lock();
        let frame = zeroed(&self.ram, &mut space.frames)?;
        let sent = self.send(&[audit(number, frame)], true);
        let mut bytes = [0; AuditResult::SIZE];
        self.ram.read(frame, &mut bytes).map_err(broken)?;
        if sent.is_ok() {
            // Otherwise the device may write to it yet.
            space.frames.give_back(frame);
        }
        sent?;
        let result = AuditResult::from_bytes(&bytes);
        if result.done != 1 {
            return Err(Error::Call {
                call: "AUDIT",
                errno: Errno::EIO,
            });
        }
        Ok(Audit {
            checked: result.checked,
            mismatches: result.mismatches,
            iova: result.iova,
            device_gpa: result.device_gpa,
            cpu_gpa: result.cpu_gpa,
            ..Audit::default()
        })
    }

    /// Whether the device runs.
    pub(super) fn check(&self) -> Result<()> {
        self.invalidations.check()?;
        self.alive()
    }
}

impl Port for Machine {
    type Memory = GuestRam;

    fn memory(&self) -> &GuestRam {
        &self.ram
    }

    fn kick(&self) {
        self.hardware.kick();
    }

    fn alive(&self) -> Result<()> {
        match self.hardware.read(regs::STATUS) == u64::from(regs::status::ENABLED) {
            true => Ok(()),
            false => Err(Error::Dead { errno: Errno::EIO }),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.hardware.reset();
        // The thread finds the machine gone.
        self.events.requests.ring();
    }
}
