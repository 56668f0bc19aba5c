//! Fetch: a descriptor is read from the ring and checked.

use extlb_spec::Iova;
use extlb_spec::context::ContextError;
use extlb_spec::work::{Completion, Descriptor, MAX_LEN, Opcode, Status, flags};

use super::{Halt, Operation};
use crate::Device;
use crate::context::{Context, Space, Work};
use crate::guard::Lane;

impl Device {
    /// Fetches the next descriptor, if one is submitted.
    pub(super) fn fetch(
        &self,
        lane: &mut Lane<'_>,
        context: &Context,
        space: &Space,
        work: &mut Work,
    ) -> Result<(), Halt> {
        let access = self.enter(lane, context, space, work.epoch)?;
        if !self.poll_tail(&access, space, work)? {
            return Err(Halt::Empty);
        }
        // The ring is aligned to a page, so no descriptor crosses one; `parse` of the context
        // entry checked that the whole ring lies in the address space.
        let slot = u64::from(work.head & (space.entries - 1));
        let at = Iova(space.ring.0 + slot * Descriptor::SIZE as u64);
        let mut bytes = [0; Descriptor::SIZE];
        access.page(at, false, 1)?.read(&mut bytes)?;
        work.operation = Some(parse(Descriptor::from_bytes(&bytes))?);
        Ok(())
    }
}

/// Checks a descriptor. One that is wrong becomes an operation that has ended already; one that
/// names no place to say so stops the context.
fn parse(descriptor: Descriptor) -> Result<Operation, Halt> {
    let record = Iova(descriptor.completion);
    let size = Completion::SIZE as u64;
    if !record.is_aligned(size) || !record.range_is_valid(size) {
        return Err(Halt::Failed(ContextError::CompletionFault, record.0));
    }
    let opcode = Opcode::from_raw(descriptor.opcode);
    let mut op = Operation {
        opcode: opcode.unwrap_or(Opcode::Nop),
        descriptor,
        done: 0,
        crc: descriptor.arg as u32,
        outcome: None,
    };
    let reserved = u64::from(descriptor.reserved0)
        | u64::from(descriptor.reserved1)
        | descriptor.reserved2
        | u64::from(descriptor.flags & !flags::ALL);
    let wide_crc = opcode == Some(Opcode::Crc32c) && descriptor.arg > u64::from(u32::MAX);
    if opcode.is_none() || reserved != 0 || wide_crc {
        op.end(Status::BadDescriptor, 0);
        return Ok(op);
    }
    if descriptor.len > MAX_LEN {
        op.end(Status::BadLength, 0);
        return Ok(op);
    }
    let (src, dst) = operands(op.opcode);
    for (used, addr) in [(src, descriptor.src), (dst, descriptor.dst)] {
        if used && !Iova(addr).range_is_valid(descriptor.len) {
            op.end_at(Status::BadAddress, Iova(addr), false);
            return Ok(op);
        }
    }
    Ok(op)
}

/// Whether an operation looks at `src` and at `dst`.
fn operands(opcode: Opcode) -> (bool, bool) {
    match opcode {
        Opcode::Nop => (false, false),
        Opcode::Copy | Opcode::Compare => (true, true),
        Opcode::Fill => (false, true),
        Opcode::Crc32c => (true, false),
    }
}
