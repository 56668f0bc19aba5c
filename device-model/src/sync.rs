//! The primitives that the lock-free parts stand on, in one place.
//!
//! `guard.rs` and `tlb.rs` take them from here only, so that the model checker can compile the
//! same two files against its own (see `tests/loom.rs`).

pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};
pub(crate) use std::sync::{Mutex, MutexGuard};

/// Locks, also after a panic of another holder: the state behind every lock of the device is
/// valid between any two statements, so a poisoned lock has nothing to warn about.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
