//! Which memory answers at which bus address: ranges, ordered and apart.
//!
//! Behind a guest's IOMMU there is a range for each of its leaves: tens of thousands. A change to
//! a copy of the map touches little of it, see [`Chunks`]; neighbours that are neighbours in their
//! memory as well are one range.

use std::ops::Range;
use std::sync::Arc;

use super::chunks::{Chunks, Piece};
use super::indirect::Indirect;
use vm_memory::{MmapRegion, VolatileMemory as _, VolatileSlice};

/// Ranges that can exist at once. VFIO allows 65,535 mappings by default; the rest is for those
/// that are cut.
pub(crate) const MAX_RANGES: usize = 1 << 17;

/// What the device may do with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rights {
    pub(crate) read: bool,
    pub(crate) write: bool,
}

impl Rights {
    pub(crate) const READ: Self = Self {
        read: true,
        write: false,
    };
    pub(crate) const WRITE: Self = Self {
        read: false,
        write: true,
    };
    pub(crate) const ALL: Self = Self {
        read: true,
        write: true,
    };

    fn cover(self, needed: Self) -> bool {
        (self.read || !needed.read) && (self.write || !needed.write)
    }
}

/// What holds memory.
#[derive(Clone, Debug)]
pub(crate) enum Store {
    Mapped(Arc<MmapRegion>),
    Asked(Arc<dyn Indirect>),
}

impl Store {
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Store::Mapped(a), Store::Mapped(b)) => Arc::ptr_eq(a, b),
            (Store::Asked(a), Store::Asked(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// Memory that was looked for.
pub(crate) enum Found<'a> {
    Mapped(VolatileSlice<'a>),
    /// To be asked for, at this offset.
    Asked(&'a Arc<dyn Indirect>, u64),
}

/// The memory of a range.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) store: Store,
    /// Where in `store` the range begins, in bytes.
    pub(crate) offset: u64,
    pub(crate) rights: Rights,
}

impl Target {
    /// The memory `by` bytes further on.
    fn after(&self, by: u64) -> Self {
        Self {
            // Within the store, which a `u64` can address.
            offset: self.offset + by,
            ..self.clone()
        }
    }

    /// Whether `next` goes on where `len` bytes of this end.
    fn continues(&self, len: u64, next: &Self) -> bool {
        self.store.is(&next.store) && self.offset + len == next.offset && self.rights == next.rights
    }
}

/// How many ranges, or parts of them, were taken out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "accesses to what was taken out may be under way"]
pub(crate) struct Removed(usize);

impl Removed {
    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// The ranges of the moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ranges<const CHUNK: usize = 256> {
    pieces: Chunks<CHUNK>,
}

impl<const CHUNK: usize> Ranges<CHUNK> {
    /// Adds a range; where it overlaps others, it takes their place. `None`: there are too many.
    pub(crate) fn insert(&mut self, range: Range<u64>, mut target: Target) -> Option<Removed> {
        // It can add itself and the rest of one that it cuts.
        if self.pieces.len() + 2 > MAX_RANGES {
            return None;
        }
        let removed = self.remove(range.clone());
        let (mut start, mut end) = (range.start, range.end);
        if let Some(before) = self.before(start)
            && before.end == start
            && before.target.continues(start - before.start, &target)
        {
            (start, target) = (before.start, before.target.clone());
            self.pieces.remove(start);
        }
        if let Some(next) = self.pieces.at_or_before(end)
            && next.start == end
            && target.continues(end - start, &next.target)
        {
            let next = end;
            end = self.pieces.remove(next).map_or(end, |next| next.end);
        }
        self.pieces.insert(Piece { start, end, target });
        Some(removed)
    }

    /// Takes a range out, also of the middle of others.
    pub(crate) fn remove(&mut self, range: Range<u64>) -> Removed {
        let mut removed = Removed::default();
        if range.is_empty() {
            return removed;
        }
        // The last first: all that begin in the range, and the one that reaches into it.
        while let Some(last) = self.before(range.end).filter(|p| p.end > range.start) {
            let start = last.start;
            let Some(piece) = self.pieces.remove(start) else {
                break;
            };
            removed.0 += 1;
            if piece.end > range.end && self.pieces.len() < MAX_RANGES {
                // A client that cuts without end loses memory rather than fill ours.
                let target = piece.target.after(range.end - start);
                let (start, end) = (range.end, piece.end);
                self.pieces.insert(Piece { start, end, target });
            }
            if start < range.start {
                let end = range.start;
                self.pieces.insert(Piece { end, ..piece });
                break;
            }
        }
        removed
    }

    /// Takes everything out.
    pub(crate) fn clear(&mut self) -> Removed {
        Removed(std::mem::take(&mut self.pieces).len())
    }

    /// The last range that begins below `at`.
    fn before(&self, at: u64) -> Option<&Piece> {
        self.pieces.at_or_before(at.checked_sub(1)?)
    }

    /// Whether nothing is there.
    pub(crate) fn is_free(&self, range: &Range<u64>) -> bool {
        let last = self.before(range.end);
        last.is_none_or(|piece| piece.end <= range.start)
    }

    /// The `len` bytes at `at`, if one range holds them all and allows it.
    pub(crate) fn find(&self, at: u64, len: usize, needed: Rights) -> Option<Found<'_>> {
        let piece = self.pieces.at_or_before(at)?;
        let end = at.checked_add(len as u64)?;
        if end > piece.end || !piece.target.rights.cover(needed) {
            return None;
        }
        let offset = piece.target.offset + (at - piece.start);
        match &piece.target.store {
            Store::Asked(by) => Some(Found::Asked(by, offset)),
            Store::Mapped(region) => {
                let offset = usize::try_from(offset).ok()?;
                region.get_slice(offset, len).ok().map(Found::Mapped)
            }
        }
    }

    /// The same, if it is mapped.
    #[cfg(test)]
    fn slice(&self, at: u64, len: usize, needed: Rights) -> Option<VolatileSlice<'_>> {
        match self.find(at, len, needed)? {
            Found::Mapped(slice) => Some(slice),
            Found::Asked(..) => None,
        }
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.pieces.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 24;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(Range<u64>, usize, u64, bool),
        Remove(Range<u64>),
    }

    fn range() -> impl Strategy<Value = Range<u64>> {
        (0..PAGES, 0..=8u64).prop_map(|(start, len)| start..(start + len).min(PAGES))
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (range(), 0..2usize, 0..4u64, any::<bool>())
                .prop_map(|(range, region, shift, write)| Step::Insert(range, region, shift, write)),
            1 => range().prop_map(Step::Remove),
        ]
    }

    proptest! {
        /// The tree says what a plain table of pages says, and has no more ranges than needed.
        #[test]
        fn ranges_are_a_table_of_pages(steps in prop::collection::vec(step(), 1..40)) {
            let len = (PAGES as usize + 8) << 12;
            let regions = [(); 2].map(|()| Arc::new(MmapRegion::<()>::new(len).unwrap()));
            let mut ranges = Ranges::<3>::default();
            let mut table = [None; PAGES as usize];
            let bytes = |r: &Range<u64>| r.start << 12..r.end << 12;
            for step in steps {
                match step {
                    Step::Insert(r, region, shift, write) if !r.is_empty() => {
                        let target = Target {
                            store: Store::Mapped(regions[region].clone()),
                            // Often equal to the address: neighbours then merge.
                            offset: (r.start + shift) << 12,
                            rights: if write { Rights::ALL } else { Rights::READ },
                        };
                        let removed = ranges.insert(bytes(&r), target).unwrap();
                        let pages = &mut table[r.start as usize..r.end as usize];
                        prop_assert_eq!(removed.is_empty(), pages.iter().all(Option::is_none));
                        for (page, at) in pages.iter_mut().zip(r.start + shift..) {
                            *page = Some((region, at, write));
                        }
                    }
                    Step::Insert(..) => {}
                    Step::Remove(r) => {
                        let removed = ranges.remove(bytes(&r));
                        let pages = &mut table[r.start as usize..r.end.max(r.start) as usize];
                        prop_assert_eq!(removed.is_empty(), pages.iter().all(Option::is_none));
                        pages.fill(None);
                    }
                }
                for (page, expected) in (0..).zip(&table) {
                    for (needed, write) in [(Rights::READ, false), (Rights::WRITE, true)] {
                        let found = ranges.slice(page << 12, 4096, needed);
                        let found = found.map(|s| s.ptr_guard().as_ptr().addr());
                        let expected = expected.filter(|(.., w)| *w || !write);
                        let expected = expected
                            .map(|(region, at, _)| regions[region].as_ptr().addr() + (at << 12) as usize);
                        prop_assert_eq!(found, expected, "page {}", page);
                    }
                }
                let mut runs = 0;
                let mut last = None;
                for page in table {
                    let next = last.map(|(region, at, write)| (region, at + 1, write));
                    runs += usize::from(page.is_some() && page != next);
                    last = page;
                }
                prop_assert_eq!(ranges.len(), runs);
            }
        }
    }

    #[test]
    fn the_number_of_ranges_is_bounded_and_what_is_taken_out_is_gone() {
        let region = Arc::new(MmapRegion::new(MAX_RANGES << 13).unwrap());
        let target = Target {
            store: Store::Mapped(region),
            offset: 0,
            rights: Rights::ALL,
        };
        let mut ranges: Ranges = Ranges::default();
        let whole = 0..(MAX_RANGES as u64) << 13;
        assert!(ranges.insert(whole, target.clone()).is_some());
        // Every other page.
        for page in 0..MAX_RANGES as u64 {
            let at = page << 13;
            assert!(!ranges.remove(at..at + 4096).is_empty() || page > 0);
            assert!(ranges.slice(at, 1, Rights::READ).is_none());
        }
        assert!(ranges.len() <= MAX_RANGES);
        assert!(ranges.insert(1 << 50..(1 << 50) + 4096, target).is_none());
        assert!(!ranges.clear().is_empty());
        assert!(ranges.slice(4096, 1, Rights::READ).is_none());
    }
}
