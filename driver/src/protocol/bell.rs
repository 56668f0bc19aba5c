//! What an interrupt rings, and its handlers sleep on.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

/// Counts its rings, so that one between a look and a sleep ends the sleep.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    rings: Mutex<u64>,
    rung: Condvar,
}

impl Bell {
    pub(crate) fn ring(&self) {
        *self.rings.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.rung.notify_all();
    }

    /// How often it rang.
    pub(crate) fn count(&self) -> u64 {
        *self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until it has rung more often than `seen`, or until the deadline.
    pub(crate) fn wait(&self, seen: u64, deadline: Instant) {
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        while *rings == seen {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.rung.wait_timeout(rings, left);
            rings = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
