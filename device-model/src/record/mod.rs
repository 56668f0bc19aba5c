//! Record and replay: a run of the device is written to a file, and done again without guest,
//! memory or clock.
//!
//! The core does nothing but what its calls and the answers of its ports make it do (there is no
//! other time, and random numbers come from the seed in the configuration). So a log of both is
//! the whole run, provided that one thread at a time is in the device: [`Recorder`] sees to it,
//! and stands directly around the core. [`replay`] makes the calls again and compares all that the
//! device does with the log, byte for byte; the first difference is named.
//!
//! # What is in the log
//!
//! Each call ([`Call`]) with its arguments and what it returned; in between, in order, each access
//! to memory with what was read or written, each look at the clock, each interrupt, event and
//! wake-up ([`Request`], [`Answer`]). Bytes that the device lets memory copy are not: it never
//! sees them. The orders that accesses to words ask for are not: one thread sees no difference.
//! Changes of the memory map and of PCI configuration space are not: they reach the core as
//! answers and as calls. The file is described in `log.rs`.
//!
//! # What makes it grow
//!
//! Bytes that go through the device: CRC32C, compare and fill put theirs into the log, copies put
//! about 20 bytes for each page. An operation of 64 bytes takes about 200 bytes. While the device
//! polls, some 50 bytes for each look: a small `poll_us` keeps that down.

pub mod command;
mod entry;
mod listing;
mod log;
mod pace;
mod player;
mod recorder;
mod replay;
mod taps;

pub use entry::{Answer, Call, Entry, Request, Return};
pub use log::{LogError, MAGIC, VERSION};
pub use pace::{Flag, Pacer};
pub use recorder::{RecordError, Recorder};
pub use replay::{Difference, Ended, Options, ReplayError, Replayed, Seen, replay};
