//! Queue: commands are fetched from the kernel's ring and checked.

use std::mem::offset_of;
use std::sync::TryLockError;
use std::sync::atomic::Ordering;

use extlb_spec::Gpa;
use extlb_spec::invalidation::{
    Command, CommandKind, InvalidationScope, KernelShadow, audit, wait,
};
use extlb_spec::page_request::Response;
use extlb_spec::regs::FatalError;
use serde::{Deserialize, Serialize};

use super::drain::Waiting;
use crate::guard::Guards;
use crate::handshake::before_sleep;
use crate::ports::BusError;
use crate::state::{StateError, check};
use crate::sync::lock;
use crate::tlb::Scope;
use crate::{Device, Step};

/// Commands that an engine thread serves at most between two chunks of its own work.
const BURST: usize = 16;

/// The invalidation queue.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CommandQueue {
    base: Gpa,
    entries: u32,
    shadow: Gpa,
    pub(super) context_table: Gpa,
    contexts: u32,
    /// Index after the last command done.
    pub(crate) head: u32,
    /// `iq_need_kick` says that nobody polls.
    armed: bool,
    /// The wait command at the head, while it drains.
    pub(super) waiting: Option<Waiting>,
    /// A context became runnable: wake an engine once the lock is given up.
    pub(super) wake: bool,
}

/// A well-formed command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decoded {
    Invalidate(Scope),
    Wait {
        flags: u32,
        addr: Gpa,
        value: u64,
    },
    ContextSync(u32),
    PageResponse {
        context: u32,
        group: u32,
        response: Response,
    },
    Audit {
        context: u32,
        last: bool,
        addr: Gpa,
    },
}

/// Checks a command; `None` if it makes no sense.
pub(super) fn decode(command: &Command, contexts: u32) -> Option<Decoded> {
    let kind = CommandKind::from_raw(command.kind)?;
    let known = command.context < contexts;
    if kind != CommandKind::PageResponse && command.group != 0 {
        return None;
    }
    match kind {
        CommandKind::Invalidate => {
            let scope = match InvalidationScope::from_raw(command.flags)? {
                InvalidationScope::Range => {
                    let end = command.addr.checked_add(command.value)?;
                    if !Gpa(command.addr | end).is_aligned(extlb_spec::PAGE_SIZE) || !known {
                        return None;
                    }
                    Scope::Range(command.context, command.addr..end)
                }
                InvalidationScope::Context if known => Scope::Context(command.context),
                InvalidationScope::All if command.context == 0 => Scope::All,
                _ => return None,
            };
            Some(Decoded::Invalidate(scope))
        }
        CommandKind::Wait => {
            let bad_addr = command.flags & wait::WRITE != 0 && !Gpa(command.addr).is_aligned(8);
            if command.flags & !wait::ALL != 0 || command.context != 0 || bad_addr {
                return None;
            }
            Some(Decoded::Wait {
                flags: command.flags,
                addr: Gpa(command.addr),
                value: command.value,
            })
        }
        CommandKind::ContextSync if known && command.flags == 0 => {
            Some(Decoded::ContextSync(command.context))
        }
        CommandKind::PageResponse if known => Some(Decoded::PageResponse {
            context: command.context,
            group: command.group,
            response: Response::from_raw(command.flags)?,
        }),
        CommandKind::Audit
            if known && command.flags & !audit::ALL == 0 && Gpa(command.addr).is_aligned(64) =>
        {
            Some(Decoded::Audit {
                context: command.context,
                last: command.flags & audit::FINAL != 0,
                addr: Gpa(command.addr),
            })
        }
        CommandKind::ContextSync | CommandKind::PageResponse | CommandKind::Audit => None,
    }
}

/// A fatal error and what it is about.
pub(super) type Fatal = (FatalError, u64);

impl CommandQueue {
    /// Starts over with an empty queue.
    pub(crate) fn start(base: Gpa, log2: u32, shadow: Gpa, table: Gpa, contexts: u32) -> Self {
        Self {
            base,
            entries: 1 << log2,
            shadow,
            context_table: table,
            contexts,
            armed: true,
            ..Default::default()
        }
    }

    /// Believes what was saved, if it is what became of `fresh`. A drain that had begun begins
    /// again: there is no guard in a new device, so it ends at the first look.
    pub(crate) fn restore(&mut self, fresh: &Self, guards: &Guards) -> Result<(), StateError> {
        let Self {
            base,
            entries,
            shadow,
            context_table,
            contexts,
            head: _,
            armed: _,
            waiting,
            wake: _,
        } = self;
        let place = (*base, *entries, *shadow, *context_table, *contexts);
        let same = (fresh.base, fresh.entries, fresh.shadow);
        let same = place == (same.0, same.1, same.2, fresh.context_table, fresh.contexts);
        check("the invalidation queue", same, place)?;
        if let Some(waiting) = waiting {
            check(
                "the wait command of a queue that is off",
                *entries > 0,
                &waiting,
            )?;
            waiting.restore(guards)?;
        }
        Ok(())
    }

    fn word(&self, offset: usize) -> Gpa {
        Gpa(self.shadow.0 + offset as u64)
    }
}

fn shadow_error(error: BusError) -> Fatal {
    (FatalError::Shadow, error.addr.0)
}

impl Device {
    /// Carries out one command, or looks after the drain of one. Never blocks on an access:
    /// while a guard is in the way it returns [`Step::Waiting`].
    pub fn invalidation_step(&self) -> Step {
        let mut queue = lock(&self.commands);
        let step = self.command_step(&mut queue);
        self.oracle_tick(&queue);
        let wake = std::mem::take(&mut queue.wake);
        drop(queue);
        if wake {
            self.ports.wake.work();
        }
        step
    }

    /// Serves the queue if nobody else does; called by engine threads, outside any guard.
    /// Whether something was done.
    pub(crate) fn serve_invalidations(&self) -> bool {
        let mut queue = match self.commands.try_lock() {
            Ok(queue) => queue,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        let mut any = false;
        for _ in 0..BURST {
            match self.command_step(&mut queue) {
                Step::Busy => any = true,
                Step::Waiting | Step::Idle => break,
            }
        }
        if any {
            self.oracle_tick(&queue);
        }
        // The caller is an engine; another one is worth waking only if there are several.
        let wake = std::mem::take(&mut queue.wake) && self.config.engines > 1;
        if queue.armed && self.is_running() {
            // We poll from now on: the kernel need not kick.
            let need_kick = queue.word(offset_of!(KernelShadow, iq_need_kick));
            match self.ports.memory.store_u32(need_kick, 0, Ordering::Relaxed) {
                Ok(()) => queue.armed = false,
                Err(error) => self.fatal(FatalError::Shadow, error.addr.0),
            }
        }
        drop(queue);
        if wake {
            self.ports.wake.work();
        }
        any
    }

    /// Whether it is time to leave a guard, for a command or for a drain. May be called inside
    /// one: it waits for nothing.
    pub(crate) fn invalidations_wait(&self) -> bool {
        match self.commands.try_lock() {
            Ok(queue) => {
                queue.waiting.is_some()
                    || self.is_running() && self.commands_ahead(&queue).is_ok_and(|n| n > 0)
            }
            // Somebody serves it just now, and may want to drain.
            Err(_) => true,
        }
    }

    /// Nobody is going to poll: asks for kicks. Whether the queue is empty, so that the caller
    /// may sleep.
    pub(crate) fn park_invalidations(&self) -> bool {
        let mut queue = lock(&self.commands);
        if !self.is_running() {
            return true;
        }
        if queue.waiting.is_some() {
            return false;
        }
        match self.arm(&mut queue) {
            Ok(empty) => empty,
            Err((error, info)) => {
                self.fatal(error, info);
                true
            }
        }
    }

    fn arm(&self, queue: &mut CommandQueue) -> Result<bool, Fatal> {
        let memory = &*self.ports.memory;
        let need_kick = queue.word(offset_of!(KernelShadow, iq_need_kick));
        let ask = |queue: &mut CommandQueue| {
            memory
                .store_u32(need_kick, 1, Ordering::Relaxed)
                .map_err(shadow_error)?;
            queue.armed = true;
            Ok(())
        };
        let ahead = before_sleep(queue, ask, |queue| self.commands_ahead(queue))?;
        Ok(ahead == 0)
    }

    /// Makes the shadow page say where the queue stands, when the device begins to run.
    pub(crate) fn publish_queue(&self) {
        let mut queue = lock(&self.commands);
        if !self.is_running() {
            return;
        }
        let head = queue.word(offset_of!(KernelShadow, iq_head));
        let published = self
            .ports
            .memory
            .store_u32(head, queue.head, Ordering::Release)
            .map_err(shadow_error)
            .and_then(|()| self.arm(&mut queue));
        if let Err((error, info)) = published {
            self.fatal(error, info);
        }
    }

    /// How many commands are posted and not done.
    fn commands_ahead(&self, queue: &CommandQueue) -> Result<u32, Fatal> {
        let at = queue.word(offset_of!(KernelShadow, iq_tail));
        // Acquire pairs with the kernel's release: its commands are visible, and so is every
        // page table entry that it cleared before it posted them.
        let tail = self
            .ports
            .memory
            .load_u32(at, Ordering::Acquire)
            .map_err(shadow_error)?;
        let ahead = tail.wrapping_sub(queue.head);
        if ahead > queue.entries {
            return Err((FatalError::IqOverrun, u64::from(tail)));
        }
        Ok(ahead)
    }

    /// One step, under the queue's lock.
    fn command_step(&self, queue: &mut CommandQueue) -> Step {
        // Looked at under the lock: a stop closes the gate and then takes this lock.
        if !self.is_running() {
            return Step::Idle;
        }
        match self.try_command_step(queue) {
            Ok(step) => step,
            Err((error, info)) => {
                self.fatal(error, info);
                Step::Idle
            }
        }
    }

    fn try_command_step(&self, queue: &mut CommandQueue) -> Result<Step, Fatal> {
        if let Some(mut waiting) = queue.waiting.take() {
            if !self.drained(&mut waiting) {
                queue.waiting = Some(waiting);
                return Ok(Step::Waiting);
            }
            self.acknowledge(&waiting)?;
            return self.retire(queue);
        }
        if self.commands_ahead(queue)? == 0 {
            return Ok(Step::Idle);
        }
        let slot = u64::from(queue.head & (queue.entries - 1));
        let at = Gpa(queue.base.0 + slot * Command::SIZE as u64);
        let mut bytes = [0; Command::SIZE];
        self.ports
            .memory
            .read(at, &mut bytes)
            .map_err(|e| (FatalError::IqFetch, e.addr.0))?;
        let command = decode(&Command::from_bytes(&bytes), queue.contexts)
            .ok_or((FatalError::BadCommand, u64::from(queue.head)))?;
        match command {
            Decoded::Invalidate(scope) => self.invalidate(&scope),
            Decoded::ContextSync(context) => self.sync_context(queue, context)?,
            Decoded::PageResponse {
                context,
                group,
                response,
            } => {
                queue.wake |= self.respond(&self.contexts[context as usize], group, response);
            }
            Decoded::Audit {
                context,
                last,
                addr,
            } => self.audit(context, last, addr)?,
            Decoded::Wait { flags, addr, value } => {
                // The drain begins here, after everything that the commands before removed.
                let mut waiting = self.begin_wait(flags, addr, value);
                if !self.drained(&mut waiting) {
                    queue.waiting = Some(waiting);
                    return Ok(Step::Waiting);
                }
                self.acknowledge(&waiting)?;
            }
        }
        self.retire(queue)
    }

    /// The command at the head is done: its slot may be used again.
    fn retire(&self, queue: &mut CommandQueue) -> Result<Step, Fatal> {
        queue.head = queue.head.wrapping_add(1);
        let head = queue.word(offset_of!(KernelShadow, iq_head));
        self.ports
            .memory
            .store_u32(head, queue.head, Ordering::Release)
            .map_err(shadow_error)?;
        Ok(Step::Busy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(kind: CommandKind) -> Command {
        Command {
            kind: kind as u32,
            ..Default::default()
        }
    }

    #[test]
    fn senseless_commands_are_refused() {
        use CommandKind::*;
        let range = Command {
            addr: 0x1000,
            value: 0x2000,
            context: 7,
            ..command(Invalidate)
        };
        assert_eq!(
            decode(&range, 8),
            Some(Decoded::Invalidate(Scope::Range(7, 0x1000..0x3000)))
        );
        let bad = [
            Command { kind: 0, ..range },
            Command { kind: 99, ..range },
            Command { flags: 3, ..range },
            Command { group: 1, ..range },
            Command {
                context: 8,
                ..range
            },
            Command {
                addr: 0x1001,
                ..range
            },
            Command {
                value: 0x10,
                ..range
            },
            Command {
                addr: !0xfff,
                ..range
            },
            Command { flags: 2, ..range },
            Command {
                flags: 1 << 2,
                ..command(Wait)
            },
            Command {
                flags: wait::WRITE,
                addr: 4,
                ..command(Wait)
            },
            Command {
                context: 1,
                ..command(Wait)
            },
            Command {
                context: 8,
                ..command(ContextSync)
            },
            Command {
                flags: 1,
                ..command(ContextSync)
            },
            Command {
                flags: 3,
                ..command(PageResponse)
            },
            Command {
                context: 8,
                ..command(PageResponse)
            },
            Command {
                addr: 8,
                ..command(Audit)
            },
            Command {
                flags: 2,
                ..command(Audit)
            },
        ];
        for (i, bad) in bad.iter().enumerate() {
            assert_eq!(decode(bad, 8), None, "{i}");
        }
    }
}
