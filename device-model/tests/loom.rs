//! The guard and TLB files themselves, compiled against the model checker's primitives: every
//! interleaving of an access with a shootdown, and of an access with a stop.
#![allow(dead_code)] // the two files have more than is modelled

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};
    pub(crate) use loom::sync::{Mutex, MutexGuard};

    pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap()
    }
}

mod config {
    pub(crate) use extlb_device::config::{Policy, TlbConfig};
}

#[path = "../src/guard.rs"]
mod guard;
#[path = "../src/tlb.rs"]
mod tlb;

use std::sync::Arc as StdArc;

use extlb_spec::{Gpa, Iova};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use config::{Policy, TlbConfig};
use guard::Guards;
use tlb::{Lookup, Scope, Tlb};

const PAGE: Iova = Iova(0x1000);
const OLD: Gpa = Gpa(0x5000);

struct Model {
    guards: Guards,
    tlb: Tlb,
    /// The leaf in RAM: the frame, or 0.
    leaf: AtomicU64,
    /// The kernel has reused the frame.
    freed: AtomicBool,
    /// The gate.
    running: AtomicBool,
}

impl Model {
    fn new() -> Arc<Self> {
        let config = TlbConfig {
            sets: 1,
            ways: 1,
            policy: Policy::Fifo,
            seed: 1,
        };
        Arc::new(Self {
            guards: Guards::with_lanes(1),
            tlb: Tlb::with_contexts(&config, 1),
            leaf: AtomicU64::new(OLD.0),
            freed: AtomicBool::new(false),
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
            Lookup::Hit(entry) => Some(entry.frame),
            Lookup::Miss(ticket) => {
                let leaf = self.leaf.load(Ordering::Acquire);
                (leaf != 0).then(|| {
                    self.tlb.insert(&ticket, Gpa(leaf), false, false);
                    Gpa(leaf)
                })
            }
        };
        if frame == Some(OLD) {
            // THE RULE.
            assert!(!self.freed.load(Ordering::Relaxed), "a page that was freed");
        }
        assert!(!guard.is_outlived());
    }

    fn drain(&self) {
        let mut drain = self.guards.begin();
        while !self.guards.poll(&mut drain) {
            loom::thread::yield_now();
        }
        self.guards.acknowledge(&drain);
    }

    /// One shootdown, in the order of the rule.
    fn shoot_down(&self) {
        self.leaf.store(0, Ordering::Release);
        self.tlb.remove(&Scope::Range(0, 0x1000..0x2000));
        self.drain();
        self.freed.store(true, Ordering::Relaxed);
    }
}

fn check(f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(f);
}

#[test]
fn no_access_uses_a_page_after_its_shootdown() {
    check(|| {
        let model = Model::new();
        let engine = model.clone();
        let thread = loom::thread::spawn(move || {
            engine.access();
            engine.access();
        });
        model.shoot_down();
        thread.join().unwrap();
    });
}

#[test]
fn no_access_begins_after_a_stop() {
    check(|| {
        let model = Model::new();
        let engine = model.clone();
        let thread = loom::thread::spawn(move || engine.access());
        // A stop has no lock in common with the access: this is the fences' case.
        model.running.store(false, Ordering::SeqCst);
        model.drain();
        model.freed.store(true, Ordering::Relaxed);
        thread.join().unwrap();
    });
}

/// The model can fail: without the drain it finds the access that is still under way.
#[test]
fn the_model_sees_a_missing_drain() {
    let failed = StdArc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = failed.clone();
    let result = std::panic::catch_unwind(move || {
        check(|| {
            let model = Model::new();
            let engine = model.clone();
            let thread = loom::thread::spawn(move || engine.access());
            model.leaf.store(0, Ordering::Release);
            model.tlb.remove(&Scope::All);
            model.freed.store(true, Ordering::Relaxed);
            thread.join().unwrap();
        });
    });
    failed.store(result.is_err(), std::sync::atomic::Ordering::SeqCst);
    assert!(seen.load(std::sync::atomic::Ordering::SeqCst));
}

/// A guard tells when a drain that should have waited for it was acknowledged, and only then.
#[test]
fn a_guard_knows_that_it_was_outlived() {
    check(|| {
        let model = Model::new();
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
