//! Which bus addresses are taken.

use std::ops::Range;

use extlb_spec::addr::GPA_BITS;
use extlb_spec::pte::leaf_size;
use extlb_spec::{Gpa, Iova, PAGE_SIZE};
use nix::errno::Errno;
use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};

use crate::error::{Error, Result};

/// The bus addresses of a device.
#[derive(Debug)]
pub(super) struct BusSpace {
    ranges: Vec<AddressAllocator>,
}

/// Bus addresses that were handed out. They are lost if it is dropped, not reused: giving them
/// back takes somebody who knows that the device has forgotten them.
#[derive(Debug)]
pub(super) struct Slot {
    /// In which range.
    range: usize,
    key: RangeInclusive,
    /// Where the memory goes.
    pub(super) start: Gpa,
}

impl BusSpace {
    /// All of `ranges`, as far as a page table entry can hold it.
    pub(super) fn new(ranges: Vec<Range<Gpa>>) -> Result<Self> {
        let usable = |range: Range<Gpa>| {
            let start = range.start.0.checked_next_multiple_of(PAGE_SIZE)?;
            let end = range.end.page().0.min(1 << GPA_BITS);
            AddressAllocator::new(start, end.checked_sub(start)?).ok()
        };
        let ranges: Vec<_> = ranges.into_iter().filter_map(usable).collect();
        match ranges.is_empty() {
            true => Err(Error::Argument(
                "this hardware has no bus addresses to map at",
            )),
            false => Ok(Self { ranges }),
        }
    }

    /// Addresses for the whole pages `[addr, addr + len)`. If whole 2 MiB leaves are in there, both
    /// are congruent modulo 2 MiB, so that the leaves can be used.
    pub(super) fn allocate(&mut self, addr: Iova, len: u64) -> Result<Slot> {
        let large = leaf_size(2);
        let full = Error::Call {
            call: "allocation of bus addresses",
            errno: Errno::ENOSPC,
        };
        let end = addr.0.checked_add(len);
        let first_large = addr.0.checked_next_multiple_of(large);
        let has_large = match (end, first_large.and_then(|first| first.checked_add(large))) {
            (Some(end), Some(after)) => after <= end,
            _ => false,
        };
        // What is left free in front is less than a leaf.
        let (align, offset) = match has_large {
            true => (large, addr.0 & (large - 1)),
            false => (PAGE_SIZE, 0),
        };
        let size = len.checked_add(offset).ok_or(full.clone())?;
        for (range, allocator) in self.ranges.iter_mut().enumerate() {
            if let Ok(key) = allocator.allocate(size, align, AllocPolicy::FirstMatch) {
                let start = Gpa(key.start() + offset);
                return Ok(Slot { range, key, start });
            }
        }
        Err(full)
    }

    /// Takes addresses back that are not mapped any more, and that no translation of the device
    /// leads to.
    pub(super) fn free(&mut self, slot: Slot) {
        let freed = self.ranges[slot.range].free(&slot.key);
        debug_assert!(freed.is_ok(), "{freed:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LARGE: u64 = 2 << 20;

    #[test]
    fn large_ranges_are_congruent_and_small_ones_are_packed() {
        let mut space = BusSpace::new(vec![Gpa(0x1000)..Gpa(1 << 30)]).unwrap();
        let small = space.allocate(Iova(0x7000_1000), 0x3000).unwrap();
        let next = space.allocate(Iova(0x7100_5000), LARGE).unwrap();
        assert_eq!(small.start, Gpa(0x1000));
        assert_eq!(next.start, Gpa(0x4000), "no whole leaf is in there");
        let addr = Iova(0x7200_0000 + LARGE - 0x3000);
        let large = space.allocate(addr, LARGE + 0x3000).unwrap();
        assert_eq!(large.start.0 % LARGE, addr.0 % LARGE);
    }

    #[test]
    fn the_end_is_an_error_and_what_is_given_back_is_used_again() {
        let ranges = vec![Gpa(0x1000)..Gpa(0x3000), Gpa(0x8800)..Gpa(0xb800)];
        let mut space = BusSpace::new(ranges).unwrap();
        let mut take = |len| space.allocate(Iova(0x5000), len);
        let both = [take(0x2000).unwrap(), take(0x2000).unwrap()];
        assert_eq!(both.each_ref().map(|slot| slot.start.0), [0x1000, 0x9000]);
        assert!(take(0x1000).is_err());
        both.into_iter().for_each(|slot| space.free(slot));
        assert_eq!(space.allocate(Iova(0), 0x2000).unwrap().start, Gpa(0x1000));
        assert!(space.allocate(Iova(u64::MAX - 0xfff), u64::MAX).is_err());
        assert!(BusSpace::new(vec![Gpa(0x1100)..Gpa(0x1f00)]).is_err());
    }
}
