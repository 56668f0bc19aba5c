//! The invalidation queue: commands from the kernel to the device.
//!
//! Commands run in order. None waits for a page request or for an operation as a whole, so the
//! queue always makes progress and a shootdown may wait for it with any lock held. As many
//! commands and waits as the queue has entries may be outstanding.
//!
//! # Acknowledgements
//! A wait command says that the commands before it are done, on the level that its flags ask for:
//!
//! | Level | Promises | Does not promise |
//! |---|---|---|
//! | posted (no flag) | the commands before were read, their entries may be used again | that anything was removed; this device carries commands out in order, so that it was |
//! | cleared | no access that begins now uses a translation that they name | that those which began before have ended |
//! | drained | in addition, all accesses that began before have ended, and their data is in RAM | anything about operations: those go on, with new translations |
//!
//! Only after "drained" may a page be given to somebody else. What is behind a wait in the queue
//! is done after it. With both, the memory write comes before the interrupt.
//!
//! # Time
//! A drain waits for accesses, not for operations: an access is a bounded number of chunks,
//! whatever the length of the operation, waits for nothing but memory, and ends before a page
//! request is sent. New accesses that begin during a drain do not make it longer.
//!
//! # When no acknowledgement comes
//! The device never says so by itself; the kernel measures the time, generously (the device may
//! have to wait for a processor of its host). Then fence it: clear bus mastering, or reset the
//! function, and read back from the configuration space. The write takes effect when it is
//! answered: from then on the device accesses nothing and raises no interrupt, so that pages may
//! be used again, whatever was not acknowledged. If an access hangs in memory, the answer comes
//! when the access has ended, or the host has given it up, and not before. After bus mastering
//! is set again all goes on where it was, and outstanding acknowledgements come; after a reset
//! none comes.

use crate::table::{bits, enumeration, layout};

layout! {
    /// A command of the invalidation queue.
    pub struct Command("extlb_command", 32) {
        /// A `CommandKind`.
        kind: u32 = 0,
        /// By kind: an `InvalidationScope`, wait flags, a `Response`, or audit flags; else zero.
        flags: u32 = 4,
        /// The context; zero for kinds that have none.
        context: u32 = 8,
        /// Page response: the group. Zero otherwise.
        group: u32 = 12,
        /// Range invalidation: start, a multiple of 4096. Wait, audit: where to write.
        addr: u64 = 16,
        /// Range invalidation: bytes, a multiple of 4096. Wait: what to write.
        value: u64 = 24,
    }
}

enumeration! {
    /// Commands.
    pub enum CommandKind: u32 {
        /// Forget translations: of a range, of a context, or all.
        Invalidate = 1,
        /// Acknowledge the commands before this one.
        Wait = 2,
        /// Read the context's entry again: start it, change it or stop it. A stopped context
        /// starts no new access, its operations end without a completion, and its
        /// translations are forgotten; a drained wait behind it tells when it is silent. A
        /// context with the same ring and shadow page as before goes on where it was, with the
        /// new entry; else, and after a stop, it starts anew with an empty ring. One that has
        /// failed stays so until it starts anew.
        ContextSync = 3,
        /// Answer a page request. One that nobody waits for is counted and ignored.
        PageResponse = 4,
        /// Compare every translation of the context, in the TLB and in its page table, with the
        /// process's own page table, and write an `AuditResult` at `addr`, a multiple of 64. A
        /// debug feature.
        Audit = 5,
    }
}

enumeration! {
    /// What an invalidation covers.
    pub enum InvalidationScope: u32 {
        /// `[addr, addr + value)` of a context.
        Range = 0,
        /// All of a context.
        Context = 1,
        /// Everything.
        All = 2,
    }
}

bits! {
    /// Flags of a wait command.
    pub mod wait Wait: u32 {
        /// Write the 8 bytes `value` at `addr`, a multiple of 8, when done.
        WRITE = 1 << 0,
        /// Raise the invalidation interrupt when done (after the write).
        INTERRUPT = 1 << 1,
        /// Done means: the commands before were carried out, no translation that they name is
        /// in the TLB or comes back from before.
        CLEARED = 1 << 4,
        /// Done means in addition: every access that began before has ended, and its data is in
        /// RAM. Without either flag, done means that the commands before were read.
        DRAINED = 1 << 5,
    }
}

bits! {
    /// Flags of an audit command.
    pub mod audit AuditFlag: u32 {
        /// The last look: each difference that it finds is a stale access.
        FINAL = 1 << 0,
    }
}

layout! {
    /// What an audit found.
    pub struct AuditResult("extlb_audit_result", 64) {
        /// Translations compared.
        checked: u64 = 0,
        /// Those that the process's page table does not have, or has with fewer rights.
        mismatches: u64 = 8,
        /// The first of them: its I/O virtual address.
        iova: u64 = 16,
        /// What the device would access there.
        device_gpa: u64 = 24,
        /// What the process has there; all ones for nothing.
        cpu_gpa: u64 = 32,
        /// Zero.
        reserved0: u64 = 40,
        /// Zero.
        reserved1: u64 = 48,
        /// 1, written last.
        done: u64 = 56,
    }
}

layout! {
    /// The kernel's shadow page: heads and tails of the privileged rings.
    ///
    /// The handshake of `iq_tail` with `iq_need_kick`, and of `prq_head` with `prq_need_kick`,
    /// is the one of the context's shadow page; the kick is a write to the `KICK` register.
    pub struct KernelShadow("extlb_kernel_shadow", 4096) {
        /// Index after the last command. Written by the kernel.
        iq_tail: u32 = 0x000,
        /// Zero.
        pad0: [u32; 15] = 0x004,
        /// Index after the last command done; its slot may be used again. By the device.
        iq_head: u32 = 0x040,
        /// Zero.
        pad1: [u32; 15] = 0x044,
        /// Not 0: the device sleeps and wants a kick. By the device.
        iq_need_kick: u32 = 0x080,
        /// Zero.
        pad2: [u32; 15] = 0x084,
        /// Index after the last page request. By the device.
        prq_tail: u32 = 0x0c0,
        /// Zero.
        pad3: [u32; 15] = 0x0c4,
        /// Index after the last page request consumed. Written by the kernel.
        prq_head: u32 = 0x100,
        /// Zero.
        pad4: [u32; 15] = 0x104,
        /// Not 0: the page request ring is full, the device wants a kick when there is room.
        prq_need_kick: u32 = 0x140,
        /// Zero.
        pad5: [u32; 15] = 0x144,
        /// Free for the kernel: where it lets wait commands write.
        wait: [u64; 464] = 0x180,
    }
}
