//! Contexts: the address spaces of the device, one per process and open file.

use crate::table::{bits, enumeration, layout};

layout! {
    /// Entry of the context table, in guest RAM, read when a `ContextSync` command names it.
    pub struct ContextEntry("extlb_context_entry", 64) {
        /// See the context flags.
        flags: u64 = 0,
        /// Guest-physical address of the root of the device's page table, a multiple of 4096.
        page_table: u64 = 8,
        /// I/O virtual address of the work queue's ring, a multiple of 4096.
        ring: u64 = 16,
        /// log2 of the number of descriptors of the ring, 1 to 12.
        ring_log2: u32 = 24,
        /// How many page requests of the context may wait for a response at once, at least 1.
        credits: u32 = 28,
        /// Guest-physical address of the context's shadow page, a multiple of 4096.
        shadow: u64 = 32,
        /// Guest-physical address of the root of the process's own page table (x86-64, four
        /// levels); looked at if the oracle flag is set.
        cpu_page_table: u64 = 40,
        /// Share of the engine's time against contexts that have work at the same time, 0 to 64;
        /// 0 means 1.
        weight: u32 = 48,
        /// Zero.
        reserved0: u32 = 52,
        /// Zero.
        reserved1: u64 = 56,
    }
}

/// Smallest `ring_log2`.
pub const MIN_WORK_RING_LOG2: u32 = 1;
/// Largest `ring_log2`.
pub const MAX_WORK_RING_LOG2: u32 = 12;
/// Largest `weight`.
pub const MAX_WEIGHT: u32 = 64;

bits! {
    /// Bits of `ContextEntry::flags`.
    pub mod flags Context: u64 {
        /// The context runs. A sync command that finds it clear stops the context.
        VALID = 1 << 0,
        /// `cpu_page_table` is valid: the oracle watches this context.
        ORACLE = 1 << 1,
    }
}

layout! {
    /// A context's shadow page: doorbell and state in RAM, so that a busy queue costs no exit
    /// from the guest. Each word has a cache line of its own. The program can write all of the
    /// page; the device trusts none of it, and keeps its own copy of what it wrote.
    ///
    /// To submit: write descriptors; store `tail` (release); full fence; load `need_kick`; if
    /// it is not 0, write the context's doorbell page. The device does the mirror image before
    /// it sleeps: store `need_kick` = 1; full fence; load `tail`; sleep only if nothing is new.
    /// So at least one of both sees the other.
    pub struct ContextShadow("extlb_context_shadow", 4096) {
        /// Index after the last descriptor submitted. Written by the program.
        tail: u32 = 0x000,
        /// Zero.
        pad0: [u32; 15] = 0x004,
        /// Index after the last descriptor retired; its slot may be used again. By the device.
        head: u32 = 0x040,
        /// Zero.
        pad1: [u32; 15] = 0x044,
        /// Not 0: the device sleeps and wants a doorbell write. By the device.
        need_kick: u32 = 0x080,
        /// Zero.
        pad2: [u32; 15] = 0x084,
        /// Number of completions so far that asked for an interrupt. By the device.
        event_seq: u32 = 0x0c0,
        /// Zero.
        pad3: [u32; 15] = 0x0c4,
        /// Why the context stopped: a `ContextError`, 0 while it runs. By the device.
        error: u32 = 0x100,
        /// Zero.
        pad4: u32 = 0x104,
        /// The address that the error is about. By the device, before `error`.
        error_addr: u64 = 0x108,
        /// Zero.
        pad5: [u32; 956] = 0x110,
    }
}

enumeration! {
    /// Why one context stopped while the others go on.
    pub enum ContextError: u32 {
        /// Its entry of the context table makes no sense.
        BadEntry = 1,
        /// The tail is further ahead than the ring is long.
        RingOverrun = 2,
        /// A descriptor could not be read: its page request was refused, or the page table is broken.
        RingFault = 3,
        /// A completion record could not be written.
        CompletionFault = 4,
        /// The shadow page could not be accessed.
        Shadow = 5,
        /// Software answered a page request with failure.
        PageRequestFailed = 6,
    }
}
