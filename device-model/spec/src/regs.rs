//! The register table of [`BAR_REGS`](crate::BAR_REGS).
//!
//! Registers are read and written with naturally aligned accesses of 4 bytes; 64-bit ones also
//! with 8 bytes, or as two halves, low half first. Other accesses read as zero and are ignored
//! when written. No register is needed on a hot path: heads, tails and acknowledgements live in
//! RAM (see [`crate::invalidation::KernelShadow`], [`crate::context::ContextShadow`]).

use crate::table::bits;

/// What software may do with a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read-only; writes are ignored.
    ReadOnly,
    /// Read-write.
    ReadWrite,
    /// Read-write while `CTRL.ENABLE` is clear; writes are ignored while it is set.
    Config,
    /// Write-only; reads as zero.
    WriteOnly,
}

/// A register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register {
    /// Name.
    pub name: &'static str,
    /// Offset in the BAR, in bytes.
    pub offset: u64,
    /// Width in bytes: 4 or 8.
    pub width: u8,
    /// Access.
    pub access: Access,
    /// Value after reset.
    pub reset: u64,
    /// Bits that software can change.
    pub writable: u64,
    /// Documentation lines.
    pub doc: &'static [&'static str],
}

macro_rules! registers {
    ($( $(#[doc = $doc:literal])* $name:ident : $width:literal @ $offset:literal $access:ident
        reset $reset:expr, writable $writable:expr ;)*) => {
        $( $(#[doc = $doc])* pub const $name: Register = Register {
            name: stringify!($name), offset: $offset, width: $width, access: Access::$access,
            reset: $reset, writable: $writable, doc: &[$($doc),*],
        }; )*
        /// Every register, in order of offset.
        pub const ALL: &[Register] = &[$($name),*];
    };
}

/// Value of [`ID`]: "EXLB" in memory order.
pub const ID_VALUE: u32 = u32::from_le_bytes(*b"EXLB");
/// Value of [`VERSION`]: major in the upper half, minor in the lower.
pub const VERSION_VALUE: u32 = 0x0001_0002;
/// Largest log2 of the entries of the invalidation queue and of the page request ring.
pub const MAX_RING_LOG2: u32 = 15;
/// Smallest log2 of the entries of the same.
pub const MIN_RING_LOG2: u32 = 4;
/// Number of records behind [`ORACLE_SELECT`].
pub const ORACLE_RECORDS: u32 = 32;

/// Value of [`CAP`].
pub const CAP_VALUE: u64 = crate::MAX_CONTEXTS.ilog2() as u64
    | (crate::addr::IOVA_BITS as u64) << 8
    | (MAX_RING_LOG2 as u64) << 16
    | cap::ORACLE;

const ADDR: u64 = ((1 << crate::addr::GPA_BITS) - 1) & !(crate::PAGE_SIZE - 1);

registers! {
    /// Identity: "EXLB".
    ID: 4 @ 0x000 ReadOnly reset ID_VALUE as u64, writable 0;
    /// Interface version: major in bits 31:16, minor in bits 15:0.
    VERSION: 4 @ 0x004 ReadOnly reset VERSION_VALUE as u64, writable 0;
    /// Capabilities, see the cap bits.
    CAP: 8 @ 0x008 ReadOnly reset CAP_VALUE, writable 0;
    /// Control, see the ctrl bits.
    CTRL: 4 @ 0x010 ReadWrite reset 0, writable ctrl::ENABLE as u64;
    /// Status, see the status bits.
    STATUS: 4 @ 0x014 ReadOnly reset 0, writable 0;
    /// Why the device stopped: a `FatalError`, 0 while it has not.
    ERROR: 4 @ 0x018 ReadOnly reset 0, writable 0;
    /// What the fatal error is about: an address or an index.
    ERROR_INFO: 8 @ 0x020 ReadOnly reset 0, writable 0;
    /// Guest-physical address of the context table.
    CTX_TABLE: 8 @ 0x028 Config reset 0, writable ADDR;
    /// Number of entries of the context table, 1 to 256.
    CTX_COUNT: 4 @ 0x030 Config reset 0, writable 0x1ff;
    /// Guest-physical address of the invalidation queue.
    IQ_BASE: 8 @ 0x038 Config reset 0, writable ADDR;
    /// log2 of the number of entries of the invalidation queue.
    IQ_LOG2: 4 @ 0x040 Config reset 0, writable 0x1f;
    /// Guest-physical address of the page request ring.
    PRQ_BASE: 8 @ 0x048 Config reset 0, writable ADDR;
    /// log2 of the number of entries of the page request ring.
    PRQ_LOG2: 4 @ 0x050 Config reset 0, writable 0x1f;
    /// Guest-physical address of the kernel's shadow page.
    SHADOW: 8 @ 0x058 Config reset 0, writable ADDR;
    /// Asks the device to look at the kernel's shadow page again; the value does not matter.
    KICK: 4 @ 0x060 WriteOnly reset 0, writable 0;

    /// Work operations that ended with success.
    OPS_COMPLETED: 8 @ 0x100 ReadOnly reset 0, writable 0;
    /// Work operations that ended otherwise.
    OPS_FAULTED: 8 @ 0x108 ReadOnly reset 0, writable 0;
    /// Bytes moved for work operations.
    BYTES: 8 @ 0x110 ReadOnly reset 0, writable 0;
    /// Translations served by the TLB.
    TLB_HITS: 8 @ 0x118 ReadOnly reset 0, writable 0;
    /// Translations that walked.
    TLB_MISSES: 8 @ 0x120 ReadOnly reset 0, writable 0;
    /// Valid TLB entries replaced by another.
    TLB_EVICTIONS: 8 @ 0x128 ReadOnly reset 0, writable 0;
    /// TLB entries removed by invalidation commands.
    TLB_SHOT_DOWN: 8 @ 0x130 ReadOnly reset 0, writable 0;
    /// Invalidation commands done.
    INVALIDATIONS: 8 @ 0x138 ReadOnly reset 0, writable 0;
    /// Drains done.
    DRAINS: 8 @ 0x140 ReadOnly reset 0, writable 0;
    /// Page requests sent.
    PAGE_REQUESTS: 8 @ 0x148 ReadOnly reset 0, writable 0;
    /// Page responses for no waiting request: late, repeated, or for a context that ended.
    STRAY_RESPONSES: 8 @ 0x150 ReadOnly reset 0, writable 0;
    /// Accesses for work operations, by translation, that no RAM answered. Since 1.1.
    BUS_ERRORS: 8 @ 0x158 ReadOnly reset 0, writable 0;

    /// Accesses that the oracle compared with the process's own page table.
    ORACLE_CHECKS: 8 @ 0x180 ReadOnly reset 0, writable 0;
    /// Accesses that differed; each must be closed by an invalidation that covers it.
    ORACLE_SUSPECTS: 8 @ 0x188 ReadOnly reset 0, writable 0;
    /// Stale accesses: the rule was broken. Stays 0 on a correct system.
    ORACLE_STALE: 8 @ 0x190 ReadOnly reset 0, writable 0;
    /// Selects the record shown below; the first records since reset are kept.
    ORACLE_SELECT: 4 @ 0x198 ReadWrite reset 0, writable 0xff;
    /// Kind of the selected record: a `StaleKind`, 0 for no record.
    ORACLE_KIND: 4 @ 0x1a0 ReadOnly reset 0, writable 0;
    /// Context of the selected record.
    ORACLE_CONTEXT: 4 @ 0x1a4 ReadOnly reset 0, writable 0;
    /// I/O virtual address of the access.
    ORACLE_IOVA: 8 @ 0x1a8 ReadOnly reset 0, writable 0;
    /// Guest-physical address that the device used.
    ORACLE_DEVICE_GPA: 8 @ 0x1b0 ReadOnly reset 0, writable 0;
    /// Guest-physical address in the process's page table; all ones for not present, or for a
    /// write where the process may not write.
    ORACLE_CPU_GPA: 8 @ 0x1b8 ReadOnly reset 0, writable 0;
    /// Number of the TLB fill that the access used.
    ORACLE_FILL: 8 @ 0x1c0 ReadOnly reset 0, writable 0;
    /// Number of the last invalidation done at the time.
    ORACLE_INVALIDATION: 8 @ 0x1c8 ReadOnly reset 0, writable 0;

    /// Selects the context whose statistics, since the last reset, are shown below. Since 1.2,
    /// as are they.
    CTX_STAT_SELECT: 4 @ 0x1d0 ReadWrite reset 0, writable (crate::MAX_CONTEXTS - 1) as u64;
    /// Translations of the selected context served by the TLB.
    CTX_TLB_HITS: 8 @ 0x1d8 ReadOnly reset 0, writable 0;
    /// Translations of it that walked.
    CTX_TLB_MISSES: 8 @ 0x1e0 ReadOnly reset 0, writable 0;
    /// Walks that found a leaf; the others ended in a page request or an error.
    CTX_WALKS: 8 @ 0x1e8 ReadOnly reset 0, writable 0;
    /// Walks that began at a table that the walk cache knew, and not at the root.
    CTX_WALK_CACHE_HITS: 8 @ 0x1f0 ReadOnly reset 0, writable 0;
    /// Valid TLB entries, of any context, replaced by fills of it.
    CTX_TLB_EVICTIONS: 8 @ 0x1f8 ReadOnly reset 0, writable 0;
    /// TLB entries of it removed by invalidation commands.
    CTX_TLB_SHOT_DOWN: 8 @ 0x200 ReadOnly reset 0, writable 0;
}

bits! {
    /// Bits of `CTRL`.
    pub mod ctrl Ctrl: u32 {
        /// Run. Setting it checks the configuration; clearing it stops and drains.
        ENABLE = 1 << 0,
        /// Write 1 to reset the device; reads as 0. When a later read returns, all is done.
        RESET = 1 << 1,
    }
}

bits! {
    /// Bits of `STATUS`.
    pub mod status Status: u32 {
        /// The device runs.
        ENABLED = 1 << 0,
        /// The device stopped on a fatal error; only a reset helps.
        FATAL = 1 << 1,
    }
}

bits! {
    /// Fields of `CAP`.
    pub mod cap Cap: u64 {
        /// log2 of the number of contexts.
        CONTEXTS_LOG2_MASK = 0xff,
        /// Width of an I/O virtual address.
        IOVA_BITS_MASK = 0xff << 8,
        /// log2 of the largest invalidation queue and page request ring.
        RING_LOG2_MASK = 0xff << 16,
        /// The device has the oracle: it compares its translations with the process's own.
        ORACLE = 1 << 32,
    }
}

impl Register {
    /// End of the register (exclusive).
    pub const fn end(&self) -> u64 {
        self.offset + self.width as u64
    }
}

crate::table::enumeration! {
    /// Why a device stopped.
    pub enum FatalError: u32 {
        /// A register holds what the device cannot run with.
        BadConfig = 1,
        /// An entry of the invalidation queue could not be read.
        IqFetch = 2,
        /// An entry of the invalidation queue makes no sense.
        BadCommand = 3,
        /// The tail of the invalidation queue is further ahead than the queue is long.
        IqOverrun = 4,
        /// An entry of the context table could not be read.
        ContextTable = 5,
        /// The page request ring could not be written.
        PrqWrite = 6,
        /// The word that a wait command names could not be written.
        WaitWrite = 7,
        /// The kernel's shadow page could not be accessed.
        Shadow = 8,
    }
}

crate::table::enumeration! {
    /// What makes an access stale.
    pub enum StaleKind: u32 {
        /// The translation differed from the process's page table, and no invalidation that
        /// covers it came within the bound.
        NotInvalidated = 1,
        /// The translation differed, and was older than an invalidation that covers it.
        SurvivedInvalidation = 2,
        /// The access was still running when a drain that should have waited was acknowledged.
        OutlivedDrain = 3,
        /// An audit found a translation that differs, and it stayed so.
        Audit = 4,
    }
}
