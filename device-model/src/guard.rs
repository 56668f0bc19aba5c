//! Guards: who is using a translation right now, and how to wait until nobody is.
//!
//! Each thread that accesses guest memory by translation owns a *lane*, one word. The word is odd
//! while the thread is inside an access (a guard exists), and each enter and leave adds one. A
//! *drain* notes the odd lanes at its start and is done when each of them has changed since.
//!
//! # Why a drain that has ended means silence
//!
//! Claim: after `remove` from the TLB, then `begin`, then `poll` returned true, no access uses
//! the removed translation. An access does, in this order:
//!
//! 1. `enter`: store the odd word, full fence;
//! 2. look at the gates (device running, context alive), then at the TLB, without a lock;
//! 3. on a miss take a ticket, walk the page table in RAM from the root or from a table that the
//!    walk cache knows, insert under the TLB's lock if nothing was removed since the ticket;
//! 4. move data;
//! 5. `leave`: store the even word, release.
//!
//! The shootdown does: A. read the command (acquire: the kernel cleared the leaf before it posted
//! it); B. remove from the TLB and the walk cache, then raise the generation, under the TLB's
//! lock; C. full fence, read all lanes; D. wait for the odd ones; E. acknowledge.
//!
//! This is Dekker's pattern: store, full fence, load, on both sides (1 and 2; B and C). So of
//! two things at least one is true:
//!
//! - C reads the word that 1 stored, or a later one. If it is the odd word, D waits for 5; if it
//!   is later, the access has ended. The data of 4 is in RAM when E happens, by release in 5 and
//!   acquire in D.
//! - Every load after the fence in 1 reads what B stored, or something later. The lookup then
//!   does not find the removed entry, nor the removed tables; it may find an entry that was
//!   inserted after B, of which below. The ticket is of the raised generation, and by its
//!   acquire the walk happens after A: it reads the cleared leaf.
//!
//! What is inserted after B is good: a walk whose ticket is of the old generation is refused (it
//! uses its leaf once, within its own guard, for which D waits by the above), and one of the new
//! generation has seen the cleared leaf. `tlb/mod.rs` has the details.
//!
//! A lookup does not read a mixture of two entries, by the sequence numbers in `tlb/sets.rs`; one
//! that meets a change takes the lock and looks again, which the above does not exclude.
//!
//! The gates are the same pattern: a stop stores "closed" and then does C and D, so the access
//! sees the closed gate, or the drain sees the lane.

use crate::sync::{AtomicU64, Ordering, Pillar, fence, stands};

/// Number of lanes: how many threads may access at once.
pub(crate) const LANES: usize = 16;

/// A word on a cache line of its own: lanes must not slow each other down.
#[repr(align(128))]
struct Word(AtomicU64);

/// All lanes of a device.
pub(crate) struct Guards {
    lanes: Vec<Word>,
    /// Bit n: lane n is taken.
    taken: AtomicU64,
    /// Drains begun; the number of the latest.
    begun: AtomicU64,
    /// The number of the latest drain that was acknowledged to the kernel.
    acknowledged: AtomicU64,
}

impl Guards {
    pub(crate) fn new() -> Self {
        Self::with_lanes(LANES)
    }

    /// Fewer lanes, for the model checker.
    pub(crate) fn with_lanes(lanes: usize) -> Self {
        Self {
            lanes: (0..lanes).map(|_| Word(AtomicU64::new(0))).collect(),
            taken: AtomicU64::new(0),
            begun: AtomicU64::new(0),
            acknowledged: AtomicU64::new(0),
        }
    }

    /// Takes a lane; `None` if all are taken.
    pub(crate) fn lane(&self) -> Option<Lane<'_>> {
        for index in 0..self.lanes.len() {
            let bit = 1 << index;
            // Acquire pairs with the release in drop: the lane's word is even.
            if self.taken.fetch_or(bit, Ordering::Acquire) & bit == 0 {
                return Some(Lane {
                    guards: self,
                    index,
                });
            }
        }
        None
    }

    /// Begins a drain of every guard that exists now.
    pub(crate) fn begin(&self) -> Drain {
        // Numbered before the scan: a guard that the scan misses sees this number (its full
        // fence comes after its store, ours before our loads), and so is never accused.
        let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        if stands(Pillar::DrainFence) {
            fence(Ordering::SeqCst);
        }
        let mut drain = Drain {
            number,
            inside: [(0, 0); LANES],
            left: 0,
        };
        for (index, lane) in self.lanes.iter().enumerate() {
            let word = lane.0.load(Ordering::Acquire);
            if word % 2 == 1 {
                drain.inside[drain.left] = (index, word);
                drain.left += 1;
            }
        }
        drain
    }

    /// Whether every guard that existed at the start of the drain is gone. Never blocks.
    pub(crate) fn poll(&self, drain: &mut Drain) -> bool {
        while drain.left > 0 {
            let (index, word) = drain.inside[drain.left - 1];
            // Acquire pairs with the release in leave: the data of that access is in RAM.
            if self.lanes[index].0.load(Ordering::Acquire) == word {
                return false;
            }
            drain.left -= 1;
        }
        true
    }

    /// Notes that the kernel is being told that a drain has ended.
    pub(crate) fn acknowledge(&self, drain: &Drain) {
        self.acknowledged.fetch_max(drain.number, Ordering::SeqCst);
    }
}

/// A drain under way.
#[derive(Debug)]
pub(crate) struct Drain {
    number: u64,
    /// Lanes that were odd at the start, with the word they had; the first `left` still are.
    inside: [(usize, u64); LANES],
    left: usize,
}

/// The right of one thread to have guards, one at a time.
pub(crate) struct Lane<'a> {
    guards: &'a Guards,
    index: usize,
}

impl Lane<'_> {
    /// Enters: from here until the guard is dropped every drain that begins waits.
    pub(crate) fn enter(&mut self) -> Guard<'_> {
        let word = &self.guards.lanes[self.index].0;
        // Nobody else writes this word: a lane has one owner, and `&mut self` one guard.
        let inside = word.load(Ordering::Relaxed) + 1;
        // Release: a drain that waited for the guard before this one may read this word instead.
        word.store(inside, Ordering::Release);
        if stands(Pillar::EnterFence) {
            fence(Ordering::SeqCst);
        }
        Guard {
            guards: self.guards,
            index: self.index,
            inside,
            begun: self.guards.begun.load(Ordering::SeqCst),
        }
    }
}

impl Drop for Lane<'_> {
    fn drop(&mut self) {
        self.guards
            .taken
            .fetch_and(!(1 << self.index), Ordering::Release);
    }
}

/// An access under way.
pub(crate) struct Guard<'a> {
    guards: &'a Guards,
    index: usize,
    inside: u64,
    begun: u64,
}

impl Guard<'_> {
    /// Whether a drain has begun since: it may wait for this guard. Only a hint, so that a guard
    /// that could go on for a while ends early.
    pub(crate) fn is_awaited(&self) -> bool {
        self.guards.begun.load(Ordering::Relaxed) != self.begun
    }

    /// Whether a drain that began after this guard was acknowledged already: never, unless the
    /// drain did not wait.
    pub(crate) fn is_outlived(&self) -> bool {
        self.guards.acknowledged.load(Ordering::SeqCst) > self.begun
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.guards.lanes[self.index]
            .0
            .store(self.inside + 1, Ordering::Release);
    }
}
