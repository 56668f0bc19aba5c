//! Waiting for an operation.
//!
//! No wake-up is lost, because:
//! 1. Behind every operation under way there is a published descriptor that asks for an interrupt
//!    (`publish`), and operations are carried out in order; so an event is counted after the
//!    operation's completion record was written.
//! 2. Events are taken by one sleeper at a time, the *leader*, who tells all others afterwards.
//! 3. Whoever becomes leader looks at the record after the leader before it has taken its last
//!    event (they hand over under a lock). An event taken earlier was counted after a record was
//!    written that this look sees; one that was not taken ends the sleep.
//! 4. Whoever finds a leader looks at the record under the lock under which that leader will
//!    resign, and then sleeps on the condition that belongs to the lock. An event that this look
//!    was too early for is thus taken, and told, after the sleep began.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::error::{Error, Result};
use crate::memory_unsafe::{Backing, BackingContext, Wake};
use crate::queue::{Cell, Core};

/// Those who sleep on a queue.
#[derive(Debug, Default)]
pub(crate) struct Sleepers {
    /// Whether there is a leader.
    led: Mutex<bool>,
    resigned: Condvar,
    missed: AtomicU64,
}

impl Sleepers {
    /// How long to sleep before asking whether the device lives.
    pub const LIVENESS: Duration = Duration::from_secs(1);

    pub fn missed(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.led.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The leader's office; laid down when dropped.
struct Office<'a>(&'a Sleepers);

impl Drop for Office<'_> {
    fn drop(&mut self) {
        *self.0.lock() = false;
        self.0.resigned.notify_all();
    }
}

impl<B: Backing> Core<B> {
    /// Waits until the operation has its answer; `Ok(false)` if that takes longer than `deadline`.
    pub(crate) fn wait(&self, cell: &Cell, deadline: Option<Instant>) -> Result<bool> {
        // It may be part of a batch that was not submitted yet.
        self.publish();
        for _ in 0..self.spins {
            if self.look(cell)? {
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        loop {
            if self.look(cell)? {
                return Ok(true);
            }
            let left = match deadline {
                None => Duration::MAX,
                Some(deadline) => deadline.saturating_duration_since(Instant::now()),
            };
            if left.is_zero() {
                return Ok(false);
            }
            self.sleep(cell, left)?;
        }
    }

    /// Sleeps for a while: until the operation may have an answer, or `left` has passed.
    fn sleep(&self, cell: &Cell, left: Duration) -> Result<()> {
        let mut led = self.sleepers.lock();
        if self.look(cell)? {
            return Ok(());
        }
        if *led {
            drop(if left == Duration::MAX {
                self.sleepers
                    .resigned
                    .wait(led)
                    .unwrap_or_else(PoisonError::into_inner)
            } else {
                let waited = self.sleepers.resigned.wait_timeout(led, left);
                waited.unwrap_or_else(PoisonError::into_inner).0
            });
            return Ok(());
        }
        *led = true;
        drop(led);
        let _office = Office(&self.sleepers);
        // The look above was under the lock, so after the last leader's last event.
        match self.context.wait(left.min(Sleepers::LIVENESS)) {
            Ok(Wake::Event) => Ok(()),
            Ok(Wake::TimedOut) if left < Sleepers::LIVENESS => Ok(()),
            Ok(Wake::TimedOut) => {
                if self.look(cell)? {
                    self.sleepers.missed.fetch_add(1, Ordering::Relaxed);
                }
                self.context.check().map_err(|error| self.fail_now(error))?;
                self.check_record(cell)
            }
            Ok(Wake::Stopped) => {
                // The shadow page says why; if it does not, nobody is left to say it.
                if !self.look(cell)? {
                    self.context.check().map_err(|error| self.fail_now(error))?;
                    return Err(self.fail_now(Error::Dead { errno: Errno::EIO }));
                }
                Ok(())
            }
            Err(error) => Err(self.fail_now(error)),
        }
    }
}
