//! Addresses of the TLB: what a removal covers, and the sizes of leaves.

use std::ops::Range;

use extlb_spec::addr::IOVA_END;
use extlb_spec::pte::leaf_size;
use extlb_spec::{Iova, PAGE_SHIFT, PAGE_SIZE};
use serde::{Deserialize, Serialize};

/// What a removal covers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Scope {
    /// A half-open range of addresses of a context.
    Range(u32, Range<u64>),
    Context(u32),
    All,
}

impl Scope {
    /// Whether a page of 4 KiB is covered.
    pub(crate) fn covers(&self, context: u32, page: Iova) -> bool {
        self.touches(context, page, PAGE_SIZE)
    }

    /// Whether any part of `[base, base + size)` is covered.
    pub(crate) fn touches(&self, context: u32, base: Iova, size: u64) -> bool {
        match self {
            Scope::Range(c, range) => {
                // By subtraction: the sum may not fit.
                *c == context
                    && range.start.max(base.0) < range.end
                    && range.start.saturating_sub(base.0) < size
            }
            Scope::Context(c) => *c == context,
            Scope::All => true,
        }
    }
}

/// log2 of what an entry of `level` maps.
pub(crate) const fn shift(level: u32) -> u32 {
    PAGE_SHIFT + 9 * (level - 1)
}

/// The start of the piece of `level`'s size that holds an address.
pub(crate) const fn base(iova: Iova, level: u32) -> Iova {
    Iova(iova.0 & !(leaf_size(level) - 1))
}

/// Numbers of the pieces of `level`'s size that a range touches, inside the address space.
pub(crate) fn numbers(range: &Range<u64>, level: u32) -> Range<u64> {
    let (start, end) = (range.start, range.end.min(IOVA_END));
    if start >= end {
        return 0..0;
    }
    start >> shift(level)..((end - 1) >> shift(level)) + 1
}
