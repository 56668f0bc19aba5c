//! Which lies a device tells, and when.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

macro_rules! lies {
    ($( $(#[doc = $doc:literal])* $name:ident, )*) => {
        /// A way in which a device, or the bus in front of it, can be wrong.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Lie { $( $(#[doc = $doc])* $name, )* }

        impl Lie {
            /// Every lie.
            pub const ALL: &[Self] = &[$(Self::$name),*];
        }
    };
}

lies! {
    /// From now on nobody answers, as after a surprise removal: registers read as all ones, writes
    /// are lost, no access reaches memory, the reset fails. Until [`Faults::stop`].
    Removed,
    /// The identity register reads as something else.
    Identity,
    /// The version register does.
    Version,
    /// The capabilities do.
    Capabilities,
    /// The status register has a value that does not exist.
    Status,
    /// The device says that it has stopped, on an error that does not exist.
    FatalError,
    /// The device says that it was reset.
    StatusReset,
    /// A write to a register or a doorbell is lost.
    WriteLost,
    /// The reset fails, and is not made.
    ResetFails,
    /// Bus mastering cannot be changed.
    BusMasterFails,
    /// A mapping is refused.
    MapRefused,
    /// The end of a mapping is refused.
    UnmapRefused,
    /// An interrupt is lost.
    InterruptLost,
    /// All other vectors are raised, too.
    InterruptTwice,
    /// A completion has a status that does not exist.
    RecordStatus,
    /// A completion says that a comparison found a difference.
    RecordMismatch,
    /// A completion has another number of bytes.
    RecordBytes,
    /// A completion says that there was a fault, at an address of nobody.
    RecordFault,
    /// A completion has an absurd result.
    RecordResult,
    /// A completion is never written.
    RecordNever,
    /// A completion is written again, with a status that does not exist.
    RecordTwice,
    /// The completion behind it is written as well: for an operation that was not carried out yet,
    /// or does not exist.
    RecordNext,
    /// The head of a context is anything.
    Head,
    /// The head of a context is two less.
    HeadBack,
    /// The head of a context is not written.
    HeadNever,
    /// The count of events of a context is anything.
    EventJump,
    /// The count of events of a context is not written.
    EventNever,
    /// A context says that it has stopped, on an error that does not exist.
    ContextError,
    /// A context wants a kick, by any value, or does not although it sleeps.
    KickGarbage,
    /// The head of the invalidation queue is anything.
    CommandHead,
    /// The head of the invalidation queue is not written.
    CommandHeadNever,
    /// As [`Lie::KickGarbage`], of the invalidation queue.
    CommandKick,
    /// An acknowledgement has a number that nobody asked for yet.
    WaitAhead,
    /// An acknowledgement has the number of the one before.
    WaitBehind,
    /// An acknowledgement is not written.
    WaitNever,
    /// An acknowledgement is written before anything was drained.
    WaitEarly,
    /// The tail of the page request ring is anything.
    RequestTail,
    /// The tail of the page request ring goes beyond the last record.
    RequestMissing,
    /// There is a page request of an unknown kind.
    RequestKind,
    /// There is a page request of a context that cannot exist.
    RequestContext,
    /// There is a page request for an address that nobody has.
    RequestAddress,
    /// There is a page request for many pages that nobody asked for, with a group that was there.
    RequestAgain,
    /// There is a record of a context that has stopped, which it has not.
    RequestStopped,
    /// There are always more page requests: one for each that is answered.
    RequestFlood,
    /// A leaf of the page table is overwritten.
    Leaf,
    /// An entry that leads to a table is overwritten.
    Table,
}

/// Says what a device that is not honest does next. All methods may be called from any thread.
///
/// What is decided depends on the seed, on the lie, and on how often there was an occasion for it:
/// the same seed tells the same lies as far as threads run in the same order.
#[derive(Debug)]
pub struct Faults {
    seed: AtomicU64,
    removed: AtomicBool,
    plans: Vec<Plan>,
}

#[derive(Debug, Default)]
struct Plan {
    /// Told once in so many occasions; 0 is never.
    one_in: AtomicU32,
    /// Occasions that pass before.
    skip: AtomicU64,
    /// How often it may still be told.
    left: AtomicU64,
    occasions: AtomicU64,
    told: AtomicU64,
}

/// One step of the generator SplitMix64 (Steele, Lea, Flood 2014).
#[must_use]
pub fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Faults {
    /// No lies.
    #[must_use]
    pub fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self {
            seed: AtomicU64::new(seed),
            removed: AtomicBool::new(false),
            plans: Lie::ALL.iter().map(|_| Plan::default()).collect(),
        })
    }

    fn plan(&self, lie: Lie) -> &Plan {
        &self.plans[lie as usize]
    }

    /// Tells a lie once in about `one_in` occasions (0: never), no more than `times` times.
    pub fn tell(&self, lie: Lie, one_in: u32, times: u64) {
        let plan = self.plan(lie);
        plan.left.store(times, Ordering::Relaxed);
        plan.one_in.store(one_in, Ordering::Relaxed);
    }

    /// Tells a lie once, after so many occasions.
    pub fn after(&self, lie: Lie, skip: u64) {
        self.plan(lie).skip.store(skip, Ordering::Relaxed);
        self.tell(lie, 1, 1);
    }

    /// Tells a lie at each occasion.
    pub fn always(&self, lie: Lie) {
        self.tell(lie, 1, u64::MAX);
    }

    /// Tells a lie at the next occasion.
    pub fn once(&self, lie: Lie) {
        self.tell(lie, 1, 1);
    }

    /// Honest from now on; a device that was removed is there again.
    pub fn stop(&self) {
        for plan in &self.plans {
            plan.one_in.store(0, Ordering::Relaxed);
            plan.skip.store(0, Ordering::Relaxed);
        }
        self.removed.store(false, Ordering::Relaxed);
    }

    /// How often a lie was told.
    pub fn told(&self, lie: Lie) -> u64 {
        self.plan(lie).told.load(Ordering::Relaxed)
    }

    /// All lies that were told, and how often.
    pub fn summary(&self) -> Vec<(Lie, u64)> {
        let told = Lie::ALL.iter().map(|lie| (*lie, self.told(*lie)));
        told.filter(|(_, times)| *times > 0).collect()
    }

    /// Whether nobody answers.
    pub(super) fn is_removed(&self) -> bool {
        if self.take(Lie::Removed).is_some() {
            self.removed.store(true, Ordering::Relaxed);
        }
        self.removed.load(Ordering::Relaxed)
    }

    /// There is an occasion for a lie. If it is told, any bits to make it of.
    pub(super) fn take(&self, lie: Lie) -> Option<u64> {
        let plan = self.plan(lie);
        let one_in = plan.one_in.load(Ordering::Relaxed);
        if one_in == 0 {
            return None;
        }
        let occasion = plan.occasions.fetch_add(1, Ordering::Relaxed);
        let seed = self.seed.load(Ordering::Relaxed);
        let bits = mix(mix(seed ^ (lie as u64) << 48).wrapping_add(occasion));
        if !bits.is_multiple_of(one_in.into()) {
            return None;
        }
        let less = |left: u64| left.checked_sub(1);
        let takes = |count: &AtomicU64| {
            let taken = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
            taken.is_ok()
        };
        if takes(&plan.skip) || !takes(&plan.left) {
            return None;
        }
        plan.told.fetch_add(1, Ordering::Relaxed);
        Some(mix(bits))
    }

    /// The same for a word: what it becomes, which is not what it was.
    pub(super) fn word(&self, lie: Lie, honest: u32) -> Option<u32> {
        let bits = self.take(lie)?;
        let any = (bits >> 32) as u32;
        let value = match bits % 6 {
            0 => 0,
            1 => u32::MAX,
            2 => honest.wrapping_add(1 + any % 64),
            3 => honest.wrapping_sub(1 + any % 64),
            4 => honest ^ 1 << (any % 32),
            _ => any,
        };
        Some(if value == honest { !honest } else { value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_decides_and_counts_are_kept() {
        let tell = |seed| {
            let faults = Faults::new(seed);
            faults.tell(Lie::Head, 3, 20);
            let told: Vec<_> = (0..1000).map(|_| faults.take(Lie::Head)).collect();
            assert_eq!(faults.told(Lie::Head), 20);
            assert_eq!(faults.summary(), [(Lie::Head, 20)]);
            told
        };
        assert_eq!(tell(1), tell(1));
        assert_ne!(tell(1), tell(2));
    }

    #[test]
    fn lies_end() {
        let faults = Faults::new(0);
        faults.always(Lie::Removed);
        assert!(faults.is_removed());
        faults.stop();
        assert!(!faults.is_removed());
        faults.once(Lie::Status);
        for honest in [0, 1, u32::MAX] {
            assert_ne!(faults.word(Lie::Status, honest), Some(honest));
        }
        assert_eq!(faults.told(Lie::Status), 1);
    }
}
