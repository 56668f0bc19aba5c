//! A reference model of the device: obvious and slow. It does not compute what the device must
//! do next, as much is left to the device; it watches every access to memory, and knows whether
//! a device may make it.
//!
//! The TLB is "whatever some walk may have found since the last invalidation that covers the page
//! may be used". An operation is its two operands, and which of their bytes have been seen or
//! written. The queue is a list of commands that take effect, one after the other, when the
//! device says that it is beyond them.

pub mod observe;
pub mod operation;
mod parts;
pub mod world;

use std::collections::{HashMap, HashSet, VecDeque};

use extlb_spec::context::ContextError;
use extlb_spec::page_request::{PageRequest, RequestKind, Response, flags};
use extlb_spec::{Gpa, Iova, Vector};

use crate::common::{IQ_LOG2, PAGE, PRQ_LOG2};
use operation::{Operand, Operation};
pub use parts::{Command, Context, Counts, Leaf, Scope, Tally};
use parts::{Group, Removed};

#[derive(Debug, Default)]
pub struct Model {
    pub contexts: Vec<Context>,
    /// Whose a frame is: pages are never shared, and a frame serves one page in its life.
    pub frames: HashMap<u64, (u32, u64)>,
    removed: Vec<Removed>,
    /// Frames that the kernel has taken back: nobody touches them.
    pub back: HashSet<u64>,
    pub queue: VecDeque<Command>,
    /// Index after the last command done.
    pub head: u64,
    /// Bus master, power, enable: accesses are allowed at all.
    pub powered: bool,
    /// Accesses to data so far, and the number of the one under way; 0 outside.
    pub accesses: u64,
    pub during: u64,
    /// Translations that were removed in the middle of an access: it may use them to its end.
    grace: Vec<(u32, u64, Option<Leaf>)>,
    /// Records of page requests that the kernel has not consumed.
    pub unread: u64,
    pub requests: Vec<(u32, u32)>,
    pub counts: Counts,
    interrupts: u64,
    pub broken: Vec<String>,
}

impl Model {
    pub fn fail(&mut self, what: impl Into<String>) {
        self.broken.push(what.into());
    }

    // ---- The kernel's side.

    /// The page table is changed.
    pub fn map(&mut self, c: u32, page: u64, leaf: Option<Leaf>) {
        let context = &mut self.contexts[c as usize];
        let old = context.pages.remove(&page);
        context.may.entry(page).or_default().push(old);
        if let Some(leaf) = leaf {
            context.pages.insert(page, leaf);
            self.frames.insert(leaf.frame.0, (c, page));
            // A page of the program's own can come back in the same frame.
            self.back.remove(&leaf.frame.0);
            self.removed.retain(|r| r.frame != leaf.frame);
        }
        if let Some(old) = old
            && leaf.is_none_or(|leaf| leaf.frame != old.frame)
        {
            self.removed.push(Removed {
                frame: old.frame,
                context: c,
                page,
                shot: None,
            });
        }
    }

    pub fn has_room(&self) -> bool {
        self.queue.len() + 2 < 1 << IQ_LOG2
    }

    /// A command is posted.
    pub fn post(&mut self, command: Command) {
        let index = self.head + self.queue.len() as u64;
        let scope = match &command {
            Command::Invalidate(scope) => Some(scope.clone()),
            Command::Stop(c) | Command::Change(c) => Some(Scope::Context(*c)),
            _ => None,
        };
        for removed in &mut self.removed {
            let covers = |s: &Scope| s.covers(removed.context, removed.page);
            if removed.shot.is_none() && scope.as_ref().is_some_and(covers) {
                removed.shot = Some(index);
            }
        }
        self.queue.push_back(command);
    }

    /// The device was reset or disabled: nothing is left of what it knew.
    pub fn forget(&mut self) {
        self.queue.clear();
        self.head = 0;
        self.unread = 0;
        self.requests.clear();
        for context in &mut self.contexts {
            context.stop();
        }
        for removed in std::mem::take(&mut self.removed) {
            self.back.insert(removed.frame.0);
        }
    }

    /// What is asked for and not answered: context, group, page, write.
    pub fn open_groups(&self) -> Vec<(u32, u32, u64, bool)> {
        let mut open = Vec::new();
        for (c, context) in (0..).zip(&self.contexts) {
            let groups = context.groups.iter().filter(|g| g.answer.is_none());
            open.extend(groups.map(|g| (c, g.number, g.page, g.write)));
        }
        open
    }

    /// No access is under way.
    pub fn rest(&mut self) {
        self.grace.clear();
    }

    // ---- The device's side.

    /// It says that its index in the queue is this.
    fn reached(&mut self, head: u32) {
        while self.head as u32 != head {
            let Some(command) = self.queue.pop_front() else {
                return self.fail("iq_head beyond iq_tail");
            };
            self.head += 1;
            self.carry_out(command);
        }
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Invalidate(scope) => {
                self.counts.invalidations += 1;
                self.clear(&scope);
            }
            Command::Wait { written, value, .. } if !written => {
                self.fail(format!("beyond wait {value}, which was not acknowledged"));
            }
            Command::Wait { .. } => {}
            Command::Start(c) => {
                self.clear(&Scope::Context(c));
                self.contexts[c as usize].runs = true;
            }
            Command::Change(c) => self.clear(&Scope::Context(c)),
            Command::Stop(c) => {
                self.clear(&Scope::Context(c));
                self.contexts[c as usize].stop();
            }
            Command::Respond(c, number, answer) => self.answer(c, number, answer),
        }
    }

    fn clear(&mut self, scope: &Scope) {
        for (c, context) in (0..).zip(&mut self.contexts) {
            let covered: Vec<u64> = context.may.keys().copied().collect();
            for page in covered.into_iter().filter(|page| scope.covers(c, *page)) {
                let old = context.may.remove(&page).unwrap_or_default();
                if self.during != 0 {
                    self.grace
                        .extend(old.into_iter().map(|leaf| (c, page, leaf)));
                }
            }
        }
    }

    fn answer(&mut self, c: u32, number: u32, answer: Response) {
        let context = &mut self.contexts[c as usize];
        let open = |g: &&mut Group| g.number == number && g.answer.is_none();
        let Some(group) = context.groups.iter_mut().find(open) else {
            self.counts.strays += 1;
            return;
        };
        group.answer = Some(answer);
        if context.groups.iter().any(|g| g.answer.is_none()) {
            return;
        }
        let groups = std::mem::take(&mut context.groups);
        let said = |r: Response| groups.iter().filter(move |g| g.answer == Some(r));
        if said(Response::Failure).next().is_some() {
            context.errors.push(ContextError::PageRequestFailed);
            return;
        }
        for group in said(Response::Invalid) {
            if group.page == context.ring {
                context.errors.push(ContextError::RingFault);
            } else if group.page == context.record_page {
                context.errors.push(ContextError::CompletionFault);
            } else if let Some(operation) = {
                if group.page == context.batches {
                    context.drop_batch();
                }
                context.operations.front_mut()
            } {
                operation.refused.insert(group.page);
            }
        }
    }

    /// Everything that the page may be translated to now.
    fn translations(&self, c: u32, page: u64) -> impl Iterator<Item = Option<Leaf>> {
        let context = &self.contexts[c as usize];
        let grace = self
            .grace
            .iter()
            .filter(move |(gc, gp, _)| (*gc, *gp) == (c, page));
        let may = context.may.get(&page).into_iter().flatten().copied();
        let now = context.pages.get(&page).copied();
        may.chain([now]).chain(grace.map(|g| g.2))
    }

    /// An access to a frame: whose page it is, if it may be made.
    fn access(&mut self, at: Gpa, write: bool) -> Option<(u32, u64)> {
        let frame = at.page();
        if self.back.contains(&frame.0) {
            self.fail(format!("{at}: touched after its page was taken away"));
            return None;
        }
        let &(c, page) = self.frames.get(&frame.0)?;
        let context = &self.contexts[c as usize];
        let what = format!("context {c}, page {page:#x}, write {write}");
        if !context.runs || context.failed || !context.errors.is_empty() {
            self.fail(format!("{what}: the context does not run"));
        } else if context.groups.iter().any(|g| g.answer.is_none()) {
            self.fail(format!("{what}: waits for an answer"));
        }
        let allows = |leaf: Leaf| leaf.frame == frame && (leaf.write || !write);
        if !self.translations(c, page).flatten().any(allows) {
            self.fail(format!("{what}: by a translation that is no more"));
        }
        Some((c, page + at.page_offset()))
    }

    /// The operation of a context that may be under way. Of one that is quiet and has done all
    /// that it has to do, nothing more is seen: what is seen then is of the next.
    fn under_way(&mut self, c: u32) -> Option<&mut Operation> {
        while let Some(operation) = self.contexts[c as usize].operations.front() {
            let tally = &self.contexts[c as usize].tally;
            if !operation.is_quiet() || operation.may_succeed(tally).is_err() {
                break;
            }
            self.retire(c, true);
        }
        self.contexts[c as usize].operations.front_mut()
    }

    /// The operation that is under way has ended.
    fn retire(&mut self, c: u32, success: bool) -> Option<Operation> {
        let context = &mut self.contexts[c as usize];
        let operation = context.operations.pop_front()?;
        let tally = &mut context.tally;
        tally.unsuccessful = match operation.is_fence() {
            true => 0,
            false => tally.unsuccessful + u64::from(!success),
        };
        if operation.in_batch {
            tally.ended += 1;
            tally.failed += u64::from(!success);
            if operation.is_fence() && !success {
                tally.stopped = true;
                context.drop_batch();
            }
        } else {
            context.retired += 1;
            *tally = Tally {
                unsuccessful: tally.unsuccessful,
                ..Default::default()
            };
        }
        match success {
            true => self.counts.completed += 1,
            false => self.counts.faulted += 1,
        }
        Some(operation)
    }

    /// The descriptors of a batch are read: those that leave no record before it have ended.
    /// Whether there is such a batch.
    fn reach_batch(&mut self, c: u32) -> bool {
        while let Some(operation) = self.contexts[c as usize].operations.front() {
            let tally = &self.contexts[c as usize].tally;
            if operation.in_batch {
                return tally.ended == 0;
            }
            if !operation.is_quiet() || operation.may_succeed(tally).is_err() {
                return false;
            }
            self.retire(c, true);
        }
        false
    }

    /// Whose `head` is here.
    fn head_at(&self, at: Gpa) -> Option<u32> {
        let mut contexts = (0..).zip(&self.contexts);
        contexts.find_map(|(c, context)| (context.head == at).then_some(c))
    }

    /// A context's shadow page says that so many operations have ended.
    fn told(&mut self, c: u32, head: u32) {
        while self.contexts[c as usize].retired != head {
            let context = &self.contexts[c as usize];
            let quiet = context.operations.front().filter(|op| op.is_quiet());
            let ended = quiet.map(|op| op.may_succeed(&context.tally));
            if ended.is_none_or(|ended| ended.is_err()) {
                let retired = context.retired;
                let why = format!("context {c}: head {head}, and {retired} ended: {ended:?}");
                return self.fail(why);
            }
            self.retire(c, true);
        }
    }

    /// The operation of a context that may be under way, and where in it an address is.
    fn operand(&mut self, c: u32, iova: u64, len: u64, write: bool) -> Option<Operand> {
        let operation = self.under_way(c);
        let operand = operation.and_then(|op| op.operand(iova, len, write));
        if operand.is_none() {
            self.fail(format!("context {c}, {iova:#x}, {len} bytes: no operand"));
        }
        operand
    }

    /// A record is written to the page request ring.
    fn record(&mut self, record: &PageRequest) {
        self.unread += 1;
        if self.unread > 1 << PRQ_LOG2 {
            self.fail("a record was written over one that was not read");
        }
        let c = record.context;
        let what = format!("{record:?}");
        let (ring, batches) = {
            let context = &self.contexts[c as usize];
            (context.ring, context.batches)
        };
        let mut wrong = Vec::new();
        if record.kind == RequestKind::Page as u32 {
            match record.iova {
                // It is read for what nothing is known of yet.
                page if page == ring => {}
                page if page == batches => {
                    if !self.reach_batch(c) {
                        wrong.push("before no batch");
                    }
                }
                _ => drop(self.under_way(c)),
            }
        }
        let context = &mut self.contexts[c as usize];
        if !context.runs || context.failed {
            return self.fail(format!("{what}: the context does not run"));
        }
        if record.kind == RequestKind::ContextError as u32 {
            let known = context.errors.iter().any(|e| *e as u32 == record.code);
            context.failed = true;
            context.groups.clear();
            context.operations.clear();
            if !known {
                self.fail(format!("{what}: for no reason"));
            }
            return;
        }
        self.counts.page_requests += 1;
        self.requests.push((c, record.group));
        let write = record.flags & flags::WRITE != 0;
        let page = record.iova;
        if !context.numbers.insert(record.group) {
            wrong.push("a group that there was before");
        }
        let open = context.groups.iter().filter(|g| g.answer.is_none()).count();
        if open >= context.credits {
            wrong.push("without credit");
        }
        if !context.errors.is_empty() {
            wrong.push("by a context that has failed");
        }
        let asked_by = context.operations.front();
        let own = [context.ring, context.batches].contains(&page) && !write
            || page == context.record_page && write;
        match asked_by {
            Some(_) if own => {}
            Some(operation) if !operation.needs(page, write) => wrong.push("by no operand"),
            Some(operation) if !operation.refused.is_empty() => wrong.push("after a refusal"),
            Some(_) => {}
            None => wrong.push("nothing is submitted"),
        }
        context.groups.push(Group {
            number: record.group,
            page,
            write,
            answer: None,
        });
        let denies = |leaf: Option<Leaf>| leaf.is_none_or(|leaf| write && !leaf.write);
        if !self.translations(c, page).any(denies) {
            wrong.push("for a page that is there");
        }
        for wrong in wrong {
            self.fail(format!("{what}: {wrong}"));
        }
    }

    /// A wait command writes.
    fn acknowledged(&mut self, written_value: u64) {
        let during_now = self.during;
        let Some(Command::Wait {
            value,
            drained,
            during,
            written,
            ..
        }) = self.queue.front_mut()
        else {
            return self.fail(format!("wait {written_value} acknowledged before its turn"));
        };
        if *value != written_value || *written {
            return self.fail(format!(
                "wait {written_value} acknowledged in place of another"
            ));
        }
        *written = true;
        let (drained, during) = (*drained, *during);
        if !drained {
            return;
        }
        self.counts.drains += 1;
        if during != 0 && during == during_now {
            self.fail(format!(
                "drain {written_value} ended before the access under way"
            ));
        }
        // The kernel may use again what was removed before.
        let head = self.head;
        let shot = |r: &Removed| r.shot.is_some_and(|shot| shot < head);
        let (gone, kept) = std::mem::take(&mut self.removed)
            .into_iter()
            .partition::<Vec<_>, _>(shot);
        self.removed = kept;
        self.back.extend(gone.into_iter().map(|r| r.frame.0));
    }

    fn raised(&mut self, vector: Vector) {
        if !self.powered {
            self.fail(format!("{vector:?} without bus mastering"));
        }
        if vector != Vector::Invalidation {
            return;
        }
        self.interrupts += 1;
        let Some(Command::Wait {
            interrupt: true,
            written: true,
            ..
        }) = self.queue.front()
        else {
            return self.fail("an invalidation interrupt that nobody asked for, or too early");
        };
    }
}

/// The page of an address.
pub fn page_of(iova: u64) -> u64 {
    Iova(iova).page().0
}

const _: () = assert!(PAGE == 4096);
