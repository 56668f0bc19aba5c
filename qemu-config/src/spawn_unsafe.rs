//! Starting children that do not outlive the rig, and that give way to others.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::{SigSet, Signal};

/// Makes the kernel kill the child when the thread that starts it ends, however it ends: nothing is
/// left behind by a rig that is killed.
///
/// The thread matters: start children from one that lives as long as they shall.
pub fn dies_with_us(command: &mut Command) -> &mut Command {
    let us = std::process::id();
    let prepare = move || -> io::Result<()> {
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        // The rig blocks the signals that it waits for; the child is to take them as usual.
        SigSet::empty().thread_set_mask()?;
        // If the rig ended before the call above, nobody will send the signal any more. (Zero: the
        // parent is outside the child's process namespace.)
        let parent = nix::unistd::getppid().as_raw() as u32;
        if parent != us && parent != 0 {
            return Err(io::Error::from_raw_os_error(nix::libc::ESRCH));
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe work is allowed:
    // it makes a few system calls and allocates nothing (an error is built from a number).
    unsafe { command.pre_exec(prepare) }
}

/// Lowers the child's priority by `steps` of `nice`.
pub fn gives_way(command: &mut Command, steps: i32) -> &mut Command {
    let prepare = move || -> io::Result<()> {
        // SAFETY: one system call without pointers. That it cannot fail for want of rights, or
        // stops at the lowest priority, is why its result does not matter.
        unsafe { nix::libc::nice(steps) };
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and makes one system call.
    unsafe { command.pre_exec(prepare) }
}
