//! The thread that hears the device: completions, page requests, errors.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use extlb_spec::page_request::{RequestKind, Response, flags};
use extlb_spec::{Iova, Vector};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::sync::atomic::Ordering;

use super::core::Core;
use crate::error::{Error, Nonsense, Result};
use crate::hardware::Hardware;
use crate::protocol::{Requests, respond};

/// How often to look whether the device lives when it says nothing.
const TICK: Duration = Duration::from_secs(1);

/// The thread; it ends when this is dropped.
pub(super) struct Service {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    /// The process that has the thread; its children have a copy of this only.
    owner: u32,
}

impl Service {
    pub(super) fn start<H: Hardware>(core: &Arc<Core<H>>) -> Result<Self> {
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(|errno| Error::Call {
            call: "eventfd",
            errno,
        })?;
        let stop = Arc::new(stop);
        let (core, stopped) = (core.clone(), stop.clone());
        let thread = std::thread::Builder::new()
            .name("extlb-service".into())
            .spawn(move || serve(&core, &stopped))
            .map_err(|_| Error::Argument("no thread left for the driver"))?;
        Ok(Self {
            stop,
            thread: Some(thread),
            owner: std::process::id(),
        })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if std::process::id() != self.owner {
            // There is nothing to join, and to stop the parent's is not a child's business.
            std::mem::forget(self.thread.take());
            return;
        }
        // It cannot fail: the count is far from its limit.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve<H: Hardware>(core: &Core<H>, stop: &EventFd) {
    let vectors = [Vector::Completion, Vector::PageRequest, Vector::Error];
    let mut next_look = Instant::now() + TICK;
    let mut more = false;
    loop {
        let events = vectors.map(|vector| core.hardware.interrupt(vector));
        let [completion, request, error] = events.map(AsFd::as_fd);
        let fds = [stop.as_fd(), completion, request, error];
        let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let left = match more {
            true => Duration::ZERO,
            false => next_look.saturating_duration_since(Instant::now()),
        };
        // Rounded up, so that it does not spin in the last millisecond.
        let left = PollTimeout::try_from(left.as_micros().div_ceil(1000));
        match poll(&mut fds, left.unwrap_or(PollTimeout::MAX)) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            // Nobody would hear the device from now on.
            Err(errno) => {
                let call = "poll";
                core.kill(&core.life(), Error::Call { call, errno });
                return;
            }
        }
        let [stopped, rang @ ..] = fds.map(|fd| fd.any().unwrap_or(true));
        if stopped {
            return;
        }
        for (event, _) in events.iter().zip(rang).filter(|(_, rang)| *rang) {
            // Taken before anything is looked at: what comes later rings again.
            let _ = event.read();
        }
        let [completion, request, error] = rang;
        if completion {
            core.bell.ring();
        }
        // A look at the ring costs nothing.
        if more || request || error || Instant::now() >= next_look {
            more = core.serve_requests();
        }
        if error || Instant::now() >= next_look {
            // What it finds is told to all who wait.
            let _ = core.check(&core.life());
            next_look = Instant::now() + TICK;
        }
    }
}

impl<H: Hardware> Core<H> {
    /// Serves the requests in the page request ring, but no more than it holds: a device that
    /// always has more does not keep the thread from other work, nor from its end. Whether there
    /// may be more.
    fn serve_requests(&self) -> bool {
        for _ in 0..Requests::ENTRIES {
            let (life, space, request) = {
                let mut state = self.state();
                let life = state.life.clone();
                if life.queue.check().is_err() {
                    return false;
                }
                match state.requests.next(self) {
                    Ok(None) => return false,
                    Ok(Some(request)) => {
                        let space = state.spaces.get(&request.context).cloned();
                        (life, space, request)
                    }
                    Err(error) => {
                        drop(state);
                        self.kill(&life, error);
                        return false;
                    }
                }
            };
            let nonsense = |name, value: u32| {
                let value = value.into();
                let error = Error::Protocol(Nonsense::Register { name, value });
                self.kill(&life, error);
                false
            };
            if request.context >= self.contexts() {
                return nonsense("context of a page request", request.context);
            }
            match RequestKind::from_raw(request.kind) {
                Some(RequestKind::Page) => {}
                Some(RequestKind::ContextError) => {
                    // The context's shadow page says why; wake those who sleep on it.
                    self.bell.ring();
                    continue;
                }
                None => return nonsense("kind of a page request", request.kind),
            }
            // Everything registered is mapped. So either the request is older than the mapping,
            // and the device finds the page now; or there is none to be had.
            let write = request.flags & flags::WRITE != 0;
            let covered = space.as_ref().is_some_and(|space| {
                space.requests.fetch_add(1, Ordering::Relaxed);
                let covered = space.covers(Iova(request.iova), write);
                space
                    .refused
                    .fetch_add(u64::from(!covered), Ordering::Relaxed);
                covered
            });
            // A device that has spoilt the way there would ask for ever.
            if let (Some(space), true) = (&space, covered)
                && let Err(error) = space.check(self.arena(), Iova(request.iova))
            {
                self.kill(&life, error);
                return false;
            }
            let response = match covered {
                true => Response::Success,
                false => Response::Invalid,
            };
            let answer = respond(request.context, request.group, response);
            if self.send(&life, &[answer], false).is_err() {
                return false;
            }
        }
        true
    }
}
