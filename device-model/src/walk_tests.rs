//! Tests of the search for leaves.

use std::sync::atomic::Ordering;

use extlb_spec::pte::{self, Pte, bit};
use extlb_spec::{Gpa, Iova};

use crate::GuestRam;
use crate::ports::Dma;
use crate::walk::leaves;

const ROOT: Gpa = Gpa(0x1000);

fn link(ram: &GuestRam, table: u64, index: u64, entry: u64) {
    ram.store_u64(Gpa(table + index * 8), entry, Ordering::Relaxed)
        .expect("the table is in RAM");
}

/// Five tables: below the root a branch of four with leaves at both ends, and a 1 GiB leaf
/// beside it. What `leaves` finds, and whether that is all.
fn found(ram: &GuestRam, tables: u64) -> (Vec<(u64, u32)>, bool) {
    let mut found = Vec::new();
    let mut take = |iova: Iova, _: Pte, level: u32| {
        found.push((iova.0, level));
        found.len() < 9
    };
    let all = leaves(ram, ROOT, tables, &mut take);
    (found, all)
}

#[test]
fn leaves_are_found_in_order_and_tables_are_counted() {
    let ram = GuestRam::anonymous(&[(Gpa(0), 0x10000)]).expect("maps");
    link(&ram, 0x1000, 0, 0x2000 | bit::PRESENT);
    link(&ram, 0x2000, 0, 0x3000 | bit::PRESENT);
    link(&ram, 0x2000, 1, (1 << 30) | bit::PRESENT | bit::LEAF);
    link(&ram, 0x3000, 0, 0x4000 | bit::PRESENT);
    link(&ram, 0x3000, 511, 0x5000 | bit::PRESENT);
    for index in [0, 511] {
        link(&ram, 0x4000, index, 0x6000 | bit::PRESENT);
        link(&ram, 0x5000, index, 0x7000 | bit::PRESENT);
    }
    let last = 511 << 21;
    let expected = vec![
        (0, 1),
        (511 << 12, 1),
        (last, 1),
        (last + (511 << 12), 1),
        (1 << 30, 3),
    ];
    assert_eq!(found(&ram, 5), (expected.clone(), true));
    // One table too few: the fifth is not looked at, nor anything after it.
    assert_eq!(found(&ram, 4), (expected[..2].to_vec(), false));
    assert_eq!(found(&ram, 3), (vec![], false));
}

/// 2^27 tables with nothing in them: only their number can end the search.
#[test]
fn a_tree_of_empty_tables_is_left_after_as_many_as_asked_for() {
    let ram = GuestRam::anonymous(&[(Gpa(0), 0x10000)]).expect("maps");
    for table in [0x1000, 0x2000, 0x3000] {
        for index in 0..pte::ENTRIES {
            link(&ram, table, index, (table + 0x1000) | bit::PRESENT);
        }
    }
    assert_eq!(found(&ram, 2000), (vec![], false));
}
