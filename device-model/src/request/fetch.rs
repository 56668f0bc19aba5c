//! Fetch: descriptors are read from the ring, or from the array of a batch.

use extlb_spec::Iova;
use extlb_spec::work::Descriptor;
use serde::{Deserialize, Serialize};

use super::descriptor::parse;
use super::translate::rest_of_page;
use super::{Access, Halt};
use crate::Device;
use crate::context::{Space, Work};
use crate::state::{StateError, check};

/// Descriptors that are read at once.
const AHEAD: usize = 16;
const SIZE: usize = Descriptor::SIZE;

/// Descriptors that were read and not begun: the next ones of the ring, or of the batch.
///
/// A program must not change a descriptor before it is retired, so it does not matter when it is
/// read. Nothing of their operands is translated before their turn.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ahead {
    descriptors: [Descriptor; AHEAD],
    /// Those of `[next, count)` are left.
    next: usize,
    count: usize,
}

impl Default for Ahead {
    fn default() -> Self {
        Self {
            descriptors: [Descriptor::default(); AHEAD],
            next: 0,
            count: 0,
        }
    }
}

impl Ahead {
    /// Forgets all: what comes next is elsewhere.
    pub(crate) fn clear(&mut self) {
        self.count = 0;
        self.next = 0;
    }

    /// Refuses what was saved, if it makes no sense. A descriptor is checked when its turn comes.
    pub(crate) fn check(&self) -> Result<(), StateError> {
        let Self {
            descriptors: _,
            next,
            count,
        } = self;
        let good = next <= count && *count <= AHEAD;
        check("the descriptors read ahead", good, (next, count))
    }

    fn take(&mut self) -> Option<Descriptor> {
        let descriptor = *self.descriptors[..self.count].get(self.next)?;
        self.next += 1;
        Some(descriptor)
    }
}

impl Device {
    /// Fetches the next descriptor, if one is submitted.
    pub(super) fn fetch(
        &self,
        access: &Access<'_>,
        space: &Space,
        work: &mut Work,
    ) -> Result<(), Halt> {
        let in_batch = work.batch.is_some();
        let descriptor = match work.ahead.take() {
            Some(descriptor) => descriptor,
            None => {
                self.read_ahead(access, space, work)?;
                work.ahead.take().ok_or(Halt::Empty)?
            }
        };
        work.operation = Some(parse(descriptor, in_batch)?);
        Ok(())
    }

    /// Reads what there is, up to the end of the page.
    fn read_ahead(&self, access: &Access<'_>, space: &Space, work: &mut Work) -> Result<(), Halt> {
        let size = SIZE as u64;
        let (at, count) = match &work.batch {
            // The check of the batch's descriptor found the whole array in the address space.
            Some(batch) => {
                let own = &batch.own;
                (own.descriptor.src + own.done * size, own.left())
            }
            None => {
                if !self.poll_tail(access, space, work)? {
                    return Err(Halt::Empty);
                }
                // Likewise `parse` of the context entry the whole ring.
                let slot = work.head & (space.entries - 1);
                let ready = work.tail.wrapping_sub(work.head).min(space.entries - slot);
                (space.ring.0 + u64::from(slot) * size, u64::from(ready))
            }
        };
        let at = Iova(at);
        // Both are aligned to a descriptor, so none crosses a page.
        let count = count.min(rest_of_page(at) / size).min(AHEAD as u64) as usize;
        // The slow bus of tests delays what is longer than a descriptor.
        let count = match self.config.debug.bus_delay_us {
            0 => count,
            _ => count.min(1),
        };
        let mut bytes = [0; AHEAD * SIZE];
        let bytes = &mut bytes[..count * SIZE];
        access.page(at, false, 1)?.read(bytes)?;
        let (descriptors, _) = bytes.as_chunks();
        for (to, from) in work.ahead.descriptors.iter_mut().zip(descriptors) {
            *to = Descriptor::from_bytes(from);
        }
        (work.ahead.next, work.ahead.count) = (0, count);
        Ok(())
    }
}
