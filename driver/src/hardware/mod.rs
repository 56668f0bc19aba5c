//! Devices that a program owns, with a driver in user space ([`crate::userspace`]).

#[cfg(any(feature = "socket", feature = "vfio"))]
mod bus;
#[cfg(feature = "inprocess")]
mod inprocess_bus;
#[cfg(feature = "inprocess")]
mod inprocess_unsafe;
#[cfg(any(feature = "socket", feature = "vfio"))]
mod pages_unsafe;
#[cfg(any(feature = "socket", feature = "vfio"))]
mod pci;
#[cfg(feature = "socket")]
mod socket_client;
#[cfg(feature = "socket")]
mod socket_memory;
#[cfg(feature = "socket")]
mod socket_server_unsafe;
#[cfg(feature = "socket")]
mod socket_unsafe;
mod trait_unsafe;

#[cfg(feature = "inprocess")]
pub use inprocess_unsafe::{LocalDevice, LocalMemory};
#[cfg(feature = "socket")]
pub use socket_server_unsafe::SocketServer;
#[cfg(feature = "socket")]
pub use socket_unsafe::{Socket, SocketMemory};
pub use trait_unsafe::Hardware;
