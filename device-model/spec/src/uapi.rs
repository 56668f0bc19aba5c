//! The interface of the kernel driver: `/dev/extlb0`.
//!
//! Each open file is one context once `CREATE` succeeded; it belongs to the address space that
//! called `CREATE`, and calls from another one (after fork) fail with `EPERM`. `mmap` gives the
//! doorbell page and the shadow page. `poll` says `POLLIN` when completions with the interrupt
//! flag came since the last `read`, and `POLLERR` when the context stopped; `read` of 8 bytes
//! takes the number of such completions, as an eventfd does.

use crate::table::{bits, layout};

/// The device node.
pub const DEVICE_NODE: &str = "/dev/extlb0";
/// Version of this interface, in `Info::version`.
pub const UAPI_VERSION: u32 = 1;
/// Type letter of the ioctls.
pub const IOC_TYPE: u8 = 0xeb;
/// `mmap` offset of the doorbell page: write-only, one page, shared.
pub const MMAP_DOORBELL: u64 = 0;
/// `mmap` offset of the shadow page: read-write, one page, shared.
pub const MMAP_SHADOW: u64 = 4096;

/// An ioctl of the driver: all are `_IOWR(IOC_TYPE, number, struct)`.
#[derive(Clone, Copy, Debug)]
pub struct Ioctl {
    /// Name in C, after `EXTLB_IOC_`.
    pub name: &'static str,
    /// Number.
    pub number: u8,
    /// C name of the structure.
    pub arg: &'static str,
    /// Size of the structure.
    pub size: usize,
    /// Documentation lines.
    pub doc: &'static [&'static str],
}

macro_rules! ioctls {
    ($( $(#[doc = $doc:literal])* $name:ident = $number:literal ( $arg:ident ) ;)*) => {
        $( $(#[doc = $doc])* pub const $name: Ioctl = Ioctl {
            name: stringify!($name), number: $number, arg: $arg::LAYOUT.c_name,
            size: $arg::SIZE, doc: &[$($doc),*],
        }; )*
        /// Every ioctl.
        pub const IOCTLS: &[Ioctl] = &[$($name),*];
    };
}

ioctls! {
    /// What the driver can do.
    INFO = 0 (Info);
    /// Makes this open file a context. `EBUSY`: it is one, or all contexts are taken.
    CREATE = 1 (Create);
    /// Lets the device use a range of addresses: pages follow the process, nothing is locked
    /// (or, in a pinned context, all pages are locked now). The range must be mapped.
    REGISTER = 2 (Register);
    /// Takes a range back. When it returns the device cannot touch it through this range.
    UNREGISTER = 3 (Unregister);
    /// Counters of this context and of the device.
    STATS = 4 (Stats);
    /// Lets the device compare its translations with the process's page table. `EOPNOTSUPP`
    /// without the oracle. Transient differences are looked at again before they are reported.
    AUDIT = 5 (Audit);
}

layout! {
    /// See `INFO`.
    pub struct Info("extlb_info", 32) {
        /// Version of the interface.
        version: u32 = 0,
        /// Flags that `CREATE` takes here.
        create_flags: u32 = 4,
        /// Contexts of the device.
        contexts: u32 = 8,
        /// 1 if the device has the oracle.
        oracle: u32 = 12,
        /// Largest log2 of a work ring.
        max_ring_log2: u32 = 16,
        /// Zero.
        reserved0: u32 = 20,
        /// Zero.
        reserved1: u64 = 24,
    }
}

bits! {
    /// Flags of `CREATE`.
    pub mod create Create: u32 {
        /// Follow the process with pte notifiers.
        FOLLOW_PTE = 1 << 0,
        /// Pin registered pages (FOLL_LONGTERM), as drivers without notifiers must.
        FOLLOW_PINNED = 1 << 1,
        /// Follow the process with an mmu notifier: told whenever the kernel flushes its TLBs.
        FOLLOW_MMU = 1 << 2,
        /// Follow the process with mmu interval notifiers: told before the kernel changes ptes.
        FOLLOW_INTERVAL = 1 << 3,
    }
}

layout! {
    /// See `CREATE`.
    pub struct Create("extlb_create", 32) {
        /// Address of the work ring, a multiple of 4096; registered by the program like any
        /// other memory, before it submits.
        ring: u64 = 0,
        /// log2 of its number of descriptors.
        ring_log2: u32 = 8,
        /// One of the create flags; 0 takes the driver's default.
        flags: u32 = 12,
        /// Returned: the number of the context.
        context: u32 = 16,
        /// Zero.
        reserved0: u32 = 20,
        /// Zero.
        reserved1: u64 = 24,
    }
}

layout! {
    /// See `REGISTER`.
    pub struct Register("extlb_register", 32) {
        /// Start, a multiple of 4096.
        addr: u64 = 0,
        /// Bytes, a multiple of 4096, not 0.
        len: u64 = 8,
        /// Zero.
        flags: u32 = 16,
        /// Returned: names the registration.
        handle: u32 = 20,
        /// Zero.
        reserved0: u64 = 24,
    }
}

layout! {
    /// See `UNREGISTER`.
    pub struct Unregister("extlb_unregister", 8) {
        /// From `REGISTER`.
        handle: u32 = 0,
        /// Zero.
        reserved0: u32 = 4,
    }
}

layout! {
    /// See `STATS`. Counters of this context, unless said otherwise.
    pub struct Stats("extlb_stats", 2688) {
        /// Times that the kernel took pages from the device and waited for its acknowledgment.
        shootdowns: u64 = 0,
        /// Device ptes cleared by them.
        shot_pages: u64 = 8,
        /// Page requests served.
        page_requests: u64 = 16,
        /// Page requests refused.
        refused_requests: u64 = 24,
        /// Device ptes installed.
        filled_pages: u64 = 32,
        /// Device ptes present now.
        mapped_pages: u64 = 40,
        /// Pages pinned now.
        pinned_pages: u64 = 48,
        /// Longest shootdown, in ns.
        shootdown_max_ns: u64 = 56,
        /// Device: operations that ended with success.
        ops_completed: u64 = 64,
        /// Device: operations that ended otherwise.
        ops_faulted: u64 = 72,
        /// Device: accesses that the oracle compared.
        oracle_checks: u64 = 80,
        /// Device: accesses that differed for a while.
        oracle_suspects: u64 = 88,
        /// Device: stale accesses.
        oracle_stale: u64 = 96,
        /// Calls of the memory manager, whether or not the device had something there.
        callbacks: u64 = 104,
        /// Times that pages were looked up for the device and changed before it had them.
        retried_fills: u64 = 112,
        /// Zero.
        reserved: u64 = 120,
        /// Latency of shootdowns in ns, from the call to the acknowledgment; for the buckets
        /// see the histogram's definition.
        shootdown_ns: [u64; 320] = 128,
    }
}

layout! {
    /// See `AUDIT`.
    pub struct Audit("extlb_audit", 64) {
        /// Returned: translations compared.
        checked: u64 = 0,
        /// Returned: those that differ, and stayed so.
        mismatches: u64 = 8,
        /// Returned: the first of them.
        iova: u64 = 16,
        /// Returned: what the device would access there.
        device_gpa: u64 = 24,
        /// Returned: what the process has there; all ones for nothing.
        cpu_gpa: u64 = 32,
        /// Zero.
        reserved: [u64; 3] = 40,
    }
}
