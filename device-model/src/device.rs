//! The device as a whole: its gates, its registers, its steps.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use extlb_spec::regs::{self, FatalError, ctrl, status};
use extlb_spec::{BAR_DOORBELLS, BAR_REGS, DOORBELL_STRIDE, Gpa, MAX_CONTEXTS, Vector};

use crate::config::{Config, ConfigError};
use crate::context::{Context, Entry};
use crate::counters::{ContextStats, Counters, Totals};
use crate::guard::Guards;
use crate::messages::Messages;
use crate::oracle::Oracle;
use crate::ports::{Event, Ports, Stop};
use crate::registers::{RegisterFile, decode};
use crate::request::{RequestRing, Turn};
use crate::schedule::Schedule;
use crate::shootdown::CommandQueue;
use crate::sync::lock;
use crate::tlb::{Scope, Tlb};

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Something; call again.
    Busy,
    /// Nothing, but something may come soon without a wake-up: call again before long.
    Waiting,
    /// Nothing, and [`crate::ports::Wake`] tells when there is.
    Idle,
}

/// Bits of the gate: memory is accessed only while exactly `RUN` is set.
pub(crate) mod gate {
    pub(crate) const ENABLED: u32 = 1 << 0;
    pub(crate) const BUS_MASTER: u32 = 1 << 1;
    pub(crate) const FATAL: u32 = 1 << 2;
    pub(crate) const RUN: u32 = ENABLED | BUS_MASTER;
    pub(crate) const ALL: u32 = RUN | FATAL;
}

/// A device. All methods may be called from any thread.
pub struct Device {
    pub(crate) config: Config,
    pub(crate) ports: Ports,
    pub(crate) messages: Messages,
    pub(crate) gate: AtomicU32,
    pub(crate) fatal: Mutex<Option<(FatalError, u64)>>,
    pub(crate) registers: Mutex<RegisterFile>,
    pub(crate) counters: Counters,
    /// What the counters were at the resets so far.
    pub(crate) before: Mutex<Totals>,
    pub(crate) guards: Guards,
    pub(crate) tlb: Tlb,
    pub(crate) contexts: Vec<Context>,
    pub(crate) schedule: Schedule,
    pub(crate) commands: Mutex<CommandQueue>,
    pub(crate) requests: Mutex<RequestRing>,
    pub(crate) oracle: Mutex<Oracle>,
    /// When an engine last did something, in ns of the clock.
    pub(crate) last_work: AtomicU64,
}

impl Device {
    /// A device as after power-on: bus master off.
    ///
    /// A fault plan in the configuration is not its business: see [`crate::fault::Interposed`].
    pub fn new(config: Config, ports: Ports) -> Result<Self, ConfigError> {
        config.check()?;
        Ok(Self {
            messages: Messages::new(ports.interrupts.clone()),
            ports,
            gate: AtomicU32::new(0),
            fatal: Mutex::new(None),
            registers: Mutex::new(RegisterFile::new()),
            counters: Counters::new(MAX_CONTEXTS),
            before: Mutex::new(Totals::default()),
            guards: Guards::new(),
            tlb: Tlb::new(&config.tlb),
            contexts: (0..MAX_CONTEXTS).map(Context::new).collect(),
            schedule: Schedule::new(),
            commands: Mutex::new(CommandQueue::default()),
            requests: Mutex::new(RequestRing::default()),
            oracle: Mutex::new(Oracle::new(&config.oracle)),
            last_work: AtomicU64::new(0),
            config,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Whether memory may be accessed. Sequentially consistent: one side of Dekker's pattern in
    /// `guard.rs`.
    pub(crate) fn is_running(&self) -> bool {
        self.gate.load(Ordering::SeqCst) == gate::RUN
    }

    pub(crate) fn now(&self) -> Duration {
        self.ports.clock.now()
    }

    pub(crate) fn poll_time(&self) -> Duration {
        Duration::from_micros(self.config.poll_us)
    }

    /// What the device has done since it was made, across resets.
    pub fn totals(&self) -> Totals {
        *lock(&self.before) + self.counters.read()
    }

    /// What the device has done for a context since the last reset; `None` if there is no such
    /// context.
    pub fn context_stats(&self, context: u32) -> Option<ContextStats> {
        let counters = self.counters.contexts.get(context as usize)?;
        Some(counters.read())
    }

    /// A read from a BAR. What is no register reads as zero.
    pub fn mmio_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar != BAR_REGS {
            return;
        }
        let Some(hit) = decode(offset, data.len()) else {
            return;
        };
        let mut file = lock(&self.registers);
        let value = file.read(hit, |file| self.register(file, hit.register));
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
    }

    /// A write to a BAR. What is no register ignores it.
    pub fn mmio_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if bar == BAR_DOORBELLS {
            if let Ok(context) = u32::try_from(offset / DOORBELL_STRIDE)
                && context < MAX_CONTEXTS
            {
                self.doorbell(context);
            }
            return;
        }
        let Some(hit) = decode(offset, data.len()).filter(|_| bar == BAR_REGS) else {
            return;
        };
        if hit.register.offset == regs::KICK.offset {
            let work = self.retry_requests();
            self.ports.wake.invalidation();
            if work {
                self.ports.wake.work();
            }
            return;
        }
        let mut raw = [0; 8];
        raw[..data.len()].copy_from_slice(data);
        let raw = u64::from_le_bytes(raw);
        let mut file = lock(&self.registers);
        if hit.register.offset != regs::CTRL.offset {
            let open = file.get(&regs::CTRL) & u64::from(ctrl::ENABLE) == 0;
            file.write(hit, raw, open);
            return;
        }
        if raw & u64::from(ctrl::RESET) != 0 {
            self.reset_locked(&mut file);
            return;
        }
        let enable = raw & u64::from(ctrl::ENABLE) != 0;
        let was = file.get(&regs::CTRL) & u64::from(ctrl::ENABLE) != 0;
        file.write(hit, raw, true);
        match (was, enable) {
            (false, true) => self.enable(&file),
            (true, false) => {
                let was = self.disable();
                self.tell_stop(was & gate::ENABLED != 0, Stop::Disabled);
            }
            _ => {}
        }
        let runs = self.is_running();
        drop(file);
        if enable && !was && runs {
            self.resume();
        }
    }

    /// The value of a register at this moment.
    fn register(&self, file: &RegisterFile, register: &regs::Register) -> u64 {
        let counters = || {
            // Suspects whose time is over count even if nothing else happens.
            self.oracle_tick(&lock(&self.commands));
            self.counters.read()
        };
        let record = || {
            let select = file.get(&regs::ORACLE_SELECT) as usize;
            lock(&self.oracle).records.get(select).copied()
        };
        let select = |f: fn(&crate::oracle::StaleAccess) -> u64| record().map_or(0, |r| f(&r));
        let stats = || {
            let context = file.get(&regs::CTX_STAT_SELECT) as u32;
            self.context_stats(context).unwrap_or_default()
        };
        match register.offset {
            o if o == regs::STATUS.offset => u64::from(self.status()),
            o if o == regs::ERROR.offset => lock(&self.fatal).map_or(0, |f| f.0 as u64),
            o if o == regs::ERROR_INFO.offset => lock(&self.fatal).map_or(0, |f| f.1),
            o if o == regs::OPS_COMPLETED.offset => counters().ops_completed,
            o if o == regs::OPS_FAULTED.offset => counters().ops_faulted,
            o if o == regs::BYTES.offset => counters().bytes,
            o if o == regs::TLB_HITS.offset => counters().tlb_hits,
            o if o == regs::TLB_MISSES.offset => counters().tlb_misses,
            o if o == regs::TLB_EVICTIONS.offset => counters().tlb_evictions,
            o if o == regs::TLB_SHOT_DOWN.offset => counters().tlb_shot_down,
            o if o == regs::INVALIDATIONS.offset => counters().invalidations,
            o if o == regs::DRAINS.offset => counters().drains,
            o if o == regs::PAGE_REQUESTS.offset => counters().page_requests,
            o if o == regs::STRAY_RESPONSES.offset => counters().stray_responses,
            o if o == regs::BUS_ERRORS.offset => counters().bus_errors,
            o if o == regs::ORACLE_CHECKS.offset => counters().oracle_checks,
            o if o == regs::ORACLE_SUSPECTS.offset => counters().oracle_suspects,
            o if o == regs::ORACLE_STALE.offset => counters().oracle_stale,
            o if o == regs::ORACLE_KIND.offset => select(|r| r.kind as u64),
            o if o == regs::ORACLE_CONTEXT.offset => select(|r| u64::from(r.context)),
            o if o == regs::ORACLE_IOVA.offset => select(|r| r.iova.0),
            o if o == regs::ORACLE_DEVICE_GPA.offset => select(|r| r.device_gpa.0),
            o if o == regs::ORACLE_CPU_GPA.offset => {
                select(|r| r.cpu_gpa.map_or(u64::MAX, |gpa| gpa.0))
            }
            o if o == regs::ORACLE_FILL.offset => select(|r| r.fill),
            o if o == regs::ORACLE_INVALIDATION.offset => select(|r| r.invalidation),
            o if o == regs::CTX_TLB_HITS.offset => stats().tlb_hits,
            o if o == regs::CTX_TLB_MISSES.offset => stats().tlb_misses,
            o if o == regs::CTX_WALKS.offset => stats().tlb_walks,
            o if o == regs::CTX_WALK_CACHE_HITS.offset => stats().walk_cache_hits,
            o if o == regs::CTX_TLB_EVICTIONS.offset => stats().tlb_evictions,
            o if o == regs::CTX_TLB_SHOT_DOWN.offset => stats().tlb_shot_down,
            o if o == regs::KICK.offset => 0,
            _ => file.get(register),
        }
    }

    fn status(&self) -> u32 {
        let gate = self.gate.load(Ordering::SeqCst);
        if gate & gate::FATAL != 0 {
            status::FATAL
        } else if gate & gate::ENABLED != 0 {
            status::ENABLED
        } else {
            0
        }
    }

    /// `CTRL.ENABLE` was set: checks the configuration and opens the gate.
    fn enable(&self, file: &RegisterFile) {
        match queues(file) {
            Ok((commands, requests)) => {
                *lock(&self.commands) = commands;
                *lock(&self.requests) = requests;
            }
            Err(register) => {
                self.fatal(FatalError::BadConfig, register.offset);
                return;
            }
        }
        self.gate.fetch_or(gate::ENABLED, Ordering::SeqCst);
    }

    /// Closes the gate, waits until nothing is under way, and forgets every context. What the
    /// gate was.
    fn disable(&self) -> u32 {
        let was = self.gate.fetch_and(!gate::ENABLED, Ordering::SeqCst);
        self.quiesce();
        // Nobody looks at the queues while the gate is closed; the epoch that `set_context`
        // raises keeps an engine that is between two accesses from going on when it reopens.
        for id in 0..MAX_CONTEXTS {
            self.set_context(id, Entry::Stopped);
        }
        self.tlb.remove(&Scope::All, |_| {});
        *lock(&self.commands) = CommandQueue::default();
        *lock(&self.requests) = RequestRing::default();
        was
    }

    /// Back to the state after power-on, except for the bus-master bit, which PCI owns. When it
    /// returns no access is under way, and none follows until the device is enabled again; no
    /// interrupt follows either. What was under way has ended without a completion; a completion
    /// that was written is whole, and was written once.
    ///
    /// It waits for accesses that are under way; see [`Device::quiesce`] for how long. A function
    /// of a real bus has 100 ms for this and may leave requests unanswered; here the memory is
    /// written by the processor that runs this program, an access cannot be called back, and
    /// silence is what the reset is for. So it waits, and the log says so when it takes long.
    pub fn reset(&self) {
        self.reset_locked(&mut lock(&self.registers));
    }

    fn reset_locked(&self, file: &mut RegisterFile) {
        let was = self.disable();
        *file = RegisterFile::new();
        *lock(&self.oracle) = Oracle::new(&self.config.oracle);
        self.counters.reset_into(&mut lock(&self.before));
        *lock(&self.fatal) = None;
        self.messages.reset();
        self.gate.fetch_and(!gate::FATAL, Ordering::SeqCst);
        self.tell_stop(was & (gate::ENABLED | gate::FATAL) != 0, Stop::Reset);
    }

    /// For the log, if there was something to stop.
    fn tell_stop(&self, ran: bool, stop: Stop) {
        if ran {
            self.ports.trace.event(Event::Stopped(stop));
        }
    }

    /// The bus-master bit of the PCI command register. When clearing it returns no access is
    /// under way, and no interrupt is raised any more; operations go on where they were when it is
    /// set again.
    pub fn set_bus_master(&self, on: bool) {
        let file = lock(&self.registers);
        if on {
            self.gate.fetch_or(gate::BUS_MASTER, Ordering::SeqCst);
            self.messages.allow(true);
            let runs = self.is_running();
            drop(file);
            if runs {
                self.resume();
            }
        } else {
            let was = self.gate.fetch_and(!gate::BUS_MASTER, Ordering::SeqCst);
            self.quiesce();
            self.messages.allow(false);
            self.tell_stop(was == gate::RUN, Stop::BusMasterOff);
        }
    }

    /// The gate was opened: whatever came up while it was closed is looked at now.
    fn resume(&self) {
        self.publish_queue();
        for id in 0..MAX_CONTEXTS {
            self.schedule.push(id);
        }
        self.ports.wake.invalidation();
        self.ports.wake.work();
    }

    /// Stops the device; the first reason is kept. Callable with any lock but the registers'.
    pub(crate) fn fatal(&self, error: FatalError, info: u64) {
        {
            let mut fatal = lock(&self.fatal);
            if fatal.is_some() {
                return;
            }
            *fatal = Some((error, info));
            self.gate.fetch_or(gate::FATAL, Ordering::SeqCst);
        }
        self.ports.trace.event(Event::Fatal { error, info });
        self.messages.raise(Vector::Error);
    }

    /// Does a bit of work: serves the invalidation queue, then gives the next context that has
    /// something to do its quantum.
    pub fn engine_step(&self) -> Step {
        if !self.is_running() {
            return Step::Idle;
        }
        let Some(mut lane) = self.guards.lane() else {
            return Step::Waiting;
        };
        let served = self.serve_invalidations();
        let now = self.now();
        let Some(id) = self.schedule.pop() else {
            return self.idle(served, now);
        };
        let turn = self.run_context(&mut lane, &self.contexts[id as usize], now);
        self.schedule.finish(id, turn != Turn::Parked);
        if turn == Turn::Worked || served {
            self.note_work(now);
        }
        match turn {
            Turn::Worked => Step::Busy,
            Turn::Parked => Step::Busy,
            Turn::Polled => Step::Waiting,
        }
    }

    /// No context has anything to do.
    fn idle(&self, served: bool, now: Duration) -> Step {
        if served {
            self.note_work(now);
            return Step::Busy;
        }
        let last = Duration::from_nanos(self.last_work.load(Ordering::Relaxed));
        if now.saturating_sub(last) < self.poll_time() {
            return Step::Waiting;
        }
        match self.park_invalidations() {
            true => Step::Idle,
            false => Step::Waiting,
        }
    }

    fn note_work(&self, now: Duration) {
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        self.last_work.store(now, Ordering::Relaxed);
    }
}

/// The queues of the kernel, empty, where the registers say; or the register that makes no sense.
pub(crate) fn queues(
    file: &RegisterFile,
) -> Result<(CommandQueue, RequestRing), &'static regs::Register> {
    let ring = u64::from(regs::MIN_RING_LOG2)..=u64::from(regs::MAX_RING_LOG2);
    for (register, good) in [
        (&regs::CTX_COUNT, 1..=u64::from(MAX_CONTEXTS)),
        (&regs::IQ_LOG2, ring.clone()),
        (&regs::PRQ_LOG2, ring),
    ] {
        if !good.contains(&file.get(register)) {
            return Err(register);
        }
    }
    let gpa = |register| Gpa(file.get(&register));
    let shadow = gpa(regs::SHADOW);
    let commands = CommandQueue::start(
        gpa(regs::IQ_BASE),
        file.get(&regs::IQ_LOG2) as u32,
        shadow,
        gpa(regs::CTX_TABLE),
        file.get(&regs::CTX_COUNT) as u32,
    );
    let requests = RequestRing::start(
        gpa(regs::PRQ_BASE),
        file.get(&regs::PRQ_LOG2) as u32,
        shadow,
    );
    Ok((commands, requests))
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("status", &self.status())
            .field("totals", &self.totals())
            .finish_non_exhaustive()
    }
}
