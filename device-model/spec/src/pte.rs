//! The device's page table: a radix tree of four levels in guest RAM.
//!
//! Level 4 is the root; level 1 holds 4 KiB leaves, level 2 may hold 2 MiB leaves and level 3
//! 1 GiB leaves (with [`bit::LEAF`]). A table is a page of 512 entries of 64 bits. Bits 11:9
//! are free for software; all other bits not named here are reserved and fault when set.

use crate::addr::{GPA_BITS, Gpa, Iova, PAGE_SHIFT};
use crate::table::bits;

/// Number of levels.
pub const LEVELS: u32 = 4;
/// Entries of one table.
pub const ENTRIES: u64 = 512;
/// Mask of the address in an entry.
pub const ADDR_MASK: u64 = ((1 << GPA_BITS) - 1) & !0xfff;
/// Bits that software may use as it likes.
pub const SOFTWARE_MASK: u64 = 0x7 << 9;

bits! {
    /// Bits of a page table entry.
    pub mod bit Pte: u64 {
        /// The entry is valid; if clear the device looks at no other bit.
        PRESENT = 1 << 0,
        /// The device may write. Looked at in leaves only.
        WRITE = 1 << 1,
        /// Set by the device when it used the leaf.
        ACCESSED = 1 << 5,
        /// Set by the device when it wrote through the leaf.
        DIRTY = 1 << 6,
        /// A leaf above level 1.
        LEAF = 1 << 7,
    }
}

/// A page table entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pte(pub u64);

impl Pte {
    /// An entry that maps nothing.
    pub const EMPTY: Self = Self(0);

    /// A leaf of level 1.
    pub const fn leaf(page: Gpa, write: bool) -> Self {
        Self(page.0 & ADDR_MASK | bit::PRESENT | if write { bit::WRITE } else { 0 })
    }

    /// An entry that points at a table of the next level down.
    pub const fn table(table: Gpa) -> Self {
        Self(table.0 & ADDR_MASK | bit::PRESENT)
    }

    /// Whether the entry maps something.
    pub const fn is_present(self) -> bool {
        self.0 & bit::PRESENT != 0
    }

    /// Whether an entry read at `level` is a leaf.
    pub const fn is_leaf(self, level: u32) -> bool {
        level == 1 || self.0 & bit::LEAF != 0
    }

    /// Whether the device may write through this leaf.
    pub const fn is_writable(self) -> bool {
        self.0 & bit::WRITE != 0
    }

    /// The address: of the page, or of the next table.
    pub const fn addr(self) -> Gpa {
        Gpa(self.0 & ADDR_MASK)
    }

    /// The reserved bits that are set in an entry read at `level`; 0 if it is well-formed.
    /// Entries that are not present have no reserved bits.
    pub const fn reserved(self, level: u32) -> u64 {
        if !self.is_present() {
            return 0;
        }
        let mut allowed = ADDR_MASK | SOFTWARE_MASK | bit::PRESENT | bit::WRITE;
        if level == 2 || level == 3 {
            allowed |= bit::LEAF;
        }
        if self.is_leaf(level) {
            allowed |= bit::ACCESSED | bit::DIRTY;
            // A leaf's address is a multiple of its size.
            allowed &= !((leaf_size(level) - 1) & ADDR_MASK);
        }
        self.0 & !allowed
    }
}

/// Bytes that a leaf of `level` (1 to 4) maps.
pub const fn leaf_size(level: u32) -> u64 {
    1 << (PAGE_SHIFT + 9 * (level - 1))
}

/// Index into the table of `level` (1 to 4) for an address.
pub const fn index(iova: Iova, level: u32) -> u64 {
    iova.0 >> (PAGE_SHIFT + 9 * (level - 1)) & (ENTRIES - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_split_an_address_into_its_parts() {
        let iova = Iova(5 << 39 | 6 << 30 | 7 << 21 | 8 << 12 | 9);
        assert_eq!([4, 3, 2, 1].map(|l| index(iova, l)), [5, 6, 7, 8]);
        assert_eq!([1, 2, 3].map(leaf_size), [4 << 10, 2 << 20, 1 << 30]);
    }

    #[test]
    fn reserved_bits_depend_on_the_level() {
        assert_eq!(Pte::leaf(Gpa(0x1000), true).reserved(1), 0);
        assert_eq!(Pte(1 << 63 | bit::PRESENT).reserved(1), 1 << 63);
        assert_eq!(
            Pte(1 << 63).reserved(1),
            0,
            "not present: nothing is looked at"
        );
        let big = Pte(0x20_0000 | bit::PRESENT | bit::LEAF);
        assert_eq!(big.reserved(2), 0);
        assert_ne!(
            Pte(0x20_1000 | bit::PRESENT | bit::LEAF).reserved(2),
            0,
            "misaligned"
        );
        assert_ne!(big.reserved(1), 0);
        assert_ne!(big.reserved(4), 0);
        assert_ne!(
            Pte(0x1000 | bit::PRESENT | bit::DIRTY).reserved(2),
            0,
            "dirty table"
        );
    }
}
