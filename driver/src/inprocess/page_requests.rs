//! The kernel's end of the page request ring.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use extlb_device::ports::Dma as _;
use extlb_spec::invalidation::KernelShadow;
use extlb_spec::page_request::{PageRequest, RequestKind, flags};
use extlb_spec::{Gpa, Iova, PAGE_SIZE};

use super::machine::Machine;
use super::table::broken;
use crate::error::{Error, Result};

/// log2 of the number of records. Small, so that it runs full in tests.
pub(super) const LOG2: u32 = 4;
/// Frames that the ring takes.
pub(super) const FRAMES: u64 = ((PageRequest::SIZE as u64) << LOG2).div_ceil(PAGE_SIZE);

/// Starts the thread that serves requests, for as long as the machine is there.
pub(super) fn spawn(machine: &Arc<Machine>, ring: Gpa, shadow: Gpa) -> Result<()> {
    let events = machine.events.clone();
    let weak = Arc::downgrade(machine);
    let serve = move || {
        let mut head = 0;
        loop {
            // Counted before the ring is looked at: what this look misses rings once more.
            let seen = events.requests.count();
            let Some(machine) = weak.upgrade() else {
                return;
            };
            if serve_all(&machine, ring, shadow, &mut head).is_err() {
                machine.invalidations.declare_dead();
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

/// Serves all requests in the ring. `head` is the index after the last one served so far.
fn serve_all(machine: &Machine, ring: Gpa, shadow: Gpa, head: &mut u32) -> Result<()> {
    let word = |offset: usize| Gpa(shadow.0 + offset as u64);
    let tail_word = word(std::mem::offset_of!(KernelShadow, prq_tail));
    let head_word = word(std::mem::offset_of!(KernelShadow, prq_head));
    let need_kick = word(std::mem::offset_of!(KernelShadow, prq_need_kick));
    while machine
        .ram
        .load_u32(tail_word, Ordering::Acquire)
        .map_err(broken)?
        != *head
    {
        let slot = u64::from(*head & ((1 << LOG2) - 1)) * PageRequest::SIZE as u64;
        let mut bytes = [0; PageRequest::SIZE];
        machine
            .ram
            .read(Gpa(ring.0 + slot), &mut bytes)
            .map_err(broken)?;
        let request = PageRequest::from_bytes(&bytes);
        *head = head.wrapping_add(1);
        // The slot is free as soon as it was read, before the request is served.
        machine
            .ram
            .store_u32(head_word, *head, Ordering::Release)
            .map_err(broken)?;
        fence(Ordering::SeqCst);
        if machine
            .ram
            .load_u32(need_kick, Ordering::Relaxed)
            .map_err(broken)?
            != 0
        {
            machine.hardware.kick();
        }
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
