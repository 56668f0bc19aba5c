//! The rig: finds, fetches or builds what is needed, boots a guest with the device, runs a program
//! in it and says how it went.
//!
//! From a program:
//!
//! ```no_run
//! use extlb::{rig::{Options, Rig}, run::{Request, run_command}, vm::{Input, Sinks}};
//!
//! let rig = Rig::prepare(&Options::default())?;
//! let outcome = run_command(&rig, &Request::new(["true"]), Input::Empty, &Sinks::inherit)?;
//! assert_eq!(outcome.code(), 0);
//! # anyhow::Ok(())
//! ```
//!
//! Guests end with the thread that boots them.

pub mod bench;
pub mod cargo;
pub mod check;
pub mod child;
pub mod cli;
pub mod compare;
pub mod console;
pub mod demo;
pub mod device;
pub mod disks;
pub mod doctor;
pub mod elf;
pub mod initramfs;
pub mod kernel;
pub mod outcome;
pub mod paths;
pub mod profile;
pub mod progress;
pub mod qemu;
pub mod qmp;
pub mod rig;
pub mod run;
pub mod sandbox;
pub mod signals;
mod spawn_unsafe;
pub mod suite;
pub mod toolbox;
pub mod vm;
