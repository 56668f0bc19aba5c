//! Starting a device.

use extlb_spec::regs::{self, Register};
use extlb_spec::{Gpa, MAX_CONTEXTS};

use super::{Invalidations, Requests};

/// Where the owner's structures are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Of [`MAX_CONTEXTS`] entries, or what `contexts` says.
    pub(crate) context_table: Gpa,
    pub(crate) contexts: u32,
    pub(crate) invalidations: Gpa,
    pub(crate) page_requests: Gpa,
    pub(crate) shadow: Gpa,
}

impl Layout {
    /// Configures a device that was reset, and lets it run. `STATUS` tells whether it does.
    pub(crate) fn start(&self, write: impl Fn(Register, u64)) {
        debug_assert!(self.contexts <= MAX_CONTEXTS);
        write(regs::CTX_TABLE, self.context_table.0);
        write(regs::CTX_COUNT, self.contexts.into());
        write(regs::IQ_BASE, self.invalidations.0);
        write(regs::IQ_LOG2, Invalidations::LOG2.into());
        write(regs::PRQ_BASE, self.page_requests.0);
        write(regs::PRQ_LOG2, Requests::LOG2.into());
        write(regs::SHADOW, self.shadow.0);
        write(regs::CTRL, regs::ctrl::ENABLE.into());
    }
}
