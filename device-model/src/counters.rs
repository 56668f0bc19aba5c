//! The counters behind the statistics registers.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($( $(#[$doc:meta])* $field:ident ),* $(,)?) => {
        /// Counters since the last reset.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $( $(#[$doc])* pub(crate) $field: Counter ),* }

        /// What a device has done.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
        pub struct Totals { $( $(#[$doc])* pub $field: u64 ),* }

        impl Counters {
            pub(crate) fn read(&self) -> Totals {
                Totals { $( $field: self.$field.get() ),* }
            }
            /// Sets all to zero, and adds what they were to `totals`.
            pub(crate) fn reset_into(&self, totals: &mut Totals) {
                $( totals.$field += self.$field.0.swap(0, Ordering::Relaxed); )*
            }
        }

        impl std::ops::Add for Totals {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                Self { $( $field: self.$field + other.$field ),* }
            }
        }
    };
}

counters! {
    /// Work operations that ended with success.
    ops_completed,
    /// Work operations that ended otherwise.
    ops_faulted,
    /// Bytes moved for work operations.
    bytes,
    /// Translations served by the TLB.
    tlb_hits,
    /// Translations that walked.
    tlb_misses,
    /// Valid TLB entries replaced by another.
    tlb_evictions,
    /// TLB entries removed by invalidation commands.
    tlb_shot_down,
    /// Invalidation commands done.
    invalidations,
    /// Drains done.
    drains,
    /// Page requests sent.
    page_requests,
    /// Page responses for no waiting request.
    stray_responses,
    /// Accesses for work operations, by translation, that no RAM answered.
    bus_errors,
    /// Accesses that the oracle compared.
    oracle_checks,
    /// Accesses that differed.
    oracle_suspects,
    /// Stale accesses.
    oracle_stale,
    /// Differences that the oracle had no room to follow.
    oracle_overflow,
}

/// A counter that any thread may raise.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
