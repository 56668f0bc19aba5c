//! MSI-X by event fds, which the client makes and this side signals.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::Mutex;

use extlb_spec::{VECTORS, Vector};

use super::transport::IrqRequest;
use crate::ports::Interrupts;
use crate::sync::lock;

/// The event fd of each vector.
#[derive(Debug, Default)]
pub(super) struct Irqs(Mutex<[Option<File>; VECTORS as usize]>);

impl Irqs {
    /// Carries out a request whose range was checked.
    pub(super) fn set(&self, request: IrqRequest) -> io::Result<()> {
        match request {
            IrqRequest::DisableAll => *lock(&self.0) = Default::default(),
            IrqRequest::Deassign { start, count } => {
                lock(&self.0)[start as usize..][..count as usize].fill_with(|| None);
            }
            IrqRequest::Assign { start, fds } => {
                for fd in &fds {
                    check_eventfd(fd)?;
                }
                let mut vectors = lock(&self.0);
                for (vector, fd) in vectors[start as usize..].iter_mut().zip(fds) {
                    *vector = Some(fd);
                }
            }
            IrqRequest::Trigger { start, count } => {
                for vector in start..start.saturating_add(count) {
                    self.signal(vector as usize);
                }
            }
        }
        Ok(())
    }

    fn signal(&self, vector: usize) {
        if let Some(Some(mut fd)) = lock(&self.0).get(vector).map(Option::as_ref) {
            // It fails only when the counter is at its end, and then the client has been told.
            let _ = fd.write_all(&1u64.to_ne_bytes());
        }
    }
}

impl Interrupts for Irqs {
    fn raise(&self, vector: Vector) {
        self.signal(vector as usize);
    }
}

/// Anything else, a full pipe for instance, might block the device.
fn check_eventfd(fd: &File) -> io::Result<()> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    match link.to_string_lossy().contains("[eventfd]") {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a vector needs an event fd",
        )),
    }
}
