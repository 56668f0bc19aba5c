//! A guest whose device is watched by the model, and what its kernel and its programs do.

use std::mem::offset_of;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

use extlb_device::ports::{Dma, Ports};
use extlb_device::{Config, Core, Device};
use extlb_spec::context::{ContextShadow, flags as context_flags};
use extlb_spec::invalidation::{CommandKind, InvalidationScope, wait};
use extlb_spec::page_request::Response;
use extlb_spec::pte::{self, Pte, bit};
use extlb_spec::work::Descriptor;
use extlb_spec::{Gpa, Iova, regs};

use super::observe::{Heard, Observed};
use super::operation::Operation;
use super::{Command, Context, Counts, Leaf, Model, Scope};
use crate::common::{self, Guest, PAGE, Process, RING_LOG2};

/// Contexts of a world.
pub const CONTEXTS: u32 = 3;
/// Single pages of a context, one after the other.
pub const SMALL: u64 = 0x5555_0000_0000;
/// Operands begin on the first pages of either half, and may be four pages long: they stay apart.
pub const SMALL_PAGES: u64 = 12;
/// A piece of the address space that may be one leaf of 2 MiB.
pub const LARGE: u64 = 0x5555_4000_0000;
const LARGE_SIZE: u64 = 2 << 20;
/// Frames for such leaves; each serves once.
const BLOCKS: std::ops::Range<u64> = 8..16;

/// What a change of the page table does.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// Another page in its place, or in the place of nothing.
    Map {
        write: bool,
    },
    Unmap,
    /// The same page, with fewer or more rights.
    Protect {
        write: bool,
    },
}

pub type Within = Box<dyn FnOnce(&World) + Send>;

pub struct World {
    pub guest: Guest,
    pub processes: Vec<Process>,
    model: Arc<Mutex<Model>>,
    /// What the kernel does in the middle of an access, and of which.
    pub within: Mutex<Option<(u64, Within)>>,
    blocks: Mutex<std::ops::Range<u64>>,
    /// The counts at the last reset.
    base: Mutex<Counts>,
}

impl World {
    pub fn new(poll_us: u64, config: impl FnOnce(&mut Config)) -> Arc<Self> {
        let model = Arc::new(Mutex::new(Model::default()));
        let within = Arc::new(OnceLock::new());
        let mut settings = common::config();
        settings.poll_us = poll_us;
        config(&mut settings);
        let guest = Guest::around(|ports| {
            let ports = Ports {
                memory: Arc::new(Observed {
                    inner: ports.memory.clone(),
                    model: model.clone(),
                    within: within.clone(),
                }),
                interrupts: Arc::new(Heard {
                    inner: ports.interrupts.clone(),
                    model: model.clone(),
                }),
                ..ports
            };
            Arc::new(Device::new(settings, ports).unwrap()) as Arc<dyn Core>
        });
        model.lock().unwrap().powered = true;
        guest.device.set_bus_master(true);
        guest.enable();
        let processes: Vec<_> = (0..CONTEXTS).map(|c| Process::new(&guest, c)).collect();
        for process in &processes {
            let mut model = model.lock().unwrap();
            model.contexts.push(Context {
                credits: 4,
                ring: process.ring.0,
                records: process.records_page,
                record_page: process.records.0,
                ..Default::default()
            });
            let leaf = |frame| Some(Leaf { frame, write: true });
            model.map(process.context, process.ring.0, leaf(process.ring_page));
            model.map(
                process.context,
                process.records.0,
                leaf(process.records_page),
            );
        }
        let world = Arc::new(Self {
            guest,
            processes,
            model,
            within: Mutex::new(None),
            blocks: Mutex::new(BLOCKS),
            base: Mutex::new(Counts::default()),
        });
        let weak: Weak<Self> = Arc::downgrade(&world);
        let _ = within.set(Box::new(move || {
            if let Some(world) = weak.upgrade() {
                world.in_the_middle();
            }
        }));
        (0..CONTEXTS).for_each(|c| world.start(c));
        world
    }

    pub fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap()
    }

    fn in_the_middle(&self) {
        let act = {
            let mut within = self.within.lock().unwrap();
            match &mut *within {
                Some((0, _)) => within.take().map(|(_, act)| act),
                Some((left, _)) => {
                    *left -= 1;
                    None
                }
                None => None,
            }
        };
        if let Some(act) = act {
            act(self);
        }
    }

    // ---- Steps of the device.

    pub fn engine_step(&self) {
        self.guest.device.engine_step();
        self.model().rest();
    }

    pub fn queue_step(&self) {
        self.guest.device.invalidation_step();
    }

    fn is_running(&self) -> bool {
        self.model().powered && self.guest.get(regs::STATUS) == u64::from(regs::status::ENABLED)
    }

    fn runs(&self, c: u32) -> bool {
        self.model().contexts[c as usize].runs
    }

    /// Lets the device carry out what is in its queue.
    pub fn drain_queue(&self) {
        for _ in 0..10_000 {
            if self.model().queue.is_empty() {
                return;
            }
            self.queue_step();
        }
        self.model().fail("the queue does not get on");
    }

    // ---- The kernel.

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

    /// Where the entry of level 2 is for the piece that may be large.
    fn large_entry(&self, c: u32) -> Gpa {
        let process = &self.processes[c as usize];
        let mut table = process.root;
        for level in [4, 3] {
            let at = Gpa(table.0 + pte::index(Iova(LARGE), level) * 8);
            let mut entry = Pte(self.load(at));
            if !entry.is_present() {
                entry = Pte::table(self.guest.pages.take());
                self.store(at, entry);
            }
            table = entry.addr();
        }
        Gpa(table.0 + pte::index(Iova(LARGE), 2) * 8)
    }

    fn load(&self, at: Gpa) -> u64 {
        self.guest.ram.load_u64(at, Ordering::SeqCst).unwrap()
    }

    fn store(&self, at: Gpa, entry: Pte) {
        let order = Ordering::SeqCst;
        self.guest.ram.store_u64(at, entry.0, order).unwrap();
    }

    /// Puts a leaf of 2 MiB there, with fresh memory behind it, or takes out all that is there.
    pub fn map_large(&self, c: u32, map: bool) {
        let frame = match map {
            true => match self.blocks.lock().unwrap().next() {
                Some(block) => Some(block * LARGE_SIZE),
                None => return,
            },
            false => None,
        };
        let at = self.large_entry(c);
        let leaf = bit::PRESENT | bit::WRITE | bit::LEAF;
        self.store(at, Pte(frame.map_or(0, |frame| frame | leaf)));
        let mut model = self.model();
        for offset in (0..LARGE_SIZE).step_by(PAGE as usize) {
            let leaf = frame.map(|frame| Leaf {
                frame: Gpa(frame + offset),
                write: true,
            });
            model.map(c, LARGE + offset, leaf);
        }
    }

    /// Makes a table of what is one leaf: nothing else changes.
    pub fn split(&self, c: u32) {
        let at = self.large_entry(c);
        let entry = Pte(self.load(at));
        if !entry.is_present() || !entry.is_leaf(2) {
            return;
        }
        let table = self.guest.pages.take();
        for i in 0..pte::ENTRIES {
            let leaf = Pte::leaf(Gpa(entry.addr().0 + i * PAGE), true);
            self.store(Gpa(table.0 + i * 8), leaf);
        }
        self.store(at, Pte::table(table));
    }

    /// Changes the leaf of a page.
    pub fn change_leaf(&self, c: u32, page: u64, change: Change) {
        let process = &self.processes[c as usize];
        if (LARGE..LARGE + LARGE_SIZE).contains(&page) {
            self.split(c);
        }
        let old = self.model().contexts[c as usize].pages.get(&page).copied();
        let leaf = match (change, old) {
            (Change::Map { write }, _) => Some(Leaf {
                // The program's rings stay where they are.
                frame: match page {
                    p if p == process.ring.0 => process.ring_page,
                    p if p == process.records.0 => process.records_page,
                    _ => self.fresh(page),
                },
                write: write || page == process.records.0,
            }),
            (Change::Unmap, _) | (Change::Protect { .. }, None) => None,
            (Change::Protect { write }, Some(old)) => Some(Leaf { write, ..old }),
        };
        let entry = leaf.map_or(Pte::EMPTY, |leaf| Pte::leaf(leaf.frame, leaf.write));
        process.set_device(Iova(page), entry);
        self.model().map(c, page, leaf);
    }

    /// A frame with something in it.
    fn fresh(&self, page: u64) -> Gpa {
        let frame = self.guest.pages.take();
        let bytes: Vec<u8> = (0..PAGE).map(|i| ((i * 7) ^ (page >> 12)) as u8).collect();
        self.guest.ram.write(frame, &bytes).unwrap();
        frame
    }

    /// Maps what a request asks for, if it is not there.
    pub fn map_for(&self, c: u32, page: u64, write: bool) {
        let old = self.model().contexts[c as usize].pages.get(&page).copied();
        match old {
            Some(leaf) if leaf.write || !write => {}
            Some(_) => self.change_leaf(c, page, Change::Protect { write: true }),
            None => self.change_leaf(c, page, Change::Map { write }),
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

    // ---- Stops.

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

    // ---- Programs.

    /// Submits, if the ring has room. `kick`: as the protocol asks for; else not at all.
    pub fn submit(&self, c: u32, descriptor: Descriptor, kick: bool) {
        let process = &self.processes[c as usize];
        {
            let context = &mut self.model().contexts[c as usize];
            if !context.runs || context.failed || context.operations.len() >= 1 << RING_LOG2 {
                return;
            }
            // A device that sleeps is rung for all that is there, one that polls sees it.
            context.unrung = !kick;
        }
        let n = process.submit(descriptor);
        let operation = Operation::new(n % 128 * 32, descriptor);
        self.model().contexts[c as usize]
            .operations
            .push_back(operation);
        if kick && process.word(offset_of!(ContextShadow, need_kick)) != 0 {
            process.ring(&self.guest);
        }
    }

    pub fn ring(&self, c: u32) {
        self.model().contexts[c as usize].unrung = false;
        self.processes[c as usize].ring(&self.guest);
    }

    // ---- Checks.

    /// After every action.
    pub fn check(&self) -> Result<(), String> {
        let broken = std::mem::take(&mut self.model().broken);
        if !broken.is_empty() {
            return Err(broken.join("\n"));
        }
        let fatal = self.guest.fatal();
        if fatal != 0 {
            return Err(format!("fatal error {fatal}"));
        }
        let (now, base) = (self.model().counts, *self.base.lock().unwrap());
        let found = Counts {
            completed: self.guest.get(regs::OPS_COMPLETED) + base.completed,
            faulted: self.guest.get(regs::OPS_FAULTED) + base.faulted,
            page_requests: self.guest.get(regs::PAGE_REQUESTS) + base.page_requests,
            strays: self.guest.get(regs::STRAY_RESPONSES) + base.strays,
            invalidations: self.guest.get(regs::INVALIDATIONS) + base.invalidations,
            drains: self.guest.get(regs::DRAINS) + base.drains,
        };
        if found != now {
            return Err(format!("the counters say {found:?}, and it is {now:?}"));
        }
        Ok(())
    }

    /// Everybody does his duty until nothing is left to do: then nothing may be.
    pub fn settle(&self) -> Result<(), String> {
        // Only if it is off: a device that is told again looks at everything again.
        if !self.model().powered {
            self.set_bus_master(true);
        }
        for ring in [false, true] {
            for _ in 0..200 {
                self.guest.run();
                self.model().rest();
                self.check()?;
                let mut any = false;
                while self.take().is_some() {
                    any = true;
                }
                let open = self.model().open_groups();
                for (c, group, page, write) in open {
                    any = true;
                    self.map_for(c, page, write);
                    self.respond(c, group, Response::Success);
                }
                if !any {
                    break;
                }
            }
            let mut left = Vec::new();
            for (c, context) in (0..).zip(&self.model().contexts) {
                if !context.is_settled() && (ring || !context.unrung) {
                    left.push(format!(
                        "context {c}: {} operations are left",
                        context.operations.len()
                    ));
                }
            }
            if !left.is_empty() {
                return Err(left.join("\n"));
            }
            for c in (0..CONTEXTS).filter(|_| !ring) {
                if self.model().contexts[c as usize].unrung {
                    self.ring(c);
                }
            }
        }
        if !self.model().queue.is_empty() {
            return Err("commands are left".into());
        }
        Ok(())
    }
}
