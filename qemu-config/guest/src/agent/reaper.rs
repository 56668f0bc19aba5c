//! Collects every child that ends: the agent's own and those left to process 1.
//!
//! All waiting is done here, by `waitpid(-1)`; nobody else may wait for a child, or a status would
//! be taken from under the other.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};

use extlb_guest_protocol::Exit;

/// Statuses of ended children that somebody asked for.
#[derive(Clone)]
pub struct Reaper(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// A program is being started, so an ended child may be one whose number is not known yet.
    starting: bool,
    /// The child whose end is awaited.
    awaited: Option<i32>,
    ended: HashMap<i32, Exit>,
}

impl Reaper {
    /// Starts the thread.
    pub fn start() -> Result<Self> {
        let reaper = Self(Arc::new(Shared {
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
        }));
        let shared = reaper.0.clone();
        std::thread::Builder::new()
            .name("reaper".into())
            .spawn(move || shared.reap())
            .context("cannot start a thread")?;
        Ok(reaper)
    }

    /// Runs `start`, which returns the number of the process it started; its end is then kept for
    /// [`Self::wait`] even if it comes before `start` returns.
    pub fn watch<E>(&self, start: impl FnOnce() -> Result<i32, E>) -> Result<i32, E> {
        self.0.lock().starting = true;
        let started = start();
        let mut state = self.0.lock();
        state.starting = false;
        state.awaited = started.as_ref().ok().copied();
        let awaited = state.awaited;
        state.ended.retain(|pid, _| Some(*pid) == awaited);
        self.0.changed.notify_all();
        started
    }

    /// Blocks until the watched process `pid` has ended.
    pub fn wait(&self, pid: i32) -> Exit {
        let mut state = self.0.lock();
        loop {
            if let Some(exit) = state.ended.remove(&pid) {
                state.awaited = None;
                return exit;
            }
            state = self
                .0
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reap(&self) {
        loop {
            let (pid, exit) = match waitpid(None, None) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, Exit::Code(code)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, Exit::Signal(signal as i32)),
                Ok(_) | Err(Errno::EINTR) => continue,
                // No child at all: wait until a program is started.
                Err(_) => {
                    let state = self.lock();
                    if !state.starting && state.awaited.is_none() {
                        drop(self.changed.wait(state));
                    } else {
                        // A start is under way and its child not there yet: look again shortly.
                        drop(self.changed.wait_timeout(state, Duration::from_millis(1)));
                    }
                    continue;
                }
            };
            let mut state = self.lock();
            if state.starting || state.awaited == Some(pid.as_raw()) {
                state.ended.insert(pid.as_raw(), exit);
                self.changed.notify_all();
            }
        }
    }
}
