//! What is where: structures that software has told the device of.

use std::collections::{HashMap, VecDeque};
use std::mem::offset_of;
use std::thread::ThreadId;
use std::time::Duration;

use extlb_spec::context::{ContextEntry, ContextShadow, flags};
use extlb_spec::invalidation::{Command, KernelShadow};
use extlb_spec::page_request::PageRequest;
use extlb_spec::{Gpa, PAGE_SIZE};

use super::acks::Held;

/// Where the privileged structures are.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Layout {
    pub(super) table: Gpa,
    pub(super) contexts: u32,
    pub(super) commands: Gpa,
    pub(super) commands_log2: u32,
    pub(super) requests: Gpa,
    pub(super) requests_log2: u32,
    pub(super) shadow: Gpa,
}

/// What an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The invalidation queue.
    Commands,
    /// The page request ring; the slot.
    Requests(u32),
    /// The entry of a context in the context table.
    Entry(u32),
    /// The kernel's shadow page, at this offset.
    Kernel(usize),
    /// A context's shadow page, at this offset.
    Context(u32, usize),
    Other,
}

/// The tail of a context's ring, as it was shown to the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct View {
    pub(super) context: u32,
    pub(super) seen: u32,
    pub(super) stalled: Option<Stall>,
}

/// A context's tail is not shown.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stall {
    Until(Duration),
    ForEver,
}

/// Tables of page tables that are remembered; enough for 128 GiB in small pages, dense.
const TABLES: usize = 1 << 16;

/// What the card knows since the device was enabled.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) layout: Option<Layout>,
    /// Acknowledgements that commands have asked for, and that are still to come.
    pub(super) expected: VecDeque<(Gpa, u64)>,
    /// Acknowledgements that were not written when they should have been.
    pub(super) held: Vec<Held>,
    /// Page requests lost: the ring that software sees is so far behind the device's.
    pub(super) lost: u32,
    /// By shadow page.
    views: HashMap<Gpa, View>,
    /// Tables of page tables: their level and context.
    tables: HashMap<Gpa, (u32, u32)>,
    /// The leaf that a thread has read last, if it was flipped.
    pub(super) flipped: HashMap<ThreadId, Gpa>,
}

impl State {
    pub(super) fn new(layout: Layout) -> Self {
        Self {
            layout: Some(layout),
            ..Self::default()
        }
    }

    pub(super) fn place(&self, at: Gpa) -> Place {
        let Some(layout) = &self.layout else {
            return Place::Other;
        };
        let inside = |start: Gpa, len: u64| at.0.checked_sub(start.0).filter(|o| *o < len);
        let commands = (Command::SIZE as u64) << layout.commands_log2;
        let requests = (PageRequest::SIZE as u64) << layout.requests_log2;
        let entries = ContextEntry::SIZE as u64 * u64::from(layout.contexts);
        if let Some(offset) = inside(layout.shadow, PAGE_SIZE) {
            Place::Kernel(offset as usize)
        } else if inside(layout.commands, commands).is_some() {
            Place::Commands
        } else if let Some(offset) = inside(layout.requests, requests) {
            Place::Requests((offset / PageRequest::SIZE as u64) as u32)
        } else if let Some(offset) = inside(layout.table, entries) {
            Place::Entry((offset / ContextEntry::SIZE as u64) as u32)
        } else if let Some(view) = self.views.get(&at.page()) {
            Place::Context(view.context, at.page_offset() as usize)
        } else {
            Place::Other
        }
    }

    /// The device has read a context's entry.
    pub(super) fn entry(&mut self, context: u32, entry: &ContextEntry) {
        let valid = entry.flags & flags::VALID != 0;
        let shadow = Gpa(entry.shadow);
        // The same shadow page: a change of a context that goes on where it was.
        self.views
            .retain(|page, view| view.context != context || valid && *page == shadow);
        self.tables.retain(|_, (_, owner)| *owner != context);
        if valid {
            self.views.entry(shadow).or_insert(View {
                context,
                seen: 0,
                stalled: None,
            });
            let root = Gpa(entry.page_table);
            self.table(root, extlb_spec::pte::LEVELS, context);
        }
    }

    /// There is a table of a page table.
    pub(super) fn table(&mut self, at: Gpa, level: u32, context: u32) {
        if self.tables.len() < TABLES {
            self.tables.insert(at, (level, context));
        }
    }

    /// The level and the context of the table that holds an address.
    pub(super) fn table_of(&self, at: Gpa) -> Option<(u32, u32)> {
        self.tables.get(&at.page()).copied()
    }

    /// The view of a context's tail, if that is what the address is.
    pub(super) fn view(&mut self, at: Gpa) -> Option<&mut View> {
        let tail = at.page_offset() == offset_of!(ContextShadow, tail) as u64;
        self.views.get_mut(&at.page()).filter(|_| tail)
    }
}

pub(super) const COMMAND_TAIL: usize = offset_of!(KernelShadow, iq_tail);
pub(super) const REQUEST_TAIL: usize = offset_of!(KernelShadow, prq_tail);
pub(super) const REQUEST_HEAD: usize = offset_of!(KernelShadow, prq_head);
