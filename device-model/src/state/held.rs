//! A device that is held still, and its state.

use std::sync::MutexGuard;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{DeviceState, StateError};
use crate::context::{self, Work};
use crate::counters::Totals;
use crate::oracle::Oracle;
use crate::registers::RegisterFile;
use crate::request::RequestRing;
use crate::shootdown::CommandQueue;
use crate::sync::lock;
use crate::{Device, counters, messages, registers, schedule, tlb};
use extlb_spec::regs::FatalError;

/// A device between two accesses: nothing is under way, and nothing begins until this is dropped.
///
/// # Why nothing is in between
///
/// This holds the locks of the registers, of every context's work, of the invalidation queue and
/// of the page request ring, taken in this order, which is the one in which the device takes them
/// where it takes several.
/// - An access by translation, and any step of an operation, is made with the lock of its
///   context's work held, from before its guard is entered until after it is left. So there is
///   no guard, and no operation is in the middle of a step: a thread that has a turn to make waits
///   for the lock.
/// - Commands are fetched and acknowledged, and the oracle looks again, under the queue's lock.
///   A wait command whose drain had not ended is kept as such; its drain ends at the next look,
///   as there is no guard left.
/// - Records are sent under the ring's lock.
/// - Registers are written, and the device is reset, stopped and started, under theirs.
///
/// What can still happen is that a doorbell is rung or a kick is noted. Both do no more than
/// queue contexts; whoever saves a device has stopped its guest's processors, and then neither
/// comes.
pub struct Held<'d> {
    device: &'d Device,
    registers: MutexGuard<'d, RegisterFile>,
    work: Vec<MutexGuard<'d, Work>>,
    commands: MutexGuard<'d, CommandQueue>,
    requests: MutexGuard<'d, RequestRing>,
}

impl Device {
    /// Holds the device still. While it is held, save its guest's memory as well.
    ///
    /// Its methods block meanwhile: the thread that holds it must not call them.
    pub fn hold(&self) -> Held<'_> {
        Held {
            device: self,
            registers: lock(&self.registers),
            work: self.contexts.iter().map(|c| lock(&c.work)).collect(),
            commands: lock(&self.commands),
            requests: lock(&self.requests),
        }
    }

    /// The state of the device at some moment between two accesses. See [`crate::state`].
    pub fn save(&self) -> Result<DeviceState, StateError> {
        self.hold().save()
    }
}

/// The state, borrowed from the device.
#[derive(Serialize)]
struct View<'a> {
    now: Duration,
    gate: u32,
    fatal: Option<(FatalError, u64)>,
    registers: registers::State,
    messages: messages::State,
    counters: counters::State,
    before: Totals,
    contexts: Vec<context::View<'a>>,
    tlb: tlb::saved::State,
    schedule: schedule::Inner,
    commands: &'a CommandQueue,
    requests: &'a RequestRing,
    oracle: &'a Oracle,
    last_work: u64,
}

/// The same, as it is read.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Parts {
    pub(super) now: Duration,
    pub(super) gate: u32,
    pub(super) fatal: Option<(FatalError, u64)>,
    pub(super) registers: registers::State,
    pub(super) messages: messages::State,
    pub(super) counters: counters::State,
    pub(super) before: Totals,
    pub(super) contexts: Vec<context::Saved>,
    pub(super) tlb: tlb::saved::State,
    pub(super) schedule: schedule::Inner,
    pub(super) commands: CommandQueue,
    pub(super) requests: RequestRing,
    pub(super) oracle: Oracle,
    pub(super) last_work: u64,
}

impl Held<'_> {
    /// The state of the device.
    pub fn save(&self) -> Result<DeviceState, StateError> {
        let Self {
            device,
            registers,
            work,
            commands,
            requests,
        } = self;
        // The configuration and the ports are given anew. There is no guard, and a new device
        // counts its drains from 0.
        let Device {
            config: _,
            ports,
            messages,
            gate,
            fatal,
            registers: _,
            counters,
            before,
            guards: _,
            tlb,
            contexts,
            schedule,
            commands: _,
            requests: _,
            oracle,
            last_work,
        } = device;
        let contexts = contexts.iter().zip(work);
        let view = View {
            now: ports.clock.now(),
            gate: gate.load(Ordering::SeqCst),
            fatal: *lock(fatal),
            registers: registers.save(),
            messages: messages.save(),
            counters: counters.save(),
            before: *lock(before),
            contexts: contexts.map(|(context, work)| context.save(work)).collect(),
            tlb: tlb.save(),
            schedule: schedule.save(),
            commands,
            requests,
            oracle: &lock(oracle),
            last_work: last_work.load(Ordering::Relaxed),
        };
        let json = serde_json::value::to_raw_value(&view).map_err(StateError::Broken)?;
        Ok(DeviceState(json))
    }
}

impl std::fmt::Debug for Held<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Held").finish_non_exhaustive()
    }
}
