//! The request path: what happens to a descriptor, in this order.
//!
//! doorbell → fetch → translate → (page request →) transfer → complete
//!
//! Each of these is a step. Steps are made under a guard, several of them until a drain begins, or
//! the guard has lasted long enough. A step moves at most a chunk, and of several pages no further
//! one once a drain waits. Nothing is translated before its step, and nothing is held between two
//! guards but the progress of the operation, so that a context can be stopped, and a shootdown
//! served, between any two of them.

mod doorbell;

mod descriptor;
mod fetch;

mod translate;

mod page_request;

mod operation;
mod saved;
mod transfer;

mod complete;

pub(crate) use fetch::Ahead;
pub(crate) use operation::{Batch, Operation};
pub(crate) use page_request::RequestRing;
pub(crate) use translate::Access;

use std::time::Duration;

use extlb_spec::context::ContextError;
use extlb_spec::work::{Opcode, Status};
use extlb_spec::{Iova, PAGE_SIZE};

use crate::Device;
use crate::config::SchedulePolicy;
use crate::context::{Context, Failure, Miss, Space, Work};
use crate::guard::Lane;
use crate::sync::lock;

/// What a step costs beside the bytes that it moves, in bytes: as many as are moved in that time,
/// about. A guard costs as much.
const STEP: u64 = 512;
/// What a page table walk costs.
const WALK: u64 = 2048;
/// How much is done under a guard before a look for invalidations, in the same measure.
const LOOK: u64 = 8192;

/// Why a step did not get on.
#[derive(Clone, Debug)]
enum Halt {
    /// Nothing is submitted.
    Empty,
    /// Pages are missing.
    Missing(Vec<Miss>),
    /// The page table is broken at this address.
    Broken(Iova),
    /// The context stops.
    Failed(ContextError, u64),
    /// The device or the context was stopped meanwhile.
    Stopped,
}

/// How a context's turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Something was done; there may be more.
    Worked,
    /// Nothing to do, but not for long yet.
    Polled,
    /// Nothing to do until a doorbell, a response or a sync comes.
    Parked,
}

impl Work {
    /// An address cannot be used, for good: what has to do with it ends, which is the operation
    /// if it is about its operands, and the context if it is about the rings.
    fn cannot(&mut self, status: Status, iova: Iova, write: bool) {
        match &mut self.operation {
            Some(op) if op.outcome.is_none() => op.end_at(status, iova, write),
            Some(_) => {
                self.failure = Some(Failure::new(ContextError::CompletionFault, iova.0));
            }
            None => match &mut self.batch {
                // Its array of descriptors is an operand.
                Some(batch) => {
                    batch.own.end_at(status, iova, write);
                    self.leave_batch();
                }
                None => self.failure = Some(Failure::new(ContextError::RingFault, iova.0)),
            },
        }
    }
}

impl Device {
    /// Gives a context its turn. `now`: the time of the engine's step.
    pub(crate) fn run_context(
        &self,
        lane: &mut Lane<'_>,
        context: &Context,
        now: Duration,
    ) -> Turn {
        let mut work = lock(&context.work);
        let work = &mut *work;
        context.refresh(work);
        let Some(space) = work.space else {
            // Without a space there is nothing to run; a failure is that of its entry.
            return self.report_failure(lane, context, work);
        };
        if work.failure.is_some() {
            return self.fail(lane, context, &space, work);
        }
        if !self.collect_responses(lane, context, &space, work) {
            return match work.failure {
                Some(_) => self.fail(lane, context, &space, work),
                None => Turn::Parked,
            };
        }
        let turn = self.turn_of(&space);
        work.allowance = (work.allowance + turn).min(turn);
        let mut idle = true;
        while work.allowance > 0 {
            let before = work.allowance;
            let halt = self.burst(lane, context, &space, work).err();
            if work.allowance != before {
                idle = false;
                work.last_work = now;
            }
            match halt {
                None => {}
                Some(Halt::Empty) => {
                    // Who has nothing to do saves nothing up.
                    work.allowance = work.allowance.min(0);
                    return match idle {
                        true => self.park(lane, context, &space, work, now),
                        false => Turn::Worked,
                    };
                }
                Some(Halt::Missing(misses)) => {
                    work.allowance = work.allowance.min(0);
                    work.misses = misses;
                    self.request_pages(lane, context, &space, work);
                    return Turn::Parked;
                }
                Some(Halt::Broken(iova)) => work.cannot(Status::BusError, iova, false),
                Some(Halt::Failed(error, addr)) => work.failure = Some(Failure::new(error, addr)),
                // The next turn looks at what there is then. If the device is stopped there is
                // no turn, but the context keeps its place.
                Some(Halt::Stopped) => return Turn::Worked,
            }
            if work.failure.is_some() {
                return self.fail(lane, context, &space, work);
            }
            // The figure that matters is how long the kernel spins for its acknowledgement:
            // this thread is awake, so it serves between any two guards.
            self.serve_invalidations();
        }
        Turn::Worked
    }

    /// Makes steps under one guard, and says in the shadow page how far they got.
    fn burst(
        &self,
        lane: &mut Lane<'_>,
        context: &Context,
        space: &Space,
        work: &mut Work,
    ) -> Result<(), Halt> {
        // The guard first, then the map of memory: who changes it waits for those who may know
        // the old one.
        let mut guard = Some(lane.enter());
        let mut made = Ok(());
        self.ports.memory.view(&mut |memory| {
            let Some(guard) = guard.take() else { return };
            made = self
                .access(guard, memory, context, space, work.epoch)
                .and_then(|access| {
                    let steps = self.steps(&access, space, work);
                    self.publish(&access, space, work)?;
                    steps
                });
        });
        made
    }

    /// Makes steps until the guard has lasted long enough.
    fn steps(&self, access: &Access<'_>, space: &Space, work: &mut Work) -> Result<(), Halt> {
        // The slow bus of tests makes one access as long as a test wants a guard to last.
        let mut left = match self.config.debug.bus_delay_us {
            0 => u64::from(self.config.schedule.chunk),
            _ => 1,
        };
        let mut look = LOOK;
        let mut walks = 0;
        let mut enter = STEP;
        loop {
            // A page at least, so that pages are not cut.
            let step = self.step(access, space, work, left.max(PAGE_SIZE));
            let walked = access.walks() - std::mem::replace(&mut walks, access.walks());
            let extra = match &step {
                // Nobody has asked for anything.
                Err(Halt::Empty) => return step.map(drop),
                // Who fails pays for the attempt.
                Err(_) => 0,
                Ok(extra) => *extra,
            };
            let cost = extra + STEP + std::mem::take(&mut enter) + WALK * walked;
            work.allowance -= match self.config.schedule.policy {
                SchedulePolicy::Fair => cost as i64,
                SchedulePolicy::RoundRobin => STEP as i64,
            };
            step?;
            left = left.saturating_sub(cost);
            if left == 0 || work.allowance <= 0 || access.is_awaited() {
                return Ok(());
            }
            // A stop takes effect here already. Not that it had to: its drain waits for the guard.
            access.still()?;
            look = look.saturating_sub(cost);
            if look == 0 {
                if self.invalidations_wait() {
                    return Ok(());
                }
                look = LOOK;
            }
        }
    }

    /// One step of the context's operation: what it cost beside the step as such, in bytes.
    fn step(
        &self,
        access: &Access<'_>,
        space: &Space,
        work: &mut Work,
        limit: u64,
    ) -> Result<u64, Halt> {
        match &mut work.operation {
            None => self.fetch(access, space, work)?,
            Some(op) if op.outcome.is_some() => self.complete(access, work)?,
            Some(op) if op.opcode == Opcode::Batch && op.left() > 0 => {
                let own = *op;
                work.enter_batch(own);
            }
            Some(op) => return transfer::transfer(access, op, work.failed, limit),
        }
        Ok(0)
    }

    /// What a turn adds to the allowance of a context.
    fn turn_of(&self, space: &Space) -> i64 {
        let schedule = &self.config.schedule;
        match schedule.policy {
            SchedulePolicy::Fair => i64::from(schedule.quantum) * i64::from(space.weight),
            SchedulePolicy::RoundRobin => i64::from(schedule.quantum),
        }
    }
}
