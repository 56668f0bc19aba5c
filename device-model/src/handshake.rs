//! The handshake of a shadow doorbell: who polls a tail in RAM may stop, and no work is lost.
//!
//! One side submits: stores the tail (release), full fence, loads "kick me", and kicks if it is
//! set. The other looks for work and wants to sleep: stores "kick me", full fence, loads the tail
//! again, and sleeps if there is nothing new. Both store, fence, load: so at least one sees the
//! other's store. Either the sleeper sees the new tail and stays awake, or the submitter sees that
//! it must kick.
//!
//! The submitter's side is software's: see the queues of the drivers.

use crate::sync::{Ordering, Pillar, fence, stands};

/// The sleeper's side: `ask` stores "kick me", `look` loads the tail.
pub(crate) fn before_sleep<S, T, E>(
    state: &mut S,
    ask: impl FnOnce(&mut S) -> Result<(), E>,
    look: impl FnOnce(&mut S) -> Result<T, E>,
) -> Result<T, E> {
    ask(state)?;
    if stands(Pillar::SleepFence) {
        fence(Ordering::SeqCst);
    }
    look(state)
}
