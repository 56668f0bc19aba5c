//! Work for the device: descriptors, tails, doorbells.

use extlb_spec::work::Descriptor;
use nix::libc;
use rand::{Rng, RngExt};

use super::answers::FILE;
use super::{Caller, RING_PAGES};
use crate::sys_unsafe::{ARENA, ARENA_BYTES, FILES, MAP_BYTES, MAPS, PAGE};

impl Caller {
    fn descriptor(&mut self) -> [u8; Descriptor::SIZE] {
        let mut bytes = [0; Descriptor::SIZE];
        if self.one_in(6) {
            self.rng.fill(&mut bytes[..]);
            return bytes;
        }
        let data = ARENA + RING_PAGES * PAGE;
        let room = ARENA_BYTES - RING_PAGES * PAGE;
        // Mostly where it is registered together with the ring: else the context is over.
        let record = self.below(PAGE / 4) * 32;
        let completion = if self.one_in(8) {
            data + record
        } else {
            ARENA + 8 * PAGE + record
        };
        let descriptor = Descriptor {
            opcode: self.below(9) as u8,
            flags: (self.below(2) | if self.one_in(6) { self.below(16) } else { 0 }) as u8,
            src: data + self.below(room),
            dst: data + self.below(room),
            len: if self.one_in(8) {
                self.interesting()
            } else {
                self.below(32 << 10)
            },
            completion,
            arg: self.rng.next_u64(),
            ..Descriptor::default()
        };
        bytes.copy_from_slice(&descriptor.to_bytes());
        bytes
    }

    /// Writes descriptors to a ring, moves a tail, rings a bell: of one context most of the time.
    pub(super) fn submit(&mut self) {
        let file = FILES + self.below(6);
        let (ring, count) = (self.ring_of(file), 1 + self.below(4));
        for _ in 0..count {
            let descriptor = self.descriptor();
            let at = ring + self.below(PAGE / 64) * 64;
            self.poke(at, &descriptor);
        }
        let place = self.place_of(file, 1);
        let tail = &mut self.tails[place as usize];
        *tail = tail.wrapping_add(count as u32);
        let mut tail = *tail;
        // A context ends by a tail that makes no sense, and begins at 0.
        match self.below(12) {
            0 => tail = self.rng.random(),
            1..4 => tail = self.below(3) as u32,
            _ => {}
        }
        self.tails[place as usize] = tail;
        let at = MAPS + place * MAP_BYTES;
        self.poke(at, &tail.to_le_bytes());
        if self.one_in(20) {
            let word = at + self.below(PAGE / 4) * 4;
            let value: u32 = self.rng.random();
            self.poke(word, &value.to_le_bytes());
        }
        let bell = MAPS + self.place_of(file, 0) * MAP_BYTES;
        self.make(FILE, libc::SYS_getresuid, [bell, bell, bell, 0, 0, 0]);
    }
}
