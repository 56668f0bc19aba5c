//! Devices that a program owns, with a driver in user space ([`crate::userspace`]).

mod trait_unsafe;

pub use trait_unsafe::Hardware;
