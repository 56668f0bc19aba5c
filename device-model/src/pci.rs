//! PCI configuration space: identity, BARs, and the capabilities PM, PCIe (with FLR) and MSI-X.
//!
//! Sections named are those of the PCI Express Base Specification 6.0.
//!
//! Bus mastering and the power state are obeyed. The memory-enable bit is kept, but not looked
//! at: it tells a device whether to decode addresses, and whoever gets here has named the BAR by
//! number, so that decoding was done (QEMU maps no BAR while the bit is clear; a user of VFIO may
//! rely on BARs that answer from the start).
//!
//! There are no extended capabilities: the space from 256 on reads as zero.

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
const PM_CONTROL: usize = PM + 4;
const PM_STATE: u8 = 0b11;
const PM_D0: u8 = 0b00;
const PM_D3_HOT: u8 = 0b11;
/// On the way back to D0 the device is as it was.
const PM_NO_SOFT_RESET: u8 = 1 << 3;
/// PCI Express capability (7.5.3).
const PCIE: usize = 0x50;
const PCIE_ID: u8 = 0x10;
const DEVICE_CONTROL: usize = PCIE + 0x08;
const DEVICE_CONTROL_FLR: u16 = 1 << 15;
/// After reset (7.5.3.4): read requests of 512 bytes, relaxed ordering, no snoop.
const DEVICE_CONTROL_RESET: u16 = 0x2810;
/// Error reporting, relaxed ordering, no snoop, size of read requests. The payload is 128 bytes,
/// the only size that the device has.
const DEVICE_CONTROL_WRITABLE: u16 = 0x781f;
const LINK_CAPABILITIES: usize = PCIE + 0x0c;
const LINK_CONTROL: usize = PCIE + 0x10;
const LINK_STATUS: usize = PCIE + 0x12;
const LINK_CAPABILITIES_2: usize = PCIE + 0x2c;
const LINK_CONTROL_2: usize = PCIE + 0x30;
/// One lane at 2.5 GT/s.
const LINK: u16 = 1 << 4 | 1;
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
        // PM: version 3, states D0 and D3hot.
        self.put(PM, &[PM_ID, PCIE as u8, 3, 0, PM_NO_SOFT_RESET, 0]);
        self.allow(PM_CONTROL, &[PM_STATE]);
        // PCIe: version 2, endpoint; payload 128 bytes, FLR, role-based error reporting.
        self.put(PCIE, &[PCIE_ID, MSIX as u8, 2, 0]);
        let device: u32 = 1 << 28 | 1 << 15;
        self.put(PCIE + 0x04, &device.to_le_bytes());
        self.put(DEVICE_CONTROL, &DEVICE_CONTROL_RESET.to_le_bytes());
        self.allow(DEVICE_CONTROL, &DEVICE_CONTROL_WRITABLE.to_le_bytes());
        // By capability and by state. Bit 22: says so about power states of the link (none).
        let link = 1 << 22 | u32::from(LINK);
        self.put(LINK_CAPABILITIES, &link.to_le_bytes());
        self.put(LINK_STATUS, &LINK.to_le_bytes());
        // Power states of the link, completion boundary, common clock: for software to keep.
        self.allow(LINK_CONTROL, &0xcbu16.to_le_bytes());
        // 2.5 GT/s is the only speed, and the target.
        self.put(LINK_CAPABILITIES_2, &0b10u32.to_le_bytes());
        self.put(LINK_CONTROL_2, &1u16.to_le_bytes());
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
            let kept = self.bytes[at];
            self.bytes[at] = kept & !mask | byte & mask;
            // A state that the device does not have: the write is discarded (7.5.2.2).
            let state = self.bytes[at] & PM_STATE;
            if at == PM_CONTROL && state != PM_D0 && state != PM_D3_HOT {
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
        self.is_awake() && self.u16(COMMAND) & COMMAND_BUS_MASTER != 0
    }

    /// Whether the device is in D0. In D3hot it answers in this space only.
    pub fn is_awake(&self) -> bool {
        self.bytes[PM_CONTROL] & PM_STATE == PM_D0
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
        assert_eq!(space.u16(DEVICE_CONTROL), DEVICE_CONTROL_RESET);
    }

    #[test]
    fn the_power_states_are_d0_and_d3hot() {
        let mut space = ConfigSpace::new();
        space.write(COMMAND as u64, &COMMAND_BUS_MASTER.to_le_bytes());
        for absent in [1, 2] {
            assert_eq!(space.write(PM_CONTROL as u64, &[absent]), Effect::default());
            assert!(space.is_awake());
        }
        let asleep = space.write(PM_CONTROL as u64, &[3]);
        assert_eq!(asleep.bus_master, Some(false));
        assert!(!space.is_awake());
        // Bus mastering is kept, and has its effect again in D0.
        let awake = space.write(PM_CONTROL as u64, &[0, 0]);
        assert_eq!(awake.bus_master, Some(true));
        assert_eq!(space.bytes[PM_CONTROL], PM_NO_SOFT_RESET);
    }

    #[test]
    fn writes_change_what_is_writable_at_any_width_and_offset() {
        let mut bytewise = ConfigSpace::new();
        let whole = ConfigSpace::new();
        let keep = [COMMAND, 0x0c, PM_CONTROL, DEVICE_CONTROL];
        for at in (0..CONFIG_SIZE).filter(|at| !keep.contains(at)) {
            let all = if at == DEVICE_CONTROL + 1 { 0x7f } else { 0xff };
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
