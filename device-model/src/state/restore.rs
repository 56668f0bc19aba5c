//! A device is made of a saved state.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64};

use extlb_spec::MAX_CONTEXTS;

use super::held::Parts;
use super::{DeviceState, Shift, StateError, check, wrong};
use crate::context::Context;
use crate::counters::Counters;
use crate::device::{gate, queues};
use crate::guard::Guards;
use crate::messages::Messages;
use crate::ports::Ports;
use crate::registers::RegisterFile;
use crate::schedule::Schedule;
use crate::tlb::Tlb;
use crate::{Config, Device};

impl Device {
    /// A device that goes on where the one that was saved stood, with these ports. Nothing is
    /// raised, written or read before its first step; who drives it by threads starts them as for
    /// a new one.
    ///
    /// `config` must give the TLB and the oracle the size that they had; the rest of it may differ.
    pub fn restore(config: Config, ports: Ports, state: &DeviceState) -> Result<Self, StateError> {
        config.check()?;
        let parts = serde_json::from_str(state.0.get()).map_err(StateError::Syntax)?;
        let Parts {
            now,
            gate,
            fatal,
            registers,
            messages,
            counters,
            before,
            contexts,
            tlb,
            schedule,
            mut commands,
            requests,
            mut oracle,
            last_work,
        } = parts;
        let shift = Shift {
            from: now,
            to: ports.clock.now(),
        };
        let is_fatal = gate & gate::FATAL != 0;
        let known = gate & !gate::ALL == 0;
        check("the gate", known && is_fatal == fatal.is_some(), gate)?;
        let bus_master = gate & gate::BUS_MASTER != 0;
        let count = contexts.len();
        check(
            "the number of contexts",
            count == MAX_CONTEXTS as usize,
            count,
        )?;
        let contexts = (0..).zip(contexts);
        let contexts = contexts.map(|(id, context)| Context::restore(id, context, shift));
        let guards = Guards::new();
        before.check()?;
        let registers = RegisterFile::restore(registers)?;
        let (fresh_commands, fresh_requests) = match gate & gate::ENABLED {
            0 => Default::default(),
            _ => match queues(&registers) {
                Ok(queues) => queues,
                Err(bad) => return Err(wrong("the configuration of queues", bad.name)),
            },
        };
        commands.restore(&fresh_commands, &guards)?;
        requests.check(&fresh_requests)?;
        oracle.restore(&config.oracle, shift)?;
        Ok(Self {
            messages: Messages::restore(ports.interrupts.clone(), messages, bus_master)?,
            gate: AtomicU32::new(gate),
            fatal: Mutex::new(fatal),
            registers: Mutex::new(registers),
            counters: Counters::restore(counters)?,
            before: Mutex::new(before),
            guards,
            tlb: Tlb::restore(&config.tlb, tlb)?,
            contexts: contexts.collect::<Result<_, _>>()?,
            schedule: Schedule::restore(schedule)?,
            commands: Mutex::new(commands),
            requests: Mutex::new(requests),
            oracle: Mutex::new(oracle),
            last_work: AtomicU64::new(shift.nanos(last_work)),
            ports,
            config,
        })
    }
}
