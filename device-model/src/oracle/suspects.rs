//! The table of open differences, and the log of invalidations that may answer for them.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use extlb_spec::regs::StaleKind;
use extlb_spec::{Gpa, Iova, MAX_CONTEXTS};
use serde::{Deserialize, Serialize};

use super::{StaleAccess, Used};
use crate::config::OracleConfig;
use crate::state::{MAX_COUNT, Shift, StateError, check};
use crate::tlb::Scope;

/// An access that differed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Suspect {
    pub(crate) used: Used,
    pub(crate) cpu_gpa: Option<Gpa>,
    /// Root of the process's page table, for the second look.
    pub(crate) root: Gpa,
    /// Number of the last invalidation at the time.
    pub(crate) invalidation: u64,
    pub(crate) since: Duration,
}

impl Suspect {
    pub(crate) fn stale(&self, context: u32, kind: StaleKind) -> StaleAccess {
        StaleAccess {
            kind,
            context,
            iova: self.used.iova,
            device_gpa: self.used.frame,
            cpu_gpa: self.cpu_gpa,
            write: self.used.write,
            fill: self.used.fill,
            invalidation: self.invalidation,
        }
    }
}

/// What the table says to a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// This translation is suspected already.
    Known,
    /// It is now.
    Suspect,
    /// An invalidation that is done should have removed it.
    Survived,
    /// There is no room to follow it.
    Overflow,
}

/// An invalidation: what it covers, and the last fill that had begun.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    scope: Scope,
    fills: u64,
    /// False: it stands for several, and covers more than they did.
    exact: bool,
}

impl Answer {
    fn answers_for(&self, context: u32, used: &Used) -> bool {
        used.fill <= self.fills && self.scope.covers(context, used.iova.page())
    }
}

/// One suspect per translation: context, page, fill. A write is told from a read, since it needs
/// more of the process's page table.
type Key = (u32, Iova, u64, bool);

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Suspects {
    bound: Duration,
    capacity: usize,
    log: usize,
    #[serde(with = "crate::state::pairs")]
    open: BTreeMap<Key, Suspect>,
    /// Keys in order of time; those that are closed are skipped when their time comes.
    order: VecDeque<(Duration, Key)>,
    /// Carried out, and not done yet.
    begun: Vec<Answer>,
    /// Done; the newest last.
    done: VecDeque<Answer>,
}

impl Suspects {
    pub(crate) fn new(config: &OracleConfig) -> Self {
        Self {
            bound: Duration::from_millis(config.bound_ms),
            capacity: config.suspects,
            log: config.invalidations,
            open: BTreeMap::new(),
            order: VecDeque::new(),
            begun: Vec::new(),
            done: VecDeque::new(),
        }
    }

    /// Believes what was saved, and lets its times be those of another clock.
    pub(crate) fn restore(
        &mut self,
        config: &OracleConfig,
        shift: Shift,
    ) -> Result<(), StateError> {
        let fresh = Self::new(config);
        let Self {
            bound,
            capacity,
            log,
            open,
            order,
            begun,
            done,
        } = self;
        let limits = (*bound, *capacity, *log);
        let good = limits == (fresh.bound, fresh.capacity, fresh.log);
        check("the limits of the oracle", good, limits)?;
        check(
            "the number of suspects",
            open.len() <= *capacity,
            open.len(),
        )?;
        check(
            "the order of suspects",
            order.len() <= 2 * *capacity,
            order.len(),
        )?;
        check(
            "the number of invalidations",
            begun.len() <= *log,
            begun.len(),
        )?;
        check(
            "the number of invalidations done",
            done.len() <= *log,
            done.len(),
        )?;
        for (key, suspect) in open.iter_mut() {
            let Suspect {
                used,
                cpu_gpa,
                root,
                invalidation,
                since,
            } = suspect;
            let good = *key == (key.0, used.iova.page(), used.fill, used.write)
                && key.0 < MAX_CONTEXTS
                && used.iova.range_is_valid(1)
                && used.fill < MAX_COUNT
                && *invalidation < MAX_COUNT;
            check("a suspect", good, key)?;
            for gpa in [used.frame, *root, cpu_gpa.unwrap_or(*root)] {
                check("the page of a suspect", crate::state::is_page(gpa), gpa)?;
            }
            *since = shift.apply(*since);
        }
        for (since, _) in order {
            *since = shift.apply(*since);
        }
        for answer in begun.iter().chain(done.iter()) {
            let Answer {
                scope,
                fills,
                exact: _,
            } = answer;
            check("an invalidation's fills", *fills < MAX_COUNT, fills)?;
            let (Scope::Range(context, _) | Scope::Context(context)) = scope else {
                continue;
            };
            check(
                "an invalidation's context",
                *context < MAX_CONTEXTS,
                context,
            )?;
        }
        Ok(())
    }

    /// Takes note of a difference.
    pub(crate) fn accuse(&mut self, context: u32, suspect: Suspect) -> Verdict {
        let used = &suspect.used;
        let key = (context, used.iova.page(), used.fill, used.write);
        if self.open.contains_key(&key) {
            return Verdict::Known;
        }
        if self.done.iter().any(|a| a.answers_for(context, used)) {
            return Verdict::Survived;
        }
        if self.open.len() >= self.capacity {
            return Verdict::Overflow;
        }
        // `order` also holds closed ones, until their time; half of it at least goes here.
        if self.order.len() >= 2 * self.capacity {
            let open = &self.open;
            self.order.retain(|(_, key)| open.contains_key(key));
        }
        self.order.push_back((suspect.since, key));
        self.open.insert(key, suspect);
        Verdict::Suspect
    }

    /// An invalidation was carried out.
    pub(crate) fn begun(&mut self, scope: Scope, fills: u64) {
        if self.begun.len() >= self.log {
            // Nobody waited for so many: they answer for everything up to the oldest, together.
            // That may acquit too much, and never accuses the innocent.
            let fills = self.begun.iter().map(|a| a.fills).max().unwrap_or(0);
            self.begun.clear();
            self.begun.push(Answer {
                scope: Scope::All,
                fills,
                exact: false,
            });
        }
        self.begun.push(Answer {
            scope,
            fills,
            exact: true,
        });
    }

    /// The invalidations so far are done: they close what they answer for.
    pub(crate) fn done(&mut self) {
        for answer in std::mem::take(&mut self.begun) {
            self.close(&answer);
            if !answer.exact {
                continue;
            }
            if self.done.len() >= self.log {
                self.done.pop_front();
            }
            self.done.push_back(answer);
        }
    }

    fn close(&mut self, answer: &Answer) {
        if self.open.is_empty() {
            return;
        }
        let (first, last) = match &answer.scope {
            Scope::Range(c, range) => ((*c, Iova(range.start)), (*c, Iova(range.end))),
            Scope::Context(c) => ((*c, Iova(0)), (*c, Iova(u64::MAX))),
            Scope::All => ((0, Iova(0)), (u32::MAX, Iova(u64::MAX))),
        };
        let closed: Vec<Key> = self
            .open
            .range((first.0, first.1, 0, false)..=(last.0, last.1, u64::MAX, true))
            .filter(|(key, suspect)| answer.answers_for(key.0, &suspect.used))
            .map(|(key, _)| *key)
            .collect();
        for key in closed {
            self.open.remove(&key);
        }
    }

    /// Closes everything of a context.
    pub(crate) fn forget(&mut self, context: u32) {
        self.open.retain(|key, _| key.0 != context);
    }

    /// Takes out the suspects whose time is over.
    pub(crate) fn expired(&mut self, now: Duration) -> Vec<(u32, Suspect)> {
        let mut expired = Vec::new();
        while let Some((since, key)) = self.order.front() {
            let open = self.open.contains_key(key);
            if open && now < since.saturating_add(self.bound) {
                break;
            }
            if let Some(suspect) = self.open.remove(key) {
                expired.push((key.0, suspect));
            }
            self.order.pop_front();
        }
        expired
    }

    /// When the next one's time is over.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        let (since, _) = self.order.front()?;
        Some(since.saturating_add(self.bound))
    }
}
