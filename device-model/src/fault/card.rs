//! The card: each access is sorted, and handed to the file that knows about it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use extlb_spec::context::ContextEntry;
use extlb_spec::invalidation::Command;
use extlb_spec::page_request::PageRequest;
use extlb_spec::{Gpa, Vector};

use super::Injection;
use super::alarm::{Alarm, Job, Jobs, alarm};
use super::places::{COMMAND_TAIL, Layout, Place, REQUEST_HEAD, REQUEST_TAIL, State};
use super::plan::{Chooser, Fired, Kind, Rule};
use crate::Device;
use crate::ports::{BusError, Dma, Event, Interrupts, Ports};
use crate::sync::lock;

type Disconnect = Box<dyn Fn() + Send + Sync>;

/// The card between a device and its slot.
///
/// Its locks are held for no access and for no call of a port: a door may lead back here.
pub(super) struct Card {
    /// The real ones.
    pub(super) ports: Ports,
    chooser: Mutex<Chooser>,
    state: Mutex<State>,
    device: OnceLock<Weak<Device>>,
    disconnect: OnceLock<Disconnect>,
    jobs: Jobs,
    injected: AtomicU64,
}

impl Card {
    pub(super) fn new(rules: &[Rule], seed: u64, ports: Ports) -> (Self, Alarm) {
        let (jobs, alarm) = alarm();
        let card = Self {
            ports,
            chooser: Mutex::new(Chooser::new(rules, seed)),
            state: Mutex::default(),
            device: OnceLock::new(),
            disconnect: OnceLock::new(),
            jobs,
            injected: AtomicU64::new(0),
        };
        (card, alarm)
    }

    /// Says which device the card is in front of, if nothing is between.
    pub(super) fn watch_gate(&self, device: &Arc<Device>) {
        // Called once, by the card's maker.
        let _ = self.device.set(Arc::downgrade(device));
    }

    pub(super) fn on_disconnect(&self, disconnect: Disconnect) {
        // The first one stays: a device has one client.
        let _ = self.disconnect.set(disconnect);
    }

    pub(super) fn disconnect(&self) -> Option<&Disconnect> {
        self.disconnect.get()
    }

    /// The device is enabled: nothing of what was before counts.
    pub(super) fn start(&self, layout: Layout) {
        *self.state() = State::new(layout);
    }

    pub(super) fn injected(&self) -> u64 {
        self.injected.load(Ordering::Relaxed)
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(super) fn now(&self) -> Duration {
        self.ports.clock.now()
    }

    /// Whether the device may access memory, as far as that can be seen without a call: false
    /// for one that is recorded, whose calls take turns, so that none comes to stop an access.
    pub(super) fn device_runs(&self) -> bool {
        let device = self.device.get().and_then(Weak::upgrade);
        device.is_some_and(|device| device.is_running())
    }

    pub(super) fn later(&self, delay: Duration, job: Job) {
        // Fails only when the device, and with it the thread, is going.
        let _ = self.jobs.send((Instant::now() + delay, job));
    }

    /// There is an occasion for a fault. If it happens: it is told and counted here, and to be
    /// done by the caller.
    pub(super) fn inject(
        &self,
        kind: Kind,
        concerns: impl Fn(&Rule) -> bool,
        to: impl FnOnce() -> String,
    ) -> Option<Fired> {
        let fired = lock(&self.chooser).occasion(kind, concerns)?;
        let number = self.injected.fetch_add(1, Ordering::Relaxed) + 1;
        self.ports.trace.event(Event::Injected(Injection {
            kind,
            number,
            at: self.now(),
            to: to(),
        }));
        Some(fired)
    }

    fn place(&self, at: Gpa) -> Place {
        self.state().place(at)
    }
}

/// How long a fault lasts.
pub(super) fn delay(fired: &Fired) -> Option<Duration> {
    fired.rule.delay_us.map(Duration::from_micros)
}

impl Interrupts for Card {
    fn raise(&self, vector: Vector) {
        let concerns = |rule: &Rule| rule.vector.is_none_or(|v| v.vector() == vector);
        let name = || format!("{vector:?}");
        if self.inject(Kind::LoseInterrupt, concerns, name).is_some() {
            return;
        }
        self.ports.interrupts.raise(vector);
        if self.inject(Kind::RepeatInterrupt, concerns, name).is_some() {
            self.ports.interrupts.raise(vector);
        }
    }
}

impl Dma for Card {
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        match self.place(from) {
            Place::Commands => {
                self.ports.memory.read(from, to)?;
                let (commands, _) = to.as_chunks_mut::<{ Command::SIZE }>();
                commands.iter_mut().try_for_each(|c| self.command(c))
            }
            Place::Entry(first) => {
                self.ports.memory.read(from, to)?;
                let (entries, _) = to.as_chunks::<{ ContextEntry::SIZE }>();
                for (context, entry) in (first..).zip(entries) {
                    self.state()
                        .entry(context, &ContextEntry::from_bytes(entry));
                }
                Ok(())
            }
            _ => self.read_data(from, to),
        }
    }

    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        match (self.place(to), <&[u8; PageRequest::SIZE]>::try_from(from)) {
            (Place::Requests(slot), Ok(record)) => self.request(slot, record),
            _ => self.write_data(to, from),
        }
    }

    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        self.copy_data(from, to, len)
    }

    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32, BusError> {
        let place = self.place(at);
        if place == Place::Kernel(COMMAND_TAIL) {
            self.release_due();
        }
        let value = self.ports.memory.load_u32(at, order)?;
        Ok(match place {
            Place::Kernel(REQUEST_HEAD) => value.wrapping_add(self.state().lost),
            Place::Context(context, _) => self.tail(at, context, value),
            _ => value,
        })
    }

    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<(), BusError> {
        let value = match self.place(at) {
            Place::Kernel(REQUEST_TAIL) => value.wrapping_sub(self.state().lost),
            _ => value,
        };
        self.ports.memory.store_u32(at, value, order)
    }

    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64, BusError> {
        let value = self.ports.memory.load_u64(at, order)?;
        Ok(self.entry_read(at, value))
    }

    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<(), BusError> {
        match self.is_expected(at, value) {
            true => self.acknowledge(at, value, order),
            false => self.ports.memory.store_u64(at, value, order),
        }
    }

    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<u64, BusError> {
        // A leaf that was read flipped: what is in RAM is not, and what comes back is again. The
        // flip is its own inverse, so the device's question ("was it `current`?") has the answer
        // of the real one.
        let flip = self.flip_of(at);
        let found = self
            .ports
            .memory
            .compare_exchange_u64(at, current ^ flip, new ^ flip)?;
        Ok(found ^ flip)
    }

    fn fetch_add_u64(&self, at: Gpa, value: u64) -> Result<u64, BusError> {
        self.ports.memory.fetch_add_u64(at, value)
    }

    fn view(&self, f: &mut dyn FnMut(&dyn Dma)) {
        f(self);
    }
}

impl std::fmt::Debug for Card {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Card")
            .field("chooser", &self.chooser)
            .field("injected", &self.injected)
            .finish_non_exhaustive()
    }
}
