//! The shootdown path: what happens to a command of the invalidation queue, in this order.
//!
//! queue → invalidate → drain → complete
//!
//! Nothing here waits for a page request, for an operation as a whole, or for a lock that is
//! held during an access: the kernel may wait for its acknowledgement with any lock held.

mod queue;

mod invalidate;

mod drain;

mod complete;

pub(crate) use queue::CommandQueue;
