//! What a recorded run consists of.

use serde::{Deserialize, Serialize};

/// Bytes of one access to a BAR at most; the device looks at 4 or 8.
pub(super) const MAX_MMIO: u32 = 4096;

/// One entry of the log. A run is calls, each followed by what the device asked of its ports
/// meanwhile, in order, and by what it returned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    /// The device was called.
    Call(Call),
    /// The device asked something of a port, and got this answer.
    Port(Request, Answer),
    /// The call returned.
    Return(Return),
    /// The run ended in order: nothing follows. Holds what the device had done, in JSON.
    End(String),
}

/// A call into the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Call {
    /// [`crate::Device::mmio_read`] of so many bytes.
    MmioRead {
        /// The BAR.
        bar: u8,
        /// Offset in it.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// [`crate::Device::mmio_write`].
    MmioWrite {
        /// The BAR.
        bar: u8,
        /// Offset in it.
        offset: u64,
        /// What is written.
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// [`crate::Device::set_bus_master`].
    SetBusMaster(bool),
    /// [`crate::Device::reset`].
    Reset,
    /// [`crate::Device::quiesce`].
    Quiesce,
    /// [`crate::Device::engine_step`].
    EngineStep,
    /// [`crate::Device::invalidation_step`].
    InvalidationStep,
}

/// What the device asks of a port. Memory is by guest-physical address; the order that a word's
/// access asks for is not kept, as it has no effect on one thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Read bytes.
    Read {
        /// Where.
        from: u64,
        /// Bytes.
        len: u32,
    },
    /// Write bytes.
    Write {
        /// Where.
        to: u64,
        /// What.
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// Copy bytes within memory: the device never sees them, so the log has none.
    Copy {
        /// From where.
        from: u64,
        /// To where.
        to: u64,
        /// Bytes.
        len: u32,
    },
    /// Load a word.
    LoadU32(u64),
    /// Store a word.
    StoreU32(u64, u32),
    /// Load a double word.
    LoadU64(u64),
    /// Store a double word.
    StoreU64(u64, u64),
    /// Compare and exchange a double word.
    Exchange {
        /// Where.
        at: u64,
        /// Expected.
        current: u64,
        /// Put there instead.
        new: u64,
    },
    /// Fetch and add to a double word.
    Add(u64, u64),
    /// The time.
    Now,
    /// Send the message of a vector.
    Raise(u32),
    /// An event, as text.
    Event(String),
    /// Wake who steps the engine.
    WakeWork,
    /// Wake who steps the invalidation queue.
    WakeInvalidation,
}

/// What a port answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It is done.
    Done,
    /// The bytes read.
    Bytes(#[serde(with = "serde_bytes")] Vec<u8>),
    /// The word loaded, or found.
    Word(u64),
    /// Nanoseconds of the clock.
    Time(u64),
    /// No RAM answers here.
    BusError {
        /// Where.
        addr: u64,
        /// Bytes.
        len: u64,
    },
}

/// What a call returned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Return {
    /// Nothing.
    Nothing,
    /// The bytes read.
    Data(#[serde(with = "serde_bytes")] Vec<u8>),
    /// [`crate::Step::Busy`].
    Busy,
    /// [`crate::Step::Waiting`].
    Waiting,
    /// [`crate::Step::Idle`].
    Idle,
}

impl From<crate::Step> for Return {
    fn from(step: crate::Step) -> Self {
        match step {
            crate::Step::Busy => Return::Busy,
            crate::Step::Waiting => Return::Waiting,
            crate::Step::Idle => Return::Idle,
        }
    }
}

impl Request {
    /// Whether an answer is one to this request; a log may hold anything.
    pub(super) fn is_answered_by(&self, answer: &Answer) -> bool {
        match (self, answer) {
            (Request::Read { len, .. }, Answer::Bytes(bytes)) => {
                bytes.len() as u64 == u64::from(*len)
            }
            (Request::LoadU32(_), Answer::Word(word)) => u32::try_from(*word).is_ok(),
            (
                Request::LoadU64(_) | Request::Exchange { .. } | Request::Add(..),
                Answer::Word(_),
            ) => true,
            (Request::Now, Answer::Time(_)) => true,
            (
                Request::Write { .. }
                | Request::Copy { .. }
                | Request::StoreU32(..)
                | Request::StoreU64(..)
                | Request::Raise(_)
                | Request::Event(_)
                | Request::WakeWork
                | Request::WakeInvalidation,
                Answer::Done,
            ) => true,
            (request, Answer::BusError { .. }) => request.is_memory(),
            _ => false,
        }
    }

    /// Whether it goes to memory, and so can fail.
    pub(super) fn is_memory(&self) -> bool {
        match self {
            Request::Read { .. }
            | Request::Write { .. }
            | Request::Copy { .. }
            | Request::LoadU32(_)
            | Request::StoreU32(..)
            | Request::LoadU64(_)
            | Request::StoreU64(..)
            | Request::Exchange { .. }
            | Request::Add(..) => true,
            Request::Now
            | Request::Raise(_)
            | Request::Event(_)
            | Request::WakeWork
            | Request::WakeInvalidation => false,
        }
    }
}
