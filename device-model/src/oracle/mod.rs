//! The oracle, device half: does the device use what the process's own page table says?
//!
//! At each access of a watched context, while its guard is held, the translation is compared
//! with the process's page table. A difference is a *suspect*: legal for as long as the
//! shootdown of that page is under way, and stale if none comes.
//!
//! Which invalidation closes a suspect is decided by numbers, not by time. Fills are numbered
//! when their walk begins; an invalidation that removes translations notes the last number given
//! out. So an invalidation *answers* for a translation if it covers the page and the fill's
//! number is not above its note, and it is *done* when a drained wait behind it is acknowledged.
//! - An access whose translation differs, and for which an invalidation that is done answers:
//!   it should not have found that translation. Stale at once (`SurvivedInvalidation`).
//! - A suspect for which an invalidation answers that is done later: closed.
//! - A suspect for which none answers within the bound, and that differs still: stale
//!   (`NotInvalidated`). The second look is for page table entries that the cpu takes out only
//!   to change them, for an upgrade that needs no shootdown.
//! - A context that is stopped or changed closes its suspects.

mod audit;
mod cpu_walk;
mod suspects;

use extlb_spec::regs::{ORACLE_RECORDS, StaleKind};
use extlb_spec::{Gpa, Iova};
use serde::{Deserialize, Serialize};

use crate::Device;
use crate::context::Context;
use crate::ports::Event;
use crate::shootdown::CommandQueue;
use crate::state::{Shift, StateError, check};
use crate::sync::lock;
use crate::tlb::Scope;

pub(crate) use suspects::Suspects;
use suspects::{Suspect, Verdict};

/// An access that broke the rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StaleAccess {
    /// In which way.
    pub kind: StaleKind,
    /// The context.
    pub context: u32,
    /// The address accessed.
    pub iova: Iova,
    /// The page that the device used.
    pub device_gpa: Gpa,
    /// The page that the process has there; `None` for none, or not writable for a write.
    pub cpu_gpa: Option<Gpa>,
    /// The access was a write.
    pub write: bool,
    /// Number of the fill that the access used.
    pub fill: u64,
    /// Number of the last invalidation done at the time.
    pub invalidation: u64,
}

/// A translation as an access uses it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Used {
    pub(crate) iova: Iova,
    pub(crate) frame: Gpa,
    pub(crate) write: bool,
    pub(crate) fill: u64,
}

/// What the oracle keeps.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Oracle {
    pub(crate) suspects: Suspects,
    /// The first stale accesses, for the registers.
    pub(crate) records: Vec<StaleAccess>,
    overflow_told: bool,
}

impl Oracle {
    pub(crate) fn new(config: &crate::config::OracleConfig) -> Self {
        Self {
            suspects: Suspects::new(config),
            records: Vec::new(),
            overflow_told: false,
        }
    }

    /// Believes what was saved, and lets its times be those of another clock.
    pub(crate) fn restore(
        &mut self,
        config: &crate::config::OracleConfig,
        shift: Shift,
    ) -> Result<(), StateError> {
        let Self {
            suspects,
            records,
            overflow_told: _,
        } = self;
        suspects.restore(config, shift)?;
        let room = records.len() <= ORACLE_RECORDS as usize;
        check("the number of records of the oracle", room, records.len())
    }
}

impl Device {
    /// Compares a translation that is about to be used. The caller holds the guard.
    pub(crate) fn check_access(&self, context: &Context, epoch: u64, root: Gpa, used: Used) {
        if !self.config.oracle.enabled || !cpu_walk::may_be_the_processs(used.iova) {
            return;
        }
        self.counters.oracle_checks.add(1);
        let cpu = cpu_walk::walk(&*self.ports.memory, root, used.iova);
        if cpu_walk::agrees(cpu, used.frame, used.write) {
            return;
        }
        let suspect = Suspect {
            used,
            cpu_gpa: cpu_walk::visible(cpu, used.write),
            root,
            invalidation: self.counters.invalidations.get(),
            since: self.now(),
        };
        let mut oracle = lock(&self.oracle);
        // Under the lock: a stop raises the epoch first and closes suspects, under this lock,
        // after. So a suspect of a stopped context is either closed by it or not recorded.
        if context.epoch() != epoch {
            return;
        }
        match oracle.suspects.accuse(context.id, suspect) {
            Verdict::Known => {}
            Verdict::Suspect => self.counters.oracle_suspects.add(1),
            Verdict::Overflow => {
                self.counters.oracle_suspects.add(1);
                self.counters.oracle_overflow.add(1);
                if !std::mem::replace(&mut oracle.overflow_told, true) {
                    self.ports.trace.event(Event::OracleOverflow);
                }
            }
            Verdict::Survived => {
                drop(oracle);
                self.stale(suspect.stale(context.id, StaleKind::SurvivedInvalidation));
            }
        }
    }

    /// Translations were removed; the fills up to this number had begun.
    pub(crate) fn invalidation_begun(&self, scope: &Scope, fills: u64) {
        lock(&self.oracle).suspects.begun(scope.clone(), fills);
    }

    /// A drained wait is about to be acknowledged: the invalidations before it are done.
    pub(crate) fn invalidations_done(&self) {
        lock(&self.oracle).suspects.done();
    }

    /// A context was stopped or changed: what its accesses used is no longer in question.
    pub(crate) fn context_changed(&self, context: u32) {
        lock(&self.oracle).suspects.forget(context);
    }

    /// Looks for suspects whose time is over. With the queue's lock, so that a stop of the
    /// device waits for the second look at the page table, which reads guest memory.
    pub(crate) fn oracle_tick(&self, _queue: &CommandQueue) {
        if !self.is_running() {
            return;
        }
        let now = self.now();
        let expired = lock(&self.oracle).suspects.expired(now);
        for (context, suspect) in expired {
            let cpu = cpu_walk::walk(&*self.ports.memory, suspect.root, suspect.used.iova);
            if cpu_walk::agrees(cpu, suspect.used.frame, suspect.used.write) {
                continue;
            }
            self.stale(suspect.stale(context, StaleKind::NotInvalidated));
        }
    }

    /// When [`Device::invalidation_step`] should be called again at the latest, for the oracle.
    pub fn next_deadline(&self) -> Option<std::time::Duration> {
        lock(&self.oracle).suspects.deadline()
    }

    /// The rule was broken.
    pub(crate) fn stale(&self, access: StaleAccess) {
        self.counters.oracle_stale.add(1);
        {
            let mut oracle = lock(&self.oracle);
            if oracle.records.len() < ORACLE_RECORDS as usize {
                oracle.records.push(access);
            }
        }
        self.ports.trace.event(Event::Stale(access));
    }
}
