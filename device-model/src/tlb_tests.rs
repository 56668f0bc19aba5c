//! Tests of the TLB.

use std::collections::HashMap;

use extlb_spec::{Gpa, Iova, PAGE_SHIFT, PAGE_SIZE};
use proptest::prelude::*;

use crate::config::{Policy, TlbConfig};
use crate::tlb::{Inserted, Lookup, Scope, Tlb};

fn tlb(sets: usize, ways: usize, policy: Policy) -> Tlb {
    Tlb::new(&TlbConfig {
        sets,
        ways,
        policy,
        seed: 7,
    })
}

fn page(n: u64) -> Iova {
    Iova(n << PAGE_SHIFT)
}

fn fill(tlb: &Tlb, context: u32, n: u64) -> Inserted {
    match tlb.lookup(context, page(n), false) {
        Lookup::Hit(_) => Inserted::Kept,
        Lookup::Miss(ticket) => tlb.insert(&ticket, Gpa(n << 20), true, false),
    }
}

fn has(tlb: &Tlb, context: u32, n: u64) -> bool {
    tlb.entries(context).iter().any(|e| e.page == page(n))
}

#[test]
fn lru_keeps_what_is_used_and_fifo_does_not_care() {
    for (policy, gone, kept) in [(Policy::Lru, 1, 0), (Policy::Fifo, 0, 1)] {
        let tlb = tlb(1, 2, policy);
        fill(&tlb, 0, 0);
        fill(&tlb, 0, 1);
        assert!(matches!(tlb.lookup(0, page(0), false), Lookup::Hit(_)));
        assert_eq!(fill(&tlb, 0, 2), Inserted::Evicted);
        assert!(!has(&tlb, 0, gone) && has(&tlb, 0, kept), "{policy:?}");
    }
}

#[test]
fn random_replacement_repeats_with_its_seed() {
    let run = || {
        let tlb = tlb(1, 4, Policy::Random);
        for n in 0..100 {
            fill(&tlb, 0, n);
        }
        (0..100).filter(|n| has(&tlb, 0, *n)).collect::<Vec<_>>()
    };
    assert_eq!(run(), run());
    assert_eq!(run().len(), 4);
}

#[test]
fn a_write_needs_a_writable_and_dirty_entry() {
    let tlb = tlb(4, 2, Policy::Lru);
    fill(&tlb, 0, 5);
    let Lookup::Miss(ticket) = tlb.lookup(0, page(5), true) else {
        panic!("clean entry");
    };
    tlb.insert(&ticket, Gpa(5 << 20), true, true);
    assert!(matches!(tlb.lookup(0, page(5), true), Lookup::Hit(_)));
    assert_eq!(tlb.entries(0).len(), 1, "replaced, not doubled");
}

#[test]
fn an_insert_that_was_overtaken_is_refused() {
    for scope in [Scope::Range(3, 0..PAGE_SIZE), Scope::Context(3), Scope::All] {
        let tlb = tlb(4, 2, Policy::Lru);
        let Lookup::Miss(ticket) = tlb.lookup(3, page(0), false) else {
            panic!("empty");
        };
        let removed = tlb.remove(&scope);
        assert!(removed.fills >= ticket.fill, "it answers for the walk");
        let inserted = tlb.insert(&ticket, Gpa(0), true, true);
        assert_eq!(inserted, Inserted::Overtaken);
        assert!(tlb.entries(3).is_empty());
    }
}

#[derive(Clone, Debug)]
enum Action {
    Lookup(u32, u64, bool),
    /// Lookup, a removal while the walk is under way, insert.
    Overtaken(u32, u64, Scope),
    Remove(Scope),
}

fn scope() -> impl Strategy<Value = Scope> {
    prop_oneof![
        6 => (0..3u32, 0..40u64, 0..20u64).prop_map(|(c, start, len)| {
            Scope::Range(c, start << PAGE_SHIFT..(start + len) << PAGE_SHIFT)
        }),
        1 => (0..3u32).prop_map(Scope::Context),
        1 => Just(Scope::All),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        10 => (0..3u32, 0..40u64, any::<bool>()).prop_map(|(c, n, w)| Action::Lookup(c, n, w)),
        1 => (0..3u32, 0..40u64, scope()).prop_map(|(c, n, s)| Action::Overtaken(c, n, s)),
        3 => scope().prop_map(Action::Remove),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    /// Against a map that never forgets by itself: what the TLB has is in the map, and exactly
    /// what a scope covers leaves both. The TLB may lack what was evicted, never more.
    #[test]
    fn behaves_like_a_map_that_forgets(
        actions in prop::collection::vec(action(), 0..200),
        sets in 0..4u32, ways in 1..4usize,
        policy in prop_oneof![Just(Policy::Lru), Just(Policy::Fifo), Just(Policy::Random)],
    ) {
        let tlb = tlb(1 << sets, ways, policy);
        let mut map: HashMap<(u32, u64), (u64, bool)> = HashMap::new();
        let mut evictions = 0;
        for (frame, action) in actions.into_iter().enumerate() {
            let frame = (frame as u64) << PAGE_SHIFT;
            match action {
                Action::Lookup(c, n, write) => match tlb.lookup(c, page(n), write) {
                    Lookup::Hit(e) => {
                        prop_assert_eq!(map.get(&(c, n)), Some(&(e.frame.0, e.dirty)));
                        prop_assert!(e.dirty || !write);
                    }
                    Lookup::Miss(ticket) => {
                        let inserted = tlb.insert(&ticket, Gpa(frame), true, write);
                        prop_assert_ne!(inserted, Inserted::Overtaken);
                        evictions += u64::from(inserted == Inserted::Evicted);
                        map.insert((c, n), (frame, write));
                    }
                },
                Action::Overtaken(c, n, scope) => {
                    let ticket = tlb.lookup(c, page(n), false);
                    tlb.remove(&scope);
                    map.retain(|k, _| !scope.covers(k.0, page(k.1)));
                    if let Lookup::Miss(ticket) = ticket {
                        let touched = match &scope {
                            Scope::Range(s, _) | Scope::Context(s) => *s == c,
                            Scope::All => true,
                        };
                        let inserted = tlb.insert(&ticket, Gpa(frame), true, false);
                        prop_assert_eq!(inserted == Inserted::Overtaken, touched);
                        if !touched {
                            evictions += u64::from(inserted == Inserted::Evicted);
                            map.insert((c, n), (frame, false));
                        }
                    }
                }
                Action::Remove(scope) => {
                    let before: usize = (0..3).map(|c| tlb.entries(c).len()).sum();
                    let removed = tlb.remove(&scope);
                    let after: usize = (0..3).map(|c| tlb.entries(c).len()).sum();
                    prop_assert_eq!(removed.entries as usize, before - after);
                    map.retain(|k, _| !scope.covers(k.0, page(k.1)));
                }
            }
            let mut cached = 0;
            for c in 0..3 {
                for e in tlb.entries(c) {
                    let n = e.page.0 >> PAGE_SHIFT;
                    prop_assert_eq!(map.get(&(c, n)), Some(&(e.frame.0, e.dirty)));
                    cached += 1;
                }
            }
            prop_assert!(cached as u64 + evictions >= map.len() as u64);
        }
    }
}
