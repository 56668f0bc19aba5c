//! What a step measured.

use std::collections::BTreeMap;
use std::time::Duration;

use extlb_driver::spec::histogram::{self, BUCKETS};
use extlb_driver::spec::uapi::Stats;
use serde::Serialize;

/// The result of the tour, as JSON.
#[derive(Debug, Serialize)]
pub struct Report {
    pub passed: bool,
    pub steps: Vec<StepReport>,
}

/// The result of a step.
#[derive(Debug, Serialize)]
pub struct StepReport {
    pub name: &'static str,
    pub passed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    pub figures: Figures,
}

/// Figures of a step; those that do not apply are absent. Sizes are in the unit of the name.
#[derive(Debug, Default, Serialize)]
pub struct Figures {
    /// Bytes that the device moved or looked at on the program's behalf.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// Operations of the device that ended, in whatever way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operations: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operations_completed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operations_faulted: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page_requests: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pages_filled: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shootdowns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pages_shot_down: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shootdown_ns: Option<Latency>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stale_accesses: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oracle_checks: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_lck_kib: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_pin_kib: Option<u64>,
    /// Memory that the device may touch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registered_kib: Option<u64>,
    /// The largest working set that the device worked on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub working_set_mib: Option<u64>,
    /// The least memory that was available to others meanwhile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_least_kib: Option<u64>,
    /// Copies of 4 KiB, many under way, between pages that the device has used before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub small_copies_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_before_kib: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_after_kib: Option<u64>,
    /// Of the two mappings, by mincore.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resident_before_kib: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resident_after_kib: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crc32c: Option<String>,
    /// Operations of the program on the memory, by kind.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub mutations: BTreeMap<&'static str, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audits: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audited_translations: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub words_verified: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary_pages: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swapped_in_kib: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swapped_out_kib: Option<u64>,
    /// How the same work ended with pinned memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pinned_outcome: Option<String>,
    /// What the oracle reported.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub oracle_records: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit_mismatches: Option<u64>,
}

/// Latency of shootdowns, as the kernel saw it, in ns.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Latency {
    pub p50: u64,
    pub p99: u64,
    pub max: u64,
}

/// Seconds with three decimals.
pub fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1000.0).round() / 1000.0
}

impl Figures {
    /// Takes the difference of two readings of the counters of one context.
    pub fn take_stats(&mut self, before: &Stats, after: &Stats) {
        let since = |field: fn(&Stats) -> u64| Some(field(after).saturating_sub(field(before)));
        self.operations_completed = since(|s| s.ops_completed);
        self.operations_faulted = since(|s| s.ops_faulted);
        self.operations = since(|s| s.ops_completed + s.ops_faulted);
        self.page_requests = since(|s| s.page_requests + s.refused_requests);
        self.pages_filled = since(|s| s.filled_pages);
        self.shootdowns = since(|s| s.shootdowns);
        self.pages_shot_down = since(|s| s.shot_pages);
        self.stale_accesses = since(|s| s.oracle_stale);
        self.oracle_checks = since(|s| s.oracle_checks);
        let counts: [u64; BUCKETS] =
            std::array::from_fn(|i| after.shootdown_ns[i].saturating_sub(before.shootdown_ns[i]));
        self.shootdown_ns = Some(Latency {
            p50: histogram::percentile(&counts, 500),
            p99: histogram::percentile(&counts, 990),
            // Of the context's whole life; steps have a context of their own.
            max: after.shootdown_max_ns,
        });
    }
}

impl std::fmt::Display for Latency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let us = |ns: u64| ns as f64 / 1000.0;
        write!(
            f,
            "p50 {:.1} us, p99 {:.1} us, max {:.1} us",
            us(self.p50),
            us(self.p99),
            us(self.max)
        )
    }
}
