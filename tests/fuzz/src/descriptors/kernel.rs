//! What the kernel does: contexts, mappings, answers.

use extlb_spec::context::{ContextEntry, ContextError, flags as context_flags};
use extlb_spec::invalidation::{Command, CommandKind, InvalidationScope};
use extlb_spec::page_request::{PageRequest, RequestKind, Response};
use extlb_spec::pte::{self, Pte, bit};
use extlb_spec::{Gpa, PAGE_SIZE};

use super::{
    DATA, DATA_PAGES, FAR, FAR_PAGES, Mapped, RING, RING_ENTRIES, RING_LOG2, WINDOW, WINDOW_PAGES,
    World,
};
use crate::input::Input;
use crate::memory::may;

impl World {
    /// What the device may do with the frames of data, by all mappings.
    pub(super) fn allow(&self) {
        let memory = &self.machine.memory;
        for (start, pages) in [(DATA, DATA_PAGES), (FAR, FAR_PAGES)] {
            for page in 0..pages {
                memory.allow(Gpa(start.0 + page * PAGE_SIZE), 0);
            }
        }
        // Twice, as a frame that is mapped both ways may be written.
        for write in [false, true] {
            let rights = if write { may::ALL } else { may::READ };
            let all = self
                .processes
                .iter()
                .flat_map(|p| p.mapped.iter().flatten());
            for mapped in all.filter(|m| m.write == write) {
                for page in 0..mapped.pages {
                    memory.allow(Gpa(mapped.frame.0 + page * PAGE_SIZE), rights);
                }
            }
        }
    }

    /// Starts a context with an empty queue and nothing mapped but ring and records.
    pub(super) fn start(&mut self, index: usize, choice: u8) {
        let process = &mut self.processes[index];
        process.tail = 0;
        process.wild = false;
        process.failed = None;
        process.running = true;
        let process = &self.processes[index];
        let memory = &self.machine.memory;
        memory.clear(process.shadow());
        memory.count(process.head(), RING_ENTRIES);
        for level in (1..pte::LEVELS).rev() {
            memory.allow(process.table(level), may::READ | may::SWAP);
            let at = process.table(level + 1).0 + pte::index(RING, level + 1) * 8;
            memory.put_u64(Gpa(at), Pte::table(process.table(level)).0);
        }
        memory.allow(process.table(4), may::READ | may::SWAP);
        memory.allow(process.shadow(), may::READ | may::STORE);
        for (place, page) in [(0, 5), (1, 6)] {
            memory.allow(process.page(page), may::ALL);
            memory.put_u64(process.leaf(place).0, Pte::leaf(process.page(page), true).0);
        }
        let oracle = match choice & 1 {
            0 => 0,
            _ => context_flags::ORACLE,
        };
        let entry = ContextEntry {
            flags: context_flags::VALID | oracle,
            page_table: process.table(4).0,
            ring: RING.0,
            ring_log2: RING_LOG2,
            credits: 1 + u32::from(choice >> 1 & 3),
            shadow: process.shadow().0,
            // Its tables are good enough to be looked at.
            cpu_page_table: process.table(4).0,
            ..Default::default()
        };
        self.machine.write_entry(process.context, &entry);
        self.machine.sync(process.context);
    }

    /// Stops a context. When it returns, nothing of it is under way.
    pub(super) fn stop(&mut self, index: usize) {
        let context = self.processes[index].context;
        self.machine.write_entry(context, &ContextEntry::default());
        self.machine.sync(context);
        self.machine.drain();
        self.processes[index].running = false;
        // Records that were in the ring are of the past.
        self.collect();
        self.requests.retain(|request| request.context != context);
    }

    /// Changes a leaf by the rules: the device's entry, invalidation, drain; then the page is free.
    pub(super) fn map(&mut self, index: usize, place: usize, new: Option<(Mapped, u64)>) {
        let process = &mut self.processes[index];
        let (at, iova, size) = process.leaf(place);
        let had = process.mapped[place].is_some() || self.machine.memory.get_u64(at) != 0;
        self.machine.memory.put_u64(at, 0);
        if had {
            let command = Command {
                kind: CommandKind::Invalidate as u32,
                flags: InvalidationScope::Range as u32,
                context: process.context,
                addr: iova.0,
                value: size,
                ..Default::default()
            };
            self.machine.post(&command);
            self.machine.drain();
        }
        self.processes[index].mapped[place] = new.map(|(mapped, _)| mapped);
        self.allow();
        if let Some((mapped, bits)) = new {
            let write = if mapped.write { bit::WRITE } else { 0 };
            let entry = mapped.frame.0 | bit::PRESENT | write | bits;
            self.machine.memory.put_u64(at, entry);
        }
    }

    /// Maps something at a place, or nothing.
    pub(super) fn map_by(&mut self, index: usize, input: &mut Input<'_>) {
        // Ring and records stay: without them there is little to see.
        let place = 2 + input.below(WINDOW_PAGES) as usize;
        let choice = input.u8();
        let write = choice & 1 != 0;
        let small = WINDOW_PAGES as usize;
        let (frame, pages, bits) = match place {
            p if p == small => (DATA, DATA_PAGES, bit::LEAF),
            p if p == small + 1 => (FAR, FAR_PAGES, bit::LEAF),
            _ => {
                let page = u64::from(choice >> 1) % DATA_PAGES;
                (Gpa(DATA.0 + page * PAGE_SIZE), 1, 0)
            }
        };
        let mapped = Mapped {
            frame,
            pages,
            write,
        };
        match choice >> 5 {
            0 | 1 => self.map(index, place, None),
            // What no kernel should write: reserved bits, pages outside RAM.
            7 => {
                self.map(index, place, None);
                let broken = [1 << 62, 1 << 40, 1 << 8, bit::LEAF][usize::from(choice >> 3 & 3)];
                let at = self.processes[index].leaf(place).0;
                let broken = if place < small { broken } else { 1 << 62 };
                self.machine.memory.put_u64(at, broken | bit::PRESENT);
            }
            _ => self.map(index, place, Some((mapped, bits))),
        }
    }

    /// Takes what is in the page request ring.
    pub(super) fn collect(&mut self) {
        while let Some(record) = self.machine.take_record() {
            let index = record.context.wrapping_sub(1) as usize;
            if record.kind == RequestKind::Page as u32 {
                self.requests.push(record);
                continue;
            }
            let error = ContextError::from_raw(record.code).expect("an error with a name");
            if let Some(process) = self.processes.get_mut(index) {
                process.failed = process.running.then_some(error);
                self.requests.retain(|r| r.context != record.context);
            }
        }
    }

    pub(super) fn respond(&mut self, request: &PageRequest, response: Response) {
        self.machine.post(&Command {
            kind: CommandKind::PageResponse as u32,
            flags: response as u32,
            context: request.context,
            group: request.group,
            ..Default::default()
        });
    }

    pub(super) fn answer(&mut self, input: &mut Input<'_>) {
        self.collect();
        let choice = input.u8();
        if self.requests.is_empty() || choice & 0x80 != 0 {
            // Nobody asked, or twice.
            let request = self.answered.unwrap_or(PageRequest {
                context: u32::from(choice) % 3,
                group: u32::from(choice),
                ..Default::default()
            });
            self.respond(&request, Response::Success);
            return;
        }
        let request = self
            .requests
            .remove(usize::from(choice) % self.requests.len());
        self.answered = Some(request);
        let response = match choice >> 4 & 7 {
            0..=3 => {
                let page = request.iova.wrapping_sub(WINDOW) / PAGE_SIZE;
                if (2..WINDOW_PAGES).contains(&page) {
                    let frame = Gpa(DATA.0 + page % DATA_PAGES * PAGE_SIZE);
                    let write = request.flags & extlb_spec::page_request::flags::WRITE != 0;
                    let mapped = Mapped {
                        frame,
                        pages: 1,
                        write,
                    };
                    let index = request.context as usize - 1;
                    self.map(index, page as usize, Some((mapped, 0)));
                }
                Response::Success
            }
            4 | 5 => Response::Success,
            6 => Response::Invalid,
            _ => Response::Failure,
        };
        self.respond(&request, response);
    }
}
