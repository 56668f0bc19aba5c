//! PCI configuration space: identity, BARs, and the capabilities PM, PCIe (with FLR) and MSI-X.
//!
//! Sections named are those of the PCI Express Base Specification 6.0.

use extlb_spec::{
    BAR_DOORBELLS, BAR_DOORBELLS_SIZE, BAR_MSIX, BAR_MSIX_SIZE, BAR_REGS, BAR_REGS_SIZE,
    MSIX_PBA_OFFSET, PCI_CLASS, PCI_DEVICE_ID, PCI_REVISION, PCI_VENDOR_ID, VECTORS,
};

/// Size of the configuration space, in bytes.
pub const CONFIG_SIZE: usize = 4096;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CLASS: usize = 0x08;
const BARS: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_NO_INTX: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Power management capability (7.5.2).
const PM: usize = 0x40;
const PM_ID: u8 = 0x01;
/// PCI Express capability (7.5.3).
const PCIE: usize = 0x50;
const PCIE_ID: u8 = 0x10;
const DEVICE_CONTROL: usize = PCIE + 0x08;
const DEVICE_CONTROL_FLR: u16 = 1 << 15;
/// MSI-X capability (7.7.2).
const MSIX: usize = 0x90;
const MSIX_ID: u8 = 0x11;
const MSIX_CONTROL: usize = MSIX + 2;

/// (BAR, size): all are 64-bit and not prefetchable, as their reads must not be repeated.
const BAR_SIZES: [(u8, u64); 3] = [
    (BAR_REGS, BAR_REGS_SIZE),
    (BAR_DOORBELLS, BAR_DOORBELLS_SIZE),
    (BAR_MSIX, BAR_MSIX_SIZE),
];
/// Type bits of a 64-bit memory BAR.
const BAR_64: u32 = 0b100;

/// What a write to the configuration space asks of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Effect {
    /// The bus-master bit changed, to this.
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
        space.header();
        space.bars();
        space.capabilities();
        space
    }

    fn header(&mut self) {
        self.put(0x00, &PCI_VENDOR_ID.to_le_bytes());
        self.put(0x02, &PCI_DEVICE_ID.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_NO_INTX;
        self.allow(COMMAND, &command.to_le_bytes());
        self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        let class = PCI_CLASS << 8 | u32::from(PCI_REVISION);
        self.put(CLASS, &class.to_le_bytes());
        self.put(SUBSYSTEM, &PCI_VENDOR_ID.to_le_bytes());
        self.put(SUBSYSTEM + 2, &PCI_DEVICE_ID.to_le_bytes());
        // Cache line size and interrupt line: scratch for software.
        self.allow(0x0c, &[0xff]);
        self.allow(0x3c, &[0xff]);
    }

    fn bars(&mut self) {
        for (bar, size) in BAR_SIZES {
            let at = BARS + 4 * usize::from(bar);
            self.put(at, &BAR_64.to_le_bytes());
            // Sizing: the bits below the size stay zero when all ones are written.
            self.allow(at, &(!(size - 1)).to_le_bytes());
        }
    }

    fn capabilities(&mut self) {
        self.put(CAPABILITIES, &[PM as u8]);
        // PM: version 3, states D0 and D3hot; no soft reset on the way back to D0.
        self.put(PM, &[PM_ID, PCIE as u8, 3, 0, 1 << 3, 0]);
        self.allow(PM + 4, &[0b11]);
        // PCIe: version 2, endpoint; payload 128 bytes, FLR, role-based error reporting.
        self.put(PCIE, &[PCIE_ID, MSIX as u8, 2, 0]);
        let device: u32 = 1 << 28 | 1 << 15;
        self.put(PCIE + 0x04, &device.to_le_bytes());
        self.allow(DEVICE_CONTROL, &0x78ffu16.to_le_bytes());
        // One lane at 2.5 GT/s, by capability and by state.
        self.put(PCIE + 0x0c, &0x11u32.to_le_bytes());
        self.put(PCIE + 0x12, &0x11u16.to_le_bytes());
        let bir = u32::from(BAR_MSIX);
        self.put(MSIX, &[MSIX_ID, 0]);
        self.put(MSIX_CONTROL, &(VECTORS as u16 - 1).to_le_bytes());
        self.put(MSIX + 4, &bir.to_le_bytes());
        self.put(MSIX + 8, &(MSIX_PBA_OFFSET | bir).to_le_bytes());
        self.allow(MSIX_CONTROL, &(0b11u16 << 14).to_le_bytes());
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
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
            let high = (DEVICE_CONTROL_FLR >> 8) as u8;
            reset |= at == DEVICE_CONTROL + 1 && byte & high != 0;
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
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

    /// Whether the device may access memory.
    pub fn bus_master(&self) -> bool {
        self.u16(COMMAND) & COMMAND_BUS_MASTER != 0
    }
}

impl std::fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConfigSpace")
            .field("command", &self.u16(COMMAND))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_u32(space: &ConfigSpace, at: usize) -> u32 {
        let mut bytes = [0; 4];
        space.read(at as u64, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn bars_tell_their_size() {
        for (bar, size) in BAR_SIZES {
            let mut space = ConfigSpace::new();
            let at = BARS + 4 * usize::from(bar);
            space.write(at as u64, &[0xff; 8]);
            let low = u64::from(read_u32(&space, at));
            let high = u64::from(read_u32(&space, at + 4));
            assert_eq!(!(high << 32 | low & !0xf) + 1, size, "BAR {bar}");
            assert_eq!(low & 0xf, u64::from(BAR_64));
        }
    }

    #[test]
    fn the_capability_list_ends_and_names_what_is_there() {
        let space = ConfigSpace::new();
        let mut at = space.bytes[CAPABILITIES] as usize;
        let mut found = Vec::new();
        while at != 0 && found.len() < 10 {
            found.push(space.bytes[at]);
            at = space.bytes[at + 1] as usize;
        }
        assert_eq!(found, [PM_ID, PCIE_ID, MSIX_ID]);
        assert_eq!(space.u16(MSIX_CONTROL) + 1, VECTORS as u16);
    }

    #[test]
    fn bus_master_and_function_level_reset_are_told() {
        let mut space = ConfigSpace::new();
        let on = space.write(COMMAND as u64, &COMMAND_BUS_MASTER.to_le_bytes());
        assert_eq!(on.bus_master, Some(true));
        let flr = space.write(DEVICE_CONTROL as u64, &DEVICE_CONTROL_FLR.to_le_bytes());
        assert_eq!((flr.bus_master, flr.reset), (Some(false), true));
        assert!(!space.bus_master());
        assert_eq!(space.u16(DEVICE_CONTROL), 0);
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
