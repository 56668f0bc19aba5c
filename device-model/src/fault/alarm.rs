//! What has to happen later, or from another thread than the device's own.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use extlb_spec::{BAR_DOORBELLS, DOORBELL_STRIDE};

use crate::Core;
use crate::ports::Wake;

/// What to do.
#[derive(Clone, Copy, Debug)]
pub(super) enum Job {
    /// Make the device look at its invalidation queue.
    Look,
    /// Make it look at a context.
    Doorbell(u32),
    /// Reset it.
    Reset,
}

/// Where jobs are put.
pub(super) type Jobs = Sender<(Instant, Job)>;

/// The thread's end; it runs from [`Alarm::start`] until nobody can put jobs any more.
pub(super) struct Alarm(Receiver<(Instant, Job)>);

/// A card has one end, its thread the other.
pub(super) fn alarm() -> (Jobs, Alarm) {
    let (jobs, receiver) = channel();
    (jobs, Alarm(receiver))
}

impl Alarm {
    pub(super) fn start(self, device: Arc<dyn Core>, wake: Arc<dyn Wake>) -> io::Result<()> {
        let device = Arc::downgrade(&device);
        std::thread::Builder::new()
            .name("faults".into())
            .spawn(move || self.run(&device, &*wake))
            .map(drop)
    }

    fn run(self, device: &Weak<dyn Core>, wake: &dyn Wake) {
        let mut jobs: Vec<(Instant, Job)> = Vec::new();
        loop {
            let now = Instant::now();
            let next = jobs.iter().map(|(at, _)| *at).min();
            let wait = next.map_or(Duration::MAX, |at| at.saturating_duration_since(now));
            let received = match next {
                None => self.0.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(_) => self.0.recv_timeout(wait),
            };
            match received {
                Ok(job) => jobs.push(job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let now = Instant::now();
            for (_, job) in jobs.extract_if(.., |(at, _)| *at <= now) {
                // Not upgraded for longer than a job takes: the device's end is ours.
                let Some(device) = device.upgrade() else {
                    return;
                };
                carry_out(&*device, wake, job);
            }
        }
    }
}

fn carry_out(device: &dyn Core, wake: &dyn Wake, job: Job) {
    match job {
        Job::Look => wake.invalidation(),
        Job::Doorbell(context) => {
            let at = u64::from(context) * DOORBELL_STRIDE;
            device.mmio_write(BAR_DOORBELLS, at, &[1, 0, 0, 0]);
        }
        Job::Reset => device.reset(),
    }
}
