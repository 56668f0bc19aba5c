//! Memory is mapped, the device copies and sums it; what is not mapped it cannot reach.

use std::time::Instant;

use anyhow::{Result, ensure};
use extlb_driver::hardware::Hardware;
use extlb_driver::spec::work::{Completion, Descriptor, Opcode, Status, fault};
use extlb_driver::userspace::Userspace;
use extlb_driver::{Context, Device, Iova, Options};

use crate::tour::figures::{Figures, seconds};
use crate::tour::memory_unsafe::{Area, PAGE, submit};
use crate::tour::random::Random;
use crate::tour::small_copies;

/// Bytes copied.
const BYTES: usize = 16 << 20;
/// Bytes of one operation.
const PIECE: usize = 1 << 20;
/// Registered, and not used.
const IDLE: usize = 32 << 20;

/// The step.
pub fn run<H: Hardware>(device: &Device<Userspace<H>>, figures: &mut Figures) -> Result<String> {
    println!("  {:?}", device.backing());
    let (lck_before, pin_before) = super::locked_kib()?;
    let context = device.context(Options {
        ring_log2: 7,
        ..Options::default()
    })?;
    let mut src = context.allocate(BYTES)?;
    let dst = context.allocate(BYTES)?;
    let _idle = context.allocate(IDLE)?;
    let (lck, pin) = super::locked_kib()?;
    figures.vm_lck_kib = Some(lck - lck_before);
    figures.vm_pin_kib = Some(pin - pin_before);
    let registered_kib = ((2 * BYTES + IDLE) >> 10) as u64;
    let locked_kib = lck - lck_before + pin - pin_before;
    figures.registered_kib = Some(registered_kib);

    let mut random = Random::new(0xd3a);
    for word in src.chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
    let cpu_crc = crc32c::crc32c(&src);
    let src = src.freeze();
    let begun = Instant::now();
    let mut copying = Vec::new();
    for (n, piece) in dst.chunks(PIECE).enumerate() {
        let from = src.slice(n * PIECE..n * PIECE + piece.len());
        copying.push(context.queue().copy(from, piece)?);
    }
    let (mut device_crc, mut copied_crc) = (0, 0);
    for copy in copying {
        let ((), (_, dst)) = copy.finish()?;
        let (crc, dst) = context.queue().crc32c(dst, 0)?.finish()?;
        device_crc = crc32c::crc32c_combine(device_crc, crc, dst.len());
        copied_crc = crc32c::crc32c_append(copied_crc, &dst);
    }
    figures.seconds = Some(seconds(begun.elapsed()));
    figures.bytes = Some(2 * BYTES as u64);
    figures.crc32c = Some(format!("{cpu_crc:08x}"));
    println!(
        "  CRC32C of {} MiB: {cpu_crc:08x} of the source by the CPU, {device_crc:08x} of the copy by \
         the device, {copied_crc:08x} by the CPU",
        BYTES >> 20
    );
    ensure!(
        device_crc == cpu_crc && copied_crc == cpu_crc,
        "the checksums differ"
    );
    println!(
        "  {} MiB registered, {} MiB of it used: VmLck {lck} KiB, VmPin {pin} KiB",
        registered_kib >> 10,
        (2 * BYTES) >> 20
    );
    ensure!(
        locked_kib >= registered_kib,
        "only {locked_kib} KiB are locked: is there an IOMMU?"
    );
    faults(&context)?;
    let before_rate = context.stats()?;
    figures.page_requests = Some(before_rate.page_requests + before_rate.refused_requests);
    figures.operations_faulted = Some(before_rate.ops_faulted);
    let rate = small_copies::per_second(&context)?;
    figures.small_copies_per_second = Some(rate.round());
    println!("  {rate:.0} copies of 4 KiB a second");
    Ok(format!(
        "{} MiB copied and summed in {:.2} s; {} MiB locked for it; what is not mapped faults, by \
         address",
        BYTES >> 20,
        figures.seconds.unwrap_or(0.0),
        locked_kib >> 10
    ))
}

/// The device is sent to memory of this process that is not mapped for it.
fn faults<H: Hardware>(context: &Context<Userspace<H>>) -> Result<()> {
    const CANARY: u64 = 0x0ff1_11f1_75ca_7a17;
    // The first two of four pages are registered.
    let area = Area::fresh(4)?;
    let other = Area::fresh(4)?;
    area.store_all(0..4, CANARY);
    let _kept = [
        context.register_addresses(area.addrs(&(0..2)))?,
        context.register_addresses(other.addrs(&(0..4)))?,
    ];
    let copy = |src: Iova, dst: Iova, len: usize| -> Result<Completion> {
        let descriptor = Descriptor {
            opcode: Opcode::Copy as u8,
            src: src.0,
            dst: dst.0,
            len: len as u64,
            ..Descriptor::default()
        };
        let pending = submit(&context.queue().batch(), descriptor)?;
        Ok(pending.finish()?.0)
    };
    let must_fault = |what: &str, completion: Completion, write: bool, bytes: usize, addr: Iova| {
        ensure!(
            completion.status == Status::PageFault as u32
                && completion.fault_addr == addr.0
                && (completion.fault & fault::WRITE != 0) == write
                && completion.bytes == bytes as u64,
            "{what}: {completion:?}, and not a fault at {addr} after {bytes} bytes"
        );
        println!("  {what}: page fault at {addr} after {bytes} bytes");
        Ok(())
    };
    let outside = area.addr(2 * PAGE);
    let done = copy(outside, other.addr(0), PAGE)?;
    must_fault("a read of what is not registered", done, false, 0, outside)?;
    let done = copy(other.addr(0), outside, PAGE)?;
    must_fault("a write to it", done, true, 0, outside)?;
    let done = copy(other.addr(0), area.addr(0), 4 * PAGE)?;
    must_fault("a write that runs out of it", done, true, 2 * PAGE, outside)?;
    let untouched = (2 * PAGE..4 * PAGE)
        .step_by(8)
        .all(|at| area.load(at) == CANARY);
    ensure!(untouched, "memory that was not registered was written to");
    Ok(())
}
