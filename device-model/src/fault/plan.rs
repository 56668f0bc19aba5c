//! The plan: which faults, and when. Text in, checked rules out.

use std::collections::BTreeMap;
use std::str::FromStr;

use extlb_spec::{MAX_CONTEXTS, Vector};
use serde::{Deserialize, Serialize};

use super::table::TABLE;

/// What goes wrong. [`TABLE`] says what each does and who notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // the table documents them
pub enum Kind {
    SkipAck,
    DelayAck,
    DuplicateAck,
    ReorderAck,
    EarlyAck,
    SkipDrain,
    SkipTlbEntry,
    LoseInterrupt,
    RepeatInterrupt,
    LoseRequest,
    LoseResponse,
    FlipPermission,
    PoisonData,
    SlowMemory,
    StallContext,
    HangBus,
    ResetMidDma,
    DisconnectMidDma,
}

impl Kind {
    /// The name in plans and reports.
    pub fn name(self) -> &'static str {
        TABLE[self as usize].name
    }
}

/// An interrupt vector in a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // those of the spec crate
pub enum VectorName {
    Error,
    PageRequest,
    Invalidation,
    Completion,
}

impl VectorName {
    pub(super) fn vector(self) -> Vector {
        match self {
            Self::Error => Vector::Error,
            Self::PageRequest => Vector::PageRequest,
            Self::Invalidation => Vector::Invalidation,
            Self::Completion => Vector::Completion,
        }
    }
}

/// What a flipped leaf looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Permission {
    /// Writable, although it is not.
    Writable,
    /// Not writable, although it is.
    ReadOnly,
}

/// A fault of a plan: a kind, when, and to what.
///
/// Each time that the fault could happen is an *occasion*: for `skip-ack` an acknowledgement that
/// is about to be written, for `lose-request` a page request that is about to be sent. Without a
/// word about when, the fault happens at each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// What goes wrong.
    pub kind: Kind,
    /// So many occasions pass first.
    #[serde(default)]
    pub after: u64,
    /// Then at one occasion of so many, beginning with the first.
    #[serde(default = "one")]
    pub every: u64,
    /// At most so often; without it, without end.
    #[serde(default)]
    pub times: Option<u64>,
    /// Of these occasions, this share, from more than 0 to 1; decided by the seed.
    #[serde(default)]
    pub probability: Option<f64>,
    /// To this context only.
    #[serde(default)]
    pub context: Option<u32>,
    /// How long, in µs.
    #[serde(default)]
    pub delay_us: Option<u64>,
    /// To this interrupt only.
    #[serde(default)]
    pub vector: Option<VectorName>,
    /// What a leaf becomes; without it, what it is not.
    #[serde(default)]
    pub to: Option<Permission>,
}

fn one() -> u64 {
    1
}

/// A plan that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The kind needs it.
    #[error("fault {kind} needs {parameter}")]
    Missing {
        /// The kind.
        kind: &'static str,
        /// What it lacks.
        parameter: &'static str,
    },
    /// The kind has no use for it.
    #[error("fault {kind} takes no {parameter}")]
    Foreign {
        /// The kind.
        kind: &'static str,
        /// What it does not take.
        parameter: &'static str,
    },
    /// A value is out of its range.
    #[error("fault {kind}: {parameter} = {value} is out of range: give {range}")]
    Range {
        /// The kind.
        kind: &'static str,
        /// The parameter.
        parameter: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        range: &'static str,
    },
    /// The text of a rule is none.
    #[error("cannot read the fault {text:?}: {why}")]
    Text {
        /// The text.
        text: String,
        /// Why not.
        why: String,
    },
}

/// A longer delay is no fault but a dead device, which other kinds are.
const MAX_DELAY_US: u64 = 60_000_000;
/// An operation of two slow accesses must end before a client gives up on an answer (5 s).
const MAX_SLOW_US: u64 = 2_000_000;
const ALWAYS: [&str; 4] = ["after", "every", "times", "probability"];

impl Rule {
    /// A fault at every occasion.
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            after: 0,
            every: 1,
            times: None,
            probability: None,
            context: None,
            delay_us: None,
            vector: None,
            to: None,
        }
    }

    /// Checks that the kind takes what is given, has what it needs, and that values make sense.
    pub fn check(&self) -> Result<(), PlanError> {
        let entry = &TABLE[self.kind as usize];
        let kind = entry.name;
        let given = [
            ("after", self.after != 0),
            ("every", self.every != 1),
            ("times", self.times.is_some()),
            ("probability", self.probability.is_some()),
            ("context", self.context.is_some()),
            ("delay_us", self.delay_us.is_some()),
            ("vector", self.vector.is_some()),
            ("to", self.to.is_some()),
        ];
        for (parameter, given) in given {
            let needs = entry.needs.contains(&parameter);
            let when = ALWAYS.contains(&parameter) && self.kind != Kind::SkipDrain;
            if given && !(when || needs || entry.takes.contains(&parameter)) {
                return Err(PlanError::Foreign { kind, parameter });
            }
            if needs && !given {
                return Err(PlanError::Missing { kind, parameter });
            }
        }
        let check = |parameter, value: String, ok: bool, range| match ok {
            true => Ok(()),
            false => Err(PlanError::Range {
                kind,
                parameter,
                value,
                range,
            }),
        };
        check("every", self.every.to_string(), self.every > 0, "1 or more")?;
        if let Some(times) = self.times {
            check("times", times.to_string(), times > 0, "1 or more")?;
        }
        if let Some(p) = self.probability {
            // Written so that NaN is refused as well.
            let ok = p > 0.0 && p <= 1.0;
            check("probability", p.to_string(), ok, "more than 0, up to 1")?;
        }
        if let Some(context) = self.context {
            let ok = context < MAX_CONTEXTS;
            check("context", context.to_string(), ok, "0 to 255")?;
        }
        if let Some(us) = self.delay_us {
            let (most, range) = match self.kind {
                Kind::SlowMemory => (MAX_SLOW_US, "1 to 2000000"),
                _ => (MAX_DELAY_US, "1 to 60000000"),
            };
            check("delay_us", us.to_string(), (1..=most).contains(&us), range)?;
        }
        Ok(())
    }

    /// The rule in words, for a warning.
    pub fn warning(&self) -> String {
        let mut text = format!("fault {}", self.kind.name());
        let mut add = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                text += &format!(", {name} = {value}");
            }
        };
        add("after", (self.after != 0).then(|| self.after.to_string()));
        add("every", (self.every != 1).then(|| self.every.to_string()));
        add("times", self.times.map(|v| v.to_string()));
        add("probability", self.probability.map(|v| v.to_string()));
        add("context", self.context.map(|v| v.to_string()));
        add("delay_us", self.delay_us.map(|v| v.to_string()));
        add("vector", self.vector.map(|v| format!("{v:?}")));
        add("to", self.to.map(|v| format!("{v:?}")));
        text
    }
}

/// A rule as on a command line: the kind, then `name=value` pairs, with commas between:
/// `skip-ack,after=10,times=1`.
impl FromStr for Rule {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let error = |why: String| PlanError::Text {
            text: text.to_owned(),
            why,
        };
        let mut words = text.split(',');
        let mut table = toml::Table::new();
        let kind = words.next().unwrap_or_default();
        table.insert("kind".into(), kind.into());
        for word in words {
            let (name, value) = word
                .split_once('=')
                .ok_or_else(|| error(format!("{word:?} is not name=value")))?;
            // Numbers are numbers; all else is a name.
            let value = match (value.parse::<i64>(), value.parse::<f64>()) {
                (Ok(value), _) => value.into(),
                (_, Ok(value)) => value.into(),
                _ => toml::Value::from(value),
            };
            if table.insert(name.to_owned(), value).is_some() {
                return Err(error(format!("{name} is given twice")));
            }
        }
        if let Some(toml::Value::Integer(value)) = table.get("probability").cloned() {
            table.insert("probability".into(), (value as f64).into());
        }
        let rule: Self = table
            .try_into()
            .map_err(|e: toml::de::Error| error(e.message().to_owned()))?;
        rule.check()?;
        Ok(rule)
    }
}

/// One step of the generator SplitMix64 (Steele, Lea, Flood 2014).
pub(super) fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A rule and how often it had its occasion.
#[derive(Debug)]
struct Armed {
    rule: Rule,
    seed: u64,
    occasions: u64,
    injected: u64,
}

/// A fault that happens now.
#[derive(Clone, Debug)]
pub(super) struct Fired {
    pub(super) rule: Rule,
    /// Bits to decide details by; of the seed, the rule and the occasion only.
    pub(super) bits: u64,
}

/// Decides. What it decides depends on the seed, the rule and the number of the occasion, not on
/// time or threads: a run that has the same occasions in the same order has the same faults.
#[derive(Debug)]
pub(super) struct Chooser(BTreeMap<Kind, Vec<Armed>>);

impl Chooser {
    pub(super) fn new(rules: &[Rule], seed: u64) -> Self {
        let mut armed: BTreeMap<Kind, Vec<Armed>> = BTreeMap::new();
        for (n, rule) in rules.iter().enumerate() {
            armed.entry(rule.kind).or_default().push(Armed {
                rule: rule.clone(),
                seed: mix(mix(seed).wrapping_add(n as u64)),
                occasions: 0,
                injected: 0,
            });
        }
        Self(armed)
    }

    /// There is an occasion for a kind, of what `concerns` says that a rule is about. The first
    /// rule that wants it has it; all of them count it.
    pub(super) fn occasion(
        &mut self,
        kind: Kind,
        concerns: impl Fn(&Rule) -> bool,
    ) -> Option<Fired> {
        let mut fired = None;
        for armed in self.0.get_mut(&kind).into_iter().flatten() {
            if !concerns(&armed.rule) {
                continue;
            }
            let occasion = armed.occasions;
            armed.occasions += 1;
            let rule = &armed.rule;
            let Some(past) = occasion.checked_sub(rule.after) else {
                continue;
            };
            let bits = mix(armed.seed.wrapping_add(occasion));
            // 53 bits, as many as a float has: from 0 to less than 1.
            let share = (bits >> 11) as f64 / (1u64 << 53) as f64;
            if !past.is_multiple_of(rule.every)
                || rule.times.is_some_and(|times| armed.injected >= times)
                || rule.probability.is_some_and(|p| share >= p)
                || fired.is_some()
            {
                continue;
            }
            armed.injected += 1;
            fired = Some(Fired {
                rule: rule.clone(),
                bits: mix(bits),
            });
        }
        fired
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(rule: &str, seed: u64) -> Vec<u64> {
        let mut chooser = Chooser::new(&[rule.parse().unwrap()], seed);
        (0..100)
            .filter(|_| chooser.occasion(Kind::SkipAck, |_| true).is_some())
            .collect::<Vec<_>>()
    }

    #[test]
    fn rules_say_when() {
        assert_eq!(at("skip-ack", 0).len(), 100);
        assert_eq!(at("skip-ack,after=98", 0), [98, 99]);
        assert_eq!(at("skip-ack,after=10,every=40", 0), [10, 50, 90]);
        assert_eq!(at("skip-ack,after=10,every=40,times=2", 0), [10, 50]);
        let some = at("skip-ack,probability=0.3", 7);
        assert!((10..60).contains(&some.len()), "{some:?}");
        assert_eq!(some, at("skip-ack,probability=0.3", 7));
        assert_ne!(some, at("skip-ack,probability=0.3", 8));
        assert_eq!(at("skip-ack,probability=1", 0).len(), 100);
    }

    #[test]
    fn text_that_makes_no_sense_has_an_error_with_a_name() {
        for (text, want) in [
            ("", "unknown variant"),
            ("break-everything", "unknown variant"),
            ("skip-ack,after", "not name=value"),
            ("skip-ack,often=3", "often"),
            ("skip-ack,after=-1", "invalid value"),
            ("skip-ack,after=1,after=2", "twice"),
            ("skip-ack,every=0", "every = 0 is out of range"),
            ("skip-ack,times=0", "times = 0 is out of range"),
            ("skip-ack,probability=0", "probability = 0 is out of range"),
            ("skip-ack,probability=1.5", "probability = 1.5"),
            ("skip-ack,probability=nan", "probability = NaN"),
            ("skip-ack,delay_us=3", "skip-ack takes no delay_us"),
            ("skip-drain,after=3", "skip-drain takes no after"),
            ("delay-ack", "delay-ack needs delay_us"),
            ("delay-ack,delay_us=0", "delay_us = 0"),
            ("slow-memory,delay_us=2000001", "delay_us = 2000001"),
            ("lose-request,context=256", "context = 256"),
            ("lose-interrupt,vector=page", "unknown variant"),
            ("flip-permission,to=writeable", "unknown variant"),
        ] {
            let error = text.parse::<Rule>().unwrap_err().to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
        let rule: Rule = "lose-interrupt,vector=page-request,times=3"
            .parse()
            .unwrap();
        assert_eq!(rule.vector, Some(VectorName::PageRequest));
        assert_eq!(
            rule.warning(),
            "fault lose-interrupt, times = 3, vector = PageRequest"
        );
    }
}
