//! What the device does meanwhile: operations without pause, each checked when it has ended.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use extlb_driver::spec::work::{Completion, Descriptor, Opcode, Status, fault};
use extlb_driver::{Iova, Kernel, Pending, Queue, Raw, Submitter};

use super::memory_unsafe::{Area, PAGE, submit};
use super::random::Random;
use super::words::{self, MAX_SEQUENCE, Writer, Wrong, word};

/// Operations submitted together.
const BATCH: usize = 32;
/// Operations under way at most; a slot of the sink for each.
pub const DEPTH: usize = 96;
/// Largest operation, in pages. An operation of this many pages may touch one more.
pub const MAX_PAGES: usize = 12;
/// Pages of a sink.
pub const SINK_PAGES: usize = DEPTH * (MAX_PAGES + 1);

/// What the device works on.
#[derive(Clone, Copy, Debug)]
pub struct Areas<'a> {
    /// Changes under the device's hands.
    pub fire: &'a Area,
    /// As large; page for page what is copied to `fire`. `None`: the device does not write there.
    pub source: Option<&'a Area>,
    /// Where pages of `fire` are copied to.
    pub sink: &'a Area,
}

/// What the traffic and those who change the memory tell each other.
#[derive(Debug)]
pub struct Shared {
    stop: AtomicBool,
    /// Rounds asked for in which nothing may fail, and rounds done.
    calm_wanted: AtomicU64,
    calm_done: AtomicU64,
    failed: AtomicBool,
    /// All fills up to this one have ended.
    fills_ended: AtomicU64,
    /// Operations that have ended.
    ended: AtomicU64,
    /// For each page: fills up to this one were wiped out.
    floors: Vec<AtomicU64>,
    first_failure: Mutex<Option<String>>,
}

impl Shared {
    /// For an area of so many pages.
    pub fn new(pages: usize) -> Self {
        Self {
            stop: AtomicBool::new(false),
            calm_wanted: AtomicU64::new(0),
            calm_done: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            fills_ended: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            floors: (0..pages).map(|_| AtomicU64::new(0)).collect(),
            first_failure: Mutex::new(None),
        }
    }

    /// Operations of the device that have ended so far.
    pub fn ended(&self) -> u64 {
        self.ended.load(Ordering::Relaxed)
    }

    /// To be taken before pages are replaced by fresh ones, and given to [`Shared::wiped`] after.
    pub fn before_wiping(&self) -> u64 {
        self.fills_ended.load(Ordering::Acquire)
    }

    /// Pages were replaced: what was filled before is not to be seen by operations from now on.
    pub fn wiped(&self, pages: Range<usize>, before: u64) {
        self.floors[pages].iter().for_each(|floor| {
            floor.fetch_max(before, Ordering::AcqRel);
        });
    }

    /// Says that something is wrong; the first one is kept.
    pub fn fail(&self, why: String) {
        if let Ok(mut first) = self.first_failure.lock() {
            first.get_or_insert(why);
        }
        self.failed.store(true, Ordering::Release);
    }

    /// What went wrong first.
    pub fn check(&self) -> Result<()> {
        if !self.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        let first = self
            .first_failure
            .lock()
            .ok()
            .and_then(|first| first.clone());
        bail!(first.unwrap_or_else(|| "a thread ended early".to_owned()))
    }

    /// Waits until a batch of operations, submitted and ended after this call, succeeded in whole.
    /// Nobody may change the memory meanwhile.
    pub fn calm_round(&self) -> Result<()> {
        let wanted = self.calm_wanted.fetch_add(1, Ordering::AcqRel) + 1;
        let begun = Instant::now();
        while self.calm_done.load(Ordering::Acquire) < wanted {
            self.check()?;
            ensure!(
                begun.elapsed() < Duration::from_secs(10),
                "the device's queue does not move"
            );
            std::thread::sleep(Duration::from_micros(200));
        }
        self.check()
    }

    /// Whether it is over.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire) || self.failed.load(Ordering::Acquire)
    }

    /// Ends the traffic.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    pub completed: u64,
    pub faulted: u64,
    pub bytes: u64,
    pub words: u64,
    /// Words that should not have been seen. Always 0, unless this is expected.
    pub wrong_words: u64,
}

/// An operation under way.
struct Flight {
    pending: Pending<Kernel, Raw, ()>,
    work: Work,
}

enum Kind<'a> {
    /// Copy from `fire` to the sink.
    Out,
    /// Copy from the source to `fire`.
    In(&'a Area),
    /// Fill a page of `fire`, or a part.
    Fill,
}

/// What an operation was.
struct Work {
    opcode: Opcode,
    /// Where in `fire`, in bytes.
    at: usize,
    len: usize,
    src: Iova,
    dst: Iova,
    /// Of a copy out of `fire`: offset in the sink, and the floors of the pages.
    out: Option<(usize, [u64; MAX_PAGES + 1])>,
    /// Of a fill.
    sequence: Option<u64>,
    /// Submitted while nobody changes the memory.
    calm: bool,
}

/// The thread's state.
pub struct Traffic<'a> {
    areas: Areas<'a>,
    queue: Queue<Kernel>,
    shared: &'a Shared,
    random: Random,
    flights: VecDeque<Flight>,
    submitted: usize,
    sequence: u64,
    totals: Totals,
    /// Wrong words are counted instead of being a failure.
    tolerant: bool,
}

impl<'a> Traffic<'a> {
    /// Traffic through a queue of at least 128 entries.
    pub fn new(
        areas: Areas<'a>,
        queue: Queue<Kernel>,
        shared: &'a Shared,
        seed: u64,
        tolerant: bool,
    ) -> Self {
        assert!(areas.sink.pages() >= SINK_PAGES && areas.fire.pages() > MAX_PAGES);
        assert!(queue.entries() as usize >= DEPTH);
        Self {
            areas,
            queue,
            shared,
            random: Random::new(seed ^ 0x7aff1c),
            flights: VecDeque::with_capacity(DEPTH),
            submitted: 0,
            sequence: 0,
            totals: Totals::default(),
            tolerant,
        }
    }

    /// Goes on until it is stopped or something is wrong (which [`Shared::check`] tells).
    pub fn run(mut self) -> Totals {
        if let Err(error) = self.go_on() {
            self.shared.fail(format!("{error:#}"));
        }
        self.totals
    }

    fn go_on(&mut self) -> Result<()> {
        while !self.shared.stopped() {
            let wanted = self.shared.calm_wanted.load(Ordering::Acquire);
            if wanted > self.shared.calm_done.load(Ordering::Acquire) {
                self.retire_down_to(0)?;
                self.submit_batch(true)?;
                self.retire_down_to(0)?;
                self.shared.calm_done.store(wanted, Ordering::Release);
            }
            self.retire_down_to(DEPTH - BATCH)?;
            self.submit_batch(false)?;
        }
        self.retire_down_to(0)
    }

    fn submit_batch(&mut self, calm: bool) -> Result<()> {
        let queue = self.queue.clone();
        let batch = queue.batch();
        for _ in 0..BATCH {
            let flight = self.one(&batch, calm)?;
            self.flights.push_back(flight);
            self.submitted += 1;
        }
        batch.submit_all();
        Ok(())
    }

    /// Submits one operation, of random kind, place and size (multiples of 8 bytes).
    fn one(&mut self, batch: &Submitter<'_, Kernel>, calm: bool) -> Result<Flight> {
        let Areas { fire, source, sink } = self.areas;
        let size = (fire.pages() * PAGE) as u64;
        // Small ones more often than large ones.
        let most = (MAX_PAGES * PAGE) as u64 >> self.random.below(6);
        let len = 8 + self.random.below(most / 8) * 8;
        let at = (self.random.below((size - len) / 8 + 1) * 8) as usize;
        let len = len as usize;

        let kind = source.map_or(Kind::Out, |source| match self.random.below(10) {
            0..4 => Kind::Out,
            4..7 => Kind::In(source),
            _ => Kind::Fill,
        });
        let (src, dst) = (Iova(0), Iova(0));
        let mut work = Work {
            opcode: Opcode::Copy,
            at,
            len,
            src,
            dst,
            out: None,
            sequence: None,
            calm,
        };
        match kind {
            Kind::Out => {
                let slot = self.submitted % DEPTH * (MAX_PAGES + 1) * PAGE;
                let first = at / PAGE;
                let mut floors = [0; MAX_PAGES + 1];
                // Read before the operation is submitted: what was wiped by now, it cannot see.
                for (floor, page) in floors.iter_mut().zip(&self.shared.floors[first..]) {
                    *floor = page.load(Ordering::Acquire);
                }
                work.out = Some((slot, floors));
                (work.src, work.dst) = (fire.addr(at), sink.addr(slot));
            }
            Kind::In(source) => (work.src, work.dst) = (source.addr(at), fire.addr(at)),
            Kind::Fill => {
                // Within a page, as the word names it.
                work.len = len.min(PAGE - at % PAGE);
                self.sequence += 1;
                ensure!(self.sequence <= MAX_SEQUENCE, "out of sequence numbers");
                work.opcode = Opcode::Fill;
                work.sequence = Some(self.sequence);
                work.dst = fire.addr(at);
            }
        }
        let descriptor = Descriptor {
            opcode: work.opcode as u8,
            src: work.src.0,
            dst: work.dst.0,
            len: work.len as u64,
            arg: work
                .sequence
                .map_or(0, |n| word(at / PAGE, Writer::Fill, n)),
            ..Descriptor::default()
        };
        Ok(Flight {
            pending: submit(batch, descriptor)?,
            work,
        })
    }

    fn retire_down_to(&mut self, left: usize) -> Result<()> {
        while self.flights.len() > left {
            let Some(Flight { pending, work }) = self.flights.pop_front() else {
                break;
            };
            let (completion, ()) = pending.finish()?;
            // With the notifier off what the device reads is stale on purpose; that step is judged
            // by what the oracle and the audit find.
            let judged = self.judge(&work, &completion);
            if !self.tolerant {
                judged.with_context(|| format!("{work}: {completion:?}"))?;
            }
            self.shared.ended.fetch_add(1, Ordering::Relaxed);
            if let Some(sequence) = work.sequence {
                // Operations end in order.
                self.shared.fills_ended.store(sequence, Ordering::Release);
            }
        }
        Ok(())
    }

    fn judge(&mut self, work: &Work, completion: &Completion) -> Result<()> {
        match Status::from_raw(completion.status) {
            Some(Status::Success) => {
                ensure!(
                    completion.bytes == work.len as u64,
                    "success with bytes missing"
                );
                self.totals.completed += 1;
            }
            Some(Status::PageFault) => {
                ensure!(!work.calm, "a fault although nobody changed the memory");
                check_fault(self.areas.fire, work, completion)?;
                self.totals.faulted += 1;
            }
            _ => bail!("neither success nor a page fault"),
        }
        self.totals.bytes += completion.bytes;
        let Some((slot, floors)) = work.out else {
            return Ok(());
        };
        // What was copied before a fault counts as well.
        for offset in (0..completion.bytes as usize & !7).step_by(8) {
            let found = self.areas.sink.load(slot + offset);
            let page = (work.at + offset) / PAGE;
            let floor = floors[page - work.at / PAGE];
            self.totals.words += 1;
            match words::check(found, page, floor) {
                Ok(()) => {}
                Err(_) if self.tolerant => self.totals.wrong_words += 1,
                Err(Wrong::Foreign) => bail!("{found:#x} does not belong to page {page}"),
                Err(Wrong::Stale) => {
                    bail!("{found:#x} in page {page} was wiped (up to {floor:#x}) before")
                }
            }
        }
        Ok(())
    }
}

/// A fault must name an address of the operation, where it had come to, in the area under fire.
fn check_fault(fire: &Area, work: &Work, completion: &Completion) -> Result<()> {
    let operand = if completion.fault & fault::WRITE != 0 {
        work.dst
    } else {
        work.src
    };
    let next = Iova(operand.0 + completion.bytes);
    let addr = Iova(completion.fault_addr);
    ensure!(
        completion.bytes < work.len as u64,
        "a fault after all was done"
    );
    ensure!(
        fire.addrs(&(0..fire.pages())).contains(&addr),
        "a fault at {addr}, outside of the memory that changes"
    );
    ensure!(
        addr.page() == next.page() && addr.0 < operand.0 + work.len as u64,
        "a fault at {addr}; the operation had come to {next}"
    );
    Ok(())
}

impl std::fmt::Display for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            opcode,
            src,
            dst,
            len,
            ..
        } = self;
        write!(f, "{opcode:?} of {len} bytes from {src} to {dst}")
    }
}
