//! Operations on any addresses, for those who change mappings under a working device on purpose.
#![allow(unsafe_code)]

use extlb_spec::work::Descriptor;

use crate::error::Result;
use crate::memory_unsafe::Backing;
use crate::operation::{Expect, Raw};
use crate::queue::{Queue, Work};
use crate::submit::{Pending, Submitter};

impl<B: Backing> Queue<B> {
    /// Submits a descriptor as it is, except for `completion`, which the library sets. Its result
    /// is the device's completion, not checked against the operation.
    ///
    /// # Safety
    /// The device writes to what is mapped at `[dst, dst + len)` and registered, at any moment
    /// until the operation has ended, and reads from `[src, src + len)`; Rust objects must not be
    /// there. That lasts when the returned value is dropped.
    pub unsafe fn submit_raw(&self, descriptor: Descriptor) -> Result<Pending<B, Raw, ()>> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.submitter().submit_raw(descriptor) }
    }
}

impl<B: Backing> Submitter<'_, B> {
    /// See [`Queue::submit_raw`].
    ///
    /// # Safety
    /// As there.
    pub unsafe fn submit_raw(&self, descriptor: Descriptor) -> Result<Pending<B, Raw, ()>> {
        let work = Work {
            descriptor,
            expect: Expect::Anything,
            holds: [None, None],
            segments: Vec::new(),
        };
        self.raw(work)
    }
}
