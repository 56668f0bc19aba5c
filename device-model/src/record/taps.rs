//! The ports of a device that is recorded: each passes on what it is asked, and notes it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use extlb_spec::{Gpa, Vector};

use super::entry::{Answer, Entry, Request};
use super::log::Writer;
use crate::ports::{BusError, Clock, Dma, Event, Interrupts, Ports, Trace, Wake};
use crate::sync::lock;

/// All ports at once.
pub(super) struct Taps {
    ports: Ports,
    log: Arc<Mutex<Writer>>,
}

impl Taps {
    /// The ports of the device, in front of `ports`.
    pub(super) fn install(ports: Ports, log: Arc<Mutex<Writer>>) -> Ports {
        let taps = Arc::new(Self { ports, log });
        Ports {
            memory: taps.clone(),
            interrupts: taps.clone(),
            clock: taps.clone(),
            trace: taps.clone(),
            wake: taps,
        }
    }

    fn note(&self, request: Request, answer: Answer) {
        lock(&self.log).put(&Entry::Port(request, answer));
    }

    /// Notes an access to memory.
    fn access<T>(
        &self,
        request: Request,
        result: Result<T, BusError>,
        answer: impl FnOnce(&T) -> Answer,
    ) -> Result<T, BusError> {
        let answer = match &result {
            Ok(value) => answer(value),
            Err(BusError { addr, len }) => Answer::BusError {
                addr: addr.0,
                len: *len as u64,
            },
        };
        self.note(request, answer);
        result
    }
}

pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Length of an access; one that is longer than that cannot be answered either.
pub(super) fn len32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

impl Dma for Taps {
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        let result = self.ports.memory.read(from, to);
        let request = Request::Read {
            from: from.0,
            len: len32(to.len()),
        };
        self.access(request, result, |()| Answer::Bytes(to.to_vec()))
    }

    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        let result = self.ports.memory.write(to, from);
        let request = Request::Write {
            to: to.0,
            data: from.to_vec(),
        };
        self.access(request, result, |()| Answer::Done)
    }

    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        let result = self.ports.memory.copy(from, to, len);
        let request = Request::Copy {
            from: from.0,
            to: to.0,
            len: len32(len),
        };
        self.access(request, result, |()| Answer::Done)
    }

    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32, BusError> {
        let result = self.ports.memory.load_u32(at, order);
        let answer = |word: &u32| Answer::Word(u64::from(*word));
        self.access(Request::LoadU32(at.0), result, answer)
    }

    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<(), BusError> {
        let result = self.ports.memory.store_u32(at, value, order);
        self.access(Request::StoreU32(at.0, value), result, |()| Answer::Done)
    }

    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64, BusError> {
        let result = self.ports.memory.load_u64(at, order);
        self.access(Request::LoadU64(at.0), result, |word| Answer::Word(*word))
    }

    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<(), BusError> {
        let result = self.ports.memory.store_u64(at, value, order);
        self.access(Request::StoreU64(at.0, value), result, |()| Answer::Done)
    }

    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<u64, BusError> {
        let result = self.ports.memory.compare_exchange_u64(at, current, new);
        let request = Request::Exchange {
            at: at.0,
            current,
            new,
        };
        self.access(request, result, |word| Answer::Word(*word))
    }

    fn fetch_add_u64(&self, at: Gpa, value: u64) -> Result<u64, BusError> {
        let result = self.ports.memory.fetch_add_u64(at, value);
        self.access(Request::Add(at.0, value), result, |word| {
            Answer::Word(*word)
        })
    }

    fn view(&self, f: &mut dyn FnMut(&dyn Dma)) {
        f(self);
    }
}

impl Interrupts for Taps {
    fn raise(&self, vector: Vector) {
        self.note(Request::Raise(vector as u32), Answer::Done);
        self.ports.interrupts.raise(vector);
    }
}

impl Clock for Taps {
    fn now(&self) -> Duration {
        // The device sees what the log says, to the nanosecond.
        let time = nanos(self.ports.clock.now());
        self.note(Request::Now, Answer::Time(time));
        Duration::from_nanos(time)
    }
}

impl Trace for Taps {
    fn event(&self, event: Event) {
        self.note(Request::Event(format!("{event:?}")), Answer::Done);
        self.ports.trace.event(event);
    }
}

impl Wake for Taps {
    fn work(&self) {
        self.note(Request::WakeWork, Answer::Done);
        self.ports.wake.work();
    }

    fn invalidation(&self) {
        self.note(Request::WakeInvalidation, Answer::Done);
        self.ports.wake.invalidation();
    }
}
