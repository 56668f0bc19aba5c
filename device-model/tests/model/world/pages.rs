//! What the kernel of a world does with its page tables.

use std::sync::atomic::Ordering;

use extlb_device::ports::Dma;
use extlb_spec::pte::{self, Pte, bit};
use extlb_spec::{Gpa, Iova};

use super::super::Leaf;
use super::{BATCHES, LARGE, LARGE_SIZE, LISTS, World};
use crate::common::PAGE;

/// What a change of the page table does.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// Another page in its place, or in the place of nothing.
    Map {
        write: bool,
    },
    Unmap,
    /// The same page, with fewer or more rights.
    Protect {
        write: bool,
    },
}

impl World {
    /// Where the entry of level 2 is for the piece that may be large.
    fn large_entry(&self, c: u32) -> Gpa {
        let process = &self.processes[c as usize];
        let mut table = process.root;
        for level in [4, 3] {
            let at = Gpa(table.0 + pte::index(Iova(LARGE), level) * 8);
            let mut entry = Pte(self.load(at));
            if !entry.is_present() {
                entry = Pte::table(self.guest.pages.take());
                self.store(at, entry);
            }
            table = entry.addr();
        }
        Gpa(table.0 + pte::index(Iova(LARGE), 2) * 8)
    }

    fn load(&self, at: Gpa) -> u64 {
        self.guest.ram.load_u64(at, Ordering::SeqCst).unwrap()
    }

    fn store(&self, at: Gpa, entry: Pte) {
        let order = Ordering::SeqCst;
        self.guest.ram.store_u64(at, entry.0, order).unwrap();
    }

    /// Puts a leaf of 2 MiB there, with fresh memory behind it, or takes out all that is there.
    pub fn map_large(&self, c: u32, map: bool) {
        let frame = match map {
            true => match self.blocks.lock().unwrap().next() {
                Some(block) => Some(block * LARGE_SIZE),
                None => return,
            },
            false => None,
        };
        let at = self.large_entry(c);
        let leaf = bit::PRESENT | bit::WRITE | bit::LEAF;
        self.store(at, Pte(frame.map_or(0, |frame| frame | leaf)));
        let mut model = self.model();
        for offset in (0..LARGE_SIZE).step_by(PAGE as usize) {
            let leaf = frame.map(|frame| Leaf {
                frame: Gpa(frame + offset),
                write: true,
            });
            model.map(c, LARGE + offset, leaf);
        }
    }

    /// Makes a table of what is one leaf: nothing else changes.
    pub fn split(&self, c: u32) {
        let at = self.large_entry(c);
        let entry = Pte(self.load(at));
        if !entry.is_present() || !entry.is_leaf(2) {
            return;
        }
        let table = self.guest.pages.take();
        for i in 0..pte::ENTRIES {
            let leaf = Pte::leaf(Gpa(entry.addr().0 + i * PAGE), true);
            self.store(Gpa(table.0 + i * 8), leaf);
        }
        self.store(at, Pte::table(table));
    }

    /// Changes the leaf of a page.
    pub fn change_leaf(&self, c: u32, page: u64, change: Change) {
        let process = &self.processes[c as usize];
        if (LARGE..LARGE + LARGE_SIZE).contains(&page) {
            self.split(c);
        }
        let old = self.model().contexts[c as usize].pages.get(&page).copied();
        let leaf = match (change, old) {
            (Change::Map { write }, _) => Some(Leaf {
                // The program's rings stay where they are.
                frame: match page {
                    p if p == process.ring.0 => process.ring_page,
                    p if p == process.records.0 => process.records_page,
                    LISTS => self.lists[c as usize],
                    BATCHES => self.batches[c as usize],
                    _ => self.fresh(page),
                },
                write: write || page == process.records.0,
            }),
            (Change::Unmap, _) | (Change::Protect { .. }, None) => None,
            (Change::Protect { write }, Some(old)) => Some(Leaf { write, ..old }),
        };
        let entry = leaf.map_or(Pte::EMPTY, |leaf| Pte::leaf(leaf.frame, leaf.write));
        process.set_device(Iova(page), entry);
        self.model().map(c, page, leaf);
    }

    /// A frame with something in it.
    fn fresh(&self, page: u64) -> Gpa {
        let frame = self.guest.pages.take();
        let bytes: Vec<u8> = (0..PAGE).map(|i| ((i * 7) ^ (page >> 12)) as u8).collect();
        self.guest.ram.write(frame, &bytes).unwrap();
        frame
    }

    /// Maps what a request asks for, if it is not there.
    pub fn map_for(&self, c: u32, page: u64, write: bool) {
        let old = self.model().contexts[c as usize].pages.get(&page).copied();
        match old {
            Some(leaf) if leaf.write || !write => {}
            Some(_) => self.change_leaf(c, page, Change::Protect { write: true }),
            None => self.change_leaf(c, page, Change::Map { write }),
        }
    }
}
