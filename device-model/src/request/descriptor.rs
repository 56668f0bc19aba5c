//! Descriptors are checked: what makes no sense becomes an operation that has ended already.

use extlb_spec::Iova;
use extlb_spec::context::ContextError;
use extlb_spec::work::{
    Completion, Descriptor, MAX_BATCH, MAX_LEN, MAX_SEGMENTS, Opcode, Segment, Status, flags,
};

use super::Halt;
use super::operation::{Cursor, Operation};

/// What an operation is made of.
struct Shape {
    /// The flags that it takes beside those that all take.
    lists: u8,
    /// Uses ranges of `len` bytes at `src` and at `dst`.
    src: bool,
    dst: bool,
}

fn shape(opcode: Opcode) -> Shape {
    let (src, dst) = match opcode {
        Opcode::Copy | Opcode::Compare => (true, true),
        Opcode::Fill => (false, true),
        Opcode::Crc32c => (true, false),
        Opcode::Nop | Opcode::FetchAdd | Opcode::CompareSwap | Opcode::Fence | Opcode::Batch => {
            (false, false)
        }
    };
    let flag = |used, flag| if used { flag } else { 0 };
    Shape {
        lists: flag(src, flags::SRC_LIST) | flag(dst, flags::DST_LIST),
        src,
        dst,
    }
}

/// Checks a descriptor, of the ring or of a batch. One that names no place to say that it is wrong
/// stops the context.
pub(super) fn parse(descriptor: Descriptor, in_batch: bool) -> Result<Operation, Halt> {
    let record = Iova(descriptor.completion);
    let size = Completion::SIZE as u64;
    if !record.is_aligned(size) || !record.range_is_valid(size) {
        return Err(Halt::Failed(ContextError::CompletionFault, record.0));
    }
    let opcode = Opcode::from_raw(descriptor.opcode);
    let mut op = Operation::new(opcode.unwrap_or(Opcode::Nop), descriptor);
    let shape = shape(op.opcode);
    let known = flags::INTERRUPT | flags::QUIET | shape.lists;
    let is_list = |flag| descriptor.flags & flag != 0;
    let src_list = is_list(flags::SRC_LIST);
    let dst_list = is_list(flags::DST_LIST);
    let stray = |list: bool, segments: u32| if list { 0 } else { segments };
    let reserved = u64::from(descriptor.reserved0)
        | u64::from(descriptor.reserved1)
        | u64::from(stray(src_list, descriptor.src_segments))
        | u64::from(stray(dst_list, descriptor.dst_segments))
        | u64::from(descriptor.flags & !known);
    let wide_crc = opcode == Some(Opcode::Crc32c) && descriptor.arg > u64::from(u32::MAX);
    if opcode.is_none() || reserved != 0 || wide_crc {
        op.end(Status::BadDescriptor, 0);
        return Ok(op);
    }
    let lengths = match op.opcode {
        Opcode::FetchAdd | Opcode::CompareSwap => 8..=8,
        Opcode::Batch => 0..=MAX_BATCH,
        _ => 0..=MAX_LEN,
    };
    if !lengths.contains(&descriptor.len) {
        op.end(Status::BadLength, 0);
        return Ok(op);
    }
    let len = descriptor.len;
    let (src, dst) = (descriptor.src, descriptor.dst);
    match op.opcode {
        Opcode::Batch if in_batch => op.end(Status::NestedBatch, 0),
        Opcode::Batch => {
            let size = Descriptor::SIZE as u64;
            place(&mut op, src, size, size * len);
        }
        Opcode::FetchAdd | Opcode::CompareSwap => place(&mut op, dst, 8, 8),
        _ => {
            if shape.src {
                op.src = operand(&mut op, src, src_list, descriptor.src_segments);
            }
            if shape.dst && op.outcome.is_none() {
                op.dst = operand(&mut op, dst, dst_list, descriptor.dst_segments);
            }
        }
    }
    // The source ends where the destination has begun: its end must be read before it is written.
    let within = dst > src && dst < src.saturating_add(len);
    op.down = op.opcode == Opcode::Copy && !src_list && !dst_list && within;
    Ok(op)
}

/// An operand as the descriptor gives it; ends the operation if that makes no sense.
fn operand(op: &mut Operation, at: u64, list: bool, segments: u32) -> Cursor {
    if !list {
        place(op, at, 1, op.descriptor.len);
        return Cursor::range(at, op.descriptor.len);
    }
    if segments > MAX_SEGMENTS {
        op.end_at(Status::BadSegments, Iova(at), false);
    } else {
        let size = Segment::SIZE as u64;
        place(op, at, size, size * u64::from(segments));
    }
    Cursor::list(at, segments)
}

/// Ends the operation if `[at, at + len)` is not aligned, or leaves the address space.
fn place(op: &mut Operation, at: u64, align: u64, len: u64) {
    if !Iova(at).range_is_valid(len) {
        op.end_at(Status::BadAddress, Iova(at), false);
    } else if !Iova(at).is_aligned(align) {
        op.end_at(Status::Misaligned, Iova(at), false);
    }
}
