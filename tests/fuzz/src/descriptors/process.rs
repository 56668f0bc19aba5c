//! A process: its pages, its tables, and what the script did to them.

use std::mem::offset_of;

use extlb_spec::context::{ContextError, ContextShadow};
use extlb_spec::pte;
use extlb_spec::{Gpa, Iova, PAGE_SIZE};

use super::{HUGE, LARGE, OWN, WINDOW, WINDOW_PAGES};
use crate::machine::FREE;

/// A mapping of the page table, as the kernel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapped {
    pub(super) frame: Gpa,
    pub(super) pages: u64,
    pub(super) write: bool,
}

pub(super) struct Process {
    pub(super) context: u32,
    pub(super) base: Gpa,
    /// Window pages, then the leaf of 2 MiB, then that of 1 GiB.
    pub(super) mapped: Vec<Option<Mapped>>,
    pub(super) tail: u32,
    /// The script broke the tail.
    pub(super) wild: bool,
    /// Told of by a record.
    pub(super) failed: Option<ContextError>,
    pub(super) running: bool,
}

impl Process {
    pub(super) fn new(index: usize) -> Self {
        Self {
            context: 1 + index as u32,
            base: Gpa(FREE.0 + index as u64 * OWN * PAGE_SIZE),
            mapped: vec![None; WINDOW_PAGES as usize + 2],
            tail: 0,
            wild: false,
            failed: None,
            running: false,
        }
    }

    pub(super) fn page(&self, index: u64) -> Gpa {
        Gpa(self.base.0 + index * PAGE_SIZE)
    }

    pub(super) fn shadow(&self) -> Gpa {
        self.page(4)
    }

    /// The word by which the device retires descriptors.
    pub(super) fn head(&self) -> Gpa {
        Gpa(self.shadow().0 + offset_of!(ContextShadow, head) as u64)
    }

    /// The table of a level.
    pub(super) fn table(&self, level: u32) -> Gpa {
        self.page(u64::from(pte::LEVELS - level))
    }

    /// Where the leaf of a place is, its address and its size.
    pub(super) fn leaf(&self, place: usize) -> (Gpa, Iova, u64) {
        let small = WINDOW_PAGES as usize;
        let (iova, level) = match place {
            p if p == small => (LARGE, 2),
            p if p == small + 1 => (HUGE, 3),
            p => (WINDOW + p as u64 * PAGE_SIZE, 1),
        };
        let iova = Iova(iova);
        let at = Gpa(self.table(level).0 + pte::index(iova, level) * 8);
        (at, iova, pte::leaf_size(level))
    }
}
