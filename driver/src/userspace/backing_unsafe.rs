//! The driver in user space as a backing.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use extlb_spec::Iova;
use extlb_spec::regs;
use extlb_spec::uapi::{self, Audit, Info, Stats, create};

use super::contexts::Shared;
use super::space::Space;
use super::{Driver, Userspace};
use crate::error::{Error, Result};
use crate::hardware::Hardware;
use crate::memory_unsafe::{Access, Backing, BackingContext, Fork, Shadow, Sharing, Wake};

// SAFETY: memory is the hardware's, and `Hardware` promises the same of it.
unsafe impl<H: Hardware> Backing for Userspace<H> {
    type Context = UserspaceContext<H>;
    type Memory = H::Memory;

    fn info(&self) -> Result<Info> {
        Ok(Info {
            version: uapi::UAPI_VERSION,
            create_flags: create::FOLLOW_PINNED,
            contexts: self.driver.core.contexts(),
            oracle: 0,
            max_ring_log2: extlb_spec::context::MAX_WORK_RING_LOG2,
            ..Info::default()
        })
    }

    fn allocate(&self, len: usize, fork: Fork) -> Result<H::Memory> {
        self.hardware().allocate(len, fork)
    }

    fn map_file(&self, file: &File, range: Range<u64>, sharing: Sharing) -> Result<H::Memory> {
        self.hardware().map_file(file, range, sharing)
    }

    fn create(&self, ring: Iova, ring_log2: u32, flags: u32) -> Result<UserspaceContext<H>> {
        if flags & !create::FOLLOW_PINNED != 0 {
            return Err(Error::Unsupported("following the process's page table"));
        }
        let (space, shadow) = self.driver.core.create(ring, ring_log2)?;
        Ok(UserspaceContext {
            driver: self.driver.clone(),
            space,
            shadow,
            taken: Mutex::new(0),
        })
    }

    fn restart(&self) -> Result<()> {
        Userspace::restart(self)
    }
}

/// A context of the driver in user space.
pub struct UserspaceContext<H: Hardware> {
    driver: Arc<Driver<H>>,
    space: Arc<Space>,
    shadow: Shared<H>,
    /// `event_seq` when events were last taken; the lock orders sleepers.
    taken: Mutex<u32>,
}

impl<H: Hardware> Drop for UserspaceContext<H> {
    fn drop(&mut self) {
        self.driver.core.stop(&self.space, &self.shadow);
    }
}

impl<H: Hardware> std::fmt::Debug for UserspaceContext<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "context {} of {:?}", self.space.number, self.driver)
    }
}

// SAFETY: `Core::unregister` returns `Ok` only after `Hardware::unmap` did, whose contract says that
// the device does not reach the memory through that mapping any more; the ptes of this registration
// led nowhere else.
unsafe impl<H: Hardware> BackingContext for UserspaceContext<H> {
    fn number(&self) -> u32 {
        self.space.number
    }

    fn register(&self, addr: Iova, len: u64, access: Access) -> Result<u32> {
        self.driver.core.register(&self.space, addr, len, access)
    }

    fn unregister(&self, handle: u32) -> Result<()> {
        self.driver.core.unregister(&self.space, handle)
    }

    fn ring_doorbell(&self) {
        self.driver.core.ring_doorbell(&self.space);
    }

    fn shadow(&self) -> &Shadow {
        self.shadow.page.shadow()
    }

    fn wait(&self, timeout: Duration) -> Result<Wake> {
        let core = &self.driver.core;
        let deadline = Instant::now() + timeout;
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            // The count is taken before the words are looked at: an interrupt for what this look
            // misses raises it above what is waited with.
            let seen = core.bell.count();
            let event_seq = u32::from_le(self.shadow().event_seq.load(Ordering::Acquire));
            if event_seq != *taken {
                *taken = event_seq;
                return Ok(Wake::Event);
            }
            if self.shadow().error.load(Ordering::Acquire) != 0 {
                return Ok(Wake::Stopped);
            }
            self.space.life.queue.check()?;
            if Instant::now() >= deadline {
                return Ok(Wake::TimedOut);
            }
            core.bell.wait(seen, deadline);
        }
    }

    fn check(&self) -> Result<()> {
        self.driver.core.check(&self.space.life)
    }

    fn stats(&self) -> Result<Stats> {
        let core = &self.driver.core;
        let mut stats = self.space.lock().stats;
        stats.page_requests = self.space.requests.load(Ordering::Relaxed);
        stats.refused_requests = self.space.refused.load(Ordering::Relaxed);
        stats.ops_completed = core.read(regs::OPS_COMPLETED);
        stats.ops_faulted = core.read(regs::OPS_FAULTED);
        stats.oracle_checks = core.read(regs::ORACLE_CHECKS);
        stats.oracle_suspects = core.read(regs::ORACLE_SUSPECTS);
        stats.oracle_stale = core.read(regs::ORACLE_STALE);
        // Behind the counters: if the device is there now, it was when they were read.
        self.check()?;
        Ok(stats)
    }

    fn audit(&self) -> Result<Audit> {
        // There is nothing to compare with: a program has no page table to show.
        Err(Error::Unsupported("an audit"))
    }
}
