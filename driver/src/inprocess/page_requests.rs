//! The thread that serves page requests.

use std::sync::Arc;
use std::time::{Duration, Instant};

use extlb_spec::Iova;
use extlb_spec::page_request::{RequestKind, flags};

use super::machine::Machine;
use crate::error::{Error, Result};
use crate::protocol::Requests;

/// Starts the thread, for as long as the machine is there.
pub(super) fn spawn(machine: &Arc<Machine>, mut requests: Requests) -> Result<()> {
    let events = machine.events.clone();
    let weak = Arc::downgrade(machine);
    let serve = move || {
        loop {
            // Counted before the ring is looked at: what this look misses rings once more.
            let seen = events.requests.count();
            let Some(machine) = weak.upgrade() else {
                return;
            };
            if let Err(error) = serve_all(&machine, &mut requests) {
                machine.invalidations.declare_dead(error);
                machine.events.contexts.ring();
                return;
            }
            drop(machine);
            events
                .requests
                .wait(seen, Instant::now() + Duration::from_secs(1));
        }
    };
    let thread = std::thread::Builder::new()
        .name("page-requests".into())
        .spawn(serve);
    thread
        .map(drop)
        .map_err(|_| Error::Argument("no thread left for page requests"))
}

/// Serves all requests in the ring.
fn serve_all(machine: &Machine, requests: &mut Requests) -> Result<()> {
    while let Some(request) = requests.next(machine)? {
        match RequestKind::from_raw(request.kind) {
            Some(RequestKind::Page) => machine.serve(
                request.context,
                Iova(request.iova),
                request.pages,
                request.group,
                request.flags & flags::WRITE != 0,
            )?,
            // The context's shadow page says why; wake those who sleep on it.
            Some(RequestKind::ContextError) | None => machine.events.contexts.ring(),
        }
    }
    Ok(())
}
