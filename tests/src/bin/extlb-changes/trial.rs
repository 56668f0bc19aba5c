//! One trial: the device gets memory, something changes it, and the device is asked what it has.

use std::fs;
use std::ops::Range;

use anyhow::{Context as _, Result, bail, ensure};
use extlb_driver::spec::uapi::{Audit, Stats};
use extlb_driver::spec::work::{Descriptor, Opcode, Status};
use extlb_driver::{Context, Device, Iova, Kernel, Options, Pending, Raw, Registration};

use crate::area_unsafe::{Area, PAGE, submit};

const FOLLOW: &str = "/sys/module/extlb/parameters/follow";
const IGNORE: &str = "/sys/kernel/debug/extlb/extlb0/ignore_notifier";
const PARAMETERS: &str = "/sys/module/extlb/parameters";
/// What the device reads goes here, a page at a time.
const SINK_PAGES: usize = 1;

/// Whether the driver hears of changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It does.
    Sound,
    /// It does not, while memory changes.
    Broken,
}

/// Why a row cannot be tried here.
#[derive(Debug)]
pub struct Skip(pub String);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// How it is seen that the driver did not hear of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The device's translations differ from the page table.
    ByAudit,
    /// They do not, for this reason; but the device was not asked to give the pages up.
    ByCount(&'static str),
    /// Nothing is taken away, for this reason: the device keeps its pages, rightly.
    Never(&'static str),
    /// As the row itself says.
    ByRow(&'static str),
}

impl Seen {
    /// Why it is not the audit that sees it.
    pub fn reason(self) -> Option<&'static str> {
        match self {
            Seen::ByAudit => None,
            Seen::ByCount(reason) | Seen::Never(reason) | Seen::ByRow(reason) => Some(reason),
        }
    }
}

/// What the device does to get hold of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads them.
    Read,
    /// Writes [`pattern`] to all of them.
    Write,
}

/// What became of an access by the device.
#[derive(Debug, PartialEq, Eq)]
pub enum Accessed {
    /// It was carried out; a read gave these words.
    Words(Vec<u64>),
    /// It was refused.
    Fault,
}

/// The word that the device writes to a page.
pub fn pattern(addr: u64) -> u64 {
    0xd0d0_0000_0000_0000 | (addr / PAGE as u64)
}

/// How the driver follows a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Pte,
    Mmu,
    Interval,
}

impl Way {
    fn of_driver() -> Result<Self> {
        let name = fs::read_to_string(FOLLOW).context(FOLLOW)?;
        Ok(match name.trim() {
            "pte" => Self::Pte,
            "mmu" => Self::Mmu,
            "interval" => Self::Interval,
            other => bail!("pages do not follow the process: follow={other}"),
        })
    }
}

/// A context of its own, and what was found so far.
pub struct Trial {
    mode: Mode,
    /// How the driver follows this process.
    pub way: Way,
    sink: Area,
    context: Context<Kernel>,
    registrations: Vec<Registration<Kernel>>,
    /// Pages that changes took away at least, as the rows say.
    expected: u64,
    /// Pages taken from the device during the changes.
    taken: u64,
    /// Translations that differed after them.
    mismatches: u64,
    /// The least of that over the changes: did the audit see each of them?
    each_seen: bool,
    first: Option<String>,
    changes: u32,
}

impl Trial {
    /// Makes a context, and lets the device have what it needs for its own purposes.
    pub fn new(mode: Mode) -> Result<Self> {
        let sink = Area::anonymous(SINK_PAGES)?;
        let device = Device::open(Kernel::new())?;
        let context = device.context(Options {
            ring_log2: 4,
            ..Options::default()
        })?;
        let kept = context.register_addresses(sink.addrs(0..SINK_PAGES))?;
        let trial = Self {
            mode,
            way: Way::of_driver()?,
            sink,
            context,
            registrations: vec![kept],
            expected: 0,
            taken: 0,
            mismatches: 0,
            each_seen: true,
            first: None,
            changes: 0,
        };
        let got = trial.write(trial.sink.addrs(0..SINK_PAGES), 0)?;
        ensure!(got != Accessed::Fault, "the device cannot write at all");
        Ok(trial)
    }

    /// Whether the notifier is ignored during changes.
    pub fn is_broken(&self) -> bool {
        self.mode == Mode::Broken
    }

    /// Registers all of an area.
    pub fn register(&mut self, area: &Area) -> Result<()> {
        let range = area.addrs(0..area.pages());
        let kept = self.context.register_addresses(range)?;
        self.registrations.push(kept);
        Ok(())
    }

    /// Takes the registration made last back.
    pub fn unregister_last(&mut self) {
        drop(self.registrations.pop());
    }

    /// Registers an area, lets the device read or write all of it, and sees that it has each page.
    pub fn give(&mut self, area: &Area, access: Access) -> Result<()> {
        self.register(area)?;
        self.fill(area, 0..area.pages(), access)
    }

    /// Lets the device read or write pages of a registered area of which it has none, and sees that
    /// it has each of them then.
    pub fn fill(&mut self, area: &Area, pages: Range<usize>, access: Access) -> Result<()> {
        let before = self.context.stats()?.mapped_pages;
        for page in pages.clone() {
            let addrs = area.addrs(page..page + 1);
            match access {
                Access::Read => {
                    let Accessed::Words(words) = self.read(addrs)? else {
                        bail!("the device cannot read page {page}");
                    };
                    let here = (0..PAGE).step_by(8).map(|at| area.load(page * PAGE + at));
                    ensure!(here.eq(words), "the device reads page {page} wrongly");
                }
                Access::Write => {
                    let word = pattern(addrs.start.0);
                    let got = self.write(addrs, word)?;
                    ensure!(
                        got != Accessed::Fault,
                        "the device cannot write page {page}"
                    );
                    let here = (0..PAGE).step_by(8).map(|at| area.load(page * PAGE + at));
                    ensure!(
                        here.into_iter().all(|w| w == word),
                        "page {page} is written wrongly"
                    );
                }
            }
        }
        let got = self.context.stats()?.mapped_pages - before;
        let wanted = pages.len() as u64;
        ensure!(got >= wanted, "the device has {got} pages, not {wanted}");
        let audit = self.context.audit()?;
        ensure!(audit.mismatches == 0, "pages differ before the change");
        Ok(())
    }

    /// Lets `change` take access to at least so many pages away. It has to check that it did.
    pub fn change<T>(&mut self, pages: usize, change: impl FnOnce() -> Result<T>) -> Result<T> {
        self.change_in(pages, |_| change())
    }

    /// As [`Trial::change`], for changes that want the trial.
    pub fn change_in<T>(
        &mut self,
        pages: usize,
        change: impl FnOnce(&Self) -> Result<T>,
    ) -> Result<T> {
        let before = self.context.stats()?;
        let ignored = self.is_broken().then(Ignored::new).transpose()?;
        let done = change(self);
        // Before the notifier is heard again: that takes all pages from the device.
        let audit = self.context.audit()?;
        let after = self.context.stats()?;
        drop(ignored);
        let done = done?;

        self.changes += 1;
        self.expected += pages as u64;
        self.taken += after.shot_pages - before.shot_pages;
        self.mismatches += audit.mismatches;
        self.each_seen &= audit.mismatches >= pages as u64;
        if audit.mismatches > 0 && self.first.is_none() {
            let [at, device, cpu] = [audit.iova, audit.device_gpa, audit.cpu_gpa];
            self.first = Some(format!("{at:#x}: device {device:#x}, process {cpu:#x}"));
        }
        Ok(done)
    }

    /// Judges what was found.
    pub fn finish(self, seen: Seen) -> Result<String> {
        let Self {
            expected,
            taken,
            mismatches,
            each_seen,
            changes,
            ..
        } = self;
        if let Seen::ByRow(_) = seen {
            return Ok("as it should be".to_owned());
        }
        ensure!(changes > 0, "the row changed nothing");
        let first = self.first.unwrap_or_default();
        let enough = taken >= expected;
        match (self.mode, seen) {
            (Mode::Sound, Seen::Never(_)) => {
                ensure!(
                    mismatches == 0,
                    "{mismatches} translations differ ({first})"
                );
                Ok(format!("{taken} pages taken, none had to be"))
            }
            (Mode::Sound, _) => {
                ensure!(
                    mismatches == 0,
                    "{mismatches} translations differ ({first})"
                );
                ensure!(expected > 0, "the row expects nothing to be taken");
                ensure!(
                    enough,
                    "{taken} pages taken from the device, not {expected}"
                );
                Ok(format!("{taken} pages taken, {expected} had to be"))
            }
            (Mode::Broken, Seen::ByAudit) => {
                ensure!(
                    each_seen,
                    "not found: only {mismatches} translations differ"
                );
                Ok(format!("found: {mismatches} translations differ"))
            }
            (Mode::Broken, Seen::ByCount(_)) => {
                ensure!(
                    mismatches == 0,
                    "{mismatches} differ: an audit does find it"
                );
                ensure!(!enough, "not found: {taken} pages taken all the same");
                Ok(format!("found: no page taken, {expected} had to be"))
            }
            (Mode::Broken, Seen::Never(_)) => {
                ensure!(
                    mismatches == 0,
                    "{mismatches} translations differ ({first})"
                );
                Ok("nothing to be found".to_owned())
            }
            (Mode::Broken, Seen::ByRow(_)) => unreachable!("dealt with above"),
        }
    }

    /// What the device reads from a page, or that it faults.
    pub fn read(&self, page: Range<Iova>) -> Result<Accessed> {
        self.end(self.begin_read(page)?, Access::Read)
    }

    /// The device begins to read a page.
    pub fn begin_read(&self, page: Range<Iova>) -> Result<Pending<Kernel, Raw, ()>> {
        assert_eq!(page.end.0 - page.start.0, PAGE as u64);
        let descriptor = Descriptor {
            opcode: Opcode::Copy as u8,
            src: page.start.0,
            dst: self.sink.addr(0).0,
            len: PAGE as u64,
            ..Descriptor::default()
        };
        submit(self.context.queue(), descriptor)
    }

    /// The device writes a word all over a range.
    pub fn write(&self, range: Range<Iova>, word: u64) -> Result<Accessed> {
        self.end(self.begin_write(range, word)?, Access::Write)
    }

    /// The device begins to write a word all over a range.
    pub fn begin_write(&self, range: Range<Iova>, word: u64) -> Result<Pending<Kernel, Raw, ()>> {
        submit(self.context.queue(), fill(range, word))
    }

    /// Expects that the device reads one word all over a page.
    pub fn reads(&self, area: &Area, page: usize, word: u64) -> Result<()> {
        match self.read(area.addrs(page..page + 1))? {
            Accessed::Fault => bail!("the device cannot read page {page} any more"),
            Accessed::Words(words) => {
                let wrong = words.iter().find(|w| **w != word);
                ensure!(
                    wrong.is_none(),
                    "page {page}: the device reads {:#x}, not {word:#x}",
                    wrong.copied().unwrap_or_default()
                );
                Ok(())
            }
        }
    }

    /// Expects that the device can write a page, and that the process sees it.
    pub fn writes(&self, area: &Area, page: usize, word: u64) -> Result<()> {
        let got = self.write(area.addrs(page..page + 1), word)?;
        ensure!(
            got != Accessed::Fault,
            "the device cannot write page {page} any more"
        );
        let seen = area.load(page * PAGE + PAGE - 8);
        ensure!(
            seen == word,
            "page {page}: the process reads {seen:#x}, not {word:#x}"
        );
        Ok(())
    }

    /// Expects faults for both kinds of access.
    pub fn faults(&self, area: &Area, page: usize) -> Result<()> {
        let addrs = area.addrs(page..page + 1);
        let got = self.read(addrs.clone())?;
        ensure!(got == Accessed::Fault, "the device still reads page {page}");
        self.write_faults(area, page)
    }

    /// Expects a fault of a write.
    pub fn write_faults(&self, area: &Area, page: usize) -> Result<()> {
        let got = self.write(area.addrs(page..page + 1), 0xbad)?;
        ensure!(
            got == Accessed::Fault,
            "the device still writes page {page}"
        );
        Ok(())
    }

    /// Lets the device read all of a range.
    pub fn read_all(&self, range: Range<Iova>) -> Result<()> {
        let descriptor = Descriptor {
            opcode: Opcode::Crc32c as u8,
            src: range.start.0,
            len: range.end.0 - range.start.0,
            ..Descriptor::default()
        };
        let pending = submit(self.context.queue(), descriptor)?;
        let (completion, ()) = pending.finish()?;
        ensure!(
            completion.status == Status::Success as u32,
            "the device cannot read it all: status {}",
            completion.status
        );
        Ok(())
    }

    /// What becomes of an access that was begun.
    pub fn end(&self, pending: Pending<Kernel, Raw, ()>, access: Access) -> Result<Accessed> {
        let (completion, ()) = match pending.finish() {
            Ok(done) => done,
            Err(extlb_driver::Error::Fault { .. }) => return Ok(Accessed::Fault),
            Err(error) => return Err(error.into()),
        };
        match completion.status {
            s if s == Status::Success as u32 => Ok(Accessed::Words(match access {
                Access::Read => (0..PAGE).step_by(8).map(|at| self.sink.load(at)).collect(),
                Access::Write => Vec::new(),
            })),
            s if s == Status::PageFault as u32 => Ok(Accessed::Fault),
            other => bail!("the operation ended with status {other}"),
        }
    }

    /// The counters of the context.
    pub fn stats(&self) -> Result<Stats> {
        Ok(self.context.stats()?)
    }

    /// Lets the device compare all its translations with the page table.
    pub fn audit(&self) -> Result<Audit> {
        Ok(self.context.audit()?)
    }
}

fn fill(range: Range<Iova>, word: u64) -> Descriptor {
    Descriptor {
        opcode: Opcode::Fill as u8,
        dst: range.start.0,
        len: range.end.0 - range.start.0,
        arg: word,
        ..Descriptor::default()
    }
}

/// The notifier ignored by the driver, for as long as this lives. The device must be idle then:
/// what it still has may be somebody else's.
pub struct Ignored;

impl Ignored {
    fn new() -> Result<Self> {
        fs::write(IGNORE, "1").context(IGNORE)?;
        Ok(Self)
    }

    /// Only the end of batches is ignored.
    pub fn ends_of_batches() -> Result<Self> {
        fs::write(IGNORE, "2").context(IGNORE)?;
        Ok(Self)
    }
}

impl Drop for Ignored {
    /// Takes all pages from the device.
    fn drop(&mut self) {
        if let Err(error) = fs::write(IGNORE, "0") {
            eprintln!("the notifier could not be switched on again: {error}");
            // The device may not be used on.
            std::process::abort();
        }
    }
}

/// A parameter of the driver that is off for as long as this lives.
pub struct Off(&'static str);

impl Off {
    /// Switches it off.
    pub fn new(parameter: &'static str) -> Result<Self> {
        fs::write(format!("{PARAMETERS}/{parameter}"), "N").context(parameter)?;
        Ok(Self(parameter))
    }
}

impl Drop for Off {
    fn drop(&mut self) {
        if let Err(error) = fs::write(format!("{PARAMETERS}/{}", self.0), "Y") {
            eprintln!("{} could not be switched on again: {error}", self.0);
        }
    }
}
