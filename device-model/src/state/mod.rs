//! Save and restore: all that a device knows, in a file, at any moment of its work.
//!
//! Between two accesses a device is a value: registers, queues' positions, translations, the
//! progress of operations, what they wait for. [`Device::hold`] makes such a moment, and
//! [`Held::save`] writes that value down; [`Device::restore`] makes a device of it that goes on as
//! if nothing had happened.
//!
//! Guest memory is not part of it: it is the guest's, and whoever saves a device saves the memory
//! at the same time, while the device is held. Nor are the ports: clock, memory and interrupts are
//! given anew. Times are kept as ages, so the new clock may begin anywhere.
//!
//! What is read from a file is not believed: a state that no device can be in, or not one with
//! this configuration, is a [`StateError`] that says what is wrong. It cannot be told whether a
//! state *was* reached: a file made up with care makes a device that has other translations than
//! the page tables of its guest, so take such files from your own disk only.
//!
//! QEMU's vfio-user client does not migrate devices: there, `migrate` leaves the device out. This
//! is for whoever has the device in its own process, and for servers of one's own.
//!
//! # How nothing is left out
//!
//! Structures of the core are written as they are, by derived code: a new field is saved without
//! anybody thinking of it. Each is taken apart field by field in its `check`, without `..`: there
//! somebody has to think of it, or it does not compile.

mod file;
mod held;
mod restore;

#[cfg(test)]
mod tests;

use std::io;
use std::time::Duration;

use extlb_spec::addr::GPA_BITS;
use extlb_spec::{Gpa, PAGE_SIZE};

pub use file::{DeviceState, Saved, SlotState, VERSION};
pub use held::Held;

#[cfg(doc)]
use crate::Device;

/// Why a state cannot be saved, read or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file cannot be read.
    #[error("cannot read the saved state")]
    Read(#[source] io::Error),
    /// It is something else.
    #[error("this is no saved state of a device")]
    NotAState,
    /// A version that this program does not know.
    #[error("the saved state has format {0}, and this program reads format {VERSION}")]
    Format(u32),
    /// It ends too early.
    #[error("the saved state is cut off")]
    Cut,
    /// It is damaged.
    #[error("the saved state is damaged: its checksum is wrong")]
    Checksum,
    /// It lacks something, or has something that this program does not know.
    #[error("the saved state is not understood")]
    Syntax(#[source] serde_json::Error),
    /// A value that no device has, or none with this configuration.
    #[error("the saved state makes no sense: {what} is {value}")]
    Value {
        /// What.
        what: &'static str,
        /// What it is, in the file.
        value: String,
    },
    /// The device is configured in another way than the one that was saved.
    #[error("the saved state is of a device with another configuration: {0} differs")]
    Config(&'static str),
    /// The configuration is one that no device can have.
    #[error(transparent)]
    BadConfig(#[from] crate::ConfigError),
    /// A thread has panicked in the device: what it left behind is not passed on.
    #[error("the state of the device cannot be written down")]
    Broken(#[source] serde_json::Error),
}

/// Refuses a value unless it is good.
pub(crate) fn check(
    what: &'static str,
    good: bool,
    value: impl std::fmt::Debug,
) -> Result<(), StateError> {
    match good {
        true => Ok(()),
        false => Err(wrong(what, value)),
    }
}

/// A value that is not good.
pub(crate) fn wrong(what: &'static str, value: impl std::fmt::Debug) -> StateError {
    StateError::Value {
        what,
        value: format!("{value:x?}"),
    }
}

/// Numbers that are only counted up: room for as much again, so that they never overflow.
pub(crate) const MAX_COUNT: u64 = 1 << 62;

/// From the clock of the device that was saved to that of the one that goes on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shift {
    /// The old clock's time when the state was saved.
    from: Duration,
    /// The new clock's time now.
    to: Duration,
}

impl Shift {
    /// A time of the old clock by the new one. What was before the new clock began was then: it
    /// counts as a little less long ago.
    pub(crate) fn apply(self, time: Duration) -> Duration {
        self.to.saturating_sub(self.from.saturating_sub(time))
    }

    /// Likewise, in nanoseconds.
    fn nanos(self, time: u64) -> u64 {
        let time = self.apply(Duration::from_nanos(time));
        u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Whether something is the address of a page that a page table entry can hold.
pub(crate) fn is_page(gpa: Gpa) -> bool {
    gpa.is_aligned(PAGE_SIZE) && gpa.0 < 1 << GPA_BITS
}

/// Maps whose keys are no text, as lists of pairs.
pub(crate) mod pairs {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<K: Serialize, V: Serialize, S: Serializer>(
        map: &BTreeMap<K, V>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_seq(map)
    }

    pub(crate) fn deserialize<'de, K, V, D>(from: D) -> Result<BTreeMap<K, V>, D::Error>
    where
        K: Ord + Deserialize<'de>,
        V: Deserialize<'de>,
        D: Deserializer<'de>,
    {
        let pairs = Vec::<(K, V)>::deserialize(from)?;
        Ok(pairs.into_iter().collect())
    }
}
