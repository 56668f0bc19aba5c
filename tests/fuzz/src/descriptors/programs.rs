//! What the programs submit.

use extlb_spec::work::{Completion, Descriptor, Segment, flags as work_flags};
use extlb_spec::{Gpa, PAGE_SIZE};

use super::{DATA, DATA_PAGES, HUGE, LARGE, RECORDS, RING_ENTRIES, WINDOW, World};
use crate::input::Input;

impl World {
    pub(super) fn submit(&mut self, index: usize, mut descriptor: Descriptor) {
        let process = &mut self.processes[index];
        let slot = process.tail % RING_ENTRIES;
        if descriptor.completion == 0 {
            descriptor.completion = RECORDS.0 + u64::from(slot) * Completion::SIZE as u64;
        }
        let at = Gpa(process.page(5).0 + u64::from(slot) * Descriptor::SIZE as u64);
        let memory = &self.machine.memory;
        memory.put(at, &descriptor.to_bytes());
        let ahead = process.tail.wrapping_sub(memory.counted(process.head()));
        if ahead < RING_ENTRIES && !process.wild {
            process.tail = process.tail.wrapping_add(1);
            memory.put_u32(process.shadow(), process.tail);
        }
    }

    /// An address that is worth a try, more or less aligned.
    pub(super) fn address(input: &mut Input<'_>) -> u64 {
        let choice = input.u8();
        let offset = u64::from(input.u16()) & [!0, !7, !15, !63][usize::from(choice >> 4 & 3)];
        match choice % 8 {
            0..=3 => WINDOW + offset,
            4 => LARGE + offset,
            5 => HUGE + (offset >> 1),
            6 => (1 << 48) - offset,
            _ => input.u64(),
        }
    }

    /// A descriptor of few bytes.
    pub(super) fn compact(input: &mut Input<'_>) -> Descriptor {
        let length = input.u16();
        let (mantissa, shift) = (length & 0xff, length >> 8 & 0x1f);
        let (opcode, flags) = (input.u8() % 16, input.u8());
        let (src, dst) = (Self::address(input), Self::address(input));
        let arg = input.u8();
        let segments = |flag: u8| match flags & flag {
            0 => 0,
            _ => u32::from(arg % 9),
        };
        Descriptor {
            opcode,
            flags: flags
                & if flags & 0x80 == 0 {
                    work_flags::ALL
                } else {
                    !0
                },
            src,
            dst,
            len: u64::from(mantissa) << shift,
            arg: u64::from(arg),
            src_segments: segments(work_flags::SRC_LIST),
            dst_segments: segments(work_flags::DST_LIST),
            ..Default::default()
        }
    }

    /// Writes a list of segments, or the descriptors of a batch, into a page of data.
    pub(super) fn list(&self, input: &mut Input<'_>) {
        let choice = input.u8();
        let mut at = Gpa(DATA.0 + u64::from(choice) % DATA_PAGES * PAGE_SIZE);
        for n in 0..input.below(9) {
            let bytes = match choice >> 4 & 1 {
                0 => {
                    let segment = Segment {
                        addr: Self::address(input),
                        len: u64::from(input.u8()) << (choice >> 5),
                    };
                    segment.to_bytes().to_vec()
                }
                _ => {
                    let mut descriptor = Self::compact(input);
                    descriptor.completion = RECORDS.0 + 1024 + n * Completion::SIZE as u64;
                    descriptor.to_bytes().to_vec()
                }
            };
            self.machine.memory.put(at, &bytes);
            at.0 += bytes.len() as u64;
        }
    }
}
