//! What runs inside the guest: the agent, which the rig speaks with, and the tour.

pub mod agent;
pub mod tour;
