//! Guest RAM as the client describes it: ranges of files, which come, go and overlap.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use extlb_spec::Gpa;

use crate::GuestRam;
use crate::memory::{Indirect, Removed, Rights, seal};

/// What to do with memory in a file that may shrink. An access to a mapping beyond the end of its
/// file would end this process, and so can a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Unsealed {
    /// Map it, and warn: for clients that are trusted.
    #[default]
    Map,
    /// Read and write the file. No word is atomic, and so the device's page tables cannot be in
    /// there: it sets their bits atomically.
    Io,
    /// Refuse it.
    Refuse,
}

/// The client's side of a [`GuestRam`].
#[derive(Debug, Default)]
pub(super) struct MemoryMap {
    ram: GuestRam,
    unsealed: Unsealed,
    warned: bool,
}

impl MemoryMap {
    pub(super) fn new(ram: GuestRam, unsealed: Unsealed) -> Self {
        Self {
            ram,
            unsealed,
            warned: false,
        }
    }

    /// Adds a range; where it overlaps others, it takes their place, and returns them.
    pub(super) fn map(
        &mut self,
        at: u64,
        len: u64,
        rights: Rights,
        file: File,
        offset: u64,
    ) -> io::Result<Removed> {
        if self.unsealed != Unsealed::Map && !seal(&file) {
            return self.map_unsealed(at, len, rights, file, offset);
        }
        let replaced = self.ram.map_over(Gpa(at), len, file, offset, rights)?;
        if !self.warned && self.ram.can_shrink() {
            self.warned = true;
            eprintln!(
                "extlb-device: warning: guest memory is in a file that may shrink, and an access \
                 beyond its end would end this process; give a memfd that allows sealing"
            );
        }
        Ok(replaced)
    }

    fn map_unsealed(
        &mut self,
        at: u64,
        len: u64,
        rights: Rights,
        file: File,
        offset: u64,
    ) -> io::Result<Removed> {
        if self.unsealed == Unsealed::Refuse {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "the file may shrink; give a memfd that allows sealing",
            ));
        }
        let end = offset.checked_add(len);
        if end.is_none_or(|end| file.metadata().is_ok_and(|meta| end > meta.len())) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the file is shorter than the range",
            ));
        }
        self.ask(at, len, rights, Arc::new(file), offset)
    }

    /// Adds a range that is asked for; likewise.
    pub(super) fn ask(
        &mut self,
        at: u64,
        len: u64,
        rights: Rights,
        by: Arc<dyn Indirect>,
        offset: u64,
    ) -> io::Result<Removed> {
        self.ram.map_asked(Gpa(at), len, by, offset, rights)
    }

    /// Takes a range out, also of the middle of others; if there is nothing, nothing.
    pub(super) fn unmap(&mut self, range: Range<u64>) -> Removed {
        self.ram.remove(range)
    }

    /// Takes everything out.
    pub(super) fn clear(&mut self) -> Removed {
        self.ram.clear()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ports::Dma;
    use std::os::unix::fs::FileExt;

    fn file(fill: u8) -> File {
        let file = tempfile::tempfile().expect("a temporary file");
        file.write_all_at(&[fill; 0x4000], 0).expect("written");
        file
    }

    fn mapped(map: &mut MemoryMap, at: u64, len: u64, file: File, offset: u64) -> Removed {
        let mapped = map.map(at, len, Rights::ALL, file, offset);
        mapped.expect("mapped")
    }

    fn bytes(map: &MemoryMap) -> Vec<Option<u8>> {
        let at = |page: u64| {
            let mut byte = [0];
            let read = map.ram.read(Gpa(page << 12), &mut byte);
            read.ok().map(|()| byte[0])
        };
        (0..6).map(at).collect()
    }

    #[test]
    fn a_new_range_takes_the_place_of_what_it_overlaps() {
        let mut map = MemoryMap::default();
        assert!(mapped(&mut map, 0x1000, 0x4000, file(1), 0).is_empty());
        assert!(!mapped(&mut map, 0x2000, 0x1000, file(2), 0x1000).is_empty());
        assert_eq!(
            bytes(&map),
            [None, Some(1), Some(2), Some(1), Some(1), None]
        );
        assert!(!map.unmap(0x2000..0x4000).is_empty());
        assert_eq!(bytes(&map), [None, Some(1), None, None, Some(1), None]);
        assert!(map.unmap(0x2000..0x4000).is_empty(), "nothing is left");
        assert!(!map.clear().is_empty());
        assert_eq!(bytes(&map), [None; 6]);
    }

    #[test]
    fn a_piece_that_was_cut_keeps_its_place_in_the_file() {
        let file = file(0);
        file.write_all_at(&[9], 0x3000).expect("written");
        let mut map = MemoryMap::default();
        assert!(mapped(&mut map, 0, 0x4000, file, 0).is_empty());
        assert!(!map.unmap(0x1000..0x2000).is_empty());
        assert_eq!(bytes(&map)[3], Some(9));
    }

    #[test]
    fn memory_is_accessed_as_it_may_be() {
        let mut map = MemoryMap::default();
        for (at, rights) in [(0, Rights::READ), (0x1000, Rights::WRITE)] {
            let mapped = map.map(at, 0x1000, rights, file(1), 0);
            assert!(mapped.expect("mapped").is_empty());
        }
        // A file that nobody could write to, as a ROM.
        let rom = File::open("/proc/self/exe").expect("opened");
        let refused = map.map(
            0x2000,
            0x1000,
            Rights::ALL,
            rom.try_clone().expect("cloned"),
            0,
        );
        assert!(refused.is_err());
        let mapped = map.map(0x2000, 0x1000, Rights::READ, rom, 0);
        assert!(mapped.expect("mapped").is_empty());
        let read = |at| map.ram.read(Gpa(at), &mut [0]).is_ok();
        let write = |at| map.ram.write(Gpa(at), &[0]).is_ok();
        assert_eq!([read(0), write(0)], [true, false]);
        assert_eq!([read(0x1000), write(0x1000)], [false, true]);
        assert_eq!([read(0x2000), write(0x2000)], [true, false]);
        let swap = |at| map.ram.compare_exchange_u64(Gpa(at), 0, 0).is_ok();
        assert_eq!([swap(0), swap(0x1000)], [false, false]);
    }

    #[test]
    fn a_file_that_has_grown_is_mapped_to_its_new_end() {
        let file = file(1);
        let clone = || file.try_clone().expect("cloned");
        let mut map = MemoryMap::default();
        assert!(mapped(&mut map, 0, 0x1000, clone(), 0).is_empty());
        assert!(
            map.map(0x1000, 0x1000, Rights::ALL, clone(), 0x4000)
                .is_err()
        );
        file.write_all_at(&[2; 0x1000], 0x4000).expect("written");
        assert!(mapped(&mut map, 0x1000, 0x1000, clone(), 0x4000).is_empty());
        assert_eq!(bytes(&map)[..2], [Some(1), Some(2)]);
    }

    #[test]
    fn a_memfd_cannot_shrink_once_it_is_guest_memory() {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let flags = MFdFlags::MFD_ALLOW_SEALING;
        let file: File = memfd_create(c"ram", flags).expect("a memfd").into();
        file.set_len(0x2000).expect("sized");
        let mut map = MemoryMap::default();
        let clone = file.try_clone().expect("cloned");
        assert!(mapped(&mut map, 0, 0x2000, clone, 0).is_empty());
        assert!(file.set_len(0x1000).is_err());
        assert_eq!(bytes(&map)[1], Some(0));
    }

    /// A guest's IOMMU at its worst: each page mapped apart, all over the file, so that no two
    /// are one range; then unmapped in halves of halves. Prints how long it takes.
    #[test]
    fn as_many_ranges_as_vfio_allows_take_moments() {
        const PAGES: u64 = 65_535;
        let file = tempfile::tempfile().expect("a file");
        file.set_len(1 << 28).expect("sized");
        let mut map = MemoryMap::default();
        let begun = std::time::Instant::now();
        for page in 0..PAGES {
            let clone = file.try_clone().expect("cloned");
            // An odd factor: a permutation of the file's pages.
            let offset = (page.wrapping_mul(40_503) % (1 << 16)) << 12;
            assert!(mapped(&mut map, page << 12, 0x1000, clone, offset).is_empty());
        }
        let maps = begun.elapsed();
        file.write_all_at(&[7], 40_503 << 12).expect("written");
        assert_eq!(bytes(&map)[..2], [Some(0), Some(7)]);
        let begun = std::time::Instant::now();
        let mut at = 0;
        while at < PAGES {
            // The largest aligned power of two, as QEMU does it.
            let size = (PAGES + 1 - at).next_power_of_two() / 2;
            assert!(!map.unmap(at << 12..(at + size) << 12).is_empty());
            at += size;
        }
        let unmaps = begun.elapsed();
        println!("{PAGES} maps: {maps:?}; unmaps of all: {unmaps:?}");
        assert!(map.clear().is_empty());
        // Milliseconds; a hundred times as much where each message costs what all do.
        assert!(maps + unmaps < std::time::Duration::from_secs(5));
    }

    #[test]
    fn senseless_ranges_are_refused() {
        let mut map = MemoryMap::default();
        assert!(
            map.map(0x1000, 0x5000, Rights::ALL, file(1), 0).is_err(),
            "too short"
        );
        assert!(
            map.map(0x1000, 0x1000, Rights::ALL, file(1), u64::MAX - 0xfff)
                .is_err()
        );
        assert!(map.map(0x1001, 0x1000, Rights::ALL, file(1), 0).is_err());
        assert!(map.map(0x1000, 0, Rights::ALL, file(1), 0).is_err());
        assert!(map.map(!0xfff, 0x2000, Rights::ALL, file(1), 0).is_err());
        assert_eq!(bytes(&map), [None; 6]);
    }
}
