//! What can go wrong.

use std::path::PathBuf;

use extlb_spec::Iova;
use extlb_spec::context::ContextError;
use extlb_spec::regs::FatalError;
use extlb_spec::work::{MAX_LEN, Status};
use nix::errno::Errno;

/// An error of the library. Addresses are virtual addresses of the process, sizes are bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device node could not be opened.
    #[error("{path}: {errno}; is the extlb driver loaded, and may you open it?")]
    Open {
        /// The device node.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// The driver speaks another version of the interface.
    #[error("the driver has interface version {found}, this library {wanted}: rebuild one of them")]
    Version {
        /// What the driver has.
        found: u32,
        /// What this library has.
        wanted: u32,
    },
    /// A call to the driver failed.
    #[error("{call}: {errno}")]
    Call {
        /// The call, as the driver names it.
        call: &'static str,
        /// Why.
        errno: Errno,
    },
    /// An argument that no device takes.
    #[error("{0}")]
    Argument(&'static str),
    /// This backing has no such thing.
    #[error("{0} is not supported by this backing")]
    Unsupported(&'static str),
    /// Two operands that must have one length.
    #[error("operands of {src} and {dst} bytes: they must be equally long")]
    Lengths {
        /// Length of the source.
        src: usize,
        /// Length of the destination.
        dst: usize,
    },
    /// An operation longer than the device takes.
    #[error("{len} bytes in one operation; the most is {MAX_LEN}")]
    TooLong {
        /// The length.
        len: u64,
    },
    /// An operand that is registered with another context.
    #[error("the operand at {addr} is registered with another context")]
    Foreign {
        /// Its start.
        addr: Iova,
    },
    /// The ring has no free slot (only from `try_…` calls).
    #[error("the ring is full; wait for an operation, then try again")]
    RingFull,
    /// The device could not reach an address of the operation; the context goes on.
    #[error("page fault at {addr} ({}); {bytes} bytes were done", if *write { "write" } else { "read" })]
    Fault {
        /// The address.
        addr: Iova,
        /// Whether the access was a write.
        write: bool,
        /// Bytes done before it.
        bytes: u64,
    },
    /// The device refused the operation; the context goes on.
    #[error("the device refused the operation: {status:?}")]
    Refused {
        /// How.
        status: Status,
    },
    /// The page table is broken; the context goes on.
    #[error("broken page table at {addr}")]
    Bus {
        /// The address.
        addr: Iova,
    },
    /// The context stopped. Close it and create another.
    #[error("the context stopped at {addr}: {error:?}; close it and create another")]
    Stopped {
        /// Why.
        error: ContextError,
        /// The address it is about.
        addr: Iova,
    },
    /// The device or its driver is gone.
    #[error("the device is dead ({errno}); it has to be reset or restarted")]
    Dead {
        /// What the driver said.
        errno: Errno,
    },
    /// There is a device, but it is not one of ours.
    #[error(
        "no extlb device: its identity is {found:#010x}, not {:#010x}",
        extlb_spec::regs::ID_VALUE
    )]
    Identity {
        /// What the identity register holds.
        found: u32,
    },
    /// The device speaks another version of the register interface.
    #[error("the device has register interface {}.{}, this library {}.{}: use one that fits", found >> 16, found & 0xffff, wanted >> 16, wanted & 0xffff)]
    Interface {
        /// What the device has: major in the upper half, minor in the lower.
        found: u32,
        /// What this library has.
        wanted: u32,
    },
    /// The device stopped on a fatal error.
    #[error("the device stopped on a fatal error ({error:?}, {info:#x}); restart it")]
    Fatal {
        /// Why.
        error: FatalError,
        /// What it is about: an address or an index.
        info: u64,
    },
    /// The hardware could not be opened or operated; says what to do.
    #[error("{0}")]
    Hardware(String),
    /// Memory cannot be mapped for the device, because no more may be locked.
    #[error(
        "{len} bytes cannot be locked for the device: RLIMIT_MEMLOCK is {limit} bytes, for all that \
         is mapped; raise it (ulimit -l, LimitMEMLOCK=, or CAP_IPC_LOCK), or map less at a time"
    )]
    LockLimit {
        /// Bytes of the mapping.
        len: u64,
        /// The limit of this process.
        limit: u64,
    },
    /// A range that is registered with this context already, in part at least.
    #[error("memory at {addr} is registered with this context already; register it once")]
    Overlap {
        /// Start of the range that is there; of the new one, if the backing does not tell.
        addr: Iova,
    },
    /// The device broke the protocol. The queue takes no more work.
    #[error("the device broke the protocol: {0}")]
    Protocol(Nonsense),
}

/// What a device said that no device may say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Nonsense {
    /// The head moved back, or beyond what was submitted.
    #[error("head {head} is outside of [{from}, {published}]")]
    Head {
        /// The head.
        head: u32,
        /// The head before.
        from: u32,
        /// Index after the last descriptor submitted.
        published: u32,
    },
    /// A completion status that does not exist, or not for this operation.
    #[error("completion status {0}")]
    Status(u32),
    /// More bytes done than asked for, or fewer although all succeeded.
    #[error("{bytes} of {len} bytes done with status {status}")]
    Bytes {
        /// Bytes said to be done.
        bytes: u64,
        /// Bytes asked for.
        len: u64,
        /// Status of the completion.
        status: u32,
    },
    /// A fault at an address that the operation does not have.
    #[error("fault at {0}, which is not in the operation")]
    FaultAddress(Iova),
    /// A result that the operation cannot have.
    #[error("result {0:#x}")]
    Result(u64),
    /// An error of the context that does not exist.
    #[error("context error {0}")]
    ContextError(u32),
    /// The head of the invalidation queue moved beyond what was posted.
    #[error("command head {head}, with {tail} commands posted")]
    CommandHead {
        /// The head.
        head: u32,
        /// Index after the last command posted.
        tail: u32,
    },
    /// An acknowledgement that nobody asked for.
    #[error("acknowledgement {done}, with {asked} asked for")]
    Acknowledged {
        /// What the device wrote.
        done: u64,
        /// The last that was asked for.
        asked: u64,
    },
    /// The tail of the page request ring is further ahead than the ring is long.
    #[error("page request tail {tail}, with {head} taken")]
    RequestTail {
        /// The tail.
        tail: u32,
        /// Index after the last record taken.
        head: u32,
    },
    /// A value that no device has there.
    #[error("{name} reads {value:#x}")]
    Register {
        /// The register, or the field of a record.
        name: &'static str,
        /// What it reads as.
        value: u64,
    },
}

/// Result of the library's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An operation that was not submitted, with the buffers that were meant for it.
pub struct Refused<T> {
    /// Why not.
    pub error: Error,
    /// The buffers, untouched.
    pub buffers: T,
}

impl<T> std::fmt::Debug for Refused<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Refused")
            .field("error", &self.error)
            .finish_non_exhaustive()
    }
}

impl<T> std::fmt::Display for Refused<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.error.fmt(f)
    }
}

impl<T> std::error::Error for Refused<T> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl<T> From<Refused<T>> for Error {
    fn from(refused: Refused<T>) -> Self {
        refused.error
    }
}
