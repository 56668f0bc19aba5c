//! The kernel's end of the invalidation queue.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use extlb_device::GuestRam;
use extlb_device::ports::Dma as _;
use extlb_spec::invalidation::{Command, CommandKind, InvalidationScope, KernelShadow, wait};
use extlb_spec::page_request::Response;
use extlb_spec::{Gpa, Iova, PAGE_SIZE};
use nix::errno::Errno;

use super::table::broken;
use crate::error::{Error, Result};

/// log2 of the number of commands.
pub(super) const LOG2: u32 = 8;
const ENTRIES: u32 = 1 << LOG2;
/// A device that does not acknowledge for so long is dead.
const PATIENCE: Duration = Duration::from_secs(10);

/// The invalidation queue.
#[derive(Debug)]
pub(super) struct Invalidations {
    base: Gpa,
    shadow: Gpa,
    /// Index after the last command; the lock orders those who write commands.
    tail: Mutex<Next>,
    dead: std::sync::atomic::AtomicBool,
    /// Commands waited for, for statistics.
    pub(super) waits: AtomicU64,
}

#[derive(Debug)]
struct Next {
    index: u32,
    sequence: u64,
}

macro_rules! word {
    ($self:ident, $field:ident) => {
        Gpa($self.shadow.0 + std::mem::offset_of!(KernelShadow, $field) as u64)
    };
}

impl Invalidations {
    /// Frames that the queue takes.
    pub(super) const FRAMES: u64 = ((Command::SIZE as u64) << LOG2).div_ceil(PAGE_SIZE);

    pub(super) fn new(base: Gpa, shadow: Gpa) -> Self {
        let tail = Mutex::new(Next {
            index: 0,
            sequence: 0,
        });
        Self {
            base,
            shadow,
            tail,
            dead: false.into(),
            waits: AtomicU64::new(0),
        }
    }

    /// Gives the device commands, in order. With `acknowledged`, waits until they were carried
    /// out and every access that began before has ended. `kick` wakes the device.
    pub(super) fn send(
        &self,
        ram: &GuestRam,
        commands: &[Command],
        acknowledged: bool,
        kick: impl Fn(),
    ) -> Result<()> {
        let waited = {
            let mut next = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
            for command in commands {
                self.push(ram, &mut next, command)?;
            }
            if acknowledged {
                next.sequence += 1;
                let command = Command {
                    kind: CommandKind::Wait as u32,
                    flags: wait::WRITE | wait::CLEARED | wait::DRAINED,
                    addr: word!(self, wait).0,
                    value: next.sequence,
                    ..Command::default()
                };
                self.push(ram, &mut next, &command)?;
            }
            // The tail, a full fence, then need_kick: the mirror image of what the device does
            // before it sleeps (see `KernelShadow`).
            ram.store_u32(word!(self, iq_tail), next.index, Ordering::Release)
                .map_err(broken)?;
            fence(Ordering::SeqCst);
            if ram
                .load_u32(word!(self, iq_need_kick), Ordering::Relaxed)
                .map_err(broken)?
                != 0
            {
                kick();
            }
            next.sequence
        };
        if !acknowledged {
            return Ok(());
        }
        self.waits.fetch_add(1, Ordering::Relaxed);
        // Wait commands are carried out in order, so a later number tells of this one as well.
        self.until(|| {
            let done = ram
                .load_u64(word!(self, wait), Ordering::Acquire)
                .map_err(broken)?;
            Ok(done >= waited)
        })
    }

    fn push(&self, ram: &GuestRam, next: &mut Next, command: &Command) -> Result<()> {
        // Room for this command: the device may not have been told of those before it, which is
        // why callers send fewer commands at once than the queue has entries.
        self.until(|| {
            let head = ram
                .load_u32(word!(self, iq_head), Ordering::Acquire)
                .map_err(broken)?;
            Ok(next.index.wrapping_sub(head) < ENTRIES)
        })?;
        let slot = u64::from(next.index & (ENTRIES - 1)) * Command::SIZE as u64;
        ram.write(Gpa(self.base.0 + slot), &command.to_bytes())
            .map_err(broken)?;
        next.index = next.index.wrapping_add(1);
        Ok(())
    }

    fn until(&self, done: impl Fn() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        while !done()? {
            if self.dead.load(Ordering::Relaxed) || start.elapsed() > PATIENCE {
                self.declare_dead();
                return Err(Error::Dead { errno: Errno::EIO });
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    pub(super) fn declare_dead(&self) {
        self.dead.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }
}

/// Forget translations of a range of a context.
pub(super) fn invalidate(context: u32, start: Iova, len: u64) -> Command {
    Command {
        kind: CommandKind::Invalidate as u32,
        flags: InvalidationScope::Range as u32,
        context,
        addr: start.0,
        value: len,
        ..Command::default()
    }
}

/// Read a context's entry again.
pub(super) fn sync(context: u32) -> Command {
    Command {
        kind: CommandKind::ContextSync as u32,
        context,
        ..Command::default()
    }
}

/// Answer a page request.
pub(super) fn respond(context: u32, group: u32, response: Response) -> Command {
    Command {
        kind: CommandKind::PageResponse as u32,
        flags: response as u32,
        context,
        group,
        ..Command::default()
    }
}
