//! Addresses that the device may not use, or not any more.
#![allow(unsafe_code)]

use std::ops::Range;

use extlb_spec::work::{Completion, Descriptor, Opcode, Status, fault};
use extlb_spec::{Iova, PAGE_SIZE};

use super::{Failure, Function, PATIENCE, Suite, Verdict, end, ensure};
use crate::error::Error;
use crate::memory_unsafe::Backing;
use crate::operation::Raw;
use crate::submit::Pending;
use crate::{Context, Mapping, SliceMut};

pub(super) fn checks<B: Backing>() -> Vec<(&'static str, Function<B>)> {
    vec![
        ("a fault names its address, and the queue goes on", fault),
        ("memory that was taken back is a fault", taken_back),
        ("contexts do not see each other's memory", isolated),
        ("two contexts register the same memory", both),
        ("memory is not touched once it was taken back", untouched),
        ("any memory of the process can be registered", foreign),
        ("refused descriptors say why", refused),
    ]
}

const PAGE: usize = PAGE_SIZE as usize;

fn crc(start: Iova, len: u64) -> Descriptor {
    Descriptor {
        opcode: Opcode::Crc32c as u8,
        src: start.0,
        len,
        ..Descriptor::default()
    }
}

fn fill(start: Iova, len: u64, arg: u64) -> Descriptor {
    Descriptor {
        opcode: Opcode::Fill as u8,
        dst: start.0,
        len,
        arg,
        ..Descriptor::default()
    }
}

fn of<B: Backing>(mapping: &Mapping<B>, range: Range<usize>) -> Range<Iova> {
    let at = |offset: usize| Iova(mapping.addr().0 + offset as u64);
    at(range.start)..at(range.end)
}

/// Submits an operation that writes to nothing but memory without Rust objects.
///
/// # Safety
/// As for [`crate::Queue::submit_raw`].
unsafe fn submit<B: Backing>(
    context: &Context<B>,
    descriptor: Descriptor,
) -> Verdict<Pending<B, Raw, ()>> {
    // SAFETY: the caller's promise.
    Ok(unsafe { context.queue().submit_raw(descriptor) }?)
}

/// Reads all of a range.
fn read<B: Backing>(context: &Context<B>, range: Range<Iova>) -> Verdict<Completion> {
    // SAFETY: it writes nothing, and what bytes it reads does not matter.
    let pending = unsafe { submit(context, crc(range.start, range.end.0 - range.start.0)) }?;
    Ok(end(pending)?.into_result()?.0)
}

fn expect(completion: &Completion, status: Status) -> Verdict {
    let got = Status::from_raw(completion.status);
    ensure!(
        got == Some(status),
        "{got:?} instead of {status:?}: {completion:x?}"
    );
    Ok(())
}

fn expect_fault(completion: &Completion, page: Iova) -> Verdict {
    expect(completion, Status::PageFault)?;
    let addr = Iova(completion.fault_addr).page();
    ensure!(addr == page, "a fault at {addr} instead of {page}");
    Ok(())
}

fn fault<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let mapping = suite.device.map_anonymous(3 * PAGE)?;
    let registration = context.register_addresses(of(&mapping, 0..2 * PAGE))?;
    let before = context.stats()?;
    let start = of(&mapping, 100..100).start;
    // SAFETY: a mapping has no Rust objects, and is not looked at here.
    let pending = unsafe { submit(&context, fill(start, 3 * PAGE_SIZE - 100, 1)) }?;
    let completion = end(pending)?.into_result()?.0;
    expect_fault(&completion, of(&mapping, 2 * PAGE..3 * PAGE).start)?;
    ensure!(completion.fault & fault::WRITE != 0, "said to be a read");
    let bytes = completion.bytes;
    ensure!(bytes == 2 * PAGE_SIZE - 100, "{bytes} bytes were done");
    expect(&read(&context, of(&mapping, 0..2 * PAGE))?, Status::Success)?;
    let after = context.stats()?;
    let counted = (
        after.ops_completed - before.ops_completed,
        after.ops_faulted - before.ops_faulted,
    );
    ensure!(counted == (1, 1), "counted as {counted:?}");
    ensure!(
        after.refused_requests > before.refused_requests,
        "no page request was refused"
    );
    Ok(registration.unregister()?)
}

fn unregister<B: Backing>(slice: SliceMut<B>) -> Verdict<Mapping<B>> {
    slice
        .unregister()?
        .map_err(|_| Failure::Failed("somebody else holds the memory".into()))
}

fn taken_back<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    for len in [PAGE, 5 * PAGE, (2 << 20) + PAGE] {
        let slice = context.allocate(len)?;
        let ((), slice) = super::finish(context.queue().fill(slice, 3)?)?;
        // It is still mapped in the process: only the registration is gone.
        let mapping = unregister(slice)?;
        for page in [0, len - PAGE] {
            let range = of(&mapping, page..page + PAGE);
            let completion = read(&context, range.clone())?;
            expect_fault(&completion, range.start)?;
        }
        // And now all is gone.
        let range = of(&mapping, 0..PAGE);
        drop(mapping);
        expect_fault(&read(&context, range.clone())?, range.start)?;
    }
    Ok(())
}

fn isolated<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let (one, other) = (suite.context(4)?, suite.context(4)?);
    let mapping = suite.device.map_anonymous(PAGE)?;
    let range = of(&mapping, 0..PAGE);
    let registration = one.register_addresses(range.clone())?;
    expect(&read(&one, range.clone())?, Status::Success)?;
    expect_fault(&read(&other, range.clone())?, range.start)?;
    Ok(registration.unregister()?)
}

fn both<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let (one, other) = (suite.context(4)?, suite.context(4)?);
    let mapping = suite.device.map_anonymous(4 << 20)?;
    let range = of(&mapping, 0..4 << 20);
    let first = one.register_addresses(range.clone())?;
    let second = other.register_addresses(range.clone())?;
    expect(&read(&one, range.clone())?, Status::Success)?;
    expect(&read(&other, range.clone())?, Status::Success)?;
    first.unregister()?;
    expect_fault(&read(&one, range.clone())?, range.start)?;
    expect(&read(&other, range.clone())?, Status::Success)?;
    second.unregister()?;
    expect_fault(&read(&other, range.clone())?, range.start)
}

/// The rule: what is taken back while the device works on it does not change afterwards.
fn untouched<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let (context, other) = (suite.context(6)?, suite.context(4)?);
    let len = 512 << 10;
    let mut mapping = suite.device.map_anonymous(len)?;
    let mut raced = 0;
    for round in 0..300u64 {
        if raced == 8 {
            return Ok(());
        }
        let registration = context.register_addresses(of(&mapping, 0..len))?;
        let mut pending = Vec::new();
        for n in 0..24u64 {
            let pattern = u64::from_le_bytes([(n + round) as u8; 8]);
            // SAFETY: a mapping has no Rust objects; it becomes a slice after the registration
            // was taken back, when the device does not touch it any more. That is what is
            // checked here, with a device that was given nothing else.
            pending.push(unsafe { submit(&context, fill(mapping.addr(), len as u64, pattern)) }?);
        }
        // In the middle, at another moment in each round.
        let first = &pending[(round % 12) as usize];
        ensure!(first.wait_for(PATIENCE)?, "an operation does not end");
        registration.unregister()?;
        let slice = other.register(mapping)?;
        let seen = crc32c::crc32c(&slice);
        let mut faults = 0;
        for pending in pending {
            let completion = end(pending)?.into_result()?.0;
            faults += u64::from(completion.status == Status::PageFault as u32);
        }
        let now = crc32c::crc32c(&slice);
        ensure!(
            seen == now,
            "round {round}: it changed after it was taken back"
        );
        raced += u64::from((1..24).contains(&faults));
        mapping = unregister(slice)?;
    }
    ensure!(
        raced > 0,
        "nothing was ever under way when it was taken back"
    );
    Ok(())
}

fn foreign<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let mut memory = memmap2::MmapMut::map_anon(3 * PAGE)?;
    memory.copy_from_slice(&super::noise(3 * PAGE, 4));
    let start = memory.as_ptr().addr() as u64;
    let range = Iova(start)..Iova(start + memory.len() as u64);
    let registered = context.register_addresses(range.clone());
    // A backing may also take the registration, and refuse the memory when it is needed.
    let result = match registered {
        Ok(registration) => {
            let completion = read(&context, range.clone())?;
            registration.unregister()?;
            match Status::from_raw(completion.status) {
                Some(Status::PageFault) if !suite.abilities.any_memory => Err(Error::Unsupported(
                    "memory that the library has not allocated",
                )),
                _ => Ok(completion),
            }
        }
        Err(error) => Err(error),
    };
    let what = "memory of the process's own";
    let completion = suite.ability(suite.abilities.any_memory, what, result)?;
    expect(&completion, Status::Success)?;
    let want = crc32c::crc32c(&memory);
    let sum = completion.result;
    ensure!(sum == u64::from(want), "crc {sum:#x} instead of {want:#x}");
    Ok(())
}

fn refused<B: Backing>(suite: &Suite<'_, B>) -> Verdict {
    let context = suite.context(4)?;
    let nop = Descriptor::default();
    let bad = [
        (Descriptor { opcode: 99, ..nop }, Status::BadDescriptor),
        (Descriptor { flags: 0x80, ..nop }, Status::BadDescriptor),
        (
            Descriptor {
                src_segments: 1,
                ..nop
            },
            Status::BadDescriptor,
        ),
        (fill(Iova(0x10_0000), (1 << 31) + 1, 0), Status::BadLength),
        (fill(Iova(1 << 48), 8, 0), Status::BadAddress),
        (crc(Iova(u64::MAX), 8), Status::BadAddress),
    ];
    for (descriptor, want) in bad {
        // SAFETY: no descriptor that the device refuses makes it write anything.
        let pending = unsafe { submit(&context, descriptor) }?;
        expect(&end(pending)?.into_result()?.0, want)?;
    }
    Ok(())
}
