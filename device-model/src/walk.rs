//! The walker of the device's page table.

use std::sync::atomic::Ordering;

use extlb_spec::pte::{self, Pte, bit};
use extlb_spec::{Gpa, Iova, PAGE_SIZE};

use crate::ports::{BusError, Dma};
use crate::tlb::{Leaf, Table, Tables};

/// Why there is no leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WalkError {
    /// Nothing is mapped, or it may not be written: software may mend it.
    NotMapped,
    /// Reserved bits.
    Broken,
    /// A table outside RAM.
    Bus(BusError),
}

impl From<BusError> for WalkError {
    fn from(error: BusError) -> Self {
        WalkError::Bus(error)
    }
}

/// How often one walk tries to set the bits of a leaf.
const ATTEMPTS: u32 = 64;

/// Walks from a table on, and sets the leaf's accessed bit, for a write also its dirty bit; the
/// leaf, and the tables read on the way below `from`.
///
/// Whatever the tables point at, each step is one level further down: a walk reads at most four
/// entries, not counting repeats of the last.
///
/// The bits are set by compare-and-swap on the very leaf that is then used: if software cleared
/// or changed it meanwhile, the swap fails and the entry is read again. So a leaf that software
/// took out stays out, and its last value tells whether the device used or wrote the page. A
/// guest that changes the entry each time we look cannot hold a guard for ever: after
/// [`ATTEMPTS`] the entry counts as not mapped, and a page request follows.
pub(crate) fn walk(
    memory: &dyn Dma,
    from: Table,
    iova: Iova,
    write: bool,
) -> Result<(Leaf, Tables), WalkError> {
    let Table { mut level, at } = from;
    let mut table = at;
    let mut tables = Tables::default();
    let mut attempts = 0;
    while attempts < ATTEMPTS {
        let at = Gpa(table.0 + pte::index(iova, level) * 8);
        let entry = Pte(memory.load_u64(at, Ordering::Acquire)?);
        if !entry.is_present() {
            return Err(WalkError::NotMapped);
        }
        if entry.reserved(level) != 0 {
            return Err(WalkError::Broken);
        }
        if !entry.is_leaf(level) {
            table = entry.addr();
            level -= 1;
            tables[level as usize - 1] = Some(table);
            continue;
        }
        if write && !entry.is_writable() {
            return Err(WalkError::NotMapped);
        }
        let used = entry.0 | bit::ACCESSED | if write { bit::DIRTY } else { 0 };
        if used != entry.0 && memory.compare_exchange_u64(at, entry.0, used)? != entry.0 {
            attempts += 1;
            continue;
        }
        let leaf = Leaf {
            frame: entry.addr(),
            level,
            writable: entry.is_writable(),
            dirty: used & bit::DIRTY != 0,
        };
        return Ok((leaf, tables));
    }
    Err(WalkError::NotMapped)
}

/// Calls `f` with every present leaf, as (address, entry, level), until it returns false.
///
/// Looks at no more than `tables` tables, whatever the page table looks like (it may point at
/// itself); returns whether it saw all of it. Broken and unreachable entries are left out: the device
/// cannot use them either.
pub(crate) fn leaves(
    memory: &dyn Dma,
    root: Gpa,
    mut tables: u64,
    f: &mut dyn FnMut(Iova, Pte, u32) -> bool,
) -> bool {
    // Depth is at most the number of levels, so the stack stays small.
    let mut stack = vec![(root, pte::LEVELS, 0u64, 0u64)];
    while let Some((table, level, base, first)) = stack.pop() {
        if first == 0 {
            if tables == 0 {
                return false;
            }
            tables -= 1;
        }
        for index in first..pte::ENTRIES {
            let Ok(raw) = memory.load_u64(Gpa(table.0 + index * 8), Ordering::Acquire) else {
                break;
            };
            let entry = Pte(raw);
            if !entry.is_present() || entry.reserved(level) != 0 {
                continue;
            }
            let iova = base + index * pte::leaf_size(level);
            if entry.is_leaf(level) {
                if !f(Iova(iova), entry, level) {
                    return false;
                }
            } else {
                if index + 1 < pte::ENTRIES {
                    stack.push((table, level, base, index + 1));
                }
                stack.push((entry.addr(), level - 1, iova, 0));
                break;
            }
        }
    }
    true
}

const _: () = assert!(pte::ENTRIES * 8 == PAGE_SIZE);
