//! The walker of the process's own page table: x86-64, four levels.
//!
//! Formats: Intel SDM volume 3A, section 4.5; what a user-mode access needs is what counts.

use std::sync::atomic::Ordering;

use extlb_spec::{Gpa, Iova};

use crate::ports::Dma;

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
/// In an entry of level 2 or 3: maps a page of 2 MiB or 1 GiB.
const LARGE: u64 = 1 << 7;
const ADDR: u64 = 0x000f_ffff_ffff_f000;
/// End of the half that is the process's; the other one is the kernel's.
const PROCESS_END: u64 = 1 << 47;

/// What the process has at a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CpuMapping {
    /// The 4 KiB piece.
    pub(crate) frame: Gpa,
    pub(crate) writable: bool,
}

/// Whether the process can have anything at an address. What a kernel maps for the device above
/// that is the kernel's own, and there is nothing to compare it with.
pub(crate) fn may_be_the_processs(iova: Iova) -> bool {
    iova.0 < PROCESS_END
}

/// What the process has at an address; `None` for nothing.
pub(crate) fn walk(memory: &dyn Dma, root: Gpa, iova: Iova) -> Option<CpuMapping> {
    let mut table = root.0;
    let mut rights = WRITE | USER;
    for level in (1..=4u32).rev() {
        let shift = 12 + 9 * (level - 1);
        let index = iova.0 >> shift & 0x1ff;
        let entry = memory
            .load_u64(Gpa(table + index * 8), Ordering::Acquire)
            .ok()?;
        if entry & PRESENT == 0 {
            return None;
        }
        rights &= entry;
        let large = entry & LARGE != 0 && (level == 2 || level == 3);
        if level == 1 || large {
            let size = 1u64 << shift;
            // Bit 12 of a large entry is PAT, hence the mask by size.
            let frame = entry & ADDR & !(size - 1) | iova.page().0 & (size - 1);
            return (rights & USER != 0).then_some(CpuMapping {
                frame: Gpa(frame),
                writable: rights & WRITE != 0,
            });
        }
        table = entry & ADDR;
    }
    None
}

/// Whether the device may do what it is doing.
pub(crate) fn agrees(cpu: Option<CpuMapping>, frame: Gpa, write: bool) -> bool {
    cpu.is_some_and(|m| m.frame == frame && (m.writable || !write))
}

/// What a report shows: for a write, a page that may not be written is none.
pub(crate) fn visible(cpu: Option<CpuMapping>, write: bool) -> Option<Gpa> {
    cpu.filter(|m| m.writable || !write).map(|m| m.frame)
}
