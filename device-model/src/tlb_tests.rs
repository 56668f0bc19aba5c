//! Tests of the TLB: against a model that is obvious and slow, and of its parts.

mod addresses;
mod histories;
mod model;

use extlb_spec::pte::leaf_size;
use extlb_spec::{Gpa, Iova, PAGE_SHIFT, PAGE_SIZE};

use crate::config::{Geometry, Policy, Split, TlbConfig};
use crate::tlb::{Inserted, Leaf, Lookup, Scope, Tables, Ticket, Tlb};

fn config(sets: usize, ways: usize, policy: Policy) -> TlbConfig {
    TlbConfig {
        sets,
        ways,
        policy,
        seed: 7,
        walk_cache: 8,
        split: None,
    }
}

fn tlb(sets: usize, ways: usize, policy: Policy) -> Tlb {
    Tlb::new(&config(sets, ways, policy))
}

fn page(n: u64) -> Iova {
    Iova(n << PAGE_SHIFT)
}

fn leaf(frame: u64, level: u32, dirty: bool) -> Leaf {
    Leaf {
        frame: Gpa(frame * leaf_size(level)),
        level,
        writable: true,
        dirty,
    }
}

fn miss(tlb: &Tlb, context: u32, page: Iova, write: bool) -> Ticket {
    match tlb.lookup(context, page, write) {
        Lookup::Miss(ticket) => ticket,
        Lookup::Hit(entry) => panic!("{entry:?}"),
    }
}

fn hits(tlb: &Tlb, context: u32, page: Iova) -> bool {
    matches!(tlb.lookup(context, page, false), Lookup::Hit(_))
}

fn fill(tlb: &Tlb, context: u32, n: u64, leaf: Leaf) -> Inserted {
    match tlb.lookup(context, page(n), false) {
        Lookup::Hit(_) => Inserted::Kept,
        Lookup::Miss(ticket) => tlb.insert(&ticket, leaf, &Tables::default()),
    }
}

fn remove(tlb: &Tlb, scope: &Scope) -> u64 {
    tlb.remove(scope, |_| {}).entries
}

fn has(tlb: &Tlb, context: u32, n: u64) -> bool {
    tlb.entries(context).iter().any(|e| e.base == page(n))
}

#[test]
fn the_policies_differ_in_who_goes() {
    // Four ways: fill 0 to 3, use 0 and then 1; what goes when a fifth comes.
    for (policy, gone) in [(Policy::Lru, 2), (Policy::Fifo, 0), (Policy::Plru, 2)] {
        let tlb = tlb(1, 4, policy);
        for n in 0..4 {
            fill(&tlb, 0, n, leaf(n, 1, false));
        }
        assert!(hits(&tlb, 0, page(0)) && hits(&tlb, 0, page(1)));
        assert_eq!(fill(&tlb, 0, 4, leaf(4, 1, false)), Inserted::Evicted);
        let left: Vec<u64> = (0..5).filter(|n| has(&tlb, 0, *n)).collect();
        let expected: Vec<u64> = (0..5).filter(|n| *n != gone).collect();
        assert_eq!(left, expected, "{policy:?}");
    }
}

#[test]
fn random_replacement_repeats_with_its_seed() {
    let run = |seed| {
        let tlb = Tlb::new(&TlbConfig {
            seed,
            ..config(1, 4, Policy::Random)
        });
        for n in 0..100 {
            fill(&tlb, 0, n, leaf(n, 1, false));
        }
        (0..100).filter(|n| has(&tlb, 0, *n)).collect::<Vec<_>>()
    };
    assert_eq!(run(7), run(7));
    assert_eq!(run(7).len(), 4);
    assert_ne!(run(7), run(8));
}

#[test]
fn a_write_needs_a_writable_and_dirty_entry() {
    let tlb = tlb(4, 2, Policy::Lru);
    fill(&tlb, 0, 5, leaf(5, 1, false));
    let ticket = miss(&tlb, 0, page(5), true);
    tlb.insert(&ticket, leaf(5, 1, true), &Tables::default());
    assert!(matches!(tlb.lookup(0, page(5), true), Lookup::Hit(_)));
    assert_eq!(tlb.entries(0).len(), 1, "replaced, not doubled");
}

#[test]
fn an_insert_that_was_overtaken_is_refused() {
    for scope in [Scope::Range(3, 0..PAGE_SIZE), Scope::Context(3), Scope::All] {
        let tlb = tlb(4, 2, Policy::Lru);
        let ticket = miss(&tlb, 3, page(0), false);
        let removed = tlb.remove(&scope, |_| {});
        assert!(removed.fills >= ticket.fill, "it answers for the walk");
        let tables = [Some(Gpa(0x1000)); 3];
        let inserted = tlb.insert(&ticket, leaf(0, 1, true), &tables);
        assert_eq!(inserted, Inserted::Overtaken);
        assert!(tlb.entries(3).is_empty());
        assert_eq!(tlb.table(&ticket), None, "nor the tables");
        let ticket = miss(&tlb, 3, page(0), false);
        assert!(removed.fills < ticket.fill, "nor for one that begins later");
    }
}

#[test]
fn any_part_of_a_large_entry_takes_it_all() {
    let split = Some(Split {
        size_2m: Geometry { sets: 2, ways: 2 },
        size_1g: Geometry { sets: 1, ways: 1 },
    });
    for split in [None, split] {
        for level in [2, 3] {
            let size = leaf_size(level);
            let base = 3 * leaf_size(3);
            for (start, end, gone) in [
                (base, base + PAGE_SIZE, true),
                (base + size - PAGE_SIZE, base + size, true),
                (base + size / 2, base + size / 2 + PAGE_SIZE, true),
                (base - PAGE_SIZE, base + PAGE_SIZE, true),
                (0, !(PAGE_SIZE - 1), true),
                (base - PAGE_SIZE, base, false),
                (base + size, base + size + PAGE_SIZE, false),
                (base + PAGE_SIZE, base + PAGE_SIZE, false),
            ] {
                let tlb = Tlb::new(&TlbConfig {
                    split,
                    ..config(4, 2, Policy::Lru)
                });
                let at = Iova(base + size / 4);
                let ticket = miss(&tlb, 1, at, false);
                tlb.insert(&ticket, leaf(9, level, false), &Tables::default());
                assert!(hits(&tlb, 1, Iova(base + size - 1).page()));
                assert!(!hits(&tlb, 2, at), "of another context");
                remove(&tlb, &Scope::Range(2, start..end));
                assert!(hits(&tlb, 1, at), "another context");
                let removed = remove(&tlb, &Scope::Range(1, start..end));
                assert_eq!(removed, u64::from(gone), "{level} {start:#x}..{end:#x}");
                for probe in [base, at.0, base + size - PAGE_SIZE] {
                    assert_eq!(hits(&tlb, 1, Iova(probe)), !gone);
                }
            }
        }
    }
}

#[test]
fn after_an_insert_one_entry_maps_the_address() {
    for (first, second) in [(1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2)] {
        let tlb = tlb(4, 4, Policy::Lru);
        let at = Iova(5 * leaf_size(3) + 7 * leaf_size(2));
        let ticket = miss(&tlb, 0, at, true);
        tlb.insert(&ticket, leaf(1, first, false), &Tables::default());
        let ticket = miss(&tlb, 0, at, true);
        tlb.insert(&ticket, leaf(2, second, true), &Tables::default());
        let entries = tlb.entries(0);
        assert_eq!(entries.len(), 1, "{first} {second}");
        assert_eq!(entries[0].leaf, leaf(2, second, true));
    }
}

#[test]
fn the_walk_cache_begins_as_low_as_it_can_and_forgets_with_the_leaves() {
    let tlb = tlb(4, 4, Policy::Lru);
    let at = Iova(leaf_size(4) + leaf_size(3) + leaf_size(2));
    let ticket = miss(&tlb, 1, at, false);
    assert_eq!(tlb.table(&ticket), None);
    let tables = [Some(Gpa(0x1000)), Some(Gpa(0x2000)), Some(Gpa(0x3000))];
    tlb.insert(&ticket, leaf(1, 1, false), &tables);
    let table = |context, iova: u64| {
        let ticket = miss(&tlb, context, Iova(iova), true);
        tlb.table(&ticket).map(|t| (t.level, t.at.0))
    };
    assert_eq!(table(1, at.0 + PAGE_SIZE), Some((1, 0x1000)));
    assert_eq!(table(1, at.0 + leaf_size(2)), Some((2, 0x2000)));
    assert_eq!(table(1, at.0 + leaf_size(3)), Some((3, 0x3000)));
    assert_eq!(table(1, at.0 + leaf_size(4)), None);
    assert_eq!(table(2, at.0), None, "another context");
    // A page that shares only the table of level 3 with the leaf.
    let other = at.0 + leaf_size(3);
    remove(&tlb, &Scope::Range(1, other..other + PAGE_SIZE));
    assert_eq!(table(1, at.0 + leaf_size(3)), None);
    assert_eq!(table(1, at.0 + leaf_size(2)), Some((2, 0x2000)));
    // A neighbour of the leaf.
    remove(
        &tlb,
        &Scope::Range(1, at.0 + PAGE_SIZE..at.0 + 2 * PAGE_SIZE),
    );
    assert_eq!(table(1, at.0), None);
    assert!(hits(&tlb, 1, at), "the leaf itself stays");
}
