//! Which hostile calls are made: decided by the seed alone, whatever they are answered.

mod answers;
mod ioctls;
mod memory;
mod work;

use nix::libc;
use rand::{Rng, RngExt, SeedableRng};
use rand_pcg::Pcg64;

pub use self::answers::{Answers, COUNTED};
use self::answers::{FILE, FORK};
use crate::sys_unsafe::{
    ARENA, ARENA_BYTES, ARGUMENT_BYTES, ARGUMENTS, FILE_PLACES, FILES, MAP_BYTES, MAP_PLACES, MAPS,
    PAGE, call, fork_for, poke,
};

const PAGES: u64 = ARENA_BYTES / PAGE;
/// Rings are in the first pages, one each; the rest is data. So most rings are not overwritten.
const RING_PAGES: u64 = 16;
/// One thread's calls.
pub struct Caller {
    rng: Pcg64,
    /// Its place among the arguments.
    arguments: u64,
    /// For [`poke`].
    memory_file: u64,
    /// Submitted so far, by place of a mapping.
    tails: [u32; MAP_PLACES as usize],
    pub answers: Answers,
    is_child: bool,
}

impl Caller {
    pub fn new(seed: u64, thread: u64, memory_file: u64) -> Self {
        Self {
            rng: Pcg64::seed_from_u64(seed ^ thread << 32),
            arguments: ARGUMENTS + thread * ARGUMENT_BYTES,
            memory_file,
            tails: [0; MAP_PLACES as usize],
            answers: Answers::new(),
            is_child: false,
        }
    }

    fn below(&mut self, end: u64) -> u64 {
        self.rng.random_range(0..end)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<const N: usize>(&mut self, of: [i32; N]) -> u64 {
        of[self.below(N as u64) as usize] as u64
    }

    /// A file; few of them are used much.
    fn file(&mut self) -> u64 {
        let places = if self.one_in(8) { FILE_PLACES } else { 6 };
        FILES + self.below(places)
    }

    /// The ring of most contexts that this file is made.
    fn ring_of(&mut self, file: u64) -> u64 {
        let other = if self.one_in(8) {
            self.below(RING_PAGES)
        } else {
            0
        };
        ARENA + (file - FILES + other) % RING_PAGES * PAGE
    }

    /// Where a page of a file is mapped most of the time: its doorbell, or the page behind it.
    fn place_of(&mut self, file: u64, page: u64) -> u64 {
        let other = if self.one_in(8) {
            self.below(MAP_PLACES)
        } else {
            0
        };
        ((file - FILES) * 2 + page % 2 + other) % MAP_PLACES
    }

    fn make(&mut self, kind: usize, number: i64, args: [u64; 6]) {
        self.answers.digest(&number.to_le_bytes());
        for arg in args {
            self.answers.digest(&arg.to_le_bytes());
        }
        let answer = call(number, args);
        self.answers.count(kind, answer);
    }

    fn poke(&mut self, addr: u64, bytes: &[u8]) {
        self.answers.digest(&addr.to_le_bytes());
        self.answers.digest(bytes);
        // Somebody may have unmapped it.
        let _ = poke(self.memory_file, addr, bytes);
    }

    /// A number that is likely to sit on an edge.
    fn interesting(&mut self) -> u64 {
        match self.below(11) {
            0 => 0,
            1 => 1,
            2 => u64::MAX,
            3 => ARENA,
            4 => ARENA + self.below(PAGES) * PAGE,
            5 => ARENA + self.below(2 * ARENA_BYTES),
            6 => PAGE << self.below(12),
            7 => 1 << self.below(64),
            8 => u64::MAX - self.below(8192),
            9 => MAPS + self.below(MAP_PLACES) * MAP_BYTES,
            // Beyond what a process can map, but for the arena: nothing of this program.
            _ => self.rng.next_u64() | 1 << 47,
        }
    }

    /// The next call, or a few that belong together.
    pub fn step(&mut self) {
        match self.below(100) {
            0..5 => self.open(),
            5..7 => {
                let file = self.file();
                self.make(FILE, libc::SYS_close, [file, 0, 0, 0, 0, 0]);
            }
            7..50 => self.ioctl(),
            50..60 => self.map_device(),
            60..67 => self.change_mapping(),
            67..75 => self.change_memory(),
            75..90 => self.submit(),
            90..99 => self.other(),
            _ if self.is_child || !self.one_in(4) => self.other(),
            _ => self.fork(),
        }
    }

    fn other(&mut self) {
        let (file, own) = (self.file(), self.arguments);
        let (number, args) = match self.below(8) {
            0 => (
                libc::SYS_dup3,
                [file, self.file(), libc::O_CLOEXEC as u64, 0, 0, 0],
            ),
            1 => (
                libc::SYS_read,
                [file, self.place(), self.pick([0, 4, 8, 64]), 0, 0, 0],
            ),
            2 => (libc::SYS_write, [file, own, 8, 0, 0, 0]),
            3 => (libc::SYS_pread64, [file, own, 8, self.interesting(), 0, 0]),
            4 => (
                libc::SYS_lseek,
                [file, self.interesting(), self.below(5), 0, 0, 0],
            ),
            5 => (libc::SYS_fsync, [file, 0, 0, 0, 0, 0]),
            6 => {
                // Not blocking stays so: nobody would come to wake it.
                let command = self.pick([libc::F_GETFL, libc::F_GETFD, libc::F_GETOWN]);
                (libc::SYS_fcntl, [file, command, 0, 0, 0, 0])
            }
            _ => {
                let count = 1 + self.below(8);
                for i in 0..count {
                    let entry = self.file() | 0x7f << 32;
                    self.poke(own + i * 8, &entry.to_le_bytes());
                }
                (libc::SYS_poll, [own, count, self.below(2), 0, 0, 0])
            }
        };
        // What is not inside is nowhere, but by way of a length: keep to what is harmless.
        let args = match number {
            libc::SYS_read if args[1] >= own + PAGE => [args[0], own, args[2], 0, 0, 0],
            _ => args,
        };
        self.make(FILE, number, args);
    }

    /// A child that has the same files and a copy of the memory makes a few calls of its own.
    fn fork(&mut self) {
        let seed = self.rng.next_u64();
        self.answers.digest(&seed.to_le_bytes());
        let mut child = Self {
            rng: Pcg64::seed_from_u64(seed),
            answers: self.answers.clone(),
            is_child: true,
            ..*self
        };
        let answer = fork_for(|| (0..20).for_each(|_| child.step()));
        self.answers.count(FORK, answer.map(|()| 0));
    }
}
