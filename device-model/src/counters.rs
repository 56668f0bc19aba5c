//! The counters behind the statistics registers.

use std::sync::atomic::{AtomicU64, Ordering};

use extlb_spec::MAX_CONTEXTS;
use serde::{Deserialize, Serialize};

use crate::state::{MAX_COUNT, StateError, check};

macro_rules! counters {
    (
        device { $( $(#[$doc:meta])* $field:ident ),* $(,)? }
        context { $( $(#[$cdoc:meta])* $cfield:ident ),* $(,)? }
    ) => {
        /// Counters since the last reset.
        #[derive(Debug)]
        pub(crate) struct Counters {
            $( $(#[$doc])* pub(crate) $field: Counter, )*
            /// One each.
            pub(crate) contexts: Box<[ContextCounters]>,
        }

        /// Counters of a context since the last reset, on cache lines of their own.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub(crate) struct ContextCounters { $( $(#[$cdoc])* pub(crate) $cfield: Counter ),* }

        /// What a device has done for a context since the last reset.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct ContextStats { $( $(#[$cdoc])* pub $cfield: u64 ),* }

        /// What a device has done.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Totals {
            $( $(#[$doc])* pub $field: u64, )*
            $( $(#[$cdoc])* pub $cfield: u64, )*
        }

        /// The counters as they are saved.
        #[derive(Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub(crate) struct State {
            $( $field: u64, )*
            contexts: Vec<ContextStats>,
        }

        impl Counters {
            pub(crate) fn save(&self) -> State {
                let Self { $( $field, )* contexts } = self;
                State {
                    $( $field: $field.get(), )*
                    contexts: contexts.iter().map(|context| context.read()).collect(),
                }
            }

            pub(crate) fn restore(state: State) -> Result<Self, StateError> {
                let State { $( $field, )* contexts } = state;
                $( check(concat!("the counter ", stringify!($field)), $field < MAX_COUNT, $field)?; )*
                let count = contexts.len();
                check("the contexts counted", count == MAX_CONTEXTS as usize, count)?;
                Ok(Self {
                    $( $field: Counter(AtomicU64::new($field)), )*
                    contexts: contexts
                        .into_iter()
                        .map(ContextCounters::restore)
                        .collect::<Result<_, _>>()?,
                })
            }
        }

        impl ContextCounters {
            fn restore(stats: ContextStats) -> Result<Self, StateError> {
                let ContextStats { $( $cfield ),* } = stats;
                // Their sum must not overflow either.
                let max = MAX_COUNT / u64::from(MAX_CONTEXTS);
                $( check(concat!("the counter ", stringify!($cfield)), $cfield < max, $cfield)?; )*
                Ok(Self { $( $cfield: Counter(AtomicU64::new($cfield)) ),* })
            }

            pub(crate) fn read(&self) -> ContextStats {
                ContextStats { $( $cfield: self.$cfield.get() ),* }
            }
        }

        impl Counters {
            pub(crate) fn new(contexts: u32) -> Self {
                Self {
                    $( $field: Counter::default(), )*
                    contexts: (0..contexts).map(|_| ContextCounters::default()).collect(),
                }
            }

            pub(crate) fn read(&self) -> Totals {
                let contexts = self.contexts.iter();
                Totals {
                    $( $field: self.$field.get(), )*
                    $( $cfield: contexts.clone().map(|c| c.$cfield.get()).sum(), )*
                }
            }

            /// Sets all to zero, and adds what they were to `totals`.
            pub(crate) fn reset_into(&self, totals: &mut Totals) {
                $( totals.$field += self.$field.take(); )*
                for context in &self.contexts {
                    $( totals.$cfield += context.$cfield.take(); )*
                }
            }
        }

        impl Totals {
            /// Refuses what may overflow.
            pub(crate) fn check(&self) -> Result<(), StateError> {
                let Self { $( $field, )* $( $cfield, )* } = self;
                for (count, name) in [
                    $( ($field, stringify!($field)), )*
                    $( ($cfield, stringify!($cfield)), )*
                ] {
                    check("a counter before the last reset", *count < MAX_COUNT, (name, count))?;
                }
                Ok(())
            }
        }

        impl std::ops::Add for Totals {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                Self {
                    $( $field: self.$field + other.$field, )*
                    $( $cfield: self.$cfield + other.$cfield, )*
                }
            }
        }
    };
}

counters! {
    device {
    /// Work operations that ended with success.
    ops_completed,
    /// Work operations that ended otherwise.
    ops_faulted,
    /// Bytes moved for work operations.
    bytes,
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
    context {
    /// Translations served by the TLB.
    tlb_hits,
    /// Translations that walked.
    tlb_misses,
    /// Walks that found a leaf; the others ended in a page request or an error.
    tlb_walks,
    /// Walks that began at a table that the walk cache knew, and not at the root.
    walk_cache_hits,
    /// Valid TLB entries replaced by fills of another page.
    tlb_evictions,
    /// TLB entries removed by invalidation commands.
    tlb_shot_down,
    }
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
    fn take(&self) -> u64 {
        self.0.swap(0, Ordering::Relaxed)
    }
}
