//! MSI-X by event fds, which the client makes and this side signals.
//!
//! An interrupt for a vector that nobody listens to, or that is masked, is pending: it is raised
//! when the client assigns an event fd or unmasks. So none is lost while a client assigns its
//! vectors anew, in whatever order it does. At worst one comes that nobody waits for any more.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Mutex;

use extlb_spec::{VECTORS, Vector};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::transport::IrqRequest;
use crate::ports::Interrupts;
use crate::sync::lock;

/// A vector.
#[derive(Debug, Default)]
struct Line {
    eventfd: Option<File>,
    masked: bool,
    pending: bool,
}

/// All vectors.
#[derive(Debug, Default)]
pub(super) struct Irqs(Mutex<[Line; VECTORS as usize]>);

impl Line {
    /// Signals; whether somebody listens.
    fn signal(&self) -> bool {
        let Some(mut fd) = self.eventfd.as_ref() else {
            return false;
        };
        // It fails only when the counter is at its end, and then the client has been told. It
        // never waits: see `accept_eventfd`.
        let _ = fd.write_all(&1u64.to_ne_bytes());
        true
    }

    /// Raises what is pending, if it can be.
    fn settle(&mut self) {
        self.pending = self.pending && (self.masked || !self.signal());
    }
}

/// Those of the vectors that are named.
fn chosen<'a>(lines: &'a mut [Line], vectors: &[u32]) -> impl Iterator<Item = &'a mut Line> {
    let named = |(n, line)| vectors.contains(&(n as u32)).then_some(line);
    lines.iter_mut().enumerate().filter_map(named)
}

impl Irqs {
    /// Carries out a request; vectors that do not exist are left aside.
    pub(super) fn set(&self, request: IrqRequest) -> io::Result<()> {
        if let IrqRequest::Assign { fds, .. } = &request {
            for fd in fds {
                accept_eventfd(fd)?;
            }
        }
        let mut lines = lock(&self.0);
        let lines = &mut *lines;
        match request {
            IrqRequest::DisableAll => {
                for line in lines {
                    (line.eventfd, line.masked) = (None, false);
                }
            }
            IrqRequest::Assign { start, fds } => {
                for (line, fd) in lines.iter_mut().skip(start as usize).zip(fds) {
                    line.eventfd = Some(File::from(fd));
                    line.settle();
                }
            }
            IrqRequest::Deassign { vectors } => {
                chosen(lines, &vectors).for_each(|line| line.eventfd = None);
            }
            IrqRequest::Trigger { vectors } => {
                for line in chosen(lines, &vectors) {
                    line.signal();
                }
            }
            IrqRequest::Mask { vectors, masked } => {
                for line in chosen(lines, &vectors) {
                    line.masked = masked;
                    line.settle();
                }
            }
        }
        Ok(())
    }

    /// The device was reset: nothing is pending. Event fds stay, as VFIO has it.
    pub(super) fn reset(&self) {
        for line in &mut *lock(&self.0) {
            line.pending = false;
        }
    }

    /// The pending bits, bit n for vector n.
    pub(super) fn pending(&self) -> u64 {
        let lines = lock(&self.0);
        let bits = lines.iter().enumerate();
        bits.fold(0, |bits, (n, line)| bits | u64::from(line.pending) << n)
    }
}

impl Interrupts for Irqs {
    fn raise(&self, vector: Vector) {
        if let Some(line) = lock(&self.0).get_mut(vector as usize) {
            line.pending = true;
            line.settle();
        }
    }
}

/// Anything else, a full pipe for instance, might block the device; so might an event fd whose
/// counter the client has put to its end, unless it does not block.
fn accept_eventfd(fd: &OwnedFd) -> io::Result<()> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    if !link.to_string_lossy().contains("[eventfd]") {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a vector needs an event fd",
        ));
    }
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    if !flags.contains(OFlag::O_NONBLOCK) {
        fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    }
    Ok(())
}
