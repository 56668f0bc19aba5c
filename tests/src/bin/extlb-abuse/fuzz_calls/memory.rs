//! Changes of mappings: of the device's pages, of the memory that it works on, of the arguments.

use nix::libc;

use super::answers::{MAP_CHANGE, MEMORY_CHANGE, MMAP};
use super::{Caller, PAGES, RING_PAGES};
use crate::sys_unsafe::{
    ARENA, ARENA_BYTES, ARGUMENT_BYTES, ARGUMENTS, MAP_BYTES, MAP_PLACES, MAPS, PAGE,
};

impl Caller {
    pub(super) fn map_device(&mut self) {
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
    pub(super) fn change_mapping(&mut self) {
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
    pub(super) fn change_memory(&mut self) {
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
