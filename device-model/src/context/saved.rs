//! A context as it is saved.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use extlb_spec::context::{ContextEntry, flags};
use extlb_spec::page_request::MAX_REQUEST_PAGES;
use serde::{Deserialize, Serialize};

use super::{Context, Control, Entry, Failure, Miss, Space, Told, Waiting, Work};
use crate::state::{MAX_COUNT, Shift, StateError, check};
use crate::sync::lock;

/// More pages than any operation misses at once.
const MAX_MISSES: usize = 16;
/// More than any allowance, by far.
const MAX_ALLOWANCE: u64 = 1 << 50;

/// What is saved.
#[derive(Serialize)]
pub(crate) struct View<'a> {
    epoch: u64,
    control: Control,
    work: &'a Work,
    waiting: Vec<Waiting>,
    next_group: u32,
}

/// The same, as it is read.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Saved {
    epoch: u64,
    control: Control,
    work: Work,
    waiting: Vec<Waiting>,
    next_group: u32,
}

impl Context {
    /// `work`: what is behind the context's own lock, which the caller holds.
    pub(crate) fn save<'a>(&self, work: &'a Work) -> View<'a> {
        let Self {
            id: _,
            epoch,
            control,
            work: _,
            waiting,
            next_group,
        } = self;
        View {
            epoch: epoch.load(Ordering::SeqCst),
            control: lock(control).clone(),
            work,
            waiting: lock(waiting).clone(),
            next_group: *lock(next_group),
        }
    }

    pub(crate) fn restore(id: u32, saved: Saved, shift: Shift) -> Result<Self, StateError> {
        let Saved {
            epoch,
            control,
            mut work,
            waiting,
            next_group,
        } = saved;
        let Control { entry, start } = &control;
        check("the starts of a context", *start < MAX_COUNT, start)?;
        check("the epoch of a context", epoch < MAX_COUNT, epoch)?;
        let space = match entry {
            Entry::Valid(space) => {
                space.check(id)?;
                Some(*space)
            }
            Entry::Stopped | Entry::Bad(_) => None,
        };
        work.check(id)?;
        let new = (work.epoch, work.start) == (epoch, *start) && work.space == space;
        let old = work.epoch < epoch && work.start <= *start;
        check("the epoch of a context's work", new || old, work.epoch)?;
        work.last_work = shift.apply(work.last_work);
        for (index, one) in waiting.iter().enumerate() {
            let Waiting { group, response: _ } = one;
            // Who waits is the operation: for pages that it misses, each once.
            let known = work.misses.iter().any(|miss| miss.group == Some(*group));
            let twice = waiting[..index].iter().any(|other| other.group == *group);
            check("the group of a page request", known && !twice, group)?;
        }
        Ok(Self {
            id,
            epoch: AtomicU64::new(epoch),
            control: Mutex::new(control),
            work: Mutex::new(work),
            waiting: Mutex::new(waiting),
            next_group: Mutex::new(next_group),
        })
    }
}

impl Space {
    /// Refuses what no entry of the context table makes.
    fn check(&self, id: u32) -> Result<(), StateError> {
        let Self {
            context: _,
            page_table,
            ring,
            entries,
            credits,
            shadow,
            weight,
            cpu_page_table,
        } = *self;
        let oracle = cpu_page_table.map_or(0, |_| flags::ORACLE);
        let entry = ContextEntry {
            flags: flags::VALID | oracle,
            page_table: page_table.0,
            ring: ring.0,
            ring_log2: entries.trailing_zeros(),
            credits,
            shadow: shadow.0,
            weight,
            cpu_page_table: cpu_page_table.map_or(0, |root| root.0),
            ..Default::default()
        };
        check(
            "a context's space",
            Self::parse(id, &entry) == Ok(*self),
            self,
        )
    }
}

impl Work {
    fn check(&self, id: u32) -> Result<(), StateError> {
        let Self {
            epoch: _,
            start: _,
            space,
            head,
            tail,
            parked: _,
            event_seq: _,
            told,
            ahead,
            operation,
            batch,
            failed,
            misses,
            failure,
            last_work: _,
            allowance,
        } = self;
        // All values are possible.
        let Told {
            head: _,
            event_seq: _,
        } = told;
        if let Some(Failure {
            error: _,
            addr: _,
            told: _,
            sent: _,
        }) = failure
        {}
        if let Some(space) = space {
            space.check(id)?;
            let distance = tail.wrapping_sub(*head);
            check(
                "the tail of a work queue",
                distance <= space.entries,
                (head, tail),
            )?;
        } else {
            let idle = head == tail && operation.is_none() && batch.is_none() && misses.is_empty();
            check("the work of a context without a space", idle, (head, tail))?;
        }
        ahead.check()?;
        if let Some(operation) = operation {
            operation.check(batch.is_some())?;
        }
        if let Some(batch) = batch {
            batch.check()?;
        }
        check("the operations that failed", *failed < MAX_COUNT, failed)?;
        check(
            "the allowance",
            allowance.unsigned_abs() < MAX_ALLOWANCE,
            allowance,
        )?;
        check(
            "the number of misses",
            misses.len() <= MAX_MISSES,
            misses.len(),
        )?;
        for miss in misses {
            let Miss {
                iova,
                write: _,
                pages,
                group: _,
            } = miss;
            let good = iova.range_is_valid(1) && (1..=MAX_REQUEST_PAGES).contains(pages);
            check("a miss", good, miss)?;
        }
        Ok(())
    }
}
