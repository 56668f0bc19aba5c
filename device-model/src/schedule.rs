//! Which contexts are worth a look: those with work, or with work not long ago.
//!
//! A parked context is in nobody's queue and costs nothing.

use std::collections::VecDeque;
use std::sync::Mutex;

use extlb_spec::MAX_CONTEXTS;
use serde::{Deserialize, Serialize};

use crate::state::{StateError, check};
use crate::sync::lock;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum State {
    /// In no queue.
    Idle,
    /// In the queue.
    Queued,
    /// With an engine thread.
    Running,
    /// With an engine thread, and something came up since.
    Again,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Inner {
    order: VecDeque<u32>,
    state: Vec<State>,
}

/// The queue of contexts to run, in turn.
#[derive(Debug)]
pub(crate) struct Schedule(Mutex<Inner>);

impl Schedule {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Inner {
            order: VecDeque::with_capacity(MAX_CONTEXTS as usize),
            state: vec![State::Idle; MAX_CONTEXTS as usize],
        }))
    }

    /// What is queued. A context that an engine thread has taken and could not run yet, or has run
    /// and not given back, is queued first: where it goes on, nobody has it.
    pub(crate) fn save(&self) -> Inner {
        let mut inner = lock(&self.0).clone();
        for (context, state) in inner.state.iter_mut().enumerate() {
            if matches!(state, State::Running | State::Again) {
                *state = State::Queued;
                inner.order.push_front(context as u32);
            }
        }
        inner
    }

    pub(crate) fn restore(inner: Inner) -> Result<Self, StateError> {
        let Inner { order, state } = &inner;
        check(
            "the contexts scheduled",
            state.len() == MAX_CONTEXTS as usize,
            state.len(),
        )?;
        let mut queued = vec![State::Idle; MAX_CONTEXTS as usize];
        for context in order {
            let place = queued.get_mut(*context as usize);
            let place = place.filter(|state| **state == State::Idle);
            check("a context queued", place.is_some(), context)?;
            if let Some(state) = place {
                *state = State::Queued;
            }
        }
        check("the state of the contexts", *state == queued, state)?;
        Ok(Self(Mutex::new(inner)))
    }

    /// Something came up for a context: it will be run. Whether somebody should be woken.
    pub(crate) fn push(&self, context: u32) -> bool {
        let mut inner = lock(&self.0);
        let inner = &mut *inner;
        let state = &mut inner.state[context as usize];
        match *state {
            State::Idle => {
                *state = State::Queued;
                inner.order.push_back(context);
                true
            }
            State::Running => {
                *state = State::Again;
                false
            }
            State::Queued | State::Again => false,
        }
    }

    /// Takes the next context; give it back with `finish`.
    pub(crate) fn pop(&self) -> Option<u32> {
        let mut inner = lock(&self.0);
        let context = inner.order.pop_front()?;
        inner.state[context as usize] = State::Running;
        Some(context)
    }

    /// Gives a context back, to be run again or not. Something that came up meanwhile counts.
    pub(crate) fn finish(&self, context: u32, again: bool) {
        let mut inner = lock(&self.0);
        let inner = &mut *inner;
        let state = &mut inner.state[context as usize];
        if again || *state == State::Again {
            *state = State::Queued;
            inner.order.push_back(context);
        } else {
            *state = State::Idle;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_up_while_running_is_not_lost() {
        let schedule = Schedule::new();
        assert!(schedule.push(3));
        assert!(!schedule.push(3), "already queued");
        assert_eq!(schedule.pop(), Some(3));
        assert!(!schedule.push(3), "its thread will see it");
        schedule.finish(3, false);
        assert_eq!(schedule.pop(), Some(3));
        schedule.finish(3, false);
        assert_eq!(schedule.pop(), None);
    }
}
