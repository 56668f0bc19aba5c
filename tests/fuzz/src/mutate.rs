//! Mutations by a seeded generator: the same on every machine, with no library.

/// Bytes that tend to matter.
const INTERESTING: [u8; 10] = [0, 1, 2, 3, 7, 0x10, 0x7f, 0x80, 0xfe, 0xff];

/// A generator of numbers (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.draw() % n as u64) as usize
    }
}

/// Changes an input in a few places; `other` is one to take parts of.
pub fn mutate(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8], longest: usize) {
    for _ in 0..1 + random.below(6) {
        let len = bytes.len();
        let at = random.below(len + 1);
        let piece = 1 + random.below(16);
        match random.below(8) {
            0 | 1 if at < len => bytes[at] ^= 1 << random.below(8),
            2 | 3 if at < len => bytes[at] = INTERESTING[random.below(INTERESTING.len())],
            4 if at < len => bytes[at] = random.draw() as u8,
            5 if at < len => {
                bytes.drain(at..len.min(at + piece));
            }
            6 => {
                let new: Vec<u8> = (0..piece).map(|_| random.draw() as u8).collect();
                bytes.splice(at..at, new);
            }
            _ if !other.is_empty() => {
                let from = random.below(other.len());
                let part = &other[from..other.len().min(from + 4 * piece)];
                bytes.splice(at..at, part.iter().copied());
            }
            _ => {}
        }
    }
    bytes.truncate(longest);
}
