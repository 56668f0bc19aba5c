//! The address space of the in-process "process", and what contexts may reach of it.

use std::collections::BTreeMap;
use std::ops::Range;

use extlb_device::GuestRam;
use extlb_spec::{Gpa, Iova, PAGE_SIZE};

use super::frames::Frames;
use super::ram::Zeroed;
use crate::error::Result;
use crate::protocol::{Format, PageTable};

/// A page of the process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Page {
    pub(super) frame: Gpa,
    pub(super) write: bool,
    /// It is part of a buffer, and mapped at the program's address too.
    pub(super) owned: bool,
}

/// State of a frame that the program has been told of by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Raw {
    /// Mapped.
    Mapped,
    /// Taken back, not free yet.
    Callers,
}

/// Everything that the lock of the address space protects.
#[derive(Debug)]
pub(super) struct Space {
    pub(super) frames: Frames,
    pub(super) pages: BTreeMap<Iova, Page>,
    pub(super) raw: BTreeMap<Gpa, Raw>,
    /// The process's own page table, for the oracle.
    pub(super) cpu: PageTable,
    pub(super) contexts: BTreeMap<u32, Registered>,
}

/// A context's view of the address space.
#[derive(Debug)]
pub(super) struct Registered {
    pub(super) device: PageTable,
    /// What is left of each registration, by its handle.
    ranges: BTreeMap<u32, Vec<Range<Iova>>>,
    next_handle: u32,
    pub(super) filled_pages: u64,
    pub(super) mapped_pages: u64,
    pub(super) page_requests: u64,
    pub(super) refused_requests: u64,
}

impl Space {
    pub(super) fn new(ram: &GuestRam, mut frames: Frames) -> Result<Self> {
        let pages = &mut Zeroed::new(ram, &mut frames);
        let cpu = PageTable::new(Format::Process, pages)?;
        Ok(Self {
            frames,
            pages: BTreeMap::new(),
            raw: BTreeMap::new(),
            cpu,
            contexts: BTreeMap::new(),
        })
    }

    pub(super) fn add_context(&mut self, ram: &GuestRam, number: u32) -> Result<Gpa> {
        let pages = &mut Zeroed::new(ram, &mut self.frames);
        let device = PageTable::new(Format::Device, pages)?;
        let root = device.root();
        let registered = Registered {
            device,
            ranges: BTreeMap::new(),
            next_handle: 1,
            filled_pages: 0,
            mapped_pages: 0,
            page_requests: 0,
            refused_requests: 0,
        };
        self.contexts.insert(number, registered);
        Ok(root)
    }

    /// Maps a page of the process: the cpu pte, and the record of it.
    pub(super) fn map(&mut self, ram: &GuestRam, at: Iova, page: Page) -> Result<()> {
        let pages = &mut Zeroed::new(ram, &mut self.frames);
        self.cpu.set(ram, pages, at, page.frame, page.write)?;
        if let Some(old) = self.pages.insert(at, page)
            && old.frame != page.frame
        {
            self.taken(old);
        }
        if !page.owned {
            self.raw.insert(page.frame, Raw::Mapped);
        }
        Ok(())
    }

    /// Unmaps a page of the process, as far as it goes without the device; its frame.
    pub(super) fn unmap(&mut self, ram: &GuestRam, at: Iova) -> Result<Option<Gpa>> {
        self.cpu.clear(ram, at)?;
        Ok(self.pages.remove(&at).map(|page| self.taken(page)))
    }

    fn taken(&mut self, page: Page) -> Gpa {
        if !page.owned {
            self.raw.insert(page.frame, Raw::Callers);
        }
        page.frame
    }

    /// Lets a context's device have a page, if it may; whether it has it now.
    pub(super) fn fill(
        &mut self,
        ram: &GuestRam,
        context: u32,
        at: Iova,
        write: bool,
    ) -> Result<bool> {
        let Some(registered) = self.contexts.get_mut(&context) else {
            return Ok(false);
        };
        let Some(page) = self
            .pages
            .get(&at)
            .copied()
            .filter(|page| page.write || !write)
        else {
            return Ok(false);
        };
        if !registered.covers(at) {
            return Ok(false);
        }
        let was = registered.device.get(ram, at)?;
        if was.is_present() && was.is_writable() == page.write {
            return Ok(true);
        }
        let pages = &mut Zeroed::new(ram, &mut self.frames);
        registered
            .device
            .set(ram, pages, at, page.frame, page.write)?;
        registered.filled_pages += 1;
        registered.mapped_pages += u64::from(!was.is_present());
        Ok(true)
    }
}

impl Registered {
    fn covers(&self, at: Iova) -> bool {
        self.ranges
            .values()
            .flatten()
            .any(|range| range.contains(&at))
    }

    pub(super) fn add(&mut self, range: Range<Iova>) -> u32 {
        let handle = self.next_handle;
        self.next_handle += 1;
        self.ranges.insert(handle, vec![range]);
        handle
    }

    pub(super) fn remove(&mut self, handle: u32) -> Option<Vec<Range<Iova>>> {
        self.ranges.remove(&handle)
    }

    /// Takes a piece out of all ranges, as the removal of a mapping does.
    pub(super) fn trim(&mut self, hole: &Range<Iova>) {
        for ranges in self.ranges.values_mut() {
            let all = ranges.drain(..).flat_map(|range| {
                let before = range.start..range.end.min(hole.start);
                let after = range.start.max(hole.end)..range.end;
                [before, after]
            });
            *ranges = all
                .filter(|range| range.start < range.end)
                .collect::<Vec<_>>();
        }
    }

    /// Clears the device ptes of a range, except for pages that other ranges still cover if
    /// `spare` is set; how many there were.
    pub(super) fn clear(
        &mut self,
        ram: &GuestRam,
        range: &Range<Iova>,
        spare: bool,
    ) -> Result<u64> {
        let mut cleared = 0;
        for at in pages(range) {
            if !(spare && self.covers(at)) {
                cleared += u64::from(self.device.clear(ram, at)?);
            }
        }
        self.mapped_pages -= cleared;
        Ok(cleared)
    }
}

/// The pages of a page-aligned range.
pub(super) fn pages(range: &Range<Iova>) -> impl Iterator<Item = Iova> + use<> {
    (range.start.0..range.end.0)
        .step_by(PAGE_SIZE as usize)
        .map(Iova)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hole_trims_and_splits() {
        let ram = GuestRam::anonymous(&[(Gpa(0x10_0000), 0x10_0000)]).unwrap();
        let frames = Frames::new(Gpa(0x10_0000), 0x10_0000, 1);
        let mut space = Space::new(&ram, frames).unwrap();
        space.add_context(&ram, 0).unwrap();
        let registered = space.contexts.get_mut(&0).unwrap();
        registered.add(Iova(0x1000)..Iova(0x9000));
        registered.add(Iova(0x3000)..Iova(0x4000));
        registered.trim(&(Iova(0x3000)..Iova(0x5000)));
        let covered: Vec<_> = pages(&(Iova(0)..Iova(0xa000)))
            .filter(|at| registered.covers(*at))
            .collect();
        let want = [1, 2, 5, 6, 7, 8].map(|n| Iova(n * 0x1000));
        assert_eq!(covered, want);
    }
}
