//! The one thread that steps a device whose run is recorded.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::Recorder;
use crate::Step;
use crate::ports::{Clock, Wake};
use crate::sync::lock;

/// How often to look for deadlines that came up since the last look.
const LOOK: Duration = Duration::from_millis(500);

#[derive(Debug, Default)]
struct State {
    /// There is something to do.
    due: bool,
    stop: bool,
}

/// Notes that there is something to do; the [`Wake`] port of a recorded device.
#[derive(Debug, Default)]
pub struct Flag {
    state: Mutex<State>,
    changed: Condvar,
}

impl Flag {
    /// A flag that is down.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    fn raise(&self) {
        lock(&self.state).due = true;
        self.changed.notify_one();
    }
}

impl Wake for Flag {
    fn work(&self) {
        self.raise();
    }

    fn invalidation(&self) {
        self.raise();
    }
}

/// Sounds the alarm when its thread unwinds.
struct Watch(Box<dyn Fn(&str) + Send + Sync>);

impl Drop for Watch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0(std::thread::current().name().unwrap_or("unnamed"));
        }
    }
}

/// Steps a recorded device, in place of [`crate::runner::Runner`]; ends when it is dropped.
#[derive(Debug)]
pub struct Pacer {
    flag: Arc<Flag>,
    thread: Option<JoinHandle<()>>,
}

impl Pacer {
    /// Starts the thread. `flag` must be the device's wake port, and `clock` its clock; `alarm` is
    /// told the thread's name if it panics.
    pub fn start(
        recorder: &Arc<Recorder>,
        flag: &Arc<Flag>,
        clock: Arc<dyn Clock>,
        alarm: Box<dyn Fn(&str) + Send + Sync>,
    ) -> std::io::Result<Self> {
        let (recorder, its) = (recorder.clone(), flag.clone());
        let thread = std::thread::Builder::new()
            .name("recorded".into())
            .spawn(move || {
                let _watch = Watch(alarm);
                pace(&recorder, &its, &*clock);
            })?;
        Ok(Self {
            flag: flag.clone(),
            thread: Some(thread),
        })
    }
}

impl Drop for Pacer {
    fn drop(&mut self) {
        lock(&self.flag.state).stop = true;
        self.flag.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

fn pace(recorder: &Recorder, flag: &Flag, clock: &dyn Clock) {
    loop {
        if lock(&flag.state).stop {
            return;
        }
        match recorder.engine_step() {
            Step::Busy => continue,
            Step::Waiting => {
                // Each look is an entry of the log: no more of them than are of use.
                std::thread::yield_now();
                continue;
            }
            Step::Idle => {}
        }
        // The engine serves the invalidation queue as well, but the oracle's deadlines only
        // while it does.
        match recorder.invalidation_step() {
            Step::Busy | Step::Waiting => continue,
            Step::Idle => {}
        }
        recorder.flush();
        let left = recorder
            .next_deadline()
            .map_or(LOOK, |deadline| deadline.saturating_sub(clock.now()));
        let mut state = lock(&flag.state);
        if !state.due && !state.stop && !left.is_zero() {
            state = flag
                .changed
                .wait_timeout(state, left.min(LOOK))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        state.due = false;
    }
}
