//! Calls on the device node: what it is opened and asked for.

use extlb_spec::uapi::{self, Create, IOC_TYPE, IOCTLS, Ioctl, Register};
use nix::libc;
use rand::RngExt;

use super::answers::{FILE, MMAP, WRONG};
use super::{Caller, PAGES, RING_PAGES};
use crate::sys_unsafe::{ARENA, ARENA_BYTES, MAP_BYTES, MAP_PLACES, MAPS, PAGE, open_at};

impl Caller {
    pub(super) fn open(&mut self) {
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

    pub(super) fn ioctl(&mut self) {
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
    pub(super) fn place(&mut self) -> u64 {
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
                flags: self.pick([0, 0, 0, 1, 1, 2, 3, 4, 8, 12]) as u32,
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
}

/// Number of an `_IOWR` ioctl.
fn request(number: u8, size: usize) -> u64 {
    3 << 30 | (size as u64 & 0x3fff) << 16 | u64::from(IOC_TYPE) << 8 | u64::from(number)
}
