//! Interrupts that are counted, a clock that is turned by hand, events that are kept.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use extlb_device::ports::{Clock, Event, Interrupts, Trace};
use extlb_spec::Vector;

/// Counts interrupts, and lets a test look at the moment of each.
#[derive(Default)]
pub struct Vectors(Mutex<HashMap<u32, u64>>, Mutex<Option<Look>>);

type Look = Box<dyn FnMut(Vector) + Send>;

impl Vectors {
    pub fn count(&self, vector: Vector) -> u64 {
        *self.0.lock().unwrap().get(&(vector as u32)).unwrap_or(&0)
    }

    pub fn total(&self) -> u64 {
        self.0.lock().unwrap().values().sum()
    }

    pub fn look(&self, look: impl FnMut(Vector) + Send + 'static) {
        *self.1.lock().unwrap() = Some(Box::new(look));
    }
}

impl Interrupts for Vectors {
    fn raise(&self, vector: Vector) {
        *self.0.lock().unwrap().entry(vector as u32).or_default() += 1;
        if let Some(look) = &mut *self.1.lock().unwrap() {
            look(vector);
        }
    }
}

/// A clock that is turned by hand.
#[derive(Default)]
pub struct HandClock(AtomicU64);

impl HandClock {
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(by.as_nanos() as u64, Ordering::SeqCst);
    }
}

impl Clock for HandClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::SeqCst))
    }
}

#[derive(Default)]
pub struct Events(pub Mutex<Vec<Event>>);

impl Trace for Events {
    fn event(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }
}
