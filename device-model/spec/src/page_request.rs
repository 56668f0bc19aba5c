//! Page requests and context errors: the ring from the device to the kernel.
//!
//! The device writes a record, then `prq_tail` of the kernel's shadow page, then raises
//! [`Vector::PageRequest`](crate::Vector::PageRequest). It never overwrites a record that the
//! kernel has not consumed (`prq_head`).
//!
//! # Groups
//! A group is what one record names: the page that the operation cannot do without, and up to 63
//! pages after it that it is going to need in the same way. It is answered by one response. An
//! operation that misses on both operands asks for two groups at once, goes on when both are
//! answered, and then walks again. The number of a group is not used again for 2^32 groups of
//! its context, whatever stops, starts and resets come in between: so a response always means the
//! group that it was made for. One for a group that nobody waits for (late, repeated, for a
//! context that was stopped or failed) is counted in `STRAY_RESPONSES` and ignored; of several
//! responses to a group the first counts.
//!
//! If several groups are answered differently, a failure stops the context, else an invalid one
//! ends the operation with a page fault at the operand it is about, the first if it is both.
//!
//! # Room
//! A request that finds the ring full, or its context without credit, stays with its operation
//! and is sent when there is room, contexts in turn; so does the record of an error. Nothing is
//! lost and nobody else waits: contexts that miss nothing run, and shootdowns do not know of this
//! ring. A `prq_head` that makes no sense (ahead of the tail, or further behind it than the ring
//! is long) leaves no room until it is mended.
//!
//! # When a context or the device stops
//! A context that is stopped, or fails, is done with its requests. Once a drained wait behind the
//! `ContextSync` that stopped it is acknowledged, all its records are in the ring and no more
//! follow: empty the ring before the number of the context is given to somebody else. A record
//! that has not found room by then is dropped. While bus mastering is off nothing is sent and
//! no response is taken; both go on afterwards. Disable and reset forget all requests.

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
