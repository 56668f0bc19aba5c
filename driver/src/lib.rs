//! Library for programs that use an extlb device.
//!
//! A program gives the device virtual addresses of its own memory. Nothing is locked: the kernel
//! may move, swap or unmap the pages, the device follows.
//!
//! ```no_run
//! use extlb_driver::{Device, Kernel, Options};
//!
//! # fn main() -> extlb_driver::Result<()> {
//! let device = Device::open(Kernel::new())?;
//! let context = device.context(Options::default())?;
//! let queue = context.queue();
//!
//! let mut src = context.allocate(1 << 20)?;
//! let dst = context.allocate(1 << 20)?;
//! src.fill(7);
//! // The buffers are handed over, and come back when the device is done.
//! let ((), (src, dst)) = queue.copy(src, dst)?.finish()?;
//! assert_eq!(src[..], dst[..]);
//! # Ok(())
//! # }
//! ```
//!
//! # Buffers
//! The device works on memory while the program runs on. [`SliceMut`] owns a range of registered
//! memory alone; an operation takes it and [`Pending::wait`] gives it back, so that it can neither
//! be looked at nor freed meanwhile. [`Slice`] is for reading and can be cloned, also while the
//! device reads it. What a program does with a [`Pending`] does not matter to safety: memory is
//! held by the queue until the device has said that it is done (or was taken back from it).
//!
//! Using a buffer that the device has does not compile:
//! ```compile_fail,E0382
//! # use extlb_driver::{Context, Kernel, Result};
//! fn both(context: &Context<Kernel>) -> Result<()> {
//!     let (src, mut dst) = (context.allocate(4096)?, context.allocate(4096)?);
//!     let pending = context.queue().copy(src, dst)?;
//!     dst[0] = 1; // handed over
//!     pending.wait()?;
//!     Ok(())
//! }
//! ```
//! Nor does one buffer as source and destination:
//! ```compile_fail,E0382
//! # use extlb_driver::{Context, Kernel, Result};
//! fn itself(context: &Context<Kernel>) -> Result<()> {
//!     let buffer = context.allocate(4096)?;
//!     context.queue().copy(buffer, buffer)?.wait()?;
//!     Ok(())
//! }
//! ```
//! Nor writing to memory that is shared for reading:
//! ```compile_fail,E0308
//! # use extlb_driver::{Context, Kernel, Result};
//! fn shared(context: &Context<Kernel>) -> Result<()> {
//!     let (shared, other) = (context.allocate(4096)?.freeze(), context.allocate(4096)?);
//!     context.queue().copy(other, shared)?.wait()?;
//!     Ok(())
//! }
//! ```
//! Nor looking at bytes across an operation:
//! ```compile_fail,E0505
//! # use extlb_driver::{Context, Kernel, Result};
//! fn across(context: &Context<Kernel>) -> Result<u8> {
//!     let buffer = context.allocate(4096)?;
//!     let bytes = &buffer[..];
//!     let pending = context.queue().fill(buffer, 7)?;
//!     let first = bytes[0];
//!     pending.wait()?;
//!     Ok(first)
//! }
//! ```
//! The same with the buffers handed over and taken back compiles:
//! ```
//! # use extlb_driver::{Context, Kernel, Result};
//! fn right(context: &Context<Kernel>) -> Result<u8> {
//!     let buffer = context.allocate(4096)?;
//!     let ((), buffer) = context.queue().fill(buffer, 7)?.finish()?;
//!     Ok(buffer[0])
//! }
//! ```
//!
//! # Errors
//! An operation that the device could not do has an error of its own ([`Completed::result`]) and
//! the queue goes on. Errors of [`Pending::wait`] itself mean that the queue has ended.

#[cfg(feature = "conformance")]
pub mod conformance;
mod context;
mod error;
pub mod hardware;
#[cfg(feature = "inprocess")]
pub mod inprocess;
mod kernel_unsafe;
mod memory_unsafe;
mod operation;
mod protocol;
mod queue;
mod raw_unsafe;
mod region;
mod ring;
mod slice_unsafe;
mod submit;
pub mod userspace;
mod wait;
pub mod workloads;

pub use context::{Context, Device, Follow, Options, Registration};
pub use error::{Error, Nonsense, Refused, Result};
pub use extlb_spec as spec;
pub use extlb_spec::Iova;
pub use kernel_unsafe::{Kernel, KernelContext, KernelMemory};
pub use memory_unsafe::{Access, Backing, BackingContext, Fork, Memory, Shadow, Sharing, Wake};
pub use operation::{
    Compare, CompareSwap, Copy, Crc32c, Fence, FetchAdd, Fill, Nop, Operation, Raw,
};
pub use queue::Queue;
pub use region::Mapping;
pub use slice_unsafe::{Slice, SliceMut, Source};
pub use submit::{Completed, Lists, Pending, Submitted, Submitter};
