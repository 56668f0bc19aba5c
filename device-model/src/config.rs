//! What can be configured, with its defaults.

use serde::{Deserialize, Serialize};

use crate::fault::{Kind, PlanError, Rule};

/// Configuration of a device; every field has a default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Geometry of the TLB.
    pub tlb: TlbConfig,
    /// Engine threads that the runner starts, 1 to 16.
    pub engines: u32,
    /// How contexts share the engines.
    pub schedule: ScheduleConfig,
    /// How long to poll the shadow pages after the last work before sleeping, in µs. A shootdown
    /// takes about 2 µs while the device polls, and 30 µs when it has to be kicked (TCG, two
    /// cores); the default bridges the time in which a page is read from swap.
    pub poll_us: u64,
    /// Seed of the fault plan.
    pub fault_seed: u64,
    /// The oracle.
    pub oracle: OracleConfig,
    /// Switches that break the device; all off.
    pub debug: DebugConfig,
    /// What goes wrong on purpose; nothing. See [`crate::fault`].
    pub fault: Vec<Rule>,
}

/// Configuration of the TLB.
///
/// ```toml
/// [tlb]
/// sets = 128
/// ways = 8
/// policy = "plru"
/// walk_cache = 64
/// [tlb.split]              # leave out for one array that all sizes share
/// size_2m = { sets = 16, ways = 4 }
/// size_1g = { sets = 1, ways = 4 }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlbConfig {
    /// Number of sets, a power of two: of the array for all sizes, or with `split` of that for
    /// 4 KiB.
    pub sets: usize,
    /// Entries of a set; a power of two for `plru`.
    pub ways: usize,
    /// Which entry of a full set goes; also in the walk cache.
    pub policy: Policy,
    /// Seed of the random policy.
    pub seed: u64,
    /// Tables of the page table that are remembered, a power of two, in sets of 4; 0 for none.
    pub walk_cache: usize,
    /// Arrays of their own for the larger sizes.
    pub split: Option<Split>,
}

/// Arrays for entries of 2 MiB and of 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// For 2 MiB.
    pub size_2m: Geometry,
    /// For 1 GiB.
    pub size_1g: Geometry,
}

/// How large an array is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Geometry {
    /// Number of sets, a power of two.
    pub sets: usize,
    /// Entries of a set; a power of two for `plru`.
    pub ways: usize,
}

/// How contexts share the engines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleConfig {
    /// Whose turn it is, and for how long.
    pub policy: SchedulePolicy,
    /// Bytes that a context of weight 1 may move in a turn. A step that moves none counts as 512.
    pub quantum: u32,
    /// Bytes that are moved at most under one guard, that is before a shootdown that arrives can be
    /// acknowledged. Larger chunks cost less to administrate, smaller ones hold shootdowns up
    /// less: at 64 KiB it is some 6% and 5 µs, at 256 KiB 3% and 20 µs.
    pub chunk: u32,
}

/// How turns are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SchedulePolicy {
    /// By the work done, times the context's weight (deficit round robin): who moves much in a step
    /// has fewer steps.
    Fair,
    /// By steps, whatever they move; weights do not count.
    RoundRobin,
}

/// Replacement policy of the TLB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// The entry whose last use is longest ago.
    Lru,
    /// About the same, by a tree of one bit per pair of entries.
    Plru,
    /// Any entry, by the seeded generator.
    Random,
    /// The entry that was filled first.
    Fifo,
}

/// Configuration of the oracle.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OracleConfig {
    /// Whether contexts with the oracle flag are watched at all.
    pub enabled: bool,
    /// How long a difference may last before it is a stale access, in ms.
    pub bound_ms: u64,
    /// How many differences may be open at once; more are counted as overflow.
    pub suspects: usize,
    /// How many completed invalidations are remembered.
    pub invalidations: usize,
}

/// Breaks the device on purpose, for tests of those who rely on it. All is off by default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DebugConfig {
    /// Wait commands that ask for a drain are acknowledged without one: the device says that it
    /// is done with a page while it may still access it. The oracle sees it (a stale access of
    /// kind `OutlivedDrain`). What the host relies on (reset, bus master off, RAM that is
    /// unmapped) is not broken: an access that comes late finds nothing mapped, a bus error.
    pub skip_drain: bool,
    /// How long each access to memory of at least 65 bytes is under way, in µs: it begins that
    /// long after the device has decided where it goes. Makes the window that a drain closes wide
    /// enough for tests.
    pub bus_delay_us: u64,
}

impl DebugConfig {
    /// What is broken, one sentence each; empty if nothing is.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.skip_drain {
            warnings.push("debug.skip_drain: acknowledges drains without draining".into());
        }
        if self.bus_delay_us > 0 {
            let us = self.bus_delay_us;
            warnings.push(format!("debug.bus_delay_us: data accesses take {us} µs"));
        }
        warnings
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            tlb: TlbConfig::default(),
            engines: 1,
            schedule: ScheduleConfig::default(),
            poll_us: 2000,
            oracle: OracleConfig::default(),
            debug: DebugConfig::default(),
            fault_seed: 1,
            fault: Vec::new(),
        }
    }
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self {
            policy: SchedulePolicy::Fair,
            quantum: 128 << 10,
            chunk: 64 << 10,
        }
    }
}

impl Default for TlbConfig {
    fn default() -> Self {
        Self {
            sets: 128,
            ways: 8,
            policy: Policy::Lru,
            seed: 1,
            walk_cache: 64,
            split: None,
        }
    }
}

impl Default for OracleConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            bound_ms: 3000,
            suspects: 65_536,
            invalidations: 1024,
        }
    }
}

/// A configuration that no device can have.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A value is out of its range.
    #[error("{name} = {value} is out of range: give {range}")]
    Range {
        /// The field.
        name: &'static str,
        /// Its value.
        value: u64,
        /// What it may be.
        range: &'static str,
    },
    /// A fault of the plan makes no sense.
    #[error(transparent)]
    Fault(#[from] PlanError),
    /// The thread that a fault plan needs cannot be started.
    #[error("cannot start the thread of the fault plan")]
    Thread(#[source] std::io::Error),
    /// The text is no configuration.
    #[error("cannot read the device configuration")]
    Syntax(#[from] toml::de::Error),
}

impl Config {
    /// Reads TOML.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text)?;
        config.check()?;
        Ok(config)
    }

    /// What is broken on purpose, one sentence each; empty if nothing is.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = self.debug.warnings();
        warnings.extend(self.fault.iter().map(Rule::warning));
        warnings
    }

    /// The plan, with the old way to say that memory is slow.
    pub(crate) fn fault_rules(&self) -> Vec<Rule> {
        let mut rules = self.fault.clone();
        if self.debug.bus_delay_us > 0 {
            rules.push(Rule {
                delay_us: Some(self.debug.bus_delay_us),
                ..Rule::new(Kind::SlowMemory)
            });
        }
        rules
    }

    /// Checks every value against its range.
    pub fn check(&self) -> Result<(), ConfigError> {
        let check = |name, value: u64, ok: bool, range| match ok {
            true => Ok(()),
            false => Err(ConfigError::Range { name, value, range }),
        };
        let tlb = &self.tlb;
        let mut geometries = vec![("tlb.sets", tlb.sets, "tlb.ways", tlb.ways)];
        if let Some(Split { size_2m, size_1g }) = tlb.split {
            let (sets, ways) = ("tlb.split.size_2m.sets", "tlb.split.size_2m.ways");
            geometries.push((sets, size_2m.sets, ways, size_2m.ways));
            let (sets, ways) = ("tlb.split.size_1g.sets", "tlb.split.size_1g.ways");
            geometries.push((sets, size_1g.sets, ways, size_1g.ways));
        }
        for (name, sets, _, _) in &geometries {
            let ok = sets.is_power_of_two() && *sets <= 1 << 16;
            check(name, *sets as u64, ok, "a power of two up to 65536")?;
        }
        for (_, _, name, ways) in &geometries {
            check(name, *ways as u64, (1..=64).contains(ways), "1 to 64")?;
            let ok = tlb.policy != Policy::Plru || ways.is_power_of_two();
            check(name, *ways as u64, ok, "a power of two for plru")?;
        }
        let tables = tlb.walk_cache;
        check(
            "tlb.walk_cache",
            tables as u64,
            tables == 0 || tables.is_power_of_two() && tables <= 1 << 16,
            "0, or a power of two up to 65536",
        )?;
        let engines = u64::from(self.engines);
        check("engines", engines, (1..=16).contains(&engines), "1 to 16")?;
        let bytes = 4096..=16 << 20;
        for (name, value) in [
            ("schedule.quantum", self.schedule.quantum),
            ("schedule.chunk", self.schedule.chunk),
        ] {
            let good = bytes.contains(&value);
            check(name, value.into(), good, "4096 to 16777216")?;
        }
        check(
            "poll_us",
            self.poll_us,
            self.poll_us <= 1_000_000,
            "0 to 1000000",
        )?;
        let oracle = &self.oracle;
        check(
            "oracle.bound_ms",
            oracle.bound_ms,
            (1..=3_600_000).contains(&oracle.bound_ms),
            "1 to 3600000",
        )?;
        let (suspects, log) = (oracle.suspects as u64, oracle.invalidations as u64);
        check(
            "oracle.suspects",
            suspects,
            (1..=1 << 20).contains(&suspects),
            "1 to 1048576",
        )?;
        check(
            "oracle.invalidations",
            log,
            (1..=1 << 20).contains(&log),
            "1 to 1048576",
        )?;
        for rule in &self.fault {
            rule.check()?;
        }
        // An operation of two accesses must end before a client gives up on an answer (5 s).
        let delay = self.debug.bus_delay_us;
        check(
            "debug.bus_delay_us",
            delay,
            delay <= 2_000_000,
            "0 to 2000000",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_senseless_shape_of_the_tlb_is_refused_by_name() {
        let split = |mid: &str, huge: &str| {
            format!("[tlb.split]\nsize_2m = {{ {mid} }}\nsize_1g = {{ {huge} }}\n")
        };
        let good = "sets = 1, ways = 64";
        let odd = "sets = 2, ways = 3";
        for (text, name) in [
            ("[tlb]\nsets = 3\n".into(), "tlb.sets"),
            ("[tlb]\nsets = 0\n".into(), "tlb.sets"),
            ("[tlb]\nsets = 131072\n".into(), "tlb.sets"),
            ("[tlb]\nways = 0\n".into(), "tlb.ways"),
            ("[tlb]\nways = 65\n".into(), "tlb.ways"),
            ("[tlb]\nways = 6\npolicy = \"plru\"\n".into(), "tlb.ways"),
            ("[tlb]\nwalk_cache = 3\n".into(), "tlb.walk_cache"),
            ("[tlb]\nwalk_cache = 131072\n".into(), "tlb.walk_cache"),
            (split("sets = 0, ways = 1", good), "tlb.split.size_2m.sets"),
            (split("sets = 1, ways = 65", good), "tlb.split.size_2m.ways"),
            (split(good, "sets = 5, ways = 1"), "tlb.split.size_1g.sets"),
            (
                format!("[tlb]\npolicy = \"plru\"\n{}", split(good, odd)),
                "tlb.split.size_1g.ways",
            ),
        ] {
            match Config::from_toml(&text) {
                Err(ConfigError::Range { name: found, .. }) => assert_eq!(found, name, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
        for text in [
            split(good, odd),
            "[tlb]\nwalk_cache = 0\n".into(),
            "[tlb]\nwalk_cache = 2\npolicy = \"plru\"\n".into(),
        ] {
            assert!(Config::from_toml(&text).is_ok(), "{text}");
        }
        let half = "[tlb.split]\nsize_2m = { sets = 1, ways = 1 }\n";
        assert!(matches!(
            Config::from_toml(half),
            Err(ConfigError::Syntax(_))
        ));
    }

    #[test]
    fn text_overrides_defaults_and_unknown_keys_are_refused() {
        let config = Config::from_toml("poll_us = 7\n[tlb]\nsets = 4\npolicy = \"random\"\n")
            .expect("valid");
        assert_eq!((config.poll_us, config.tlb.sets), (7, 4));
        assert_eq!(config.tlb.ways, TlbConfig::default().ways);
        assert!(Config::from_toml("pol_us = 7").is_err());
        assert!(Config::from_toml("engines = 0").is_err());
        assert!(Config::from_toml("[debug]\nbus_delay_us = 2000001").is_err());
        let broken = Config::from_toml("[debug]\nskip_drain = true").expect("valid");
        assert_eq!(broken.debug.warnings().len(), 1);
        assert!(Config::default().debug.warnings().is_empty());
    }
}
