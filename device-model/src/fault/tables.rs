//! Page tables as the walker reads them.

use extlb_spec::Gpa;
use extlb_spec::pte::{Pte, bit};

use super::card::Card;
use super::plan::{Kind, Permission, Rule};

impl Card {
    /// A double word was read. If it is an entry of a page table: what the device sees of it.
    ///
    /// The card follows the walker from the roots in the context table, as only the level tells a
    /// leaf from an entry that leads to a table. What looks like neither is left alone: the page
    /// may be no table any more.
    pub(super) fn entry_read(&self, at: Gpa, value: u64) -> u64 {
        let entry = Pte(value);
        let thread = std::thread::current().id();
        let context = {
            let mut state = self.state();
            state.flipped.remove(&thread);
            let Some((level, context)) = state.table_of(at) else {
                return value;
            };
            if !entry.is_present() || entry.reserved(level) != 0 {
                return value;
            }
            if !entry.is_leaf(level) {
                state.table(entry.addr(), level - 1, context);
                return value;
            }
            context
        };
        let now = match entry.is_writable() {
            true => Permission::Writable,
            false => Permission::ReadOnly,
        };
        let concerns = |rule: &Rule| {
            rule.context.is_none_or(|c| c == context) && rule.to.is_none_or(|to| to != now)
        };
        let to = || format!("leaf {value:#x} at {at} of context {context}");
        if self.inject(Kind::FlipPermission, concerns, to).is_none() {
            return value;
        }
        self.state().flipped.insert(thread, at);
        value ^ bit::WRITE
    }

    /// What to turn in an entry that this thread swaps: it is the one that it was shown.
    pub(super) fn flip_of(&self, at: Gpa) -> u64 {
        let thread = std::thread::current().id();
        match self.state().flipped.get(&thread) == Some(&at) {
            true => bit::WRITE,
            false => 0,
        }
    }
}
