//! The register file: what software reads and writes, by the table of the spec crate.

use extlb_spec::regs::{self, Access, Register};
use serde::{Deserialize, Serialize};

use crate::state::{StateError, check};

/// Values of the writable registers, and the latch for reads in halves.
#[derive(Debug)]
pub(crate) struct RegisterFile {
    values: Vec<(Register, u64)>,
    /// Upper half of the 64-bit register at this offset, kept when its lower half was read.
    latch: Option<(u64, u32)>,
}

/// The register file as it is saved.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    /// (name, value) of the writable registers.
    values: Vec<(String, u64)>,
    latch: Option<(u64, u32)>,
}

/// A register, or a half of one, that an access hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hit {
    pub(crate) register: &'static Register,
    /// The access is 4 bytes of the 8; true: the upper ones.
    half: Option<bool>,
}

/// What an access hits; `None` if the device ignores it.
pub(crate) fn decode(offset: u64, len: usize) -> Option<Hit> {
    let register = regs::ALL
        .iter()
        .find(|r| (r.offset..r.end()).contains(&offset))?;
    let inside = offset - register.offset;
    let half = match (register.width, inside, len) {
        (4, 0, 4) | (8, 0, 8) => None,
        (8, 0, 4) => Some(false),
        (8, 4, 4) => Some(true),
        _ => return None,
    };
    Some(Hit { register, half })
}

impl RegisterFile {
    pub(crate) fn new() -> Self {
        let writable = regs::ALL.iter().filter(|r| r.writable != 0);
        Self {
            values: writable.map(|r| (*r, r.reset)).collect(),
            latch: None,
        }
    }

    pub(crate) fn save(&self) -> State {
        let Self { values, latch } = self;
        State {
            values: values.iter().map(|(r, v)| (r.name.into(), *v)).collect(),
            latch: *latch,
        }
    }

    pub(crate) fn restore(state: State) -> Result<Self, StateError> {
        let State { values, latch } = state;
        let mut file = Self::new();
        check(
            "the number of registers",
            values.len() == file.values.len(),
            values.len(),
        )?;
        for ((register, value), (name, saved)) in file.values.iter_mut().zip(values) {
            check("a register", name == register.name, &name)?;
            check("a register's value", saved & !register.writable == 0, saved)?;
            *value = saved;
        }
        let wide = |(offset, _): (u64, u32)| decode(offset, 8).is_some();
        check("the register latched", latch.is_none_or(wide), latch)?;
        file.latch = latch;
        Ok(file)
    }

    /// The value of a writable register.
    pub(crate) fn get(&self, register: &Register) -> u64 {
        let find = |(r, _): &&(Register, u64)| r.offset == register.offset;
        self.values
            .iter()
            .find(find)
            .map_or(register.reset, |v| v.1)
    }

    /// Writes; `configurable` says whether config registers are open.
    pub(crate) fn write(&mut self, hit: Hit, raw: u64, configurable: bool) {
        let register = hit.register;
        let open = match register.access {
            Access::ReadWrite => true,
            Access::Config => configurable,
            Access::ReadOnly | Access::WriteOnly => false,
        };
        if !open {
            return;
        }
        let (mask, value) = match hit.half {
            None => (u64::MAX, raw),
            Some(false) => (u64::from(u32::MAX), raw),
            Some(true) => (!u64::from(u32::MAX), raw << 32),
        };
        let mask = mask & register.writable;
        for (r, kept) in &mut self.values {
            if r.offset == register.offset {
                *kept = *kept & !mask | value & mask;
            }
        }
    }

    /// Reads; `current` is asked for the value of the whole register. The upper half is the one
    /// that belonged to the lower half read just before, so that a counter is read whole.
    pub(crate) fn read(&mut self, hit: Hit, current: impl FnOnce(&Self) -> u64) -> u64 {
        match hit.half {
            None => current(self),
            Some(false) => {
                let value = current(self);
                self.latch = Some((hit.register.offset, (value >> 32) as u32));
                value & u64::from(u32::MAX)
            }
            Some(true) => match self.latch.take() {
                Some((offset, high)) if offset == hit.register.offset => u64::from(high),
                _ => current(self) >> 32,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_aligned_words_and_their_halves_are_decoded() {
        assert_eq!(decode(0, 4).map(|h| h.register.name), Some("ID"));
        assert_eq!(decode(0x02c, 4).map(|h| h.register.name), Some("CTX_TABLE"));
        for (offset, len) in [
            (0, 8),
            (0, 2),
            (1, 4),
            (0x2a, 4),
            (0x2c, 8),
            (0x64, 4),
            (0xffc, 4),
        ] {
            assert_eq!(decode(offset, len), None, "{offset:#x} {len}");
        }
    }

    #[test]
    fn writes_keep_to_the_mask_and_the_state() {
        let mut file = RegisterFile::new();
        let whole = decode(0x028, 8).expect("CTX_TABLE");
        file.write(whole, u64::MAX, true);
        assert_eq!(file.get(&regs::CTX_TABLE), regs::CTX_TABLE.writable);
        file.write(decode(0x02c, 4).expect("its upper half"), 0, true);
        assert_eq!(file.get(&regs::CTX_TABLE), 0xffff_f000);
        file.write(whole, 0, false);
        assert_eq!(file.get(&regs::CTX_TABLE), 0xffff_f000, "locked");
    }

    #[test]
    fn a_counter_is_read_whole_in_halves() {
        let mut file = RegisterFile::new();
        let (low, high) = (decode(0x110, 4), decode(0x114, 4));
        let read = |file: &mut RegisterFile, hit: Option<Hit>, v| file.read(hit.unwrap(), |_| v);
        assert_eq!(read(&mut file, low, 0x1_ffff_ffff), 0xffff_ffff);
        assert_eq!(read(&mut file, high, 0x2_0000_0000), 1);
        assert_eq!(read(&mut file, high, 0x2_0000_0000), 2);
    }
}
