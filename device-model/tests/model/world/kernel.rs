//! What the kernel of a world does with queues and contexts, and with the whole device.

use extlb_spec::context::flags as context_flags;
use extlb_spec::invalidation::{CommandKind, InvalidationScope, wait};
use extlb_spec::page_request::Response;
use extlb_spec::regs;

use super::super::{Command, Scope};
use super::World;

impl World {
    /// Posts a command, if there is room.
    pub fn post(&self, command: Command) -> bool {
        let value = {
            let mut model = self.model();
            if !model.has_room() || self.guest.fatal() != 0 {
                return false;
            }
            model.post(command.clone());
            command
        };
        let zero = extlb_spec::invalidation::Command::default();
        let raw = match value {
            Command::Invalidate(scope) => {
                let (flags, context, addr, value) = match scope {
                    Scope::Range(c, start, end) => {
                        (InvalidationScope::Range, c, start, end - start)
                    }
                    Scope::Context(c) => (InvalidationScope::Context, c, 0, 0),
                    Scope::All => (InvalidationScope::All, 0, 0, 0),
                };
                extlb_spec::invalidation::Command {
                    kind: CommandKind::Invalidate as u32,
                    flags: flags as u32,
                    context,
                    addr,
                    value,
                    ..zero
                }
            }
            Command::Start(c) | Command::Change(c) | Command::Stop(c) => {
                extlb_spec::invalidation::Command {
                    kind: CommandKind::ContextSync as u32,
                    context: c,
                    ..zero
                }
            }
            Command::Respond(context, group, response) => extlb_spec::invalidation::Command {
                kind: CommandKind::PageResponse as u32,
                flags: response as u32,
                context,
                group,
                ..zero
            },
            Command::Wait { .. } => unreachable!("see `wait`"),
        };
        self.guest.post(raw);
        true
    }

    /// Posts a wait: posted, cleared or drained.
    pub fn wait(&self, level: u32, interrupt: bool) {
        let mut model = self.model();
        if !model.has_room() {
            return;
        }
        let flags = [0, wait::CLEARED, wait::CLEARED | wait::DRAINED][level as usize];
        let interrupt_flag = if interrupt { wait::INTERRUPT } else { 0 };
        let value = self.guest.post_wait(flags | interrupt_flag);
        let during = model.during;
        model.post(Command::Wait {
            value,
            drained: level == 2,
            interrupt,
            during,
            written: false,
        });
    }

    fn write_entry(&self, c: u32, valid: bool, credits: u32) {
        self.processes[c as usize].write_entry(&self.guest, |entry| {
            entry.flags = if valid { context_flags::VALID } else { 0 };
            entry.credits = credits;
        });
    }

    /// Starts a context that does not run.
    pub fn start(&self, c: u32) {
        if self.runs(c) || !self.is_running() {
            return;
        }
        self.processes[c as usize].restart();
        self.write_entry(c, true, 4);
        self.model().contexts[c as usize].credits = 4;
        if self.post(Command::Start(c)) {
            self.drain_queue();
        }
    }

    /// Changes how many credits a context has.
    pub fn change(&self, c: u32, credits: u32) {
        if !self.runs(c) || !self.is_running() {
            return;
        }
        self.write_entry(c, true, credits);
        if self.post(Command::Change(c)) {
            self.drain_queue();
            self.model().contexts[c as usize].credits = credits as usize;
        }
    }

    pub fn stop(&self, c: u32) {
        if !self.runs(c) || !self.is_running() {
            return;
        }
        self.write_entry(c, false, 4);
        if self.post(Command::Stop(c)) {
            self.drain_queue();
        }
    }

    /// Takes the next record out of the ring.
    pub fn take(&self) -> Option<extlb_spec::page_request::PageRequest> {
        let record = self.guest.take_request()?;
        self.model().unread -= 1;
        Some(record)
    }

    pub fn respond(&self, c: u32, group: u32, response: Response) {
        self.post(Command::Respond(c, group, response));
    }

    pub fn set_bus_master(&self, on: bool) {
        if on {
            self.model().powered = true;
        }
        self.guest.device.set_bus_master(on);
        self.model().powered = on;
    }

    /// Register reset, or disable; and the device is enabled again.
    pub fn reset(&self, disable: bool) {
        match disable {
            true => self.guest.set(regs::CTRL, 0),
            false => self.guest.device.reset(),
        }
        {
            let mut model = self.model();
            model.forget();
            if !disable {
                *self.base.lock().unwrap() = model.counts;
            }
        }
        match disable {
            true => self.guest.enable_as_is(),
            false => self.guest.enable(),
        }
    }
}
