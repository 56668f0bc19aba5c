//! The arithmetic of scopes and sizes, by every pair of boundaries.

use std::ops::Range;

use extlb_spec::addr::IOVA_END;
use extlb_spec::pte::{self, leaf_size};
use extlb_spec::{Iova, PAGE_SIZE};

use crate::tlb::Scope;
use crate::tlb::scope::{base, numbers, shift};

/// Every address worth a look: around every power of two from the page on, and the ends.
fn boundaries() -> Vec<u64> {
    let powers = (12..64).map(|bit| 1u64 << bit);
    let sums = [leaf_size(2) * 3, leaf_size(3) * 5, IOVA_END - leaf_size(3)];
    let mut all: Vec<u64> = powers
        .chain(sums)
        .flat_map(|at| [at.wrapping_sub(PAGE_SIZE), at, at.wrapping_add(PAGE_SIZE)])
        .chain([0, !(PAGE_SIZE - 1)])
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// By 128 bits, in which nothing overflows.
fn overlap(range: &Range<u64>, base: u64, size: u64) -> bool {
    let (start, end) = (u128::from(range.start), u128::from(range.end));
    let (base, top) = (u128::from(base), u128::from(base) + u128::from(size));
    start.max(base) < end.min(top)
}

#[test]
fn a_range_touches_what_it_overlaps() {
    let all = boundaries();
    for start in &all {
        for end in &all {
            let range = *start..*end;
            let scope = Scope::Range(1, range.clone());
            for at in &all {
                for level in 1..=4 {
                    let base = at & !(leaf_size(level) - 1);
                    let expected = overlap(&range, base, leaf_size(level));
                    let size = leaf_size(level);
                    assert_eq!(
                        scope.touches(1, Iova(base), size),
                        expected,
                        "{range:x?} {base:#x} {level}"
                    );
                    assert!(!scope.touches(2, Iova(base), size));
                }
                let page = overlap(&range, *at, PAGE_SIZE);
                assert_eq!(scope.covers(1, Iova(*at)), page, "{range:x?} {at:#x}");
            }
        }
    }
    assert!(Scope::Context(1).covers(1, Iova(u64::MAX)) && !Scope::Context(1).covers(0, Iova(0)));
    assert!(Scope::All.covers(9, Iova(0)));
}

#[test]
fn numbers_are_those_of_the_pieces_that_a_range_touches() {
    let all = boundaries();
    for start in &all {
        for end in &all {
            let range = *start..*end;
            for level in 1..=4 {
                let numbers = numbers(&range, level);
                assert!(numbers.end <= IOVA_END >> shift(level));
                assert!(numbers.start <= numbers.end, "no subtraction overflows");
                // The pieces at both edges and their neighbours decide.
                let edges = [
                    numbers.start,
                    numbers.end,
                    start >> shift(level),
                    end >> shift(level),
                ];
                for near in edges
                    .into_iter()
                    .flat_map(|n| [n.wrapping_sub(1), n, n + 1])
                {
                    let last = IOVA_END >> shift(level);
                    if near >= last {
                        continue;
                    }
                    let touched = overlap(&range, near << shift(level), leaf_size(level));
                    assert_eq!(
                        numbers.contains(&near),
                        touched,
                        "{range:x?} {level} {near}"
                    );
                }
            }
        }
    }
}

#[test]
fn every_address_is_the_sum_of_its_parts() {
    for at in boundaries().into_iter().filter(|at| *at < IOVA_END) {
        for at in [at, at + 1, at + PAGE_SIZE - 1] {
            let iova = Iova(at);
            let parts: u64 = (1..=4).map(|l| pte::index(iova, l) * leaf_size(l)).sum();
            assert_eq!(parts + iova.page_offset(), at);
            for level in 1..=4 {
                assert!(pte::index(iova, level) < pte::ENTRIES);
                assert_eq!(leaf_size(level), 1 << shift(level));
                let base = base(iova, level);
                assert!(base.0 <= at && at - base.0 < leaf_size(level));
                assert!(base.is_aligned(leaf_size(level)));
            }
        }
    }
}
