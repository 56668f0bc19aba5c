//! The TLB: set-associative, tagged by context, entries of 4 KiB.
//!
//! Larger leaves are cached as the 4 KiB pieces that were used. One lock guards it all; why that
//! lock is also what makes a shootdown safe is written in `guard.rs`.

use std::ops::Range;

use extlb_spec::{Gpa, Iova, MAX_CONTEXTS, PAGE_SHIFT, PAGE_SIZE};

use crate::config::{Policy, TlbConfig};
use crate::sync::{Mutex, lock};

/// A cached translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) context: u32,
    pub(crate) page: Iova,
    pub(crate) frame: Gpa,
    /// The leaf lets the device write.
    pub(crate) writable: bool,
    /// The leaf's dirty bit was set when the entry was filled: a write need not walk.
    pub(crate) dirty: bool,
    /// Number of the fill, in the order in which walks began.
    pub(crate) fill: u64,
}

/// What a lookup says.
#[derive(Debug)]
pub(crate) enum Lookup {
    Hit(Entry),
    Miss(Ticket),
}

/// The right to insert what a walk finds, unless something is removed meanwhile.
#[derive(Debug)]
pub(crate) struct Ticket {
    context: u32,
    page: Iova,
    generation: u64,
    /// Number of the fill.
    pub(crate) fill: u64,
}

/// What became of an insert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inserted {
    /// It is in.
    Kept,
    /// It is in, and another valid entry is out.
    Evicted,
    /// Translations of the context were removed since the walk began: use it once, forget it.
    Overtaken,
}

/// What a removal covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// A half-open range of addresses of a context.
    Range(u32, Range<u64>),
    Context(u32),
    All,
}

impl Scope {
    /// Whether a page is covered.
    pub(crate) fn covers(&self, context: u32, page: Iova) -> bool {
        match self {
            Scope::Range(c, range) => *c == context && range.contains(&page.0),
            Scope::Context(c) => *c == context,
            Scope::All => true,
        }
    }
}

/// What a removal did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Removed {
    /// Entries removed.
    pub(crate) entries: u64,
    /// Fills with this number or a lower one began before the removal.
    pub(crate) fills: u64,
}

#[derive(Clone, Copy)]
struct Slot {
    entry: Entry,
    /// Order of last use, or of insertion, by policy.
    rank: u64,
}

struct Inner {
    slots: Vec<Option<Slot>>,
    /// Per context: how often translations were removed.
    generation: Vec<u64>,
    fills: u64,
    rank: u64,
    random: u64,
}

pub(crate) struct Tlb {
    sets: usize,
    ways: usize,
    policy: Policy,
    inner: Mutex<Inner>,
}

impl Tlb {
    pub(crate) fn new(config: &TlbConfig) -> Self {
        Self::with_contexts(config, MAX_CONTEXTS as usize)
    }

    /// Fewer contexts, for the model checker.
    pub(crate) fn with_contexts(config: &TlbConfig, contexts: usize) -> Self {
        Self {
            sets: config.sets,
            ways: config.ways,
            policy: config.policy,
            inner: Mutex::new(Inner {
                slots: vec![None; config.sets * config.ways],
                generation: vec![0; contexts],
                fills: 0,
                rank: 0,
                // Xorshift must not start from zero.
                random: config.seed | 1 << 63,
            }),
        }
    }

    /// The slots of the set of a page. Neighbouring pages go to neighbouring sets; contexts
    /// start at different ones.
    fn set(&self, context: u32, page: Iova) -> Range<usize> {
        let number = (page.0 >> PAGE_SHIFT) as usize;
        let set = number.wrapping_add(context as usize * 0x9e37_79b1) & (self.sets - 1);
        set * self.ways..(set + 1) * self.ways
    }

    /// Looks a page up; a write needs an entry that is writable and dirty.
    pub(crate) fn lookup(&self, context: u32, page: Iova, write: bool) -> Lookup {
        let set = self.set(context, page);
        let mut inner = lock(&self.inner);
        let inner = &mut *inner;
        for slot in inner.slots[set].iter_mut().flatten() {
            let entry = slot.entry;
            if entry.context == context && entry.page == page {
                if write && !(entry.writable && entry.dirty) {
                    break;
                }
                if self.policy == Policy::Lru {
                    inner.rank += 1;
                    slot.rank = inner.rank;
                }
                return Lookup::Hit(entry);
            }
        }
        inner.fills += 1;
        Lookup::Miss(Ticket {
            context,
            page,
            generation: inner.generation[context as usize],
            fill: inner.fills,
        })
    }

    /// Inserts what a walk found.
    pub(crate) fn insert(
        &self,
        ticket: &Ticket,
        frame: Gpa,
        writable: bool,
        dirty: bool,
    ) -> Inserted {
        let set = self.set(ticket.context, ticket.page);
        let mut inner = lock(&self.inner);
        let inner = &mut *inner;
        if inner.generation[ticket.context as usize] != ticket.generation {
            return Inserted::Overtaken;
        }
        inner.rank += 1;
        let slot = Slot {
            entry: Entry {
                context: ticket.context,
                page: ticket.page,
                frame,
                writable,
                dirty,
                fill: ticket.fill,
            },
            rank: inner.rank,
        };
        let slots = &mut inner.slots[set];
        // A page has at most one entry: a fill with more rights replaces the one with fewer.
        let same = |s: &Option<Slot>| {
            s.is_some_and(|s| s.entry.context == ticket.context && s.entry.page == ticket.page)
        };
        if let Some(place) = slots.iter().position(same) {
            slots[place] = Some(slot);
            return Inserted::Kept;
        }
        if let Some(place) = slots.iter().position(Option::is_none) {
            slots[place] = Some(slot);
            return Inserted::Kept;
        }
        let victim = match self.policy {
            Policy::Random => {
                let mut x = inner.random;
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                inner.random = x;
                (x % self.ways as u64) as usize
            }
            Policy::Lru | Policy::Fifo => (0..slots.len())
                .min_by_key(|i| slots[*i].map_or(0, |s| s.rank))
                .unwrap_or(0),
        };
        slots[victim] = Some(slot);
        Inserted::Evicted
    }

    /// Removes what the scope covers, and keeps walks that began earlier from inserting.
    pub(crate) fn remove(&self, scope: &Scope) -> Removed {
        let mut inner = lock(&self.inner);
        let inner = &mut *inner;
        match scope {
            Scope::Range(context, _) | Scope::Context(context) => {
                inner.generation[*context as usize] += 1;
            }
            Scope::All => inner.generation.iter_mut().for_each(|g| *g += 1),
        }
        let mut entries = 0;
        let mut clear = |slots: &mut [Option<Slot>]| {
            for slot in slots {
                if slot.is_some_and(|s| scope.covers(s.entry.context, s.entry.page)) {
                    *slot = None;
                    entries += 1;
                }
            }
        };
        match scope {
            // Few pages: look at their sets only.
            Scope::Range(context, range)
                if range.end.saturating_sub(range.start) >> PAGE_SHIFT <= self.sets as u64 =>
            {
                for page in range.clone().step_by(PAGE_SIZE as usize) {
                    let set = self.set(*context, Iova(page));
                    clear(&mut inner.slots[set]);
                }
            }
            _ => clear(&mut inner.slots),
        }
        Removed {
            entries,
            fills: inner.fills,
        }
    }

    /// Every entry of a context, for the audit.
    pub(crate) fn entries(&self, context: u32) -> Vec<Entry> {
        let inner = lock(&self.inner);
        let entries = inner.slots.iter().flatten().map(|s| s.entry);
        entries.filter(|e| e.context == context).collect()
    }
}
