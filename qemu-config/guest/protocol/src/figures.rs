//! What the comparison of ways to follow a process prints in the guest, a line of JSON for each way.

use serde::{Deserialize, Serialize};

/// What one way took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Way {
    /// Its name.
    pub way: String,
    /// The changes, in the order in which they were made.
    pub changes: Vec<Change>,
}

/// What a change of memory took. All but the time are counts.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Change {
    /// Its name.
    pub name: String,
    /// Time of the change, in ns.
    pub ns: u64,
    /// Pages that lost a right, or went.
    pub changed: u64,
    /// Calls of the memory manager.
    pub callbacks: u64,
    /// Pages taken from the device.
    pub shot: u64,
    /// Those of them that had not changed.
    pub beyond: u64,
    /// Times that the device was waited for.
    pub shootdowns: u64,
    /// Median of that, in ns.
    pub p50_ns: u64,
    /// Its 99th percentile, in ns.
    pub p99_ns: u64,
    /// Times that pages were looked up for the device and changed before it got them.
    pub retried: u64,
    /// Page requests served.
    pub page_requests: u64,
}
