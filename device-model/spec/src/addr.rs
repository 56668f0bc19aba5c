//! Address spaces as types that do not mix.

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Size of the smallest page, and of every table of a page table.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Width of an [`Iova`] in bits.
pub const IOVA_BITS: u32 = 48;
/// End of the [`Iova`] space (exclusive).
pub const IOVA_END: u64 = 1 << IOVA_BITS;
/// Width of a [`Gpa`] in bits: what a page table entry can hold.
pub const GPA_BITS: u32 = 52;

macro_rules! address {
    ($(#[$m:meta])* $name:ident) => {
        $(#[$m])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        pub struct $name(pub u64);

        impl $name {
            /// The start of the page that holds this address.
            pub const fn page(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }
            /// The offset in its page.
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }
            /// Whether the address is a multiple of `align`, a power of two.
            pub const fn is_aligned(self, align: u64) -> bool {
                self.0 & (align - 1) == 0
            }
            /// The address `bytes` further on; `None` on overflow of 64 bits.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(a) => Some(Self(a)),
                    None => None,
                }
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// A guest-physical address: what the device puts on the bus.
    Gpa
}
address! {
    /// An I/O virtual address: a virtual address of the process that owns a context.
    Iova
}

impl Iova {
    /// Whether `[self, self + len)` lies below [`IOVA_END`].
    pub const fn range_is_valid(self, len: u64) -> bool {
        match self.0.checked_add(len) {
            Some(end) => end <= IOVA_END,
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_end_at_the_limit_and_never_wrap() {
        assert!(Iova(IOVA_END - 1).range_is_valid(1));
        assert!(!Iova(IOVA_END - 1).range_is_valid(2));
        assert!(!Iova(u64::MAX).range_is_valid(2));
        assert!(Iova(IOVA_END).range_is_valid(0));
        assert_eq!(Gpa(u64::MAX).checked_add(1), None);
        assert_eq!(Gpa(0x1fff).page(), Gpa(0x1000));
    }
}
