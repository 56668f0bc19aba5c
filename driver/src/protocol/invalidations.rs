//! The owner's end of the invalidation queue.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use extlb_spec::invalidation::{Command, CommandKind, InvalidationScope, KernelShadow, wait};
use extlb_spec::page_request::Response;
use extlb_spec::{Gpa, Iova, PAGE_SIZE};
use nix::errno::Errno;

use super::{BusMemory as _, Port};
use crate::error::{Error, Nonsense, Result};

/// How often to ask whether the device lives while it does not answer.
const LIVENESS: Duration = Duration::from_millis(50);

/// The invalidation queue of a device, from one reset to the next.
#[derive(Debug)]
pub(crate) struct Invalidations {
    base: Gpa,
    shadow: Gpa,
    patience: Duration,
    /// Index after the last command; the lock orders those who write commands.
    tail: Mutex<Next>,
    /// The last acknowledgement that was asked for.
    asked: AtomicU64,
    dead: OnceLock<Error>,
    /// Commands waited for, for statistics.
    pub(crate) waits: AtomicU64,
}

#[derive(Debug)]
struct Next {
    index: u32,
}

impl Invalidations {
    /// log2 of the number of commands.
    pub(crate) const LOG2: u32 = 8;
    const ENTRIES: u32 = 1 << Self::LOG2;
    /// Pages that the queue takes.
    pub(crate) const PAGES: u64 = ((Command::SIZE as u64) << Self::LOG2).div_ceil(PAGE_SIZE);
    /// How long a device may take to acknowledge, if nothing else is asked for.
    pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

    /// An empty queue of a device that was reset; the memory is zeroed. A device that does not
    /// acknowledge for `patience` is dead.
    pub(crate) fn new(base: Gpa, shadow: Gpa, patience: Duration) -> Self {
        Self {
            base,
            shadow,
            patience,
            tail: Mutex::new(Next { index: 0 }),
            asked: AtomicU64::new(0),
            dead: OnceLock::new(),
            waits: AtomicU64::new(0),
        }
    }

    fn word(&self, offset: usize) -> Gpa {
        Gpa(self.shadow.0 + offset as u64)
    }

    /// Gives the device commands, in order. With `acknowledged`, waits until they were carried
    /// out and every access that began before has ended.
    ///
    /// # Errors
    /// Whatever happens here means that the device is dead: the queue remembers why.
    pub(crate) fn send(
        &self,
        port: &impl Port,
        commands: &[Command],
        acknowledged: bool,
    ) -> Result<()> {
        self.try_send(port, commands, acknowledged)
            .map_err(|error| self.declare_dead(error))
    }

    fn try_send(&self, port: &impl Port, commands: &[Command], acknowledged: bool) -> Result<()> {
        let memory = port.memory();
        let waited = {
            let mut next = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
            // Under the lock: after `close` nobody writes to the queue.
            self.check()?;
            for command in commands {
                self.push(port, &mut next, command)?;
            }
            let waited = acknowledged.then(|| self.asked.fetch_add(1, Ordering::Relaxed) + 1);
            if let Some(waited) = waited {
                let command = Command {
                    kind: CommandKind::Wait as u32,
                    flags: wait::WRITE | wait::CLEARED | wait::DRAINED,
                    addr: self.word(offset_of!(KernelShadow, wait)).0,
                    value: waited,
                    ..Command::default()
                };
                self.push(port, &mut next, &command)?;
            }
            // The tail, a full fence, then need_kick: the mirror image of what the device does
            // before it sleeps (see `KernelShadow`).
            let tail = self.word(offset_of!(KernelShadow, iq_tail));
            memory.store_u32(tail, next.index, Ordering::Release)?;
            fence(Ordering::SeqCst);
            let need_kick = self.word(offset_of!(KernelShadow, iq_need_kick));
            if memory.load_u32(need_kick, Ordering::Relaxed)? != 0 {
                port.kick();
            }
            waited
        };
        let Some(waited) = waited else {
            return Ok(());
        };
        self.waits.fetch_add(1, Ordering::Relaxed);
        let word = self.word(offset_of!(KernelShadow, wait));
        self.until(port, || {
            // Acquire: what the device did before it acknowledged is seen.
            let done = memory.load_u64(word, Ordering::Acquire)?;
            // Wait commands are carried out in order, so a later number tells of this one as
            // well; but one that nobody asked for yet tells of nothing.
            let asked = self.asked.load(Ordering::Relaxed);
            if done > asked {
                return Err(Error::Protocol(Nonsense::Acknowledged { done, asked }));
            }
            Ok(done >= waited)
        })
    }

    fn push(&self, port: &impl Port, next: &mut Next, command: &Command) -> Result<()> {
        // Room for this command: the device may not have been told of those before it, which is
        // why callers send fewer commands at once than the queue has entries.
        self.until(port, || {
            let word = self.word(offset_of!(KernelShadow, iq_head));
            let head = port.memory().load_u32(word, Ordering::Acquire)?;
            let behind = next.index.wrapping_sub(head);
            if behind > Self::ENTRIES {
                let tail = next.index;
                return Err(Error::Protocol(Nonsense::CommandHead { head, tail }));
            }
            Ok(behind < Self::ENTRIES)
        })?;
        let slot = u64::from(next.index & (Self::ENTRIES - 1)) * Command::SIZE as u64;
        port.memory()
            .write(Gpa(self.base.0 + slot), &command.to_bytes())?;
        next.index = next.index.wrapping_add(1);
        Ok(())
    }

    fn until(&self, port: &impl Port, done: impl Fn() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        let mut look = LIVENESS;
        while !done()? {
            self.check()?;
            let waited = start.elapsed();
            if waited > look {
                port.alive()?;
                look = waited + LIVENESS;
            }
            if waited > self.patience {
                let errno = Errno::ETIMEDOUT;
                return Err(Error::Dead { errno });
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Why the device is dead, if it is.
    pub(crate) fn check(&self) -> Result<()> {
        self.dead.get().map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Nobody waits for this device any more. The first reason is kept, and returned.
    pub(crate) fn declare_dead(&self, why: Error) -> Error {
        self.dead.get_or_init(|| why).clone()
    }

    /// After [`Invalidations::declare_dead`]: waits until nobody writes to the queue any more.
    pub(crate) fn close(&self) {
        drop(self.tail.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Forget translations of a range of a context.
pub(crate) fn invalidate(context: u32, start: Iova, len: u64) -> Command {
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
pub(crate) fn sync(context: u32) -> Command {
    Command {
        kind: CommandKind::ContextSync as u32,
        context,
        ..Command::default()
    }
}

/// Answer a page request.
pub(crate) fn respond(context: u32, group: u32, response: Response) -> Command {
    Command {
        kind: CommandKind::PageResponse as u32,
        flags: response as u32,
        context,
        group,
        ..Command::default()
    }
}

/// Compare translations with the process's page table; the result goes to `to`.
#[cfg(feature = "inprocess")]
pub(crate) fn audit(context: u32, to: Gpa) -> Command {
    Command {
        kind: CommandKind::Audit as u32,
        context,
        addr: to.0,
        ..Command::default()
    }
}
