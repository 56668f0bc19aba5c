//! Work queues: descriptors and completions, all addressed by virtual address.
//!
//! A context's descriptors run in order, one at a time; contexts run beside each other. An
//! operation that misses waits for its page request without holding anything, so that it delays
//! its own queue only.
//!
//! # How to go on after a page fault
//!
//! The completion says in `bytes` how much is done, and an operation may be submitted again for the
//! rest, once the address is mapped:
//! - copy, and `fault` without `FROM_END`: `src`, `dst` and `len` less what is done; with `FROM_END`
//!   the rest is at the start: only `len` is less;
//! - fill: likewise, with `arg` rotated right by 8 times `bytes % 8` bits;
//! - CRC32C: likewise, with `arg` = `result`, the CRC of what is done;
//! - compare: likewise; what is done is equal, and the result counts from the new start;
//! - with lists: the program cuts what is done off the lists;
//! - fetch-add and compare-swap: nothing is done, submit it again;
//! - batch: `src` 64 times `bytes` further on, `len` less `bytes`.

use crate::table::{bits, enumeration, layout};

layout! {
    /// A work descriptor, an entry of the ring. It must not change until it is retired; the device
    /// may read it any number of times until then.
    pub struct Descriptor("extlb_descriptor", 64) {
        /// An `Opcode`.
        opcode: u8 = 0,
        /// See the descriptor flags.
        flags: u8 = 1,
        /// Zero.
        reserved0: u16 = 2,
        /// Zero.
        reserved1: u32 = 4,
        /// Where to read; of a list, the address of the list; of a batch, of the descriptors.
        /// Compare-swap: the value to write.
        src: u64 = 8,
        /// Where to write; second operand of a compare; or the address of a list.
        dst: u64 = 16,
        /// Bytes, 0 to 2 GiB, any alignment. Fetch-add and compare-swap: 8. Batch: the number of
        /// descriptors.
        len: u64 = 24,
        /// Address of the completion record, a multiple of 32.
        completion: u64 = 32,
        /// Fill: the pattern of 8 bytes, from `dst` on. CRC32C: the CRC to go on from, 0 at first.
        /// Fetch-add: what to add. Compare-swap: what to compare with.
        arg: u64 = 40,
        /// Not looked at; for the program.
        user: u64 = 48,
        /// Segments of the list at `src`; zero without `SRC_LIST`.
        src_segments: u32 = 56,
        /// Segments of the list at `dst`; zero without `DST_LIST`.
        dst_segments: u32 = 60,
    }
}

layout! {
    /// A piece of an operand that is given as a list (scatter/gather).
    pub struct Segment("extlb_segment", 16) {
        /// Address, any alignment.
        addr: u64 = 0,
        /// Bytes, may be 0.
        len: u64 = 8,
    }
}

/// Largest `Descriptor::len`: 2 GiB.
pub const MAX_LEN: u64 = 1 << 31;
/// Largest number of descriptors of a batch.
pub const MAX_BATCH: u64 = 4096;
/// Largest number of segments of a list.
pub const MAX_SEGMENTS: u32 = 4096;

bits! {
    /// Bits of `Descriptor::flags`.
    pub mod flags Work: u8 {
        /// Count the completion in `event_seq` and raise the completion interrupt. One interrupt
        /// may stand for several completions.
        INTERRUPT = 1 << 0,
        /// `src` is the address of a list of `src_segments` segments, a multiple of 16; their
        /// lengths add up to `len`. For copy, CRC32C and compare.
        SRC_LIST = 1 << 1,
        /// Likewise `dst` and `dst_segments`. For copy, fill and compare.
        DST_LIST = 1 << 2,
        /// No completion record on success; the interrupt, if asked for, comes all the same.
        QUIET = 1 << 3,
    }
}

enumeration! {
    /// Operations.
    pub enum Opcode: u8 {
        /// Does nothing, and completes.
        Nop = 0,
        /// Copies `len` bytes from `src` to `dst`. The ranges may overlap: the result is as if all
        /// had been read before any was written. To that end it goes from the highest address
        /// down if `dst` lies in (`src`, `src` + `len`), from the lowest up otherwise. Overlap is
        /// judged by these addresses; that of pages mapped twice, or of lists, has no defined
        /// result, but stays within the destination.
        Copy = 1,
        /// Writes the pattern `arg` to `len` bytes at `dst`; the last repetition may be cut.
        Fill = 2,
        /// CRC32C (Castagnoli) of `len` bytes at `src`, into `Completion::result`.
        Crc32c = 3,
        /// Compares `len` bytes at `src` and `dst`; `result` is the offset of the first difference.
        Compare = 4,
        /// Adds `arg` to the 8 bytes at `dst`, modulo 2^64, once and atomically, also against the
        /// processors; `result` is what was there before.
        FetchAdd = 5,
        /// Writes `src` (a value, not an address) to the 8 bytes at `dst` if they are `arg`;
        /// atomically likewise. `result` is what was there before: if it is `arg`, it was written.
        /// Needs a page that may be written either way.
        CompareSwap = 6,
        /// Ends when every earlier operation of the queue has ended and its data is visible.
        /// `result` is the number of those since the last fence that did not end with success;
        /// `EarlierFailed` if there are any.
        Fence = 7,
        /// Runs the `len` descriptors at `src`, a multiple of 64, in order, each with a completion
        /// of its own. Then `bytes` is the number of those that ended, and `result` of those that
        /// did not end with success. A fence among them that ends with `EarlierFailed` ends the
        /// batch likewise.
        Batch = 8,
    }
}

layout! {
    /// A completion record. The device writes the other fields first and `status` last (release),
    /// as one aligned word, after every byte of the operation is visible.
    pub struct Completion("extlb_completion", 32) {
        /// A `Status`; the program sets it to 0 before it submits.
        status: u32 = 0,
        /// See the fault bits.
        fault: u32 = 4,
        /// Bytes done from the start; on a fault all bytes below are done.
        bytes: u64 = 8,
        /// The address that faulted.
        fault_addr: u64 = 16,
        /// The result of the operation.
        result: u64 = 24,
    }
}

bits! {
    /// Bits of `Completion::fault`.
    pub mod fault Fault: u32 {
        /// Page fault: the access was a write.
        WRITE = 1 << 0,
        /// A copy that ended early had gone from the highest address down: `bytes` are the last
        /// ones, not the first.
        FROM_END = 1 << 1,
    }
}

enumeration! {
    /// How an operation ended.
    pub enum Status: u32 {
        /// Not yet.
        Pending = 0,
        /// All done.
        Success = 1,
        /// `fault_addr` is not mapped, or not writable, and software would not map it.
        PageFault = 2,
        /// Unknown opcode, unknown flag, a flag that the opcode does not take, or a reserved field
        /// that is not zero.
        BadDescriptor = 3,
        /// `len` is more than the largest, or not what the operation takes.
        BadLength = 4,
        /// An address range leaves the 48-bit address space; `fault_addr` is its start.
        BadAddress = 5,
        /// The page table is broken at `fault_addr`: reserved bits, or an address outside RAM.
        BusError = 6,
        /// Compare found a difference.
        Mismatch = 7,
        /// `fault_addr` is not aligned as the operation needs it.
        Misaligned = 8,
        /// A fence, or a batch with such a fence: earlier operations did not end with success.
        EarlierFailed = 9,
        /// The segments of a list are too many, or do not add up to `len`. Found when the list is
        /// read, piece by piece: `bytes` are done.
        BadSegments = 10,
        /// A batch within a batch.
        NestedBatch = 11,
    }
}
