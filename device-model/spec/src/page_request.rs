//! Page requests and context errors: the ring from the device to the kernel.
//!
//! The device writes a record, then `prq_tail` of the kernel's shadow page, then raises
//! [`Vector::PageRequest`](crate::Vector::PageRequest). It never overwrites a record that the
//! kernel has not consumed (`prq_head`): a request that finds the ring full, or its context
//! without credit, stays with its operation and is sent when there is room. Nothing is lost.

use crate::table::{bits, enumeration, layout};

layout! {
    /// A record of the page request ring.
    pub struct PageRequest("extlb_page_request", 32) {
        /// A `RequestKind`.
        kind: u32 = 0,
        /// The context.
        context: u32 = 4,
        /// Page request: the address of the page. Context error: what it is about.
        iova: u64 = 8,
        /// How many pages from `iova` on the operation is going to need in the same way, 1 to 64.
        /// Only the first is waited for.
        pages: u32 = 16,
        /// See the request flags.
        flags: u32 = 20,
        /// Names the request in its response. Unique among the waiting requests of a context.
        group: u32 = 24,
        /// Context error: a `ContextError`.
        code: u32 = 28,
    }
}

/// Largest `PageRequest::pages`.
pub const MAX_REQUEST_PAGES: u32 = 64;

enumeration! {
    /// What a record of the page request ring says.
    pub enum RequestKind: u32 {
        /// Map a page and respond.
        Page = 1,
        /// A context stopped on an error; there is no response.
        ContextError = 2,
    }
}

bits! {
    /// Bits of `PageRequest::flags`.
    pub mod flags Request: u32 {
        /// The access is a write.
        WRITE = 1 << 0,
    }
}

enumeration! {
    /// Answer to a page request.
    pub enum Response: u32 {
        /// The page was mapped; the device walks again (and may ask again).
        Success = 0,
        /// There is no such page: the operation ends with a page fault.
        Invalid = 1,
        /// It could not be served: the context stops with an error.
        Failure = 2,
    }
}
