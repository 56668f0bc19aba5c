//! Registrations: memory comes and goes.
//!
//! # The rule
//! Memory that a program gets back is not touched by the device any more. `Core::take_back`
//! keeps it, in this order:
//! 1. the registration is not live any more: a page request for it is refused from now on, so
//!    that nothing is asked for again;
//! 2. the device ptes are cleared in RAM (release): whoever walks from now on finds none. Nobody
//!    puts them back: only registering writes ptes, and the addresses stay reserved until 6;
//! 3. an invalidation command is posted behind that (the tail's release, the device's acquire):
//!    the device removes its translations after 2, so none comes back;
//! 4. a wait command behind it is acknowledged when every access that began before, with one of
//!    those translations, has ended. The acknowledgement is a word in RAM, loaded with acquire;
//! 5. only then is the mapping taken from the bus ([`Hardware::unmap`]), and with it the pin;
//! 6. only then are bus addresses, page table pages and the addresses of the program free.
//!
//! A device that does not acknowledge is dead: it is fenced ([`Core::kill`]), bus mastering off and
//! reset. If the reset succeeds, all accesses have ended, as its contract says, and 5 may follow. If
//! not even that is known, [`Hardware::unmap`] has the last word: when it says that the device does
//! not reach the range any more, the memory can be given back, but the bus addresses cannot (the
//! device may still have translations to them), nor the page tables; and otherwise all is lost, on
//! purpose.

use std::sync::Arc;
use std::time::Instant;

use extlb_spec::{Iova, PAGE_SIZE};
use nix::errno::Errno;

use super::core::{ArenaPages, Core};
use super::space::{Space, whole_pages};
use crate::error::{Error, Result};
use crate::hardware::Hardware;
use crate::memory_unsafe::Access;
use crate::protocol::{Pages as _, invalidate};

impl<H: Hardware> Core<H> {
    /// Lets a context's device use memory; see [`crate::BackingContext::register`].
    pub(super) fn register(
        &self,
        space: &Arc<Space>,
        addr: Iova,
        len: u64,
        access: Access,
    ) -> Result<u32> {
        let range = whole_pages(addr, len)?;
        let write = access == Access::Exclusive;
        self.check_owner()?;
        space.life.queue.check()?;
        let handle = space.lock().reserve(&range, write)?;
        let mapped = self.map(addr, len, write);
        let slot = match mapped {
            Ok(slot) => slot,
            Err(error) => {
                space.lock().remove(handle);
                return Err(error);
            }
        };
        // The mapping is there before the ptes that lead to it.
        let mut state = space.lock();
        let start = slot.start;
        let (_, registered) = state.get(handle)?;
        registered.slot = Some(slot);
        registered.live = true;
        let (memory, pages) = (self.arena(), &mut ArenaPages(self));
        let table = state.table.as_mut().expect("of a context that is there");
        let filled = table.set_range(memory, pages, &range, start, write);
        match filled {
            Ok(leaves) => {
                state.stats.filled_pages += leaves;
                state.stats.mapped_pages += leaves;
                state.stats.pinned_pages += len / PAGE_SIZE;
                Ok(handle)
            }
            Err(error) => {
                state.stats.pinned_pages += len / PAGE_SIZE;
                drop(state);
                // Some ptes are there, and the device may have used them.
                match self.take_back(space, handle, true) {
                    Ok(()) => Err(error),
                    // It stays mapped, so the program must not have it back: it is registered,
                    // with a device that has died, and cannot be unregistered.
                    Err(_) => {
                        self.kill(&space.life, error);
                        Ok(handle)
                    }
                }
            }
        }
    }

    /// Takes memory back; the order is that at the top of this file.
    pub(super) fn unregister(&self, space: &Arc<Space>, handle: u32) -> Result<()> {
        self.take_back(space, handle, false)
    }

    fn take_back(&self, space: &Arc<Space>, handle: u32, partly: bool) -> Result<()> {
        self.check_owner()?;
        let (range, cleared) = {
            let mut state = space.lock();
            let (range, registered) = state.get(handle)?;
            if !std::mem::take(&mut registered.live) {
                return Err(Error::Call {
                    call: "UNREGISTER",
                    errno: Errno::ENOENT,
                });
            }
            let table = state.table.as_mut().expect("of a context that is there");
            let cleared = table.clear_range(self.arena(), &range);
            if let (Ok(cleared), false) = (&cleared, partly) {
                state.stats.mapped_pages = state.stats.mapped_pages.saturating_sub(cleared.leaves);
            }
            (range, cleared)
        };
        let begun = Instant::now();
        let len = range.end.0 - range.start.0;
        let command = invalidate(space.number, range.start, len);
        let acknowledged = match cleared {
            Ok(cleared) => self.send(&space.life, &[command], true).map(|()| cleared),
            // The device has spoilt its own page table.
            Err(error) => Err(self.kill(&space.life, error)),
        };
        let confirmed = acknowledged.is_ok() || space.life.is_silent();
        if let Ok(cleared) = acknowledged {
            let mut state = space.lock();
            state.count_shootdown(cleared.leaves, begun.elapsed());
            drop(state);
            let mut pages = ArenaPages(self);
            for table in cleared.tables {
                pages.give_back(table);
            }
        }
        self.release(space, handle, confirmed)
    }

    /// The end of a registration: takes the mapping from the bus. `confirmed` says that the device
    /// does not access it any more.
    pub(super) fn release(&self, space: &Space, handle: u32, confirmed: bool) -> Result<()> {
        let (range, slot) = {
            let mut state = space.lock();
            let (range, registered) = state.get(handle)?;
            registered.live = false;
            (range, registered.slot.take())
        };
        let len = range.end.0 - range.start.0;
        // Without one, an earlier attempt has failed.
        let slot = slot.ok_or(Error::Dead { errno: Errno::EIO })?;
        if let Err(error) = self.hardware.unmap(slot.start, len) {
            // Lost: its addresses stay reserved.
            return Err(match confirmed {
                true => error,
                false => space.life.queue.check().err().unwrap_or(error),
            });
        }
        if confirmed {
            self.bus().free(slot);
        }
        let mut state = space.lock();
        state.stats.pinned_pages = state.stats.pinned_pages.saturating_sub(len / PAGE_SIZE);
        state.remove(handle);
        Ok(())
    }
}
