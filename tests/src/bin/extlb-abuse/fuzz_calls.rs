//! Which hostile calls are made: decided by the seed alone, whatever they are answered.

use extlb_spec::uapi::{self, Create, IOC_TYPE, IOCTLS, Ioctl, Register};
use extlb_spec::work::Descriptor;
use nix::errno::Errno;
use nix::libc;
use rand::{Rng, RngExt, SeedableRng};
use rand_pcg::Pcg64;

use crate::sys_unsafe::{
    ARENA, ARENA_BYTES, ARGUMENT_BYTES, ARGUMENTS, FILE_PLACES, FILES, MAP_BYTES, MAP_PLACES, MAPS,
    PAGE, call, fork_for, open_at, poke,
};

const PAGES: u64 = ARENA_BYTES / PAGE;
/// Rings are in the first pages, one each; the rest is data. So most rings are not overwritten.
const RING_PAGES: u64 = 16;
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
const WRONG: usize = 6;
const MMAP: usize = 7;
const MAP_CHANGE: usize = 8;
const MEMORY_CHANGE: usize = 9;
const FILE: usize = 10;
const FORK: usize = 11;

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

    fn digest(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.digest = (self.digest ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }

    fn count(&mut self, kind: usize, answer: Result<u64, Errno>) {
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

    fn open(&mut self) {
        let file = self.file();
        let flags = if self.one_in(8) {
            self.pick([libc::O_RDONLY, libc::O_WRONLY]) as i32
        } else {
            libc::O_RDWR
        };
        let flags = flags | libc::O_NONBLOCK;
        self.answers.digest(&file.to_le_bytes());
        self.answers.digest(&flags.to_le_bytes());
        let answer = open_at(c"/dev/extlb0", flags, file);
        self.answers.count(FILE, answer);
        // Most are to become contexts, and half of those such as work.
        if self.one_in(4) {
            return;
        }
        let place = self.place_of(file, 1);
        self.tails[place as usize] = 0;
        self.valid_ioctl(file, &uapi::CREATE);
        if self.one_in(2) {
            self.valid_ioctl(file, &uapi::REGISTER);
            self.register(file, 0, RING_PAGES);
            let page = self.below(PAGES - 32);
            self.register(file, page.max(RING_PAGES), 24);
            for page in [0, 1] {
                let at = MAPS + self.place_of(file, page) * MAP_BYTES;
                let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
                let flags = (flags | libc::MAP_FIXED) as u64;
                let args = [at, PAGE, prot as u64, flags, file, page * PAGE];
                self.make(MMAP, libc::SYS_mmap, args);
            }
        }
    }

    fn register(&mut self, file: u64, page: u64, pages: u64) {
        let register = Register {
            addr: ARENA + page * PAGE,
            len: pages * PAGE,
            ..Register::default()
        };
        self.put_argument(&register.to_bytes());
        let (request, at) = (
            request(uapi::REGISTER.number, Register::SIZE),
            self.arguments,
        );
        let kind = usize::from(uapi::REGISTER.number);
        self.make(kind, libc::SYS_ioctl, [file, request, at, 0, 0, 0]);
    }

    fn ioctl(&mut self) {
        let file = self.file();
        let which = self.below(IOCTLS.len() as u64) as usize;
        // Many registrations, few audits.
        let which = if self.one_in(3) { 2 } else { which };
        match self.below(10) {
            0 => {
                let (number, size) = (self.rng.random(), self.below(4096) as usize);
                let direction = self.below(4);
                self.random_argument();
                let request = direction << 30 | request(number, size) & 0x3fff_ffff;
                let at = self.arguments;
                self.make(WRONG, libc::SYS_ioctl, [file, request, at, 0, 0, 0]);
            }
            1..3 => {
                self.random_argument();
                let (request, at) = (
                    request(IOCTLS[which].number, IOCTLS[which].size),
                    self.place(),
                );
                self.make(which, libc::SYS_ioctl, [file, request, at, 0, 0, 0]);
            }
            _ => self.valid_ioctl(file, &IOCTLS[which]),
        }
    }

    /// Where an argument is: hardly ever where it should be.
    fn place(&mut self) -> u64 {
        let own = self.arguments;
        match self.below(12) {
            0 => 0,
            1 => 8,
            2 => u64::MAX << 47,
            3 => u64::MAX - 7,
            // Over the edge of the page, into what is not mapped.
            4 => own + PAGE - self.below(96),
            5 => own + PAGE,
            // Can be read and not written.
            6 => own + 2 * PAGE + self.below(64),
            7 => own + self.below(64),
            // The device may write there meanwhile.
            8 => ARENA + self.below(ARENA_BYTES - PAGE),
            9 => MAPS + self.below(MAP_PLACES) * MAP_BYTES,
            _ => own,
        }
    }

    fn random_argument(&mut self) {
        let mut bytes = [0; 64];
        // Most calls get past the check of the reserved fields: few words are set.
        for _ in 0..self.below(4) {
            let at = self.below(8) as usize * 8;
            let value = self.interesting();
            match self.below(2) {
                0 => bytes[at..at + 8].copy_from_slice(&value.to_le_bytes()),
                _ => bytes[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes()),
            }
        }
        self.put_argument(&bytes);
    }

    fn put_argument(&mut self, bytes: &[u8]) {
        // The rest is zero, up to the longest argument.
        let at = self.arguments;
        if bytes.len() < 64 || self.one_in(2) {
            self.poke(at, &[0; 2688]);
        }
        self.poke(at, bytes);
    }

    /// A call that makes sense, but for a word now and then.
    fn valid_ioctl(&mut self, file: u64, ioctl: &Ioctl) {
        let mut bytes = [0; 64];
        let page = self.below(PAGES);
        if ioctl.number == uapi::CREATE.number {
            let create = Create {
                ring: self.ring_of(file),
                ring_log2: if self.one_in(8) {
                    self.below(14) as u32
                } else {
                    1 + self.below(6) as u32
                },
                flags: self.pick([0, 0, 0, 1, 1, 2, 3]) as u32,
                ..Create::default()
            };
            bytes[..Create::SIZE].copy_from_slice(&create.to_bytes());
        } else if ioctl.number == uapi::REGISTER.number {
            let most = if self.one_in(8) { PAGES } else { 4 };
            let len = 1 + self.below(most);
            // Rings first: without one a context does nothing.
            let (page, len) = if self.one_in(3) {
                (0, RING_PAGES)
            } else {
                (page, len)
            };
            let register = Register {
                addr: ARENA + page * PAGE,
                len: len.min(PAGES - page) * PAGE,
                ..Register::default()
            };
            bytes[..Register::SIZE].copy_from_slice(&register.to_bytes());
        } else if ioctl.number == uapi::UNREGISTER.number {
            let handle = 1 + self.below(3) as u32;
            bytes[..4].copy_from_slice(&handle.to_le_bytes());
        }
        if self.one_in(12) {
            let at = self.below(8) as usize * 8;
            let value = self.interesting();
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        self.put_argument(&bytes);
        let at = self.arguments;
        let request = request(ioctl.number, ioctl.size);
        let kind = usize::from(ioctl.number);
        self.make(kind, libc::SYS_ioctl, [file, request, at, 0, 0, 0]);
    }

    fn map_device(&mut self) {
        let file = self.file();
        let mut len = PAGE;
        let mut offset = self.below(2) * PAGE;
        let at = MAPS + self.place_of(file, offset / PAGE) * MAP_BYTES;
        let mut prot = libc::PROT_READ | libc::PROT_WRITE;
        let mut flags = libc::MAP_SHARED;
        if self.one_in(3) {
            len = self.pick([1, 4096, 4097, 8192, 32768]);
            offset = self.below(4) * PAGE;
            if self.one_in(4) {
                offset = self.interesting() & !(PAGE - 1);
            }
            prot = self.below(8) as i32;
            let more = [0, libc::MAP_LOCKED, libc::MAP_POPULATE, libc::MAP_NORESERVE];
            let base = [
                libc::MAP_SHARED,
                libc::MAP_PRIVATE,
                libc::MAP_SHARED_VALIDATE,
            ];
            flags = (self.pick(base) | self.pick(more)) as i32;
        }
        let flags = (flags | libc::MAP_FIXED) as u64;
        self.make(
            MMAP,
            libc::SYS_mmap,
            [at, len, prot as u64, flags, file, offset],
        );
    }

    /// Changes the mapping of a page of the device.
    fn change_mapping(&mut self) {
        let at = MAPS + self.below(MAP_PLACES) * MAP_BYTES;
        let len = PAGE * (1 + self.below(3));
        let (number, args) = match self.below(6) {
            0 => (libc::SYS_munmap, [at, len, 0, 0, 0, 0]),
            1 => {
                let to = MAPS + self.below(MAP_PLACES) * MAP_BYTES;
                let flags = (libc::MREMAP_FIXED | libc::MREMAP_MAYMOVE) as u64;
                let old = self.below(3) * PAGE;
                (libc::SYS_mremap, [at, old, len, flags, to, 0])
            }
            2 => (libc::SYS_mremap, [at, PAGE, len, 0, 0, 0]),
            3 => (libc::SYS_mprotect, [at, len, self.below(8), 0, 0, 0]),
            4 => (libc::SYS_mlock, [at, PAGE, 0, 0, 0, 0]),
            _ => {
                let advice = self.advice();
                (libc::SYS_madvise, [at, len, advice, 0, 0, 0])
            }
        };
        self.make(MAP_CHANGE, number, args);
    }

    fn advice(&mut self) -> u64 {
        self.pick([
            libc::MADV_DONTNEED,
            libc::MADV_DOFORK,
            libc::MADV_DONTFORK,
            libc::MADV_FREE,
            libc::MADV_PAGEOUT,
            libc::MADV_COLD,
            libc::MADV_MERGEABLE,
            libc::MADV_HUGEPAGE,
            libc::MADV_WILLNEED,
            libc::MADV_POPULATE_WRITE,
            libc::MADV_REMOVE,
        ])
    }

    /// Changes memory that the device may be at work on.
    fn change_memory(&mut self) {
        let page = self.below(PAGES);
        let spared = page < RING_PAGES && !self.one_in(16);
        let page = if spared { page + RING_PAGES } else { page };
        let at = ARENA + page * PAGE;
        let len = PAGE * (1 + self.below((PAGES - page).min(24)));
        let (number, args) = match self.below(8) {
            // Less than is mapped, so that a range is whole now and then.
            0 => (libc::SYS_munmap, [at, len.min(2 * PAGE), 0, 0, 0, 0]),
            1..5 => {
                let flags = libc::MAP_FIXED | libc::MAP_ANONYMOUS;
                let kind = if self.one_in(3) {
                    libc::MAP_SHARED
                } else {
                    libc::MAP_PRIVATE
                };
                let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
                (
                    libc::SYS_mmap,
                    [at, len, prot, (flags | kind) as u64, u64::MAX, 0],
                )
            }
            5 => (
                libc::SYS_mprotect,
                [at, len, self.pick([0, 1, 3, 3]), 0, 0, 0],
            ),
            _ => {
                let advice = self.advice();
                (libc::SYS_madvise, [at, len, advice, 0, 0, 0])
            }
        };
        self.make(MEMORY_CHANGE, number, args);
    }

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
    fn submit(&mut self) {
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

    /// What another thread does to the arguments of calls that are being made.
    pub fn change_arguments(&mut self, threads: u64) {
        let at = ARGUMENTS + self.below(threads) * ARGUMENT_BYTES;
        match self.below(8) {
            0 => self.make(MEMORY_CHANGE, libc::SYS_munmap, [at, PAGE, 0, 0, 0, 0]),
            1 => self.make(MEMORY_CHANGE, libc::SYS_mprotect, [at, PAGE, 1, 0, 0, 0]),
            2 | 3 => self.map_arguments(at),
            _ => {
                let value = self.interesting();
                let word = at + self.below(16) * 8;
                self.poke(word, &value.to_le_bytes());
            }
        }
    }

    /// Maps a thread's arguments as they should be.
    pub fn map_arguments(&mut self, at: u64) {
        let flags = (libc::MAP_FIXED | libc::MAP_ANONYMOUS | libc::MAP_PRIVATE) as u64;
        self.make(
            MEMORY_CHANGE,
            libc::SYS_mmap,
            [at, PAGE, 3, flags, u64::MAX, 0],
        );
        self.make(
            MEMORY_CHANGE,
            libc::SYS_mmap,
            [at + 2 * PAGE, PAGE, 1, flags, u64::MAX, 0],
        );
    }

    /// Maps the memory for the device.
    pub fn map_arena(&mut self) {
        let flags = (libc::MAP_FIXED | libc::MAP_ANONYMOUS | libc::MAP_PRIVATE) as u64;
        self.make(
            MEMORY_CHANGE,
            libc::SYS_mmap,
            [ARENA, ARENA_BYTES, 3, flags, u64::MAX, 0],
        );
    }
}

/// Number of an `_IOWR` ioctl.
fn request(number: u8, size: usize) -> u64 {
    3 << 30 | (size as u64 & 0x3fff) << 16 | u64::from(IOC_TYPE) << 8 | u64::from(number)
}
