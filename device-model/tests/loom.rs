//! The guard, TLB and handshake files themselves, compiled against the model checker's
//! primitives: every interleaving of an access with a shootdown, of an access with a stop, and of
//! a sleeper with a submitter.
//!
//! Each line that the proof stands on is a `Pillar`. The checker takes them away one by one, and
//! has to find a history in which the device fails.
#![allow(dead_code)] // the files have more than is modelled

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};
    pub(crate) use loom::sync::{Mutex, MutexGuard};

    pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap()
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum Pillar {
        EnterFence,
        DrainFence,
        Generation,
        Sequence,
        SleepFence,
    }

    std::thread_local! {
        /// The pillar that is away. The checker runs all threads of a model on one of ours.
        pub(crate) static AWAY: std::cell::Cell<Option<Pillar>> = const { std::cell::Cell::new(None) };
    }

    pub(crate) fn stands(pillar: Pillar) -> bool {
        AWAY.get() != Some(pillar)
    }
}

mod config {
    pub(crate) use extlb_device::config::{Geometry, Policy, TlbConfig};
}

#[path = "stand_ins/state.rs"]
mod state;

#[path = "../src/guard.rs"]
mod guard;
#[path = "../src/handshake.rs"]
mod handshake;
#[path = "../src/tlb/mod.rs"]
mod tlb;

use extlb_spec::{Gpa, Iova};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use config::{Policy, TlbConfig};
use guard::Guards;
use sync::Pillar;
use tlb::{Leaf, Lookup, Scope, Tables, Tlb};

const PAGE: Iova = Iova(0x1000);
const OLD: Gpa = Gpa(0x5000);
/// A table of level 1, and the one in its place after it was freed.
const TABLE: Gpa = Gpa(0x7000);

struct Model {
    guards: Guards,
    tlb: Tlb,
    /// The leaf in RAM: the frame, or 0.
    leaf: AtomicU64,
    /// The way to the table of the leaf in RAM: the table, or 0.
    table: AtomicU64,
    /// The kernel has reused the frame.
    freed: AtomicBool,
    /// The kernel has reused the table.
    table_freed: AtomicBool,
    /// The gate.
    running: AtomicBool,
}

impl Model {
    fn new(walk_cache: usize) -> Arc<Self> {
        let config = TlbConfig {
            sets: 1,
            ways: 1,
            policy: Policy::Fifo,
            seed: 1,
            walk_cache,
            split: None,
        };
        Arc::new(Self {
            guards: Guards::with_lanes(1),
            tlb: Tlb::with_contexts(&config, 1),
            leaf: AtomicU64::new(OLD.0),
            table: AtomicU64::new(TABLE.0),
            freed: AtomicBool::new(false),
            table_freed: AtomicBool::new(false),
            running: AtomicBool::new(true),
        })
    }

    /// One access, as the request path makes it.
    fn access(&self) {
        let mut lane = self.guards.lane().expect("one thread, one lane");
        let guard = lane.enter();
        if !self.running.load(Ordering::SeqCst) {
            return;
        }
        let frame = match self.tlb.lookup(0, PAGE, false) {
            Lookup::Hit(entry) => Some(entry.leaf.frame),
            Lookup::Miss(ticket) => self.walk(&ticket),
        };
        if frame == Some(OLD) {
            // THE RULE.
            assert!(!self.freed.load(Ordering::Relaxed), "a page that was freed");
        }
        // With a pillar away the rule itself has to break, not only what watches it.
        if sync::AWAY.get().is_none() {
            assert!(!guard.is_outlived());
        }
    }

    /// As walk.rs does, by two levels.
    fn walk(&self, ticket: &tlb::Ticket) -> Option<Gpa> {
        let cached = self.tlb.table(ticket).map(|t| t.at);
        let table = match cached {
            Some(table) => table,
            None => Gpa(self.table.load(Ordering::Acquire)),
        };
        if table.0 == 0 {
            return None;
        }
        assert!(
            !self.table_freed.load(Ordering::Relaxed),
            "a table that was freed"
        );
        let frame = Gpa(self.leaf.load(Ordering::Acquire));
        if frame.0 == 0 {
            return None;
        }
        let leaf = Leaf {
            frame,
            level: 1,
            writable: false,
            dirty: false,
        };
        let mut tables = Tables::default();
        tables[0] = cached.is_none().then_some(table);
        self.tlb.insert(ticket, leaf, &tables);
        Some(frame)
    }

    fn drain(&self) {
        let mut drain = self.guards.begin();
        while !self.guards.poll(&mut drain) {
            loom::thread::yield_now();
        }
        self.guards.acknowledge(&drain);
    }

    fn invalidate(&self) {
        self.tlb.remove(&Scope::Range(0, 0x1000..0x2000), |_| {});
        self.drain();
    }

    /// One shootdown, in the order of the rule.
    fn shoot_down(&self) {
        self.leaf.store(0, Ordering::Release);
        self.invalidate();
        self.freed.store(true, Ordering::Relaxed);
    }

    /// Takes the table out whose last leaf is gone, and frees it.
    fn free_table(&self) {
        self.table.store(0, Ordering::Release);
        self.invalidate();
        self.table_freed.store(true, Ordering::Relaxed);
    }
}

fn check(f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(f);
}

/// The model fails when `pillar` is away.
fn fails_without(pillar: Pillar, f: impl Fn() + Sync + Send + 'static) {
    sync::AWAY.set(Some(pillar));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(f)));
    sync::AWAY.set(None);
    assert!(result.is_err(), "nobody misses {pillar:?}");
}

fn accesses_and_a_shootdown(accesses: usize) -> impl Fn() + Sync + Send + 'static {
    move || {
        let model = Model::new(0);
        let engine = model.clone();
        let thread = loom::thread::spawn(move || {
            for _ in 0..accesses {
                engine.access();
            }
        });
        model.shoot_down();
        thread.join().unwrap();
    }
}

/// The translation is cached already.
fn a_hit_and_a_shootdown() {
    let model = Model::new(0);
    model.access();
    let engine = model.clone();
    let thread = loom::thread::spawn(move || engine.access());
    model.shoot_down();
    thread.join().unwrap();
}

fn a_walk_and_the_end_of_a_table() {
    let model = Model::new(1);
    model.access();
    model.leaf.store(0, Ordering::Release);
    let engine = model.clone();
    let thread = loom::thread::spawn(move || engine.access());
    model.free_table();
    thread.join().unwrap();
}

#[test]
fn no_access_uses_a_page_after_its_shootdown() {
    check(accesses_and_a_shootdown(2));
}

#[test]
fn no_hit_uses_a_page_after_its_shootdown() {
    check(a_hit_and_a_shootdown);
}

#[test]
fn no_walk_uses_a_table_that_was_freed() {
    check(a_walk_and_the_end_of_a_table);
}

#[test]
fn the_fence_of_an_access_is_missed() {
    fails_without(Pillar::EnterFence, a_hit_and_a_shootdown);
    fails_without(Pillar::EnterFence, an_access_and_a_stop);
}

#[test]
fn the_fence_of_a_drain_is_missed() {
    fails_without(Pillar::DrainFence, a_hit_and_a_shootdown);
    fails_without(Pillar::DrainFence, an_access_and_a_stop);
}

#[test]
fn the_generation_is_missed() {
    fails_without(Pillar::Generation, accesses_and_a_shootdown(2));
}

fn an_access_and_a_stop() {
    let model = Model::new(0);
    let engine = model.clone();
    let thread = loom::thread::spawn(move || engine.access());
    // A stop has no lock in common with the access.
    model.running.store(false, Ordering::SeqCst);
    model.drain();
    model.freed.store(true, Ordering::Relaxed);
    thread.join().unwrap();
}

#[test]
fn no_access_begins_after_a_stop() {
    check(an_access_and_a_stop);
}

/// One way of one set changes from one page to another, and back: a reader gets what was inserted
/// together, or nothing.
fn a_lookup_and_a_change() {
    let model = Model::new(0);
    let put = |n: u64| {
        let Lookup::Miss(ticket) = model.tlb.lookup(0, Iova(n << 12), false) else {
            panic!("one way only");
        };
        let leaf = Leaf {
            frame: Gpa(ticket.fill << 12),
            level: 1,
            writable: true,
            dirty: true,
        };
        model.tlb.insert(&ticket, leaf, &Tables::default());
    };
    put(1);
    let reader = model.clone();
    let thread = loom::thread::spawn(move || {
        if let Lookup::Hit(entry) = reader.tlb.lookup(0, PAGE, false) {
            assert_eq!(entry.leaf.frame.0, entry.fill << 12, "of one fill");
        }
    });
    put(2);
    put(1);
    thread.join().unwrap();
}

#[test]
fn no_lookup_mixes_two_entries() {
    check(a_lookup_and_a_change);
}

#[test]
fn the_sequence_is_missed() {
    fails_without(Pillar::Sequence, a_lookup_and_a_change);
}

/// The numbers of fills and removals keep what the oracle's verdicts stand on: a fill that a
/// removal answers for is not found after it, and one that it does not answer for has seen the
/// cleared leaf.
#[test]
fn the_numbers_of_fills_accuse_nobody_who_is_innocent() {
    check(|| {
        let model = Model::new(0);
        let engine = model.clone();
        let thread = loom::thread::spawn(move || {
            let Lookup::Miss(ticket) = engine.tlb.lookup(0, PAGE, false) else {
                panic!("empty");
            };
            let old = engine.leaf.load(Ordering::Acquire) != 0;
            let leaf = Leaf {
                frame: OLD,
                level: 1,
                writable: true,
                dirty: true,
            };
            engine.tlb.insert(&ticket, leaf, &Tables::default());
            (ticket.fill, old)
        });
        model.leaf.store(0, Ordering::Release);
        let removed = model.tlb.remove(&Scope::Context(0), |_| {});
        for entry in model.tlb.entries(0) {
            assert!(entry.fill > removed.fills, "an innocent entry");
        }
        let (fill, old) = thread.join().unwrap();
        assert!(!old || fill <= removed.fills, "nobody answers for it");
        for entry in model.tlb.entries(0) {
            assert!(entry.fill > removed.fills, "an entry that survived");
        }
    });
}

/// The model can fail: without the drain it finds the access that is still under way.
#[test]
fn the_model_sees_a_missing_drain() {
    let result = std::panic::catch_unwind(|| {
        check(|| {
            let model = Model::new(0);
            let engine = model.clone();
            let thread = loom::thread::spawn(move || engine.access());
            model.leaf.store(0, Ordering::Release);
            model.tlb.remove(&Scope::All, |_| {});
            model.freed.store(true, Ordering::Relaxed);
            thread.join().unwrap();
        });
    });
    assert!(result.is_err());
}

/// A guard tells when a drain that should have waited for it was acknowledged, and only then.
#[test]
fn a_guard_knows_that_it_was_outlived() {
    check(|| {
        let model = Model::new(0);
        let before = model.guards.begin();
        let mut lane = model.guards.lane().expect("free");
        let guard = lane.enter();
        model.guards.acknowledge(&before);
        assert!(!guard.is_outlived(), "a drain that began before it");
        let mut during = model.guards.begin();
        assert!(!model.guards.poll(&mut during));
        model.guards.acknowledge(&during);
        assert!(guard.is_outlived());
        drop(guard);
        assert!(model.guards.poll(&mut during));
    });
}

/// A submitter and a device that falls asleep; `fenced`: the submitter keeps its side.
fn a_submission_and_a_sleep(fenced: bool) -> impl Fn() + Sync + Send + 'static {
    move || {
        let words = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
        let device = words.clone();
        let sleeper = loom::thread::spawn(move || {
            let (tail, need_kick) = &*device;
            let ask = |_: &mut ()| {
                need_kick.store(1, Ordering::Relaxed);
                Ok::<(), ()>(())
            };
            let look = |_: &mut ()| Ok(tail.load(Ordering::Acquire));
            // Whether it sleeps.
            handshake::before_sleep(&mut (), ask, look) == Ok(0)
        });
        let (tail, need_kick) = &*words;
        tail.store(1, Ordering::Release);
        if fenced {
            fence(Ordering::SeqCst);
        }
        let kicks = need_kick.load(Ordering::Relaxed) != 0;
        let sleeps = sleeper.join().unwrap();
        assert!(kicks || !sleeps, "work that nobody looks at");
    }
}

#[test]
fn no_submission_is_slept_over() {
    check(a_submission_and_a_sleep(true));
}

#[test]
fn either_fence_of_the_handshake_is_missed() {
    fails_without(Pillar::SleepFence, a_submission_and_a_sleep(true));
    let result = std::panic::catch_unwind(|| check(a_submission_and_a_sleep(false)));
    assert!(result.is_err(), "the submitter's");
}
