//! Work queues: descriptors and completions, all addressed by virtual address.
//!
//! A context's descriptors run in order, one at a time; contexts run beside each other. An
//! operation that misses waits for its page request without holding anything, so that it delays
//! its own queue only.

use crate::table::{bits, enumeration, layout};

layout! {
    /// A work descriptor, an entry of the ring.
    pub struct Descriptor("extlb_descriptor", 64) {
        /// An `Opcode`.
        opcode: u8 = 0,
        /// See the descriptor flags.
        flags: u8 = 1,
        /// Zero.
        reserved0: u16 = 2,
        /// Zero.
        reserved1: u32 = 4,
        /// Where to read.
        src: u64 = 8,
        /// Where to write; second operand of a compare.
        dst: u64 = 16,
        /// Bytes, 0 to 2 GiB. Any alignment.
        len: u64 = 24,
        /// Address of the completion record, a multiple of 32.
        completion: u64 = 32,
        /// Fill: the pattern of 8 bytes, from `dst` on. CRC32C: the CRC to go on from, 0 at first.
        arg: u64 = 40,
        /// Not looked at; for the program.
        user: u64 = 48,
        /// Zero.
        reserved2: u64 = 56,
    }
}

/// Largest `Descriptor::len`: 2 GiB.
pub const MAX_LEN: u64 = 1 << 31;

bits! {
    /// Bits of `Descriptor::flags`.
    pub mod flags Work: u8 {
        /// Count the completion in `event_seq` and raise the completion interrupt.
        INTERRUPT = 1 << 0,
    }
}

enumeration! {
    /// Operations.
    pub enum Opcode: u8 {
        /// Does nothing, and completes.
        Nop = 0,
        /// Copies `len` bytes from `src` to `dst`, lowest address first; if both overlap and
        /// `dst` is above `src` the result is undefined, but stays within `dst`.
        Copy = 1,
        /// Writes the pattern `arg` to `len` bytes at `dst`; the last repetition may be cut.
        Fill = 2,
        /// CRC32C (Castagnoli) of `len` bytes at `src`, into `Completion::result`.
        Crc32c = 3,
        /// Compares `len` bytes at `src` and `dst`; `result` is the offset of the first difference.
        Compare = 4,
    }
}

layout! {
    /// A completion record. The device writes the other fields first and `status` last (release),
    /// as one aligned word, after every byte of the operation is visible.
    pub struct Completion("extlb_completion", 32) {
        /// A `Status`; the program sets it to 0 before it submits.
        status: u32 = 0,
        /// Page fault: 1 if the access was a write.
        fault_write: u32 = 4,
        /// Bytes done from the start; on a fault all bytes below are done.
        bytes: u64 = 8,
        /// The address that faulted.
        fault_addr: u64 = 16,
        /// The result of the operation.
        result: u64 = 24,
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
        /// Unknown opcode, unknown flag or a reserved field that is not zero.
        BadDescriptor = 3,
        /// `len` is more than the largest.
        BadLength = 4,
        /// An address range leaves the 48-bit address space.
        BadAddress = 5,
        /// The page table is broken at `fault_addr`: reserved bits, or an address outside RAM.
        BusError = 6,
        /// Compare found a difference.
        Mismatch = 7,
    }
}
