//! A program of the script: what it submits, and what becomes of it.

use std::mem::offset_of;
use std::ops::RangeInclusive;

use extlb_spec::context::ContextShadow;
use extlb_spec::work::{Completion, Descriptor, Opcode, Segment, Status, fault, flags};
use extlb_spec::{Gpa, Iova};

use super::simulation::Simulation;
use super::{BATCHES, LISTS, NOWHERE};
use crate::common::{self, Guest, PAGE, Process, op};

/// Records from here on are of descriptors in batches; those before, of the ring.
const IN_BATCH: u64 = 64;
const RECORDS: u64 = 128;

/// A submission, and how it ends.
pub type Work = (Descriptor, Status);

/// A program, and what becomes of each of its submissions.
pub struct Program {
    pub process: Process,
    pub memory: Simulation,
    lists: u64,
    batches: u64,
    in_batch: u64,
    /// What is in the ring.
    pub work: Vec<Descriptor>,
    /// How all that ends: in this order.
    pub ends: Vec<End>,
    /// Frames behind its pages, as they were mapped.
    pub frames: Vec<(u64, Gpa)>,
}

/// The end of an operation, of the ring or of a batch.
#[derive(Clone, Copy, Debug)]
pub struct End {
    descriptor: Descriptor,
    done: Completion,
}

impl End {
    /// It leaves no record.
    fn is_silent(&self) -> bool {
        self.descriptor.flags & flags::QUIET != 0 && self.done.status == Status::Success as u32
    }

    fn is_in_ring(&self, process: &Process) -> bool {
        self.descriptor.completion < process.record(IN_BATCH).0
    }
}

impl Program {
    pub fn new(guest: &Guest, context: u32) -> Self {
        let process = guest.process(context);
        process.map(Iova(NOWHERE), Gpa(common::RAM as u64), true);
        Self {
            process,
            memory: Simulation::default(),
            lists: LISTS,
            batches: BATCHES,
            in_batch: IN_BATCH,
            work: Vec::new(),
            ends: Vec::new(),
            frames: Vec::new(),
        }
    }

    /// A list in its memory.
    pub fn list(&mut self, segments: &[(u64, u64)]) -> (u64, u32) {
        let at = self.lists;
        for &(addr, len) in segments {
            let segment = Segment { addr, len };
            self.memory.give(self.lists, &segment.to_bytes());
            self.lists += Segment::SIZE as u64;
        }
        (at, segments.len() as u32)
    }

    /// A batch of descriptors in its memory; those that end as `Pending` are never begun.
    pub fn batch(&mut self, work: &[Work]) -> (Descriptor, Vec<Status>) {
        let at = self.batches;
        for (descriptor, _) in work {
            let descriptor = Descriptor {
                completion: self.process.record(self.in_batch).0,
                ..*descriptor
            };
            self.memory.give(self.batches, &descriptor.to_bytes());
            self.batches += Descriptor::SIZE as u64;
            self.in_batch += 1;
        }
        let ends = work.iter().map(|(_, status)| *status);
        let ends = ends.filter(|status| *status != Status::Pending).collect();
        (op(Opcode::Batch, at, 0, work.len() as u64), ends)
    }

    /// It will submit this, which ends so.
    pub fn add(&mut self, (descriptor, status): Work) {
        self.add_batch((descriptor, Vec::new()), status);
    }

    /// Likewise a batch, before which its descriptors end.
    pub fn add_batch(&mut self, (descriptor, mut want): (Descriptor, Vec<Status>), status: Status) {
        let descriptor = Descriptor {
            completion: self.process.record(self.work.len() as u64).0,
            ..descriptor
        };
        self.work.push(descriptor);
        let ends = self.memory.run(&descriptor).into_iter();
        let ends: Vec<_> = ends
            .map(|(descriptor, done)| End { descriptor, done })
            .collect();
        want.push(status);
        let found: Vec<_> = ends
            .iter()
            .map(|e| Status::from_raw(e.done.status))
            .collect();
        assert_eq!(found, want.into_iter().map(Some).collect::<Vec<_>>());
        self.ends.extend(ends);
    }

    fn shadow(&self, offset: usize) -> u32 {
        self.process.word(offset)
    }

    /// Between how many and how many of its operations have ended, by their records: they end in
    /// their order, and some leave none.
    fn ended(&self) -> RangeInclusive<usize> {
        let has_record = |end: &End| self.record(end).status != 0;
        let least = self
            .ends
            .iter()
            .rposition(has_record)
            .map_or(0, |at| at + 1);
        let silent = self.ends[least..].iter().take_while(|end| end.is_silent());
        least..=least + silent.count()
    }

    /// The number of a record in their page.
    fn number(&self, end: &End) -> u64 {
        (end.descriptor.completion - self.process.records.0) / Completion::SIZE as u64
    }

    fn record(&self, end: &End) -> Completion {
        self.process.completion(self.number(end))
    }

    /// Nothing is half done or done twice.
    pub fn check_half(&self, guest: &Guest, what: &str) {
        let stores = guest.memory.stores.lock().unwrap();
        let times = |number: u64| {
            let at = Gpa(self.process.records_page.0 + number * Completion::SIZE as u64);
            stores.get(&at).copied().unwrap_or(0)
        };
        let mut left: Vec<u64> = (0..RECORDS).collect();
        let least = *self.ended().start();
        for (n, end) in self.ends.iter().enumerate() {
            let what = format!("{what}: {n} of context {}", self.process.context);
            let (found, want) = (self.record(end), end.done);
            if n >= least || end.is_silent() {
                // Not yet; nobody looks at what else is in the record.
                assert_eq!((found.status, times(self.number(end))), (0, 0), "{what}");
                continue;
            }
            let number = self.number(end);
            assert_eq!(times(number), 1, "{what}: {found:?}");
            left.retain(|n| *n != number);
            let page_only = want.fault & fault::FROM_END != 0;
            let place = |addr: u64| if page_only { addr & !(PAGE - 1) } else { addr };
            let in_short = |c: Completion| Completion {
                fault_addr: place(c.fault_addr),
                ..c
            };
            assert_eq!(in_short(found), in_short(want), "{what}");
        }
        for number in left {
            assert_eq!(times(number), 0, "{what}: record {number} is of nothing");
        }
    }

    /// Likewise, where the device has said in the shadow page how far it got: how many have ended.
    pub fn check_told(&self, what: &str) -> RangeInclusive<u64> {
        let head = self.shadow(offset_of!(ContextShadow, head)) as usize;
        let ring = |end: &&End| end.is_in_ring(&self.process);
        // Those that are in front of the next one of the ring.
        let mut of_ring = (0..).zip(&self.ends).filter(|(_, end)| ring(end));
        let next = of_ring
            .clone()
            .nth(head)
            .map_or(self.ends.len(), |(n, _)| n);
        let last = of_ring.nth(head.wrapping_sub(1)).map_or(0, |(n, _)| n + 1);
        let by_record = self.ended();
        let what = format!("{what}: context {}, head {head}", self.process.context);
        let ended = last.max(*by_record.start())..=next.min(*by_record.end());
        assert!(
            !ended.is_empty(),
            "{what}, {last} to {next}, {by_record:?} by records"
        );
        let told = self.shadow(offset_of!(ContextShadow, event_seq)) as usize;
        let events = |ends: &[End]| {
            let asked = |end: &&End| end.descriptor.flags & flags::INTERRUPT != 0;
            ends.iter().filter(asked).count()
        };
        let events = events(&self.ends[..*ended.start()])..=events(&self.ends[..*ended.end()]);
        assert!(
            events.contains(&told),
            "{what}: event {told}, not {events:?}"
        );
        *ended.start() as u64..=*ended.end() as u64
    }

    /// All that is in the ring has ended.
    pub fn is_done(&self) -> bool {
        self.shadow(offset_of!(ContextShadow, head)) as usize == self.work.len()
    }
}
