//! Contexts: made and stopped.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use extlb_spec::context::{ContextEntry, flags};
use extlb_spec::{Gpa, Iova};
use nix::errno::Errno;

use super::arena::SharedPage;
use super::core::{ArenaPages, Core, State};
use super::space::Space;
use crate::error::{Error, Result};
use crate::hardware::Hardware;
use crate::protocol::{BusMemory as _, Format, PageTable, Pages as _, sync};

/// Page requests of a context that may wait at once. Operations have two operands; everything
/// registered is mapped, so that there are few of them.
const CREDITS: u32 = 8;

/// A context's shadow page.
pub(super) struct Shared<H: Hardware> {
    pub(super) page: SharedPage<H::Memory>,
    at: Gpa,
}

impl<H: Hardware> Core<H> {
    /// Makes a context.
    pub(super) fn create(&self, ring: Iova, ring_log2: u32) -> Result<(Arc<Space>, Shared<H>)> {
        self.check_owner()?;
        let mut pages = ArenaPages(self);
        let shadow_page = pages.zeroed()?;
        let shadow = Shared {
            page: self.arena().shared(shadow_page)?,
            at: shadow_page,
        };
        // The device has not looked yet: the first doorbell must be rung.
        shadow
            .page
            .shadow()
            .need_kick
            .store(1u32.to_le(), Ordering::Relaxed);
        let table = match PageTable::new(Format::Device, &mut pages) {
            Ok(table) => table,
            Err(error) => {
                pages.give_back(shadow_page);
                return Err(error);
            }
        };
        let entry = ContextEntry {
            flags: flags::VALID,
            page_table: table.root().0,
            ring: ring.0,
            ring_log2,
            credits: CREDITS,
            shadow: shadow_page.0,
            ..ContextEntry::default()
        };
        let mut table = Some(table);
        let entered = self.enter(&entry, &mut table);
        let space = match entered {
            Ok(space) => space,
            Err(error) => {
                if let Some(table) = table {
                    table.free(&mut pages);
                }
                pages.give_back(shadow_page);
                return Err(error);
            }
        };
        if let Err(error) = self.send(&space.life, &[sync(space.number)], true) {
            self.stop(&space, &shadow);
            return Err(error);
        }
        Ok((space, shadow))
    }

    /// Finds a free number and writes the context's entry.
    fn enter(&self, entry: &ContextEntry, table: &mut Option<PageTable>) -> Result<Arc<Space>> {
        let mut state = self.state();
        // Under the lock: see `restart`.
        state.life.queue.check()?;
        let free = (0..self.contexts()).find(|number| !state.spaces.contains_key(number));
        let number = free.ok_or(Error::Call {
            call: "CREATE",
            errno: Errno::EBUSY,
        })?;
        self.arena().write(self.entry(number), &entry.to_bytes())?;
        let table = table.take().expect("of the caller");
        let space = Arc::new(Space::new(number, state.life.clone(), table));
        state.spaces.insert(number, space.clone());
        Ok(space)
    }

    fn entry(&self, number: u32) -> Gpa {
        let offset = u64::from(number) * ContextEntry::SIZE as u64;
        Gpa(self.layout.context_table.0 + offset)
    }

    /// Ends a context. Nobody calls for it any more.
    pub(super) fn stop(&self, space: &Arc<Space>, shadow: &Shared<H>) {
        if self.check_owner().is_err() {
            return;
        }
        let current = |state: &State| {
            let known = state.spaces.get(&space.number);
            known.is_some_and(|known| Arc::ptr_eq(known, space))
        };
        {
            let state = self.state();
            if current(&state) && state.life.queue.check().is_ok() {
                // It cannot fail: the table is there.
                let none = ContextEntry::default().to_bytes();
                let _ = self.arena().write(self.entry(space.number), &none);
            }
        }
        // No access of the context begins any more, and those that began have ended.
        let stopped = self.send(&space.life, &[sync(space.number)], true).is_ok();
        let silent = stopped || space.life.is_silent();
        // What the program did not take back.
        let handles = space.lock().handles();
        for handle in handles {
            let _ = self.release(space, handle, silent);
        }
        if silent {
            let mut pages = ArenaPages(self);
            if let Some(table) = space.lock().table.take() {
                table.free(&mut pages);
            }
            pages.give_back(shadow.at);
        }
        let mut state = self.state();
        if current(&state) {
            state.spaces.remove(&space.number);
        }
    }
}
