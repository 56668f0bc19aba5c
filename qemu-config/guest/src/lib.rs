//! What runs inside the guest, and the protocol by which the rig speaks with it.
//!
//! The rig depends on this crate for [`protocol`] only: both ends are compiled from one definition.

pub mod agent;
pub mod bench;
pub mod protocol;
pub mod tour;
