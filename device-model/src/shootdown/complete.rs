//! Complete: the kernel is told. From here on it may reuse the pages.

use std::sync::atomic::Ordering;

use extlb_spec::Vector;
use extlb_spec::invalidation::wait;
use extlb_spec::regs::FatalError;

use super::drain::Waiting;
use super::queue::Fatal;
use crate::Device;

impl Device {
    /// Acknowledges a wait.
    pub(super) fn acknowledge(&self, waiting: &Waiting) -> Result<(), Fatal> {
        if let Some(drain) = &waiting.drain {
            self.counters.drains.add(1);
            // Before the kernel can see it: whoever is still inside a guard from before the
            // drain finds out when it leaves.
            self.guards.acknowledge(drain);
            self.invalidations_done();
        }
        if waiting.flags & wait::WRITE != 0 {
            // Release: the kernel that sees this word sees all data of the drained accesses.
            self.ports
                .memory
                .store_u64(waiting.addr, waiting.value, Ordering::Release)
                .map_err(|e| (FatalError::WaitWrite, e.addr.0))?;
        }
        if waiting.flags & wait::INTERRUPT != 0 {
            self.messages.raise(Vector::Invalidation);
        }
        Ok(())
    }
}
