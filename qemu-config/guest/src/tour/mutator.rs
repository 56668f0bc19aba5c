//! What the program does to the memory under the device's hands.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use extlb_driver::{Context, Kernel, Registration};

use super::memory_unsafe::{Area, PAGE, in_child};
use super::random::Random;
use super::traffic::Shared;
use super::words::{Writer, word};

/// Largest range that one operation changes, in pages.
const MAX_PAGES: usize = 12;
/// Ranges that were moved away and are watched for a while.
const GRAVES: usize = 8;
/// Registrations before all is registered anew as one.
const MAX_REGISTRATIONS: usize = 1000;

/// Operations on memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `munmap`, and fresh pages there.
    Unmap,
    /// `MADV_DONTNEED`.
    DontNeed,
    /// `mprotect`, read-only and back.
    Protect,
    /// `fork`, and writing while the child lives.
    Fork,
    /// `mremap` to elsewhere, and fresh pages there.
    Move,
    /// `mmap` with `MAP_FIXED` over it.
    Replace,
}

impl Kind {
    /// The system call, for reports.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Unmap => "munmap",
            Kind::DontNeed => "madvise_dontneed",
            Kind::Protect => "mprotect",
            Kind::Fork => "fork_and_write",
            Kind::Move => "mremap",
            Kind::Replace => "mmap_fixed",
        }
    }
}

/// Changes an area that a context's device works on.
pub struct Mutator<'a> {
    fire: &'a Area,
    context: &'a Context<Kernel>,
    shared: &'a Shared,
    random: Random,
    registrations: Vec<Registration<Kernel>>,
    /// Unmapping ends a registration there.
    unmapping_ends: bool,
    graveyard: Area,
    /// What was moved away: pages of the graveyard, with their checksum.
    graves: VecDeque<(Range<usize>, u64)>,
    next_grave: usize,
    written: u64,
    /// How often, and how long in all.
    pub counts: BTreeMap<&'static str, (u64, Duration)>,
}

/// How the driver follows a process, as its parameter says it.
fn follow() -> Result<String> {
    const FOLLOW: &str = "/sys/module/extlb/parameters/follow";
    let follow = std::fs::read_to_string(FOLLOW).context(FOLLOW)?;
    Ok(follow.trim().to_owned())
}

/// Whether the way that the driver follows a process by ends a registration where memory is unmapped.
fn unmapping_ends_registrations() -> Result<bool> {
    Ok(!matches!(follow()?.as_str(), "mmu" | "interval"))
}

/// Whether the driver hears of changes anywhere in the process, by ranges wider than what changed.
pub fn hears_of_everything() -> Result<bool> {
    Ok(follow()? == "mmu")
}

impl<'a> Mutator<'a> {
    /// Registers the area.
    pub fn new(
        fire: &'a Area,
        context: &'a Context<Kernel>,
        shared: &'a Shared,
        seed: u64,
    ) -> Result<Self> {
        Ok(Self {
            fire,
            context,
            shared,
            random: Random::new(seed),
            registrations: vec![context.register_addresses(fire.addrs(&(0..fire.pages())))?],
            unmapping_ends: unmapping_ends_registrations()?,
            graveyard: Area::reserve((GRAVES + 1) * MAX_PAGES)?,
            graves: VecDeque::new(),
            next_grave: 0,
            written: 0,
            counts: BTreeMap::new(),
        })
    }

    /// Does one operation on a random range.
    pub fn step(&mut self, kind: Kind) -> Result<()> {
        let len = 1 + self.random.below(MAX_PAGES as u64) as usize;
        let start = self.random.below((self.fire.pages() - len + 1) as u64) as usize;
        self.change(kind, start..start + len)
    }

    /// Gives the whole area up, every page of it present.
    ///
    /// To change so many ptes takes long enough for the device to ask for pages in the middle of
    /// it: a kernel that took them from the device before it changed the ptes, and not after,
    /// would give some of them out again, and nobody would take those back.
    pub fn give_all_up(&mut self) -> Result<()> {
        let all = 0..self.fire.pages();
        self.touch(&all);
        self.change(Kind::DontNeed, all)
    }

    fn change(&mut self, kind: Kind, pages: Range<usize>) -> Result<()> {
        let begun = Instant::now();
        let before = self.shared.before_wiping();
        match kind {
            Kind::Unmap => {
                self.fire.unmap(pages.clone())?;
                self.fire.map_hole(pages.clone())?;
                self.register(&pages)?;
            }
            Kind::DontNeed => self.fire.dont_need(pages.clone())?,
            Kind::Protect => self.protect(&pages)?,
            Kind::Fork => self.fork(&pages)?,
            Kind::Move => {
                self.bury(&pages)?;
                self.fire.map_hole(pages.clone())?;
                self.register(&pages)?;
            }
            Kind::Replace => {
                self.fire.map(pages.clone())?;
                self.register(&pages)?;
            }
        }
        if !matches!(kind, Kind::Protect | Kind::Fork) {
            self.shared.wiped(pages, before);
        }
        let (count, time) = self.counts.entry(kind.name()).or_default();
        *count += 1;
        *time += begun.elapsed();
        self.shared.check()
    }

    /// What was unmapped is no longer registered; what is there now has to be registered anew. Unless
    /// the driver does not hear of unmapping: then it is registered still.
    fn register(&mut self, pages: &Range<usize>) -> Result<()> {
        if !self.unmapping_ends {
            return Ok(());
        }
        if self.registrations.len() < MAX_REGISTRATIONS {
            let range = self.fire.addrs(pages);
            let registration = self.context.register_addresses(range);
            let registration = registration.with_context(|| format!("pages {pages:?}"))?;
            self.registrations.push(registration);
            return Ok(());
        }
        for registration in self.registrations.drain(..) {
            registration.unregister()?;
        }
        let all = self.fire.addrs(&(0..self.fire.pages()));
        self.registrations
            .push(self.context.register_addresses(all)?);
        Ok(())
    }

    /// While a page is read-only nobody writes to it: not the program, so not the device.
    fn protect(&mut self, pages: &Range<usize>) -> Result<()> {
        self.fire.protect(pages.clone(), false)?;
        let page = pages.start..pages.start + 1;
        let first = self.fire.checksum(page.clone());
        let second = self.fire.checksum(page);
        self.fire.protect(pages.clone(), true)?;
        ensure!(
            first == second,
            "page {} was written to while read-only",
            pages.start
        );
        Ok(())
    }

    /// After a fork both have the same pages; whoever writes gets copies, and the device belongs
    /// to the parent. The child must see none of what it writes.
    fn fork(&mut self, pages: &Range<usize>) -> Result<()> {
        let fire = self.fire;
        let child = || {
            let first = fire.checksum(pages.clone());
            std::thread::yield_now();
            first == fire.checksum(pages.clone())
        };
        let same = in_child(child, || self.touch(pages))?;
        ensure!(
            same,
            "the device wrote to pages {pages:?} of a forked child"
        );
        Ok(())
    }

    /// Writes a word to each page.
    fn touch(&mut self, pages: &Range<usize>) {
        for page in pages.clone() {
            self.written += 1;
            let word = word(page, Writer::Program, self.written);
            self.fire.store(page * PAGE + 8 * (page % 512), word);
        }
    }

    /// Moves pages to the graveyard. They are the program's alone there, and stay as they are.
    fn bury(&mut self, pages: &Range<usize>) -> Result<()> {
        if self.graves.len() == GRAVES {
            self.exhume()?;
        }
        let at = self.next_grave;
        self.next_grave = (at + MAX_PAGES) % self.graveyard.pages();
        self.fire.move_to(pages.clone(), &self.graveyard, at)?;
        let grave = at..at + pages.len();
        let sum = self.graveyard.checksum(grave.clone());
        self.graves.push_back((grave, sum));
        Ok(())
    }

    fn exhume(&mut self) -> Result<()> {
        let Some((grave, sum)) = self.graves.pop_front() else {
            return Ok(());
        };
        let now = self.graveyard.checksum(grave.clone());
        ensure!(
            now == sum,
            "the device wrote to pages that were moved away from its range"
        );
        self.graveyard.unmap(grave)
    }

    /// Checks what was moved away, and takes the area back from the device.
    pub fn finish(mut self) -> Result<()> {
        while !self.graves.is_empty() {
            self.exhume()?;
        }
        for registration in self.registrations.drain(..) {
            registration.unregister()?;
        }
        Ok(())
    }
}
