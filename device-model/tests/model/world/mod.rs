//! A guest whose device is watched by the model, and what its kernel and its programs do.

mod checks;
mod kernel;
mod pages;

use std::mem::offset_of;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

use extlb_device::ports::{Dma, Ports};
use extlb_device::{Config, Core, Device};
use extlb_spec::context::ContextShadow;
use extlb_spec::work::{Descriptor, Opcode, Segment, flags};
use extlb_spec::{Gpa, Iova, regs};

use super::observe::{Heard, Observed};
use super::operation::Operation;
use super::{Context, Counts, Leaf, Model};
use crate::common::{self, Guest, PAGE, Process, RING_LOG2};
pub use pages::Change;

/// Contexts of a world.
pub const CONTEXTS: u32 = 3;
/// Single pages of a context, one after the other.
pub const SMALL: u64 = 0x5555_0000_0000;
/// Operands begin on the first pages of either half, and may be four pages long: they stay apart.
pub const SMALL_PAGES: u64 = 12;
/// The page of a context's lists: as much for each submission of the ring.
pub const LISTS: u64 = 0x5555_8000_0000;
/// The page of the descriptors in its batches: likewise.
pub const BATCHES: u64 = 0x5555_9000_0000;
const OF_ONE: u64 = PAGE >> RING_LOG2;
/// Descriptors of a batch, at most.
pub const MAX_BATCH: usize = 4;
/// A piece of the address space that may be one leaf of 2 MiB.
pub const LARGE: u64 = 0x5555_4000_0000;
const LARGE_SIZE: u64 = 2 << 20;
/// Frames for such leaves; each serves once.
const BLOCKS: std::ops::Range<u64> = 8..16;

pub type Within = Box<dyn FnOnce(&World) + Send>;

pub struct World {
    pub guest: Guest,
    pub processes: Vec<Process>,
    /// The frames of each one's lists and batches.
    lists: Vec<Gpa>,
    batches: Vec<Gpa>,
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
        let pages = || -> Vec<_> { processes.iter().map(|_| guest.pages.take()).collect() };
        let (lists, batches) = (pages(), pages());
        for ((process, lists), batches) in processes.iter().zip(&lists).zip(&batches) {
            process.map(Iova(LISTS), *lists, true);
            process.map(Iova(BATCHES), *batches, true);
            let mut model = model.lock().unwrap();
            model.contexts.push(Context {
                credits: 4,
                ring: process.ring.0,
                records: process.records_page,
                record_page: process.records.0,
                lists: LISTS,
                batches: BATCHES,
                head: Gpa(process.shadow.0 + offset_of!(ContextShadow, head) as u64),
                ..Default::default()
            });
            for (page, frame) in [
                (process.ring.0, process.ring_page),
                (process.records.0, process.records_page),
                (LISTS, *lists),
                (BATCHES, *batches),
            ] {
                let leaf = Leaf { frame, write: true };
                model.map(process.context, page, Some(leaf));
            }
        }
        let world = Arc::new(Self {
            guest,
            processes,
            lists,
            batches,
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

    // ---- Programs.

    /// Whether a context's ring has room.
    fn has_room(&self, c: u32) -> bool {
        let context = &self.model().contexts[c as usize];
        let in_ring = context.operations.iter().filter(|op| !op.in_batch).count();
        context.runs && !context.failed && in_ring < 1 << RING_LOG2
    }

    /// Submits, if the ring has room. `lists`: what the operands are lists of. `kick`: as the
    /// protocol asks for; else not at all.
    pub fn submit(
        &self,
        c: u32,
        mut descriptor: Descriptor,
        lists: [Option<Vec<Segment>>; 2],
        kick: bool,
    ) {
        if !self.has_room(c) {
            return;
        }
        let process = &self.processes[c as usize];
        let [src, dst] = &lists;
        let slot = process.submitted() % (1 << RING_LOG2);
        if let Some(list) = src {
            descriptor.flags |= flags::SRC_LIST;
            (descriptor.src, descriptor.src_segments) = self.write_list(c, slot * OF_ONE, list);
        }
        if let Some(list) = dst {
            descriptor.flags |= flags::DST_LIST;
            let at = slot * OF_ONE + OF_ONE / 2;
            (descriptor.dst, descriptor.dst_segments) = self.write_list(c, at, list);
        }
        descriptor.completion = self.fresh_record(c, slot);
        self.ring_with(c, descriptor, lists, kick);
    }

    /// Submits a batch, if the ring has room.
    pub fn submit_batch(&self, c: u32, all: &[Descriptor], own_flags: u8, kick: bool) {
        if !self.has_room(c) {
            return;
        }
        let slot = self.processes[c as usize].submitted() % (1 << RING_LOG2);
        let offset = slot * OF_ONE;
        for (n, descriptor) in (0..).zip(all) {
            let number = (1 << RING_LOG2) + slot * MAX_BATCH as u64 + n;
            let descriptor = Descriptor {
                completion: self.fresh_record(c, number),
                ..*descriptor
            };
            let at = offset + n * Descriptor::SIZE as u64;
            let at = Gpa(self.batches[c as usize].0 + at);
            self.guest.ram.write(at, &descriptor.to_bytes()).unwrap();
            let operation = Operation::new(number * 32, descriptor, [None, None]);
            self.model().contexts[c as usize]
                .operations
                .push_back(operation.of_batch());
        }
        let descriptor = Descriptor {
            flags: own_flags,
            completion: self.fresh_record(c, slot),
            ..common::op(Opcode::Batch, BATCHES + offset, 0, all.len() as u64)
        };
        self.ring_with(c, descriptor, [None, None], kick);
    }

    /// The address of a record, which is zero from now on.
    fn fresh_record(&self, c: u32, number: u64) -> u64 {
        let process = &self.processes[c as usize];
        let at = Gpa(process.records_page.0 + number * 32);
        self.guest.ram.write(at, &[0; 32]).unwrap();
        process.record(number).0
    }

    /// Puts a descriptor into the ring.
    fn ring_with(
        &self,
        c: u32,
        descriptor: Descriptor,
        lists: [Option<Vec<Segment>>; 2],
        kick: bool,
    ) {
        let process = &self.processes[c as usize];
        process.submit(descriptor);
        let record = descriptor.completion - process.records.0;
        let operation = Operation::new(record, descriptor, lists);
        {
            let context = &mut self.model().contexts[c as usize];
            // A device that sleeps is rung for all that is there, one that polls sees it.
            context.unrung = !kick;
            context.operations.push_back(operation);
        }
        if kick && process.word(offset_of!(ContextShadow, need_kick)) != 0 {
            process.ring(&self.guest);
        }
    }

    /// Writes a list into the page of lists: where it is, and how long.
    fn write_list(&self, c: u32, offset: u64, list: &[Segment]) -> (u64, u32) {
        let bytes: Vec<u8> = list.iter().flat_map(Segment::to_bytes).collect();
        assert!(bytes.len() as u64 <= OF_ONE / 2);
        let at = Gpa(self.lists[c as usize].0 + offset);
        self.guest.ram.write(at, &bytes).unwrap();
        (LISTS + offset, list.len() as u32)
    }

    pub fn ring(&self, c: u32) {
        self.model().contexts[c as usize].unrung = false;
        self.processes[c as usize].ring(&self.guest);
    }
}
