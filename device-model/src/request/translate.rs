//! Translate: an address becomes a page of RAM, for as long as the guard is held.
//!
//! [`Access`] is the guard; [`Page`] borrows it and keeps the guest-physical address to itself,
//! so that none can be used after the guard is gone.

use std::cell::Cell;
use std::sync::atomic::Ordering;

use extlb_spec::page_request::MAX_REQUEST_PAGES;
use extlb_spec::pte;
use extlb_spec::regs::StaleKind;
use extlb_spec::{Gpa, Iova, PAGE_SIZE};

use super::Halt;
use crate::Device;
use crate::context::{Context, Miss, Space};
use crate::counters::ContextCounters;
use crate::guard::{Guard, Lane};
use crate::oracle::{StaleAccess, Used};
use crate::ports::{BusError, Dma, Event};
use crate::tlb::{Inserted, Leaf, Lookup, Table, Ticket};
use crate::walk::{WalkError, walk};

/// An access under way: every drain that begins now waits for its end.
pub(crate) struct Access<'d> {
    device: &'d Device,
    context: &'d Context,
    space: &'d Space,
    epoch: u64,
    memory: &'d dyn Dma,
    guard: Guard<'d>,
    /// The translation handed out last, for the report if the guard is outlived.
    last: Cell<Used>,
    tally: Tally,
}

/// What is counted when the guard ends: an atomic addition for each would cost as much as the
/// lookup, and would wait for the bytes of the last copy to leave the processor.
#[derive(Debug, Default)]
struct Tally {
    hits: Cell<u64>,
    /// For the cost of the step; counted already.
    misses: Cell<u64>,
    walks: Cell<u64>,
    walk_cache_hits: Cell<u64>,
    evictions: Cell<u64>,
    /// Counted before a record says so.
    bytes: Cell<u64>,
}

fn add(cell: &Cell<u64>, n: u64) {
    cell.set(cell.get() + n);
}

impl Device {
    /// Enters a guard, unless the device or the context was stopped.
    pub(super) fn enter<'d>(
        &'d self,
        lane: &'d mut Lane<'_>,
        context: &'d Context,
        space: &'d Space,
        epoch: u64,
    ) -> Result<Access<'d>, Halt> {
        self.access(lane.enter(), &*self.ports.memory, context, space, epoch)
    }

    /// Goes on from the guard, if neither the device nor the context was stopped. `memory`: that
    /// of the port, or a view of it that was taken under the guard.
    pub(super) fn access<'d>(
        &'d self,
        guard: Guard<'d>,
        memory: &'d dyn Dma,
        context: &'d Context,
        space: &'d Space,
        epoch: u64,
    ) -> Result<Access<'d>, Halt> {
        // The guard first, the gates after: see `guard.rs`.
        if !self.is_running() || context.epoch() != epoch {
            return Err(Halt::Stopped);
        }
        let last = Cell::new(Used {
            iova: Iova(0),
            frame: space.shadow,
            write: false,
            fill: 0,
        });
        Ok(Access {
            device: self,
            context,
            space,
            epoch,
            memory,
            guard,
            last,
            tally: Tally::default(),
        })
    }
}

impl Access<'_> {
    /// Whether the device and the context still run.
    pub(super) fn still(&self) -> Result<(), Halt> {
        match self.device.is_running() && self.context.epoch() == self.epoch {
            true => Ok(()),
            false => Err(Halt::Stopped),
        }
    }

    /// Page table walks so far.
    pub(super) fn walks(&self) -> u64 {
        self.tally.misses.get()
    }

    /// Bytes were moved.
    pub(super) fn moved(&self, bytes: u64) {
        add(&self.tally.bytes, bytes);
    }

    /// Counts the bytes that were moved.
    pub(super) fn count_bytes(&self) {
        match self.tally.bytes.take() {
            0 => {}
            bytes => self.device.counters.bytes.add(bytes),
        }
    }

    /// Whether a drain waits for this access: it should end with the step that it is in.
    pub(super) fn is_awaited(&self) -> bool {
        self.guard.is_awaited()
    }

    /// Memory by guest-physical address: for the shadow page, whose address the kernel gave.
    pub(super) fn memory(&self) -> &dyn Dma {
        self.memory
    }

    /// No RAM answers: broken at this address, and counted.
    fn bus_error(&self, iova: Iova, error: BusError) -> Halt {
        self.device.counters.bus_errors.add(1);
        self.device.ports.trace.event(Event::BusError {
            context: self.space.context,
            iova,
            error,
        });
        Halt::Broken(iova)
    }

    /// The context's counters.
    fn counters(&self) -> &ContextCounters {
        &self.device.counters.contexts[self.space.context as usize]
    }

    /// The TLB does not know: walks, from the lowest table that is remembered.
    fn walk(&self, ticket: &Ticket, iova: Iova, write: bool, pages: u64) -> Result<Leaf, Halt> {
        let tally = &self.tally;
        // At once: a walk may be slow, and it shows that one is under way.
        self.counters().tlb_misses.add(1);
        add(&tally.misses, 1);
        let tlb = &self.device.tlb;
        let root = Table {
            level: pte::LEVELS,
            at: self.space.page_table,
        };
        let from = tlb.table(ticket);
        if from.is_some() {
            add(&tally.walk_cache_hits, 1);
        }
        let mut found = walk(self.memory(), from.unwrap_or(root), iova, write);
        // Before software is asked for a page that it may have mapped: a table that it replaced
        // without an invalidation is remembered still, and would be asked about for ever.
        if from.is_some() && matches!(found, Err(WalkError::NotMapped)) {
            found = walk(self.memory(), root, iova, write);
        }
        let (leaf, tables) = found.map_err(|error| match error {
            WalkError::Broken => Halt::Broken(iova),
            WalkError::Bus(error) => self.bus_error(iova, error),
            WalkError::NotMapped => Halt::Missing(vec![Miss {
                iova,
                write,
                pages: pages.clamp(1, u64::from(MAX_REQUEST_PAGES)) as u32,
                group: None,
            }]),
        })?;
        add(&tally.walks, 1);
        // Overtaken by a shootdown: good for this access, whose guard it waits for.
        if tlb.insert(ticket, leaf, &tables) == Inserted::Evicted {
            add(&tally.evictions, 1);
        }
        Ok(leaf)
    }

    /// Translates. `pages`: how many pages from here on the operation still needs, for the
    /// page request if there is to be one.
    pub(super) fn page(&self, iova: Iova, write: bool, pages: u64) -> Result<Page<'_>, Halt> {
        let device = self.device;
        let context = self.space.context;
        let (leaf, fill) = match device.tlb.lookup(context, iova.page(), write) {
            Lookup::Hit(entry) => {
                add(&self.tally.hits, 1);
                (entry.leaf, entry.fill)
            }
            Lookup::Miss(ticket) => (self.walk(&ticket, iova, write, pages)?, ticket.fill),
        };
        let used = Used {
            iova,
            frame: leaf.page(iova),
            write,
            fill,
        };
        self.last.set(used);
        let mut rest = leaf.size() - (iova.0 & (leaf.size() - 1));
        if let Some(root) = self.space.cpu_page_table {
            // Watched: each page is compared, as the process may map the leaf by smaller ones.
            rest = rest_of_page(iova);
            device.check_access(self.context, self.epoch, root, used);
        }
        Ok(Page {
            access: self,
            iova,
            gpa: Gpa(used.frame.0 + iova.page_offset()),
            rest,
        })
    }
}

impl Drop for Access<'_> {
    fn drop(&mut self) {
        self.count_bytes();
        let (counters, tally) = (self.counters(), &self.tally);
        for (counter, count) in [
            (&counters.tlb_hits, &tally.hits),
            (&counters.tlb_walks, &tally.walks),
            (&counters.walk_cache_hits, &tally.walk_cache_hits),
            (&counters.tlb_evictions, &tally.evictions),
        ] {
            if count.get() > 0 {
                counter.add(count.get());
            }
        }
        // Before the guard itself is dropped.
        if self.guard.is_outlived() {
            let used = self.last.get();
            self.device.stale(StaleAccess {
                kind: StaleKind::OutlivedDrain,
                context: self.space.context,
                iova: used.iova,
                device_gpa: used.frame,
                cpu_gpa: None,
                write: used.write,
                fill: used.fill,
                invalidation: self.device.counters.invalidations.get(),
            });
        }
    }
}

/// A piece of RAM that an address stands for while the access lasts, to the end of its leaf.
///
/// `read`, `write` and `copy_to` stay within a page of 4 KiB on each side: what RAM does not answer
/// there is a bus error. `try_copy_to` reaches as far as [`Page::rest`] allows on each side, and only
/// says whether it was done: the pages of a leaf need not be in one piece of RAM. If it was not,
/// the pages one by one ([`Page::within`]) tell how far RAM goes.
pub(super) struct Page<'a> {
    access: &'a Access<'a>,
    iova: Iova,
    gpa: Gpa,
    rest: u64,
}

impl<'a> Page<'a> {
    /// Bytes from here to the end of the leaf; to the end of the 4 KiB page at least, and for a
    /// context that the oracle watches at most.
    pub(super) fn rest(&self) -> u64 {
        self.rest
    }

    /// The place `offset` bytes further on; `offset` is less than [`Page::rest`].
    pub(super) fn within(&self, offset: u64) -> Page<'a> {
        debug_assert!(offset < self.rest);
        Page {
            access: self.access,
            iova: Iova(self.iova.0 + offset),
            gpa: Gpa(self.gpa.0 + offset),
            rest: self.rest - offset,
        }
    }

    fn bus<R>(&self, result: Result<R, BusError>) -> Result<R, Halt> {
        result.map_err(|error| self.access.bus_error(self.iova, error))
    }

    /// Reads, within the page.
    pub(super) fn read(&self, to: &mut [u8]) -> Result<(), Halt> {
        self.bus(self.access.memory().read(self.gpa, to))
    }

    /// Writes, within the page.
    pub(super) fn write(&self, from: &[u8]) -> Result<(), Halt> {
        self.bus(self.access.memory().write(self.gpa, from))
    }

    /// Writes from `offset` bytes on, within the page.
    pub(super) fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), Halt> {
        self.within(offset).write(from)
    }

    /// Stores a word after everything before it.
    pub(super) fn release_u32(&self, value: u32) -> Result<(), Halt> {
        let memory = self.access.memory();
        self.bus(memory.store_u32(self.gpa, value, Ordering::Release))
    }

    /// Adds to a word, atomically; what was there before.
    pub(super) fn fetch_add_u64(&self, value: u64) -> Result<u64, Halt> {
        self.bus(self.access.memory().fetch_add_u64(self.gpa, value))
    }

    /// Replaces a word if it is `current`, atomically; what was there before.
    pub(super) fn compare_exchange_u64(&self, current: u64, new: u64) -> Result<u64, Halt> {
        let memory = self.access.memory();
        self.bus(memory.compare_exchange_u64(self.gpa, current, new))
    }

    /// Copies to another page, within both.
    pub(super) fn copy_to(&self, to: &Page<'_>, len: usize) -> Result<(), Halt> {
        let memory = self.access.memory();
        memory.copy(self.gpa, to.gpa, len).map_err(|error| {
            let source = error.addr == self.gpa;
            let iova = if source { self.iova } else { to.iova };
            self.access.bus_error(iova, error)
        })
    }

    /// Copies to another place, within both leaves; whether it was copied.
    #[must_use]
    pub(super) fn try_copy_to(&self, to: &Page<'_>, len: usize) -> bool {
        debug_assert!(len as u64 <= self.rest.min(to.rest));
        self.access.memory().copy(self.gpa, to.gpa, len).is_ok()
    }
}

/// Bytes from an address to the end of its page.
pub(super) fn rest_of_page(iova: Iova) -> u64 {
    PAGE_SIZE - iova.page_offset()
}

/// Pages that `[iova, iova + len)` touches.
pub(super) fn pages(iova: Iova, len: u64) -> u64 {
    (iova.page_offset() + len).div_ceil(PAGE_SIZE)
}
