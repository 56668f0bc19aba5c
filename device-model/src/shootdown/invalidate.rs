//! Invalidate: translations leave the TLB, contexts start, change and stop.

use extlb_spec::Gpa;
use extlb_spec::context::{ContextEntry, flags};
use extlb_spec::regs::FatalError;

use super::queue::{CommandQueue, Fatal};
use crate::Device;
use crate::context::{Entry, Space};
use crate::tlb::{Removed, Scope};

impl Device {
    /// Forgets translations. Accesses that use them now go on; a drain waits for them.
    pub(super) fn invalidate(&self, scope: &Scope) {
        let removed = self.remove_translations(scope);
        self.counters.invalidations.add(1);
        self.invalidation_begun(scope, removed.fills);
    }

    /// Takes translations out of the TLB, and counts them for their contexts.
    fn remove_translations(&self, scope: &Scope) -> Removed {
        let contexts = &self.counters.contexts;
        self.tlb.remove(scope, |context| {
            contexts[context as usize].tlb_shot_down.add(1);
        })
    }

    /// Reads a context's entry again.
    pub(super) fn sync_context(&self, queue: &mut CommandQueue, id: u32) -> Result<(), Fatal> {
        let at = Gpa(queue.context_table.0 + u64::from(id) * ContextEntry::SIZE as u64);
        let mut bytes = [0; ContextEntry::SIZE];
        self.ports
            .memory
            .read(at, &mut bytes)
            .map_err(|e| (FatalError::ContextTable, e.addr.0))?;
        let entry = ContextEntry::from_bytes(&bytes);
        let entry = match entry.flags & flags::VALID {
            0 => Entry::Stopped,
            _ => match Space::parse(id, &entry) {
                Ok(space) => Entry::Valid(space),
                Err(error) => Entry::Bad(error),
            },
        };
        self.set_context(id, entry);
        // An engine takes it from here: it looks for work, or sends the record of the error.
        queue.wake |= self.schedule.push(id);
        Ok(())
    }

    /// Puts an entry in force. The gate first, the translations after: an access that finds the
    /// gate open has its guard up already, and its translation, if it is cached after the
    /// removal, is of the new entry's page table.
    pub(crate) fn set_context(&self, id: u32, entry: Entry) {
        self.contexts[id as usize].set(entry);
        let scope = Scope::Context(id);
        self.remove_translations(&scope);
        self.context_changed(id);
    }
}
