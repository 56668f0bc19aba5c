//! The extlb device: a PCI DMA engine with its own page tables and TLB.
//!
//! The core is [`Device`]: registers in, guest memory and interrupts out, by [`ports`]. It knows
//! neither sockets nor threads. Whoever owns it calls [`Device::engine_step`] and
//! [`Device::invalidation_step`], by hand (tests) or with threads ([`runner`]); [`server`] puts
//! it behind a vfio-user socket.
//!
//! A device in process, with no VM, played by one thread:
//!
//! ```
//! use std::sync::Arc;
//! use extlb_device::{Config, Device, GuestRam, Step, ports::{Ignore, Ports}};
//! use extlb_spec::{BAR_REGS, Gpa, regs};
//!
//! let ram = GuestRam::anonymous(&[(Gpa(0), 1 << 20)]).unwrap();
//! let ports = Ports::stepped(Arc::new(ram.clone()), Arc::new(Ignore));
//! let device = Device::new(Config::default(), ports).unwrap();
//! device.set_bus_master(true);
//! let write = |r: regs::Register, v: u64| {
//!     device.mmio_write(BAR_REGS, r.offset, &v.to_le_bytes()[..r.width as usize]);
//! };
//! write(regs::CTX_TABLE, 0x1000);
//! write(regs::CTX_COUNT, 16);
//! write(regs::IQ_BASE, 0x2000);
//! write(regs::IQ_LOG2, 7);
//! write(regs::PRQ_BASE, 0x3000);
//! write(regs::PRQ_LOG2, 7);
//! write(regs::SHADOW, 0x4000);
//! write(regs::CTRL, regs::ctrl::ENABLE.into());
//! let mut status = [0; 4];
//! device.mmio_read(BAR_REGS, regs::STATUS.offset, &mut status);
//! assert_eq!(u32::from_le_bytes(status), regs::status::ENABLED);
//! assert_eq!(device.invalidation_step(), Step::Idle);
//! ```
//!
//! With threads: make a [`runner::Bell`], pass it as [`ports::Ports::wake`], and hand both to
//! [`runner::Runner::start`].

mod calls;
pub mod config;
mod context;
mod counters;
mod device;
pub mod fault;
mod guard;
mod handshake;
mod memory;
mod messages;
pub mod oracle;
pub mod pci;
pub mod ports;
pub mod record;
mod registers;
mod request;
pub mod runner;
mod schedule;
pub mod server;
mod shootdown;
pub mod state;
mod sync;
mod tlb;
#[cfg(test)]
mod tlb_tests; // apart, as tests/loom.rs includes tlb/
mod walk;
#[cfg(test)]
mod walk_tests;
mod words;
#[cfg(test)]
mod wrap_tests;

pub use calls::Core;
pub use config::{Config, ConfigError};
pub use counters::{ContextStats, Totals};
pub use device::{Device, Step};
pub use memory::GuestRam;
