//! Memory is taken back in the midst of an operation on it.
//!
//! With a sound device the drain holds the memory until the access under way has ended: the
//! operation ends by success, or by a fault at the next page. With one that acknowledges without
//! draining, the mapping is gone when the access arrives: the bus has no memory there.
#![allow(unsafe_code)]

use std::fmt;
use std::time::Duration;

use anyhow::{Result, bail};
use extlb_driver::hardware::Hardware;
use extlb_driver::spec::work::{Descriptor, Opcode, Status};
use extlb_driver::spec::{BAR_REGS, Iova, PAGE_SIZE, regs};
use extlb_driver::{Device, Options};

use crate::Driver;

const PAGES: u64 = 4;
/// The tests let an access of the device take 100 ms: eight of these are in the midst of each.
const STEP: Duration = Duration::from_millis(13);

/// How operations ended.
#[derive(Debug, Default)]
pub struct Seen {
    whole: u64,
    /// By a fault in the midst: there was an access under way, and it was waited for.
    cut: u64,
    /// By an access that found no memory.
    late: u64,
    /// As the device counts them.
    bus_errors: u64,
}

/// Takes memory back `rounds` times, each time at another moment.
pub fn run(device: &Device<Driver>, rounds: u64) -> Result<Seen> {
    let context = device.context(Options::default())?;
    let mut seen = Seen::default();
    for round in 0..rounds {
        let len = PAGES * PAGE_SIZE;
        let mapping = device.map_anonymous(usize::try_from(len)?)?;
        let range = mapping.addr()..Iova(mapping.addr().0 + len);
        let registration = context.register_addresses(range.clone())?;
        let nop = context.queue().nop()?;
        let fill = Descriptor {
            opcode: Opcode::Fill as u8,
            dst: range.start.0,
            len,
            arg: u64::MAX,
            ..Descriptor::default()
        };
        // SAFETY: there are no Rust objects in a mapping. It is dropped when the device has no way
        // to it any more: unregistering unmaps it from the IOMMU, whatever the device does.
        let pending = unsafe { context.queue().submit_raw(fill) }?;
        nop.finish()?;
        // Another moment in each round, so that some of them are in the midst of an access.
        std::thread::sleep(STEP * u32::try_from(round % 8)?);
        registration.unregister()?;
        drop(mapping);
        let completion = pending.finish()?.0;
        match Status::from_raw(completion.status) {
            Some(Status::Success) => seen.whole += 1,
            Some(Status::PageFault) => seen.cut += u64::from(completion.bytes > 0),
            Some(Status::BusError) => seen.late += 1,
            other => bail!("round {round}: {other:?}"),
        }
    }
    let register = regs::BUS_ERRORS;
    let hardware = device.backing().hardware();
    seen.bus_errors = hardware.read(BAR_REGS, register.offset, register.width);
    Ok(seen)
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "whole {} cut {} late {} bus_errors {}",
            self.whole, self.cut, self.late, self.bus_errors
        )
    }
}
