//! Page tables in guest RAM: the device's, and the process's own in the format of x86-64.
//!
//! Both are radix trees of four levels with 512 entries a table and 4 KiB leaves.

use std::sync::atomic::Ordering;

use extlb_device::GuestRam;
use extlb_device::ports::{BusError, Dma as _};
use extlb_spec::pte::{self, Pte, index};
use extlb_spec::{Gpa, Iova, PAGE_SIZE};

use super::frames::Frames;
use crate::error::{Error, Result};

/// Bits of a pte of x86-64 that are not where the device's format has them.
mod x86 {
    /// Accessible from user mode.
    pub(super) const USER: u64 = 1 << 2;
}

/// Whose format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Device,
    Process,
}

impl Format {
    fn leaf(self, page: Gpa, write: bool) -> u64 {
        let common = Pte::leaf(page, write).0;
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
pub(super) struct Table {
    format: Format,
    root: Gpa,
    /// All tables but the root.
    tables: Vec<Gpa>,
}

/// The kernel's own structures are in RAM that it made itself.
pub(super) fn broken(_: BusError) -> Error {
    Error::Call {
        call: "access to guest RAM",
        errno: nix::errno::Errno::EFAULT,
    }
}

pub(super) fn zeroed(ram: &GuestRam, frames: &mut Frames) -> Result<Gpa> {
    let frame = frames.take()?;
    ram.write(frame, &[0; PAGE_SIZE as usize]).map_err(broken)?;
    Ok(frame)
}

impl Table {
    pub(super) fn new(format: Format, ram: &GuestRam, frames: &mut Frames) -> Result<Self> {
        Ok(Self {
            format,
            root: zeroed(ram, frames)?,
            tables: Vec::new(),
        })
    }

    pub(super) fn root(&self) -> Gpa {
        self.root
    }

    /// The address of the leaf entry for `iova`; `None` if a table on the way is absent.
    fn leaf_entry(&self, ram: &GuestRam, iova: Iova) -> Result<Option<Gpa>> {
        let mut table = self.root;
        for level in (2..=pte::LEVELS).rev() {
            let entry = Gpa(table.0 + index(iova, level) * 8);
            let entry = Pte(ram.load_u64(entry, Ordering::Acquire).map_err(broken)?);
            if !entry.is_present() {
                return Ok(None);
            }
            table = entry.addr();
        }
        Ok(Some(Gpa(table.0 + index(iova, 1) * 8)))
    }

    /// Sets the leaf of the page at `iova`, whatever was there.
    pub(super) fn set(
        &mut self,
        ram: &GuestRam,
        frames: &mut Frames,
        iova: Iova,
        page: Gpa,
        write: bool,
    ) -> Result<()> {
        let mut table = self.root;
        for level in (2..=pte::LEVELS).rev() {
            let at = Gpa(table.0 + index(iova, level) * 8);
            let entry = Pte(ram.load_u64(at, Ordering::Acquire).map_err(broken)?);
            table = if entry.is_present() {
                entry.addr()
            } else {
                let new = zeroed(ram, frames)?;
                self.tables.push(new);
                // Release: the device sees an empty table, not what was in the frame before.
                let entry = self.format.table(new);
                ram.store_u64(at, entry, Ordering::Release)
                    .map_err(broken)?;
                new
            };
        }
        let at = Gpa(table.0 + index(iova, 1) * 8);
        let leaf = self.format.leaf(page, write);
        ram.store_u64(at, leaf, Ordering::Release).map_err(broken)
    }

    /// Clears the leaf of a page; whether there was one.
    pub(super) fn clear(&self, ram: &GuestRam, iova: Iova) -> Result<bool> {
        let Some(at) = self.leaf_entry(ram, iova)? else {
            return Ok(false);
        };
        let was = Pte(ram.load_u64(at, Ordering::Acquire).map_err(broken)?);
        ram.store_u64(at, 0, Ordering::Release).map_err(broken)?;
        Ok(was.is_present())
    }

    /// The leaf of a page.
    pub(super) fn get(&self, ram: &GuestRam, iova: Iova) -> Result<Pte> {
        match self.leaf_entry(ram, iova)? {
            Some(at) => Ok(Pte(ram.load_u64(at, Ordering::Acquire).map_err(broken)?)),
            None => Ok(Pte::EMPTY),
        }
    }

    /// Gives all frames back. Nobody may walk it any more.
    pub(super) fn free(self, frames: &mut Frames) {
        for table in self.tables {
            frames.give_back(table);
        }
        frames.give_back(self.root);
    }
}
