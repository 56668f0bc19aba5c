//! The primitives that the lock-free parts stand on, in one place.
//!
//! `guard.rs`, `handshake.rs` and `tlb/` take them from here only, so that the model checker can
//! compile the same files against its own (see `tests/loom.rs`).

pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};
pub(crate) use std::sync::{Mutex, MutexGuard};

/// Locks, also after a panic of another holder: the state behind every lock of the device is
/// valid between any two statements, so a poisoned lock has nothing to warn about.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The single lines that the safety of a shootdown, or the waking of a sleeper, stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pillar {
    /// The fence between the lane's store and the first lookup.
    EnterFence,
    /// The fence between the removal's stores and the scan of the lanes.
    DrainFence,
    /// The comparison that keeps an overtaken walk from inserting.
    Generation,
    /// The comparison that keeps a reader from mixing two entries.
    Sequence,
    /// The fence between "kick me" and the last look at the tail.
    SleepFence,
}

/// Whether a pillar stands: always, here. The model checker takes them away one by one and must
/// see the device fail each time.
#[inline(always)]
pub(crate) const fn stands(_: Pillar) -> bool {
    true
}
