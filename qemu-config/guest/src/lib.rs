//! Programs that run inside the guest: the agent and the tour.
