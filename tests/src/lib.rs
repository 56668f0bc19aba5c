//! Tests across crates and whole VMs.
