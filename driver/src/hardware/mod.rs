//! Devices that a program owns, with a driver in user space ([`crate::userspace`]).
//!
//! When to take which way to a device:
//!
//! | | the device is | needs | memory is | take it |
//! |---|---|---|---|---|
//! | [`crate::Kernel`] | the machine's, shared by all | `extlb.ko` | not locked: it may be swapped and moved, the device follows | whenever the kernel can be chosen |
//! | `VfioCdev` (feature `vfio`) | this program's alone | vfio-pci, an IOMMU, a kernel with `CONFIG_VFIO_DEVICE_CDEV` | locked while it is registered | where the kernel has it: no group, and the way that VFIO goes on |
//! | `VfioGroup` (`vfio`) | this program's alone, with all of its IOMMU group | vfio-pci, an IOMMU | locked while it is registered | on any ordinary kernel |
//! | `Socket` (`socket`) | another process's | nothing | shared with that process; only what is allocated here, and copies of files | to develop a driver or a device: both are processes, to be watched, killed and started again in milliseconds |
//! | `LocalDevice` (`inprocess`) | a part of this program | nothing | as with a socket | for tests that look into the device, and under tools that want one process (sanitisers, debuggers) |
//!
//! All but the first are [`Hardware`], and [`crate::userspace::Userspace`] makes a
//! [`crate::Backing`] of each; the program's side is the same for all.

#[cfg(any(feature = "socket", feature = "vfio"))]
mod bus;
#[cfg(feature = "inprocess")]
mod inprocess_bus;
#[cfg(feature = "inprocess")]
mod inprocess_unsafe;
#[cfg(feature = "mutated")]
mod mutated_bus;
#[cfg(feature = "mutated")]
mod mutated_faults;
#[cfg(feature = "mutated")]
mod mutated_ledger;
#[cfg(feature = "mutated")]
mod mutated_unsafe;
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
#[cfg(feature = "vfio")]
mod vfio_cdev_unsafe;
#[cfg(feature = "vfio")]
mod vfio_group_unsafe;
#[cfg(feature = "vfio")]
mod vfio_unsafe;

#[cfg(feature = "inprocess")]
pub use inprocess_unsafe::{LocalDevice, LocalMemory};
#[cfg(feature = "mutated")]
pub use mutated_faults::{Faults, Lie, mix};
#[cfg(feature = "mutated")]
pub use mutated_unsafe::{Mutated, MutatedMemory};
#[cfg(feature = "socket")]
pub use socket_server_unsafe::SocketServer;
#[cfg(feature = "socket")]
pub use socket_unsafe::{Socket, SocketMemory};
pub use trait_unsafe::Hardware;
#[cfg(feature = "vfio")]
pub use vfio_unsafe::{Vfio, VfioMemory};

/// A PCI device by its IOMMU group and a container: every kernel with VFIO has it.
///
/// All of the group has to be bound to vfio-pci (or to nothing), and belongs to this program.
#[cfg(feature = "vfio")]
pub type VfioGroup = Vfio<vfio_group_unsafe::Group>;

/// A PCI device by its own node and iommufd: kernels from 6.6 on, if they were built with it.
#[cfg(feature = "vfio")]
pub type VfioCdev = Vfio<vfio_cdev_unsafe::Cdev>;
