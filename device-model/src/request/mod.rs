//! The request path: what happens to a descriptor, in this order.
//!
//! doorbell → fetch → translate → (page request →) transfer → complete
//!
//! Each step enters a guard, translates, moves at most a page, and leaves. Nothing is held
//! between two steps but the operation's progress, so that a context can be stopped, and a
//! shootdown served, between any two of them.

mod doorbell;

mod fetch;

mod translate;

mod page_request;

mod transfer;

mod complete;

pub(crate) use page_request::RequestRing;
pub(crate) use translate::Access;

use extlb_spec::Iova;
use extlb_spec::context::ContextError;
use extlb_spec::work::{Completion, Descriptor, Opcode, Status};

use crate::Device;
use crate::context::{Context, Failure, Miss, Space, Work};
use crate::guard::Lane;
use crate::sync::lock;

/// An operation under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operation {
    pub(crate) opcode: Opcode,
    pub(crate) descriptor: Descriptor,
    /// Bytes done.
    pub(crate) done: u64,
    /// CRC32C so far.
    pub(crate) crc: u32,
    /// How it ended, once it has: what is left is to write this.
    pub(crate) outcome: Option<Completion>,
}

impl Operation {
    /// Ends the operation.
    fn end(&mut self, status: Status, result: u64) {
        self.outcome = Some(Completion {
            status: status as u32,
            bytes: self.done,
            result,
            ..Default::default()
        });
    }

    /// Ends the operation at an address.
    fn end_at(&mut self, status: Status, iova: Iova, write: bool) {
        self.outcome = Some(Completion {
            status: status as u32,
            fault_write: u32::from(write && status == Status::PageFault),
            bytes: self.done,
            fault_addr: iova.0,
            result: 0,
        });
    }
}

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

impl Device {
    /// Gives a context a quantum of chunks.
    pub(crate) fn run_context(&self, lane: &mut Lane<'_>, context: &Context) -> Turn {
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
        for chunk in 0..self.config.quantum {
            match self.advance(lane, context, &space, work) {
                Ok(()) => {}
                Err(Halt::Empty) if chunk > 0 => return Turn::Worked,
                Err(Halt::Empty) => return self.park(lane, context, &space, work),
                Err(Halt::Missing(misses)) => {
                    work.misses = misses;
                    self.request_pages(lane, context, &space, work);
                    return Turn::Parked;
                }
                Err(Halt::Broken(iova)) => match &mut work.operation {
                    Some(op) if op.outcome.is_none() => {
                        op.end_at(Status::BusError, iova, false);
                    }
                    Some(_) => {
                        work.failure = Some(Failure::new(ContextError::CompletionFault, iova.0));
                        return self.fail(lane, context, &space, work);
                    }
                    None => {
                        work.failure = Some(Failure::new(ContextError::RingFault, iova.0));
                        return self.fail(lane, context, &space, work);
                    }
                },
                Err(Halt::Failed(error, addr)) => {
                    work.failure = Some(Failure::new(error, addr));
                    return self.fail(lane, context, &space, work);
                }
                // The next turn looks at what there is then. If the device is stopped there is
                // no turn, but the context keeps its place.
                Err(Halt::Stopped) => return Turn::Worked,
            }
            work.last_work = self.now();
            // The figure that matters is how long the kernel spins for its acknowledgement:
            // this thread is awake, so it serves between any two chunks.
            self.serve_invalidations();
        }
        Turn::Worked
    }

    /// One step of the context's operation.
    fn advance(
        &self,
        lane: &mut Lane<'_>,
        context: &Context,
        space: &Space,
        work: &mut Work,
    ) -> Result<(), Halt> {
        match &mut work.operation {
            None => self.fetch(lane, context, space, work),
            Some(op) if op.outcome.is_none() => {
                let access = self.enter(lane, context, space, work.epoch)?;
                self.transfer(&access, op)
            }
            Some(_) => self.complete(lane, context, space, work),
        }
    }
}
