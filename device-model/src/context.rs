//! Contexts: address spaces, one per process and open file.
//!
//! A context's state has three owners, each with its own lock, so that the shootdown path never
//! waits for the request path: `control` is what the last sync command said, `work` belongs to
//! the engine thread that runs the context, `waiting` is where page responses arrive.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use extlb_spec::addr::GPA_BITS;
use extlb_spec::context::{
    ContextEntry, ContextError, MAX_WEIGHT, MAX_WORK_RING_LOG2, MIN_WORK_RING_LOG2, flags,
};
use extlb_spec::page_request::Response;
use extlb_spec::work::Descriptor;
use extlb_spec::{Gpa, Iova, PAGE_SIZE};
use serde::{Deserialize, Serialize};

use crate::request::{Ahead, Batch, Operation};
use crate::sync::lock;

mod saved;

pub(crate) use saved::{Saved, View};

/// A well-formed context table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Space {
    pub(crate) context: u32,
    pub(crate) page_table: Gpa,
    pub(crate) ring: Iova,
    pub(crate) entries: u32,
    pub(crate) credits: u32,
    pub(crate) shadow: Gpa,
    /// Share of the engine's time, at least 1.
    pub(crate) weight: u32,
    /// Root of the process's own page table, if the oracle watches.
    pub(crate) cpu_page_table: Option<Gpa>,
}

impl Space {
    /// Checks an entry with the valid flag.
    pub(crate) fn parse(context: u32, entry: &ContextEntry) -> Result<Self, ContextError> {
        let page = |addr: u64| addr.is_multiple_of(PAGE_SIZE) && addr < 1 << GPA_BITS;
        let log2 = MIN_WORK_RING_LOG2..=MAX_WORK_RING_LOG2;
        let oracle = entry.flags & flags::ORACLE != 0;
        let good = entry.flags & !flags::ALL == 0
            && entry.reserved0 == 0
            && entry.reserved1 == 0
            && page(entry.page_table)
            && page(entry.shadow)
            && (!oracle || page(entry.cpu_page_table))
            && log2.contains(&entry.ring_log2)
            && entry.ring.is_multiple_of(PAGE_SIZE)
            && Iova(entry.ring).range_is_valid((Descriptor::SIZE as u64) << entry.ring_log2)
            && entry.weight <= MAX_WEIGHT
            && entry.credits > 0;
        if !good {
            return Err(ContextError::BadEntry);
        }
        Ok(Self {
            context,
            page_table: Gpa(entry.page_table),
            ring: Iova(entry.ring),
            entries: 1 << entry.ring_log2,
            credits: entry.credits,
            shadow: Gpa(entry.shadow),
            weight: entry.weight.max(1),
            cpu_page_table: oracle.then_some(Gpa(entry.cpu_page_table)),
        })
    }

    /// Whether the work queue is the same, so that it goes on after a change.
    fn same_queue(&self, other: &Self) -> bool {
        (self.ring, self.entries, self.shadow) == (other.ring, other.entries, other.shadow)
    }
}

/// What the last sync command found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Entry {
    /// Not valid: the context does not run.
    Stopped,
    /// Valid, but senseless.
    Bad(ContextError),
    /// Runs.
    Valid(Space),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Control {
    entry: Entry,
    /// Counts starts: tells a change from a stop and a start.
    start: u64,
}

/// A page request that the operation of a context waits for.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Waiting {
    pub(crate) group: u32,
    pub(crate) response: Option<Response>,
}

/// A context stopped on this, and the kernel must be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Failure {
    pub(crate) error: ContextError,
    pub(crate) addr: u64,
    /// The program is told, in its shadow page.
    pub(crate) told: bool,
    /// The record is in the page request ring.
    pub(crate) sent: bool,
}

/// A page that the operation misses.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Miss {
    pub(crate) iova: Iova,
    pub(crate) write: bool,
    pub(crate) pages: u32,
    /// The group of the request, once it is sent.
    pub(crate) group: Option<u32>,
}

/// The engine's part.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Work {
    /// The epoch that the fields below are of.
    pub(crate) epoch: u64,
    start: u64,
    pub(crate) space: Option<Space>,
    /// Index after the last descriptor retired.
    pub(crate) head: u32,
    /// Index after the last descriptor seen; `tail - head` is at most the ring's length.
    pub(crate) tail: u32,
    /// What `need_kick` in the shadow page says.
    pub(crate) parked: bool,
    /// Completions so far that asked for an interrupt.
    pub(crate) event_seq: u32,
    /// What the shadow page says of the two.
    pub(crate) told: Told,
    /// Descriptors after the one at `head` that were read already.
    pub(crate) ahead: Ahead,
    pub(crate) operation: Option<Operation>,
    /// The batch at `head`, of which `operation` is a part.
    pub(crate) batch: Option<Batch>,
    /// Operations since the last fence that did not succeed.
    pub(crate) failed: u64,
    pub(crate) misses: Vec<Miss>,
    pub(crate) failure: Option<Failure>,
    pub(crate) last_work: Duration,
    /// What the context may still do in this turn; below zero, what it has done too much.
    pub(crate) allowance: i64,
}

/// What the shadow page says.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Told {
    pub(crate) head: u32,
    pub(crate) event_seq: u32,
}

impl Work {
    fn new() -> Self {
        Self {
            epoch: 0,
            start: 0,
            space: None,
            head: 0,
            tail: 0,
            parked: true,
            event_seq: 0,
            told: Told::default(),
            ahead: Ahead::default(),
            operation: None,
            batch: None,
            failed: 0,
            misses: Vec::new(),
            failure: None,
            last_work: Duration::ZERO,
            allowance: 0,
        }
    }

    /// The operation begins to run the descriptors of its batch.
    pub(crate) fn enter_batch(&mut self, own: Operation) {
        self.ahead.clear();
        self.operation = None;
        self.batch = Some(Batch { own, failed: 0 });
    }

    /// The batch has ended: what is left is its own completion.
    pub(crate) fn leave_batch(&mut self) {
        self.ahead.clear();
        self.operation = self.batch.take().map(|batch| batch.own);
    }
}

/// A context.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) id: u32,
    /// Raised by every sync and reset, before translations are removed: an access that entered
    /// its guard and finds another epoch than its own does not go on.
    epoch: AtomicU64,
    control: Mutex<Control>,
    pub(crate) work: Mutex<Work>,
    pub(crate) waiting: Mutex<Vec<Waiting>>,
    /// The next group. Never starts again, so that a response for an earlier life of the
    /// context is told from one for this.
    pub(crate) next_group: Mutex<u32>,
}

impl Failure {
    pub(crate) fn new(error: ContextError, addr: u64) -> Self {
        Self {
            error,
            addr,
            told: false,
            sent: false,
        }
    }
}

impl Context {
    pub(crate) fn new(id: u32) -> Self {
        Self {
            id,
            epoch: AtomicU64::new(0),
            control: Mutex::new(Control {
                entry: Entry::Stopped,
                start: 0,
            }),
            work: Mutex::new(Work::new()),
            waiting: Mutex::new(Vec::new()),
            next_group: Mutex::new(0),
        }
    }

    /// The epoch of the moment. Sequentially consistent: one side of Dekker's pattern in
    /// `guard.rs`.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Puts a new entry in force: accesses of the old epoch that are not under way yet will
    /// not begin; those under way are waited for by the next drain.
    pub(crate) fn set(&self, entry: Entry) {
        let mut control = lock(&self.control);
        let keeps = matches!((&control.entry, &entry),
            (Entry::Valid(old), Entry::Valid(new)) if old.same_queue(new));
        if !keeps {
            control.start += 1;
        }
        control.entry = entry;
        self.epoch.fetch_add(1, Ordering::SeqCst);
        if !keeps {
            lock(&self.waiting).clear();
        }
    }

    /// The space in force, if the context runs.
    pub(crate) fn space(&self) -> Option<Space> {
        match lock(&self.control).entry {
            Entry::Valid(space) => Some(space),
            _ => None,
        }
    }

    /// Brings the engine's part up to date with the control part.
    pub(crate) fn refresh(&self, work: &mut Work) {
        if work.epoch == self.epoch() {
            return;
        }
        let control = lock(&self.control);
        // Under the lock: epoch and entry belong together.
        if work.start != control.start {
            *work = Work {
                start: control.start,
                last_work: work.last_work,
                allowance: work.allowance,
                ..Work::new()
            };
        }
        work.epoch = self.epoch();
        work.space = match control.entry {
            Entry::Valid(space) => Some(space),
            Entry::Stopped => None,
            Entry::Bad(error) => {
                work.failure = Some(Failure::new(error, 0));
                None
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> ContextEntry {
        ContextEntry {
            flags: flags::VALID | flags::ORACLE,
            page_table: 0x1000,
            ring: 0x7000_0000,
            ring_log2: 12,
            credits: 1,
            shadow: 0x2000,
            cpu_page_table: 0x3000,
            ..Default::default()
        }
    }

    #[test]
    fn every_senseless_field_makes_a_bad_entry() {
        assert!(Space::parse(1, &entry()).is_ok());
        let spoil: [fn(&mut ContextEntry); 15] = [
            |e| e.flags |= 1 << 2,
            |e| e.reserved0 = 1,
            |e| e.reserved1 = 1,
            |e| e.page_table += 8,
            |e| e.page_table = 1 << 52,
            |e| e.shadow += 4,
            |e| e.shadow = 1 << 63,
            |e| e.cpu_page_table += 1,
            |e| e.ring_log2 = 0,
            |e| e.ring_log2 = 13,
            |e| e.ring += 64,
            |e| e.ring = (1 << 48) - 4096,
            |e| e.ring = u64::MAX - 4095,
            |e| e.credits = 0,
            |e| e.weight = MAX_WEIGHT + 1,
        ];
        for (i, spoil) in spoil.iter().enumerate() {
            let mut bad = entry();
            spoil(&mut bad);
            assert_eq!(Space::parse(1, &bad), Err(ContextError::BadEntry), "{i}");
        }
        let unwatched = ContextEntry {
            flags: flags::VALID,
            cpu_page_table: 1,
            ..entry()
        };
        let space = Space::parse(1, &unwatched).expect("not looked at");
        assert_eq!(space.cpu_page_table, None);
    }
}
