//! PCI configuration space: identity, BARs, and the capabilities PM, PCIe (with FLR) and MSI-X, by
//! the table of the spec crate.
//!
//! Bus mastering and the power state are obeyed. The memory-enable bit is kept, but not looked
//! at: it tells a device whether to decode addresses, and whoever gets here has named the BAR by
//! number, so that decoding was done (QEMU maps no BAR while the bit is clear; a user of VFIO may
//! rely on BARs that answer from the start).
//!
//! There are no extended capabilities: the space from 256 on reads as zero.

use extlb_spec::pci_config::{
    self as config, COMMAND, DEVICE_CONTROL, INITIATE_FLR, PM_CONTROL, command, power,
};

use crate::state::{StateError, check};

/// Size of the configuration space, in bytes.
pub const CONFIG_SIZE: usize = config::SIZE;

/// What a write to the configuration space asks of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Effect {
    /// Whether the device may access memory changed, to this.
    pub bus_master: Option<bool>,
    /// Function-level reset; the configuration space is reset already.
    pub reset: bool,
}

/// The configuration space.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    /// Bits that software can change.
    writable: Vec<u8>,
}

impl Default for ConfigSpace {
    fn default() -> Self {
        Self::new()
    }
}

impl ConfigSpace {
    /// As after power-on.
    pub fn new() -> Self {
        let mut space = Self {
            bytes: vec![0; CONFIG_SIZE],
            writable: vec![0; CONFIG_SIZE],
        };
        for field in config::ALL {
            let bytes = field.offset..field.offset + field.width;
            space.bytes[bytes.clone()].copy_from_slice(&field.reset.to_le_bytes()[..field.width]);
            space.writable[bytes].copy_from_slice(&field.writable.to_le_bytes()[..field.width]);
        }
        space
    }

    /// What software wrote, as bytes from the start of the space; what follows is as after
    /// power-on.
    pub fn save(&self) -> Vec<u8> {
        let Self { bytes, writable: _ } = self;
        let end = bytes.iter().rposition(|byte| *byte != 0);
        bytes[..end.map_or(0, |end| end + 1)].to_vec()
    }

    /// The space as it was saved; an error if a byte is one that software cannot have made.
    pub fn restore(saved: &[u8]) -> Result<Self, StateError> {
        let mut space = Self::new();
        let len = saved.len();
        check("the configuration space's length", len <= CONFIG_SIZE, len)?;
        for at in 0..CONFIG_SIZE {
            let byte = saved.get(at).copied().unwrap_or(0);
            let fixed = (byte ^ space.bytes[at]) & !space.writable[at];
            check("a byte of the configuration space", fixed == 0, (at, byte))?;
            space.bytes[at] = byte;
        }
        let state = space.bytes[PM_CONTROL.offset] & power::STATE;
        let known = state == power::D0 || state == power::D3_HOT;
        check("the power state", known, state)?;
        Ok(space)
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// Reads; bytes beyond the end are zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|o| o.checked_add(i));
            *byte = at.and_then(|at| self.bytes.get(at)).copied().unwrap_or(0);
        }
    }

    /// Writes what is writable, and says what follows from it.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let before = self.bus_master();
        let mut reset = false;
        for (i, byte) in data.iter().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|o| o.checked_add(i));
            let Some(at) = at.filter(|at| *at < CONFIG_SIZE) else {
                break;
            };
            // The reset bit reads as zero: it acts, and is not kept.
            let high = (INITIATE_FLR >> 8) as u8;
            reset |= at == DEVICE_CONTROL.offset + 1 && byte & high != 0;
            let mask = self.writable[at];
            let kept = self.bytes[at];
            self.bytes[at] = kept & !mask | byte & mask;
            // A state that the device does not have: the write is discarded (7.5.2.2).
            let state = self.bytes[at] & power::STATE;
            if at == PM_CONTROL.offset && state != power::D0 && state != power::D3_HOT {
                self.bytes[at] = kept;
            }
        }
        if reset {
            *self = Self::new();
        }
        let now = self.bus_master();
        Effect {
            bus_master: (before != now).then_some(now),
            reset,
        }
    }

    /// Whether the device may access memory: bus mastering is on, and the power.
    pub fn bus_master(&self) -> bool {
        self.is_awake() && self.u16(COMMAND.offset) & command::BUS_MASTER != 0
    }

    /// Whether the device is in D0. In D3hot it answers in this space only.
    pub fn is_awake(&self) -> bool {
        self.bytes[PM_CONTROL.offset] & power::STATE == power::D0
    }
}

impl std::fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConfigSpace")
            .field("command", &self.u16(COMMAND.offset))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use extlb_spec::pci_config::{CAPABILITIES, MSIX_CONTROL};
    use extlb_spec::{
        BAR_DOORBELLS, BAR_DOORBELLS_SIZE, BAR_MSIX, BAR_MSIX_SIZE, BAR_REGS, BAR_REGS_SIZE,
        PCI_DEVICE_ID, PCI_VENDOR_ID, VECTORS,
    };

    use super::*;

    const BAR_SIZES: [(u8, u64); 3] = [
        (BAR_REGS, BAR_REGS_SIZE),
        (BAR_DOORBELLS, BAR_DOORBELLS_SIZE),
        (BAR_MSIX, BAR_MSIX_SIZE),
    ];

    fn read_u32(space: &ConfigSpace, at: usize) -> u32 {
        let mut bytes = [0; 4];
        space.read(at as u64, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn bars_tell_their_size() {
        for (bar, size) in BAR_SIZES {
            let mut space = ConfigSpace::new();
            let at = 0x10 + 4 * usize::from(bar);
            space.write(at as u64, &[0xff; 8]);
            let low = u64::from(read_u32(&space, at));
            let high = u64::from(read_u32(&space, at + 4));
            assert_eq!(!(high << 32 | low & !0xf) + 1, size, "BAR {bar}");
            assert_eq!(low & 0xf, 0b100, "64 bits, not prefetchable");
        }
    }

    #[test]
    fn the_capability_list_ends_and_names_what_is_there() {
        let space = ConfigSpace::new();
        let mut at = space.bytes[CAPABILITIES.offset] as usize;
        let mut found = Vec::new();
        while at != 0 && found.len() < 10 {
            found.push(space.bytes[at]);
            at = space.bytes[at + 1] as usize;
        }
        assert_eq!(found, [0x01, 0x10, 0x11]);
        assert_eq!(space.u16(MSIX_CONTROL.offset) + 1, VECTORS as u16);
    }

    #[test]
    fn bus_master_and_function_level_reset_are_told() {
        let mut space = ConfigSpace::new();
        let on = space.write(COMMAND.offset as u64, &command::BUS_MASTER.to_le_bytes());
        assert_eq!(on.bus_master, Some(true));
        let flr = space.write(DEVICE_CONTROL.offset as u64, &INITIATE_FLR.to_le_bytes());
        assert_eq!((flr.bus_master, flr.reset), (Some(false), true));
        assert!(!space.bus_master());
        assert_eq!(space.u16(DEVICE_CONTROL.offset), 0x2810);
    }

    #[test]
    fn the_power_states_are_d0_and_d3hot() {
        let mut space = ConfigSpace::new();
        space.write(COMMAND.offset as u64, &command::BUS_MASTER.to_le_bytes());
        for absent in [1, 2] {
            assert_eq!(
                space.write(PM_CONTROL.offset as u64, &[absent]),
                Effect::default()
            );
            assert!(space.is_awake());
        }
        let asleep = space.write(PM_CONTROL.offset as u64, &[3]);
        assert_eq!(asleep.bus_master, Some(false));
        assert!(!space.is_awake());
        // Bus mastering is kept, and has its effect again in D0.
        let awake = space.write(PM_CONTROL.offset as u64, &[0, 0]);
        assert_eq!(awake.bus_master, Some(true));
        assert_eq!(space.bytes[PM_CONTROL.offset], power::NO_SOFT_RESET);
    }

    #[test]
    fn writes_change_what_is_writable_at_any_width_and_offset() {
        let mut bytewise = ConfigSpace::new();
        let whole = ConfigSpace::new();
        let keep = [
            COMMAND.offset,
            0x0c,
            PM_CONTROL.offset,
            DEVICE_CONTROL.offset,
        ];
        for at in (0..CONFIG_SIZE).filter(|at| !keep.contains(at)) {
            let all = if at == DEVICE_CONTROL.offset + 1 {
                0x7f
            } else {
                0xff
            };
            bytewise.write(at as u64, &[all]);
        }
        for at in 0..CONFIG_SIZE {
            let changed = bytewise.bytes[at] ^ whole.bytes[at];
            assert_eq!(changed & !whole.writable[at], 0, "{at:#x}");
        }
        // Nothing beyond the BARs, the scratch bytes and the capabilities' controls.
        assert!(whole.writable[256..].iter().all(|mask| *mask == 0));
        assert!(whole.bytes[256..].iter().all(|byte| *byte == 0));
        let mut three = [0; 3];
        bytewise.read(0x11, &mut three);
        assert_eq!(three, bytewise.bytes[0x11..0x14]);
    }

    #[test]
    fn identity_cannot_be_written_and_the_end_is_the_end() {
        let mut space = ConfigSpace::new();
        space.write(0, &[0xff; 4]);
        let id = u32::from(PCI_DEVICE_ID) << 16 | u32::from(PCI_VENDOR_ID);
        assert_eq!(read_u32(&space, 0), id);
        space.write(CONFIG_SIZE as u64 - 1, &[0xff; 8]);
        space.write(u64::MAX, &[0xff; 8]);
        let mut bytes = [1; 8];
        space.read(u64::MAX - 3, &mut bytes);
        assert_eq!(bytes, [0; 8]);
    }
}
