//! Requests that were received and are not carried out yet, for a session that receives on one
//! thread and carries out on another. Bounded in bytes: a client that sends more waits.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};

use super::connection::Message;
use super::protocol::{Header, MAX_MESSAGE};
use crate::sync::lock;

/// Bytes of requests that may wait; a hundred thousand register accesses.
const MOST: usize = 4 * MAX_MESSAGE;

#[derive(Debug, Default)]
struct State {
    messages: VecDeque<Message>,
    bytes: usize,
    closed: bool,
}

/// The requests, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    state: Mutex<State>,
    changed: Condvar,
}

fn weight(message: &Message) -> usize {
    Header::SIZE + message.body.len()
}

impl Inbox {
    /// Adds one, as soon as there is room. False: nobody takes them any more.
    pub(super) fn put(&self, message: Message) -> bool {
        let mut state = lock(&self.state);
        while !state.closed && state.bytes + weight(&message) > MOST {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return false;
        }
        state.bytes += weight(&message);
        state.messages.push_back(message);
        self.changed.notify_all();
        true
    }

    /// Takes the next one, as soon as there is one. `None`: there are none any more.
    pub(super) fn take(&self) -> Option<Message> {
        let mut state = lock(&self.state);
        loop {
            if let Some(message) = state.messages.pop_front() {
                state.bytes -= weight(&message);
                self.changed.notify_all();
                return Some(message);
            }
            if state.closed {
                return None;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// No more come, or no more are taken.
    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }
}
