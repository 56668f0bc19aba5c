//! Page tables in memory: the device's, and the process's own in the format of x86-64.
//!
//! Both are radix trees of four levels with 512 entries a table. The device's may have leaves of
//! 2 MiB beside those of 4 KiB.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::Ordering;

use extlb_spec::pte::{self, Pte, index, leaf_size};
use extlb_spec::{Gpa, Iova, PAGE_SIZE};

use super::BusMemory;
use crate::error::{Error, Nonsense, Result};

/// Where tables come from.
pub(crate) trait Pages {
    /// A page of zeros.
    fn zeroed(&mut self) -> Result<Gpa>;
    /// Takes a page that nobody uses any more, the device included.
    fn give_back(&mut self, page: Gpa);
}

/// Bits of a pte of x86-64 that are not where the device's format has them.
mod x86 {
    /// Accessible from user mode.
    pub(super) const USER: u64 = 1 << 2;
}

/// Whose format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Device,
    #[cfg_attr(
        not(feature = "inprocess"),
        expect(dead_code, reason = "for the oracle")
    )]
    Process,
}

impl Format {
    fn leaf(self, page: Gpa, write: bool, level: u32) -> u64 {
        let large = if level > 1 { pte::bit::LEAF } else { 0 };
        let common = Pte::leaf(page, write).0 | large;
        match self {
            Format::Device => common,
            // Present, write and the address are at the same bits. Accessed and dirty: set, as
            // for a page that the program has used.
            Format::Process if write => common | x86::USER | pte::bit::ACCESSED | pte::bit::DIRTY,
            Format::Process => common | x86::USER | pte::bit::ACCESSED,
        }
    }

    fn table(self, table: Gpa) -> u64 {
        match self {
            Format::Device => Pte::table(table).0,
            Format::Process => Pte::table(table).0 | pte::bit::WRITE | x86::USER,
        }
    }
}

/// A page table.
#[derive(Debug)]
pub(crate) struct PageTable {
    format: Format,
    root: Gpa,
    /// All tables but the root, by level and first address. The device writes to its page table
    /// (accessed and dirty bits, if it is honest), so where a table is is not read from there: a
    /// device that spoils it harms its own translations, and no other structure.
    tables: BTreeMap<(u32, Iova), Gpa>,
}

/// What [`PageTable::clear_range`] took out.
#[derive(Debug, Default)]
#[must_use = "the tables are lost otherwise"]
pub(crate) struct Cleared {
    /// Leaves that were present.
    pub(crate) leaves: u64,
    /// Tables that nothing leads to any more. The device may still be reading them, until it has
    /// acknowledged an invalidation of the range.
    pub(crate) tables: Vec<Gpa>,
}

/// What no device may have made of an entry.
fn spoilt(entry: Pte) -> Error {
    Error::Protocol(Nonsense::Register {
        name: "an entry of a page table",
        value: entry.0,
    })
}

impl PageTable {
    pub(crate) fn new(format: Format, pages: &mut impl Pages) -> Result<Self> {
        Ok(Self {
            format,
            root: pages.zeroed()?,
            tables: BTreeMap::new(),
        })
    }

    pub(crate) fn root(&self) -> Gpa {
        self.root
    }

    fn load(memory: &impl BusMemory, at: Gpa) -> Result<Pte> {
        Ok(Pte(memory.load_u64(at, Ordering::Acquire)?))
    }

    /// The table of a level that holds the entry for `iova`, if there is one.
    fn table(&self, iova: Iova, level: u32) -> Option<Gpa> {
        match level {
            pte::LEVELS => Some(self.root),
            _ => self.tables.get(&Self::key(iova, level)).copied(),
        }
    }

    fn key(iova: Iova, level: u32) -> (u32, Iova) {
        (level, Iova(iova.0 & !(leaf_size(level + 1) - 1)))
    }

    /// The address of the entry of `level` for `iova`; `None` if there is no table of that level.
    fn entry(&self, iova: Iova, level: u32) -> Option<Gpa> {
        let table = self.table(iova, level)?;
        Some(Gpa(table.0 + index(iova, level) * 8))
    }

    /// The same, with tables made on the way. There must be no larger leaf in the way.
    fn make_entry(
        &mut self,
        memory: &impl BusMemory,
        pages: &mut impl Pages,
        iova: Iova,
        level: u32,
    ) -> Result<Gpa> {
        let mut table = self.root;
        for above in (level + 1..=pte::LEVELS).rev() {
            table = match self.table(iova, above - 1) {
                Some(table) => table,
                None => {
                    let at = Gpa(table.0 + index(iova, above) * 8);
                    let new = pages.zeroed()?;
                    self.tables.insert(Self::key(iova, above - 1), new);
                    // Release: the device sees an empty table, not what was in the page before.
                    memory.store_u64(at, self.format.table(new), Ordering::Release)?;
                    new
                }
            };
        }
        Ok(Gpa(table.0 + index(iova, level) * 8))
    }

    /// Maps a range that is not mapped to `[to, …)`, with leaves as large as fit; how many. After
    /// an error some may be there.
    pub(crate) fn set_range(
        &mut self,
        memory: &impl BusMemory,
        pages: &mut impl Pages,
        range: &Range<Iova>,
        to: Gpa,
        write: bool,
    ) -> Result<u64> {
        let large = leaf_size(2);
        let mut leaves = 0;
        let mut iova = range.start;
        while iova < range.end {
            let page = Gpa(to.0 + (iova.0 - range.start.0));
            let fits =
                iova.is_aligned(large) && page.is_aligned(large) && range.end.0 - iova.0 >= large;
            let level = if fits { 2 } else { 1 };
            let at = self.make_entry(memory, pages, iova, level)?;
            let was = Self::load(memory, at)?;
            if was.is_present() {
                return Err(spoilt(was));
            }
            // Release: what the program wrote to the memory before is seen by whom it leads there.
            memory.store_u64(at, self.format.leaf(page, write, level), Ordering::Release)?;
            leaves += 1;
            iova = Iova(iova.0 + leaf_size(level));
        }
        Ok(leaves)
    }

    /// Takes a range out that [`PageTable::set_range`] has put in, and tables of 4 KiB leaves that
    /// are empty then: what is mapped next at those addresses may want larger leaves.
    pub(crate) fn clear_range(
        &mut self,
        memory: &impl BusMemory,
        range: &Range<Iova>,
    ) -> Result<Cleared> {
        let mut cleared = Cleared::default();
        let mut iova = range.start;
        while iova < range.end {
            // To the end of the range, or of what an entry of level 2 leads to.
            let end = Iova((iova.0 | (leaf_size(2) - 1)) + 1).min(range.end);
            match (self.entry(iova, 2), self.table(iova, 1)) {
                (Some(at), Some(table)) => {
                    for page in (iova.0..end.0).step_by(PAGE_SIZE as usize) {
                        let at = Gpa(table.0 + index(Iova(page), 1) * 8);
                        cleared.leaves += u64::from(Self::load(memory, at)?.is_present());
                        memory.store_u64(at, 0, Ordering::Release)?;
                    }
                    if Self::is_empty(memory, table)? {
                        memory.store_u64(at, 0, Ordering::Release)?;
                        self.tables.remove(&Self::key(iova, 1));
                        cleared.tables.push(table);
                    }
                }
                (Some(at), None) => {
                    cleared.leaves += u64::from(Self::load(memory, at)?.is_present());
                    memory.store_u64(at, 0, Ordering::Release)?;
                }
                (None, _) => {}
            }
            iova = end;
        }
        Ok(cleared)
    }

    fn is_empty(memory: &impl BusMemory, table: Gpa) -> Result<bool> {
        for n in 0..pte::ENTRIES {
            if Self::load(memory, Gpa(table.0 + n * 8))?.is_present() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether the way to the leaf of an address that is mapped is as it was written.
    ///
    /// # Errors
    /// If it is not: nobody but the device can have changed it.
    pub(crate) fn check(&self, memory: &impl BusMemory, iova: Iova) -> Result<()> {
        for level in (1..=pte::LEVELS).rev() {
            let Some(at) = self.entry(iova, level) else {
                return Ok(());
            };
            let entry = Self::load(memory, at)?;
            let below = (level > 1).then(|| self.table(iova, level - 1)).flatten();
            let good = match below {
                Some(table) => entry.0 == self.format.table(table),
                None => entry.is_present() && entry.is_leaf(level) && entry.reserved(level) == 0,
            };
            if !good {
                return Err(spoilt(entry));
            }
        }
        Ok(())
    }

    /// Gives all pages back. Nobody may walk it any more.
    pub(crate) fn free(self, pages: &mut impl Pages) {
        for table in self.tables.into_values() {
            pages.give_back(table);
        }
        pages.give_back(self.root);
    }
}

/// Page by page, for the kernel that plays in this process.
#[cfg(feature = "inprocess")]
impl PageTable {
    /// Sets the leaf of the page at `iova`, whatever was there.
    pub(crate) fn set(
        &mut self,
        memory: &impl BusMemory,
        pages: &mut impl Pages,
        iova: Iova,
        page: Gpa,
        write: bool,
    ) -> Result<()> {
        let at = self.make_entry(memory, pages, iova, 1)?;
        memory.store_u64(at, self.format.leaf(page, write, 1), Ordering::Release)
    }

    /// Clears the leaf of a page; whether there was one.
    pub(crate) fn clear(&self, memory: &impl BusMemory, iova: Iova) -> Result<bool> {
        let Some(at) = self.entry(iova, 1) else {
            return Ok(false);
        };
        let was = Self::load(memory, at)?;
        memory.store_u64(at, 0, Ordering::Release)?;
        Ok(was.is_present())
    }

    /// The leaf of a page.
    pub(crate) fn get(&self, memory: &impl BusMemory, iova: Iova) -> Result<Pte> {
        match self.entry(iova, 1) {
            Some(at) => Self::load(memory, at),
            None => Ok(Pte::EMPTY),
        }
    }
}
