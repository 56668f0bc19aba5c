//! Devices that a program owns, with a driver in user space ([`crate::userspace`]).

#[cfg(feature = "inprocess")]
mod inprocess_bus;
#[cfg(feature = "inprocess")]
mod inprocess_unsafe;
mod trait_unsafe;

#[cfg(feature = "inprocess")]
pub use inprocess_unsafe::{LocalDevice, LocalMemory};
pub use trait_unsafe::Hardware;
