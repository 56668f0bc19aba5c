//! A context's address space: what is registered, and the device page table that says so.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use extlb_spec::addr::IOVA_END;
use extlb_spec::uapi::Stats;
use extlb_spec::{Iova, PAGE_SIZE, histogram};
use nix::errno::Errno;

use super::bus_space::Slot;
use crate::error::{Error, Result};
use crate::protocol::{BusMemory, Invalidations, PageTable};

/// A device from one reset to the next.
#[derive(Debug)]
pub(super) struct Life {
    pub(super) queue: Invalidations,
    /// A reset has confirmed that no access is under way any more, and none follows.
    silent: AtomicBool,
}

impl Life {
    pub(super) fn new(queue: Invalidations) -> Self {
        Self {
            queue,
            silent: AtomicBool::new(false),
        }
    }

    pub(super) fn is_silent(&self) -> bool {
        self.silent.load(Ordering::Acquire)
    }

    /// Only after the hardware's reset returned `Ok`.
    pub(super) fn set_silent(&self) {
        self.silent.store(true, Ordering::Release);
    }
}

/// A context as the driver knows it.
#[derive(Debug)]
pub(super) struct Space {
    pub(super) number: u32,
    pub(super) life: Arc<Life>,
    state: Mutex<State>,
    pub(super) requests: AtomicU64,
    pub(super) refused: AtomicU64,
}

/// What the lock of a space protects.
#[derive(Debug)]
pub(super) struct State {
    /// `Some` until the context ends.
    pub(super) table: Option<PageTable>,
    /// By start. They do not overlap.
    ranges: BTreeMap<Iova, Registered>,
    handles: BTreeMap<u32, Iova>,
    next_handle: u32,
    pub(super) stats: Stats,
}

/// A registration.
#[derive(Debug)]
pub(super) struct Registered {
    pub(super) end: Iova,
    pub(super) write: bool,
    /// The device may have it. Otherwise it is just being made or taken back, or was lost.
    pub(super) live: bool,
    /// Where it is mapped.
    pub(super) slot: Option<Slot>,
}

impl Space {
    pub(super) fn new(number: u32, life: Arc<Life>, table: PageTable) -> Self {
        let state = State {
            table: Some(table),
            ranges: BTreeMap::new(),
            handles: BTreeMap::new(),
            next_handle: 1,
            stats: Stats::default(),
        };
        Self {
            number,
            life,
            state: Mutex::new(state),
            requests: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the device may access the page.
    pub(super) fn covers(&self, at: Iova, write: bool) -> bool {
        let state = self.lock();
        let below = state.ranges.range(..=at).next_back();
        below.is_some_and(|(_, range)| at < range.end && range.live && (range.write || !write))
    }

    /// Whether the device finds the page table as it was written, if the address is registered.
    pub(super) fn check(&self, memory: &impl BusMemory, at: Iova) -> Result<()> {
        let state = self.lock();
        let below = state.ranges.range(..=at).next_back();
        let there = below.is_some_and(|(_, range)| at < range.end && range.live);
        match &state.table {
            Some(table) if there => table.check(memory, at),
            _ => Ok(()),
        }
    }
}

/// A page-aligned range that is not empty and that a device page table can hold.
pub(super) fn whole_pages(addr: Iova, len: u64) -> Result<Range<Iova>> {
    let end = addr.checked_add(len).filter(|end| end.0 <= IOVA_END);
    match end {
        Some(end) if addr.is_aligned(PAGE_SIZE) && end.is_aligned(PAGE_SIZE) && addr < end => {
            Ok(addr..end)
        }
        _ => Err(Error::Argument(
            "a range must be whole pages below 2^48, and not empty",
        )),
    }
}

impl State {
    /// Takes the addresses, for a registration that is not live yet; its handle.
    pub(super) fn reserve(&mut self, range: &Range<Iova>, write: bool) -> Result<u32> {
        // They do not overlap, so the last that starts before our end is the one that may.
        if let Some((start, last)) = self.ranges.range(..range.end).next_back()
            && last.end > range.start
        {
            return Err(Error::Overlap { addr: *start });
        }
        let handle = self.next_handle;
        self.next_handle = handle.checked_add(1).ok_or(Error::Call {
            call: "REGISTER",
            errno: Errno::EOVERFLOW,
        })?;
        let registered = Registered {
            end: range.end,
            write,
            live: false,
            slot: None,
        };
        self.ranges.insert(range.start, registered);
        self.handles.insert(handle, range.start);
        Ok(handle)
    }

    /// A registration by its handle.
    pub(super) fn get(&mut self, handle: u32) -> Result<(Range<Iova>, &mut Registered)> {
        let start = self.handles.get(&handle).copied();
        let range = start.and_then(|start| Some((start, self.ranges.get_mut(&start)?)));
        let (start, registered) = range.ok_or(Error::Call {
            call: "UNREGISTER",
            errno: Errno::ENOENT,
        })?;
        Ok((start..registered.end, registered))
    }

    /// Forgets a registration: its addresses may be registered again.
    pub(super) fn remove(&mut self, handle: u32) {
        if let Some(start) = self.handles.remove(&handle) {
            self.ranges.remove(&start);
        }
    }

    /// Handles of all registrations.
    pub(super) fn handles(&self) -> Vec<u32> {
        self.handles.keys().copied().collect()
    }

    /// Notes a shootdown that was acknowledged.
    pub(super) fn count_shootdown(&mut self, leaves: u64, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.stats.shootdowns += 1;
        self.stats.shot_pages += leaves;
        self.stats.shootdown_max_ns = self.stats.shootdown_max_ns.max(ns);
        self.stats.shootdown_ns[histogram::bucket(ns)] += 1;
    }
}
