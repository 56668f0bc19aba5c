//! What the calls were answered.

use nix::errno::Errno;

/// Kinds of calls whose answers are counted apart.
pub const COUNTED: [&str; 12] = [
    "info",
    "create",
    "register",
    "unregister",
    "stats",
    "audit",
    "wrong",
    "mmap",
    "map_change",
    "memory_change",
    "file",
    "fork",
];
pub const WRONG: usize = 6;
pub const MMAP: usize = 7;
pub const MAP_CHANGE: usize = 8;
pub const MEMORY_CHANGE: usize = 9;
pub const FILE: usize = 10;
pub const FORK: usize = 11;

/// What was answered: calls by kind, and by errno.
#[derive(Clone)]
pub struct Answers {
    pub done: [u64; COUNTED.len()],
    pub refused: [u64; COUNTED.len()],
    /// ioctls that were answered with EIO: the device is dead.
    pub dead: u64,
    pub errnos: [u64; 256],
    /// Of the calls, not of the answers.
    pub digest: u64,
}

impl Answers {
    pub fn new() -> Self {
        Self {
            done: [0; COUNTED.len()],
            refused: [0; COUNTED.len()],
            dead: 0,
            errnos: [0; 256],
            digest: 0xcbf2_9ce4_8422_2325,
        }
    }

    pub fn digest(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.digest = (self.digest ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }

    pub fn count(&mut self, kind: usize, answer: Result<u64, Errno>) {
        match answer {
            Ok(_) => self.done[kind] += 1,
            Err(errno) => {
                self.refused[kind] += 1;
                self.errnos[errno as usize & 255] += 1;
                self.dead += u64::from(kind < MMAP && errno == Errno::EIO);
            }
        }
    }
}
