//! Threads that drive a device.
//!
//! One or more engine threads run contexts and, while they are awake, serve the invalidation
//! queue between any two chunks. When they sleep the kernel kicks, and the thread that delivers
//! the kick serves the queue itself: one wake-up less than handing it on. One more thread takes
//! what that one cannot finish, and looks after the oracle's deadlines.

use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::ports::Wake;
use crate::sync::lock;
use crate::{Device, Step};

/// How long the thread that delivers a kick serves the queue before it hands over.
const INLINE: Duration = Duration::from_millis(1);
/// How often to look for deadlines of the oracle that came up since the last look.
const LOOK: Duration = Duration::from_millis(500);
/// Polls in a row that an engine makes before it lets others run in between.
const SPINS: u32 = 64;

#[derive(Debug, Default)]
struct State {
    work: bool,
    invalidation: bool,
    stop: bool,
}

/// Is told the name of a thread that panicked.
type Alarm = Box<dyn Fn(&str) + Send + Sync>;

/// Wakes the threads of a [`Runner`]; the device's [`Wake`] port.
#[derive(Default)]
pub struct Bell {
    state: Mutex<State>,
    work: Condvar,
    invalidation: Condvar,
    device: OnceLock<Weak<Device>>,
    alarm: OnceLock<Alarm>,
}

impl std::fmt::Debug for Bell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bell").finish_non_exhaustive()
    }
}

/// Sounds the alarm when its thread unwinds.
struct Watch(Arc<Bell>);

impl Drop for Watch {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(alarm) = self.0.alarm.get()
        {
            alarm(std::thread::current().name().unwrap_or("unnamed"));
        }
    }
}

impl Bell {
    /// A bell that nobody hears yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Calls `alarm` with a thread's name when a thread of the runner panics: nothing does then
    /// what it did. The first alarm that is set counts.
    pub fn on_panic(&self, alarm: Box<dyn Fn(&str) + Send + Sync>) {
        let _ = self.alarm.set(alarm);
    }

    /// Wakes the thread that serves the queue, rather than serve it here.
    pub(crate) fn ring_invalidation(&self) {
        lock(&self.state).invalidation = true;
        self.invalidation.notify_one();
    }
}

impl Wake for Bell {
    fn work(&self) {
        lock(&self.state).work = true;
        self.work.notify_one();
    }

    fn invalidation(&self) {
        let Some(device) = self.device.get().and_then(Weak::upgrade) else {
            return;
        };
        let begun = Instant::now();
        loop {
            match device.invalidation_step() {
                Step::Idle => break,
                Step::Busy => {}
                Step::Waiting => std::thread::yield_now(),
            }
            if begun.elapsed() > INLINE {
                self.ring_invalidation();
                return;
            }
        }
    }
}

/// The threads of a device; they end when this is dropped.
#[derive(Debug)]
pub struct Runner {
    bell: Arc<Bell>,
    threads: Vec<JoinHandle<()>>,
}

impl Runner {
    /// Starts the threads. `bell` must be the device's wake port.
    pub fn start(device: &Arc<Device>, bell: &Arc<Bell>) -> std::io::Result<Self> {
        // A bell serves one device; a second start for the same is no error.
        let _ = bell.device.set(Arc::downgrade(device));
        let mut runner = Self {
            bell: bell.clone(),
            threads: Vec::new(),
        };
        for n in 0..device.config().engines {
            let (device, bell) = (device.clone(), bell.clone());
            runner.threads.push(
                std::thread::Builder::new()
                    .name(format!("engine{n}"))
                    .spawn(move || {
                        let _watch = Watch(bell.clone());
                        engine(&device, &bell);
                    })?,
            );
        }
        let (device, bell) = (device.clone(), bell.clone());
        runner.threads.push(
            std::thread::Builder::new()
                .name("invalidation".into())
                .spawn(move || {
                    let _watch = Watch(bell.clone());
                    invalidation(&device, &bell);
                })?,
        );
        Ok(runner)
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        lock(&self.bell.state).stop = true;
        self.bell.work.notify_all();
        self.bell.invalidation.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

fn engine(device: &Device, bell: &Bell) {
    let mut spins = 0;
    loop {
        match device.engine_step() {
            Step::Busy => spins = 0,
            Step::Waiting => {
                spins += 1;
                if spins < SPINS {
                    std::hint::spin_loop();
                } else {
                    // The guest's processors may need this core to give us something to do.
                    std::thread::yield_now();
                }
            }
            Step::Idle => {
                let mut state = lock(&bell.state);
                while !state.work && !state.stop {
                    state = bell
                        .work
                        .wait(state)
                        .unwrap_or_else(std::sync::PoisonError::into_inner);
                }
                state.work = false;
            }
        }
        if lock(&bell.state).stop {
            return;
        }
    }
}

fn invalidation(device: &Device, bell: &Bell) {
    loop {
        match device.invalidation_step() {
            Step::Busy => {}
            Step::Waiting => std::thread::yield_now(),
            Step::Idle => {
                let mut state = lock(&bell.state);
                while !state.invalidation && !state.stop {
                    let left = device
                        .next_deadline()
                        .map_or(LOOK, |deadline| deadline.saturating_sub(device.now()));
                    if left.is_zero() {
                        break;
                    }
                    state = bell
                        .invalidation
                        .wait_timeout(state, left.min(LOOK))
                        .unwrap_or_else(std::sync::PoisonError::into_inner)
                        .0;
                }
                state.invalidation = false;
            }
        }
        if lock(&bell.state).stop {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ports::{Clock, Ignore, Ports};
    use crate::{Config, GuestRam};
    use extlb_spec::{BAR_REGS, Gpa, regs};

    /// Fails the engine, and nobody else.
    struct Broken;

    impl Clock for Broken {
        fn now(&self) -> Duration {
            let engine = std::thread::current().name() == Some("engine0");
            assert!(!engine, "on purpose");
            Duration::ZERO
        }
    }

    #[test]
    fn a_thread_that_panics_is_told_by_its_name() {
        let ram = GuestRam::anonymous(&[(Gpa(0), 1 << 20)]).expect("maps");
        let bell = Bell::new();
        let (say, told) = std::sync::mpsc::channel();
        bell.on_panic(Box::new(move |name| drop(say.send(name.to_owned()))));
        let ports = Ports {
            clock: Arc::new(Broken),
            wake: bell.clone(),
            ..Ports::stepped(Arc::new(ram), Arc::new(Ignore))
        };
        let device = Arc::new(Device::new(Config::default(), ports).expect("good"));
        let runner = Runner::start(&device, &bell).expect("starts");
        device.set_bus_master(true);
        for (register, value) in [
            (regs::CTX_TABLE, 0x1000),
            (regs::CTX_COUNT, 16),
            (regs::IQ_BASE, 0x2000),
            (regs::IQ_LOG2, 4),
            (regs::PRQ_BASE, 0x3000),
            (regs::PRQ_LOG2, 4),
            (regs::SHADOW, 0x4000),
            (regs::CTRL, 1u64),
        ] {
            let bytes = value.to_le_bytes();
            device.mmio_write(BAR_REGS, register.offset, &bytes[..register.width as usize]);
        }
        let name = told.recv_timeout(Duration::from_secs(20)).expect("told");
        assert_eq!(name, "engine0");
        // What the thread held is given up, and the others end.
        device.reset();
        drop(runner);
    }
}
