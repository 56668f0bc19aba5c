//! Page request: a miss is put to the kernel, and its answer taken.
//!
//! By now the guard of the access is gone: an operation that waits holds nothing, and no shootdown
//! waits for it. The kernel's answer arrives through the invalidation queue.
//!
//! A record is written under a guard of its own, for a moment: when a context was stopped and a
//! drain after that has been acknowledged, all its records are in the ring, and none follows. The
//! kernel relies on it: it empties the ring before it gives the context's number to somebody
//! else. The lock of the ring is taken inside the guard and held for a few accesses only; nobody
//! waits for a drain while holding it.

use std::collections::VecDeque;
use std::mem::offset_of;
use std::sync::atomic::{Ordering, fence};

use extlb_spec::context::ContextError;
use extlb_spec::invalidation::KernelShadow;
use extlb_spec::page_request::{PageRequest, RequestKind, Response, flags};
use extlb_spec::regs::FatalError;
use extlb_spec::work::Status;
use extlb_spec::{Gpa, MAX_CONTEXTS, Vector};
use serde::{Deserialize, Serialize};

use super::Turn;
use super::doorbell::word;
use crate::Device;
use crate::context::{Context, Failure, Space, Waiting, Work};
use crate::guard::Lane;
use crate::ports::Event;
use crate::state::{StateError, check};
use crate::sync::lock;

/// The ring to the kernel.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RequestRing {
    pub(crate) base: Gpa,
    pub(crate) entries: u32,
    pub(crate) shadow: Gpa,
    /// Index after the last record written.
    pub(crate) tail: u32,
    /// `prq_need_kick` says that we wait for room.
    armed: bool,
    /// Contexts that have a record to send and found no room.
    waiters: VecDeque<u32>,
}

/// What became of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Posted {
    Sent,
    /// The ring is full; the context is run again when there is room.
    Full,
    /// The device or the context was stopped, or the context changed. It is run again when the
    /// device goes on, or for the sync.
    Stopped,
}

impl RequestRing {
    /// Starts over with an empty ring.
    pub(crate) fn start(base: Gpa, log2: u32, shadow: Gpa) -> Self {
        Self {
            base,
            entries: 1 << log2,
            shadow,
            ..Default::default()
        }
    }

    /// Refuses what was saved unless it is what became of `fresh`.
    pub(crate) fn check(&self, fresh: &Self) -> Result<(), StateError> {
        let Self {
            base,
            entries,
            shadow,
            tail: _,
            armed: _,
            waiters,
        } = self;
        let place = (*base, *entries, *shadow);
        let same = place == (fresh.base, fresh.entries, fresh.shadow);
        check("the page request ring", same, place)?;
        let mut seen = std::collections::BTreeSet::new();
        for context in waiters {
            let good = *context < MAX_CONTEXTS && seen.insert(context);
            check(
                "a context that waits for the page request ring",
                good,
                context,
            )?;
        }
        Ok(())
    }

    fn word(&self, offset: usize) -> Gpa {
        Gpa(self.shadow.0 + offset as u64)
    }
}

impl Device {
    /// Writes a record for a context of this epoch, if there is room.
    fn post(
        &self,
        lane: &mut Lane<'_>,
        context: &Context,
        epoch: u64,
        record: &PageRequest,
    ) -> Posted {
        // The guard first, the gates after: see `guard.rs`. It also keeps a stop waiting until
        // the interrupt is raised.
        let _guard = lane.enter();
        let mut ring = lock(&self.requests);
        let ring = &mut *ring;
        if !self.is_running() || context.epoch() != epoch {
            return Posted::Stopped;
        }
        let memory = &*self.ports.memory;
        let shadow_error = |e: crate::ports::BusError| (FatalError::Shadow, e.addr.0);
        let mut attempt = || -> Result<Posted, (FatalError, u64)> {
            let head = ring.word(offset_of!(KernelShadow, prq_head));
            let need_kick = ring.word(offset_of!(KernelShadow, prq_need_kick));
            // A head that makes no sense leaves no room either: it harms its writer only.
            let has_room = |ring: &RequestRing| {
                // Acquire pairs with the kernel's release: it has read the slots before.
                let head = memory.load_u32(head, Ordering::Acquire)?;
                Ok(ring.tail.wrapping_sub(head) < ring.entries)
            };
            if !has_room(ring).map_err(shadow_error)? {
                memory
                    .store_u32(need_kick, 1, Ordering::Relaxed)
                    .map_err(shadow_error)?;
                ring.armed = true;
                // Mirror image of the kernel's store to `prq_head`, fence, load of this.
                fence(Ordering::SeqCst);
                if !has_room(ring).map_err(shadow_error)? {
                    if !ring.waiters.contains(&context.id) {
                        ring.waiters.push_back(context.id);
                    }
                    return Ok(Posted::Full);
                }
            }
            if ring.armed && ring.waiters.is_empty() {
                memory
                    .store_u32(need_kick, 0, Ordering::Relaxed)
                    .map_err(shadow_error)?;
                ring.armed = false;
            }
            let slot = u64::from(ring.tail & (ring.entries - 1));
            let at = Gpa(ring.base.0 + slot * PageRequest::SIZE as u64);
            memory
                .write(at, &record.to_bytes())
                .map_err(|e| (FatalError::PrqWrite, e.addr.0))?;
            ring.tail = ring.tail.wrapping_add(1);
            let tail = ring.word(offset_of!(KernelShadow, prq_tail));
            memory
                .store_u32(tail, ring.tail, Ordering::Release)
                .map_err(shadow_error)?;
            Ok(Posted::Sent)
        };
        match attempt() {
            Ok(Posted::Sent) => {
                self.messages.raise(Vector::PageRequest);
                Posted::Sent
            }
            Ok(other) => other,
            Err((error, info)) => {
                self.fatal(error, info);
                Posted::Stopped
            }
        }
    }

    /// The kernel kicked: contexts that found the ring full try again. Whether there are any.
    pub(crate) fn retry_requests(&self) -> bool {
        let waiters = std::mem::take(&mut lock(&self.requests).waiters);
        waiters
            .into_iter()
            .fold(false, |any, context| self.schedule.push(context) | any)
    }

    /// Sends the requests of an operation that were not sent yet, as far as credits and the
    /// ring allow. The context is run again when a response comes, or room.
    pub(super) fn request_pages(
        &self,
        lane: &mut Lane<'_>,
        context: &Context,
        space: &Space,
        work: &mut Work,
    ) {
        let credits = (space.credits as usize).saturating_sub(lock(&context.waiting).len());
        let unsent = work.misses.iter_mut().filter(|m| m.group.is_none());
        for miss in unsent.take(credits) {
            let group = {
                let mut next = lock(&context.next_group);
                *next = next.wrapping_add(1);
                *next
            };
            // Expected before it is asked, as the answer may be fast.
            lock(&context.waiting).push(Waiting {
                group,
                response: None,
            });
            let record = PageRequest {
                kind: RequestKind::Page as u32,
                context: context.id,
                iova: miss.iova.page().0,
                pages: miss.pages,
                flags: if miss.write { flags::WRITE } else { 0 },
                group,
                code: 0,
            };
            if self.post(lane, context, work.epoch, &record) != Posted::Sent {
                lock(&context.waiting).retain(|w| w.group != group);
                return;
            }
            miss.group = Some(group);
            self.counters.page_requests.add(1);
        }
    }

    /// The kernel answered. Whether somebody should be woken.
    pub(crate) fn respond(&self, context: &Context, group: u32, response: Response) -> bool {
        let known = lock(&context.waiting)
            .iter_mut()
            .find(|w| w.group == group && w.response.is_none())
            .map(|w| w.response = Some(response));
        if known.is_none() {
            self.counters.stray_responses.add(1);
            return false;
        }
        self.schedule.push(context.id)
    }

    /// Takes the answers to the operation's requests, when all have come. False: it cannot go
    /// on, because it still waits, or because the context failed.
    pub(super) fn collect_responses(
        &self,
        lane: &mut Lane<'_>,
        context: &Context,
        space: &Space,
        work: &mut Work,
    ) -> bool {
        if work.misses.is_empty() {
            return true;
        }
        let answers = {
            let mut waiting = lock(&context.waiting);
            if waiting.iter().any(|w| w.response.is_none()) {
                return false;
            }
            std::mem::take(&mut *waiting)
        };
        if answers.is_empty() {
            // There was no room yet.
            self.request_pages(lane, context, space, work);
            return false;
        }
        let mut refused = None;
        // What was not sent, for lack of credit, is asked for by the next miss.
        for miss in std::mem::take(&mut work.misses) {
            let answer = answers.iter().find(|w| miss.group == Some(w.group));
            match answer.and_then(|w| w.response) {
                None | Some(Response::Success) => {}
                Some(Response::Failure) => {
                    let error = ContextError::PageRequestFailed;
                    work.failure = Some(Failure::new(error, miss.iova.0));
                }
                // If both operands are refused the first is the one to name.
                Some(Response::Invalid) => refused = refused.or(Some(miss)),
            }
        }
        if let (Some(miss), None) = (refused, work.failure) {
            work.cannot(Status::PageFault, miss.iova, miss.write);
        }
        work.failure.is_none()
    }

    /// The context stops on an error: tells the program, by its shadow page, and the kernel.
    pub(super) fn fail(
        &self,
        lane: &mut Lane<'_>,
        context: &Context,
        space: &Space,
        work: &mut Work,
    ) -> Turn {
        let Some(failure) = work.failure else {
            return Turn::Parked;
        };
        if !failure.told {
            let Ok(access) = self.enter(lane, context, space, work.epoch) else {
                // The device was stopped: it is told when the device goes on. Or the context was
                // stopped or changed: then the next turn finds out which.
                return Turn::Worked;
            };
            let memory = access.memory();
            // If it was the shadow page that failed, only the kernel is told.
            let _ = memory
                .store_u64(word!(space, error_addr), failure.addr, Ordering::Relaxed)
                .and_then(|()| {
                    let code = failure.error as u32;
                    memory.store_u32(word!(space, error), code, Ordering::Release)
                });
            drop(access);
            work.failure = Some(Failure {
                told: true,
                ..failure
            });
        }
        work.operation = None;
        work.batch = None;
        work.ahead.clear();
        work.misses.clear();
        lock(&context.waiting).clear();
        self.report_failure(lane, context, work)
    }

    /// Puts the record of a failure into the ring, once.
    pub(super) fn report_failure(
        &self,
        lane: &mut Lane<'_>,
        context: &Context,
        work: &mut Work,
    ) -> Turn {
        let epoch = work.epoch;
        let Some(failure) = work.failure.as_mut().filter(|f| !f.sent) else {
            return Turn::Parked;
        };
        let record = PageRequest {
            kind: RequestKind::ContextError as u32,
            context: context.id,
            iova: failure.addr,
            code: failure.error as u32,
            ..Default::default()
        };
        match self.post(lane, context, epoch, &record) {
            Posted::Sent => {
                failure.sent = true;
                self.ports.trace.event(Event::ContextError {
                    context: context.id,
                    error: failure.error,
                    addr: failure.addr,
                });
                Turn::Parked
            }
            // The ring remembers the context.
            Posted::Full => Turn::Parked,
            Posted::Stopped => Turn::Worked,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    use extlb_spec::{BAR_REGS, regs};

    use super::*;
    use crate::ports::{Ignore, Ports, Wake};
    use crate::{Config, GuestRam};

    #[derive(Default)]
    struct Woken(AtomicU32);

    impl Wake for Woken {
        fn work(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }

        fn invalidation(&self) {}
    }

    #[test]
    fn a_kick_wakes_who_runs_the_contexts_if_any_waits_for_room() {
        let woken = Arc::new(Woken::default());
        let ram = Arc::new(GuestRam::default());
        let mut ports = Ports::stepped(ram, Arc::new(Ignore));
        ports.wake = woken.clone();
        let device = Device::new(Config::default(), ports).expect("made");
        for (waiters, wakes) in [(&[][..], 0), (&[1][..], 1), (&[2, 3][..], 2)] {
            lock(&device.requests).waiters.extend(waiters);
            device.mmio_write(BAR_REGS, regs::KICK.offset, &1u32.to_le_bytes());
            assert_eq!(woken.0.load(Ordering::Relaxed), wakes, "{waiters:?}");
        }
    }
}
