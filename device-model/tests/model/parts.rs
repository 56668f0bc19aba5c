//! What the model is made of: page tables, commands, contexts.

use std::collections::{BTreeMap, HashSet, VecDeque};

use extlb_spec::Gpa;
use extlb_spec::context::ContextError;
use extlb_spec::page_request::Response;

use super::operation::Operation;

/// What a leaf maps a page to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    pub frame: Gpa,
    pub write: bool,
}

/// What an invalidation covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    Range(u32, u64, u64),
    Context(u32),
    All,
}

impl Scope {
    pub(super) fn covers(&self, context: u32, page: u64) -> bool {
        match self {
            Scope::Range(c, start, end) => *c == context && (*start..*end).contains(&page),
            Scope::Context(c) => *c == context,
            Scope::All => true,
        }
    }
}

/// A command that was posted and is not done.
#[derive(Clone, Debug)]
pub enum Command {
    Invalidate(Scope),
    Wait {
        value: u64,
        drained: bool,
        interrupt: bool,
        /// Posted in the middle of this access; 0 for none.
        during: u64,
        written: bool,
    },
    Start(u32),
    Change(u32),
    Stop(u32),
    Respond(u32, u32, Response),
}

/// A page request that was not answered, or not all of its operation's were.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub(super) number: u32,
    pub(super) page: u64,
    pub(super) write: bool,
    pub(super) answer: Option<Response>,
}

#[derive(Debug, Default)]
pub struct Context {
    pub runs: bool,
    /// It has told its error, and does nothing more.
    pub failed: bool,
    /// Errors that it may, and must, tell.
    pub(super) errors: Vec<ContextError>,
    pub credits: usize,
    /// Pages that must be readable for the ring, and writable for the records.
    pub ring: u64,
    pub records: Gpa,
    pub record_page: u64,
    /// The page that the lists are in.
    pub lists: u64,
    /// The page that the descriptors of batches are in.
    pub batches: u64,
    /// Where the device says how many operations have ended.
    pub head: Gpa,
    /// The page table as it is; a page that is not here maps nothing.
    pub pages: BTreeMap<u64, Leaf>,
    /// What a walk may have found, beside what it finds now.
    pub(super) may: BTreeMap<u64, Vec<Option<Leaf>>>,
    pub operations: VecDeque<Operation>,
    pub(super) groups: Vec<Group>,
    /// All numbers there ever were.
    pub(super) numbers: HashSet<u32>,
    /// How many of the ring have ended since the context was started.
    pub retired: u32,
    pub(super) tally: Tally,
    /// Submitted without looking whether the device sleeps.
    pub unrung: bool,
}

/// What an operation that tells of others must say.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Operations since the last fence that did not end with success.
    pub unsuccessful: u64,
    /// Of the batch under way: how many have ended, and how many of those not with success.
    pub ended: u64,
    pub failed: u64,
    /// A fence has ended it.
    pub stopped: bool,
}

/// A frame that was taken out of a page table, and is not the kernel's yet.
#[derive(Clone, Debug)]
pub(super) struct Removed {
    pub(super) frame: Gpa,
    pub(super) context: u32,
    pub(super) page: u64,
    /// The index of a command that was posted after, and covers it.
    pub(super) shot: Option<u64>,
}

/// What the registers must say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub completed: u64,
    pub faulted: u64,
    pub page_requests: u64,
    pub strays: u64,
    pub invalidations: u64,
    pub drains: u64,
}

impl Context {
    /// What is left of the batch under way is not begun any more.
    pub(super) fn drop_batch(&mut self) {
        while self.operations.front().is_some_and(|op| op.in_batch) {
            self.operations.pop_front();
        }
    }

    /// It is stopped: nothing of it is left, but the numbers of its groups.
    pub(super) fn stop(&mut self) {
        self.runs = false;
        self.failed = false;
        self.unrung = false;
        self.retired = 0;
        self.tally = Tally::default();
        self.errors.clear();
        self.operations.clear();
        self.groups.clear();
        self.may.clear();
    }

    /// Whether it has done all that it can do by itself.
    pub fn is_settled(&self) -> bool {
        !self.runs || self.failed || self.operations.is_empty()
    }
}
