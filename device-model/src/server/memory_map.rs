//! Guest RAM as the client describes it: ranges of files, which come, go and overlap.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use extlb_spec::PAGE_SIZE;
use extlb_spec::addr::GPA_BITS;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// Ranges that a client may have at once; QEMU needs about ten.
const MAX_RANGES: usize = 4096;

#[derive(Clone, Debug)]
struct Piece {
    range: Range<u64>,
    file: Arc<File>,
    offset: u64,
    region: Arc<GuestRegionMmap>,
}

/// The ranges of the moment, ordered and apart.
#[derive(Debug, Default)]
pub(super) struct MemoryMap {
    pieces: Vec<Piece>,
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what.to_owned())
}

impl Piece {
    fn new(range: Range<u64>, file: Arc<File>, offset: u64) -> io::Result<Self> {
        let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let at = FileOffset::from_arc(file.clone(), offset);
        let region = GuestRegionMmap::from_range(GuestAddress(range.start), len, Some(at))
            .map_err(io::Error::other)?;
        Ok(Self {
            range,
            file,
            offset,
            region: Arc::new(region),
        })
    }
}

impl MemoryMap {
    /// Adds a range; where it overlaps others, it takes their place.
    pub(super) fn map(&mut self, at: u64, len: u64, file: File, offset: u64) -> io::Result<()> {
        let aligned = (at | len | offset).is_multiple_of(PAGE_SIZE) && len > 0;
        let end = at.checked_add(len).filter(|end| *end <= 1 << GPA_BITS);
        let (true, Some(end)) = (aligned, end) else {
            return Err(invalid("a range of guest memory must be whole pages"));
        };
        // Beyond the end of the file an access would kill this process.
        let file_end = offset.checked_add(len);
        if file_end.is_none_or(|end| file.metadata().map_or(true, |m| end > m.len())) {
            return Err(invalid("the file is shorter than the range"));
        }
        if self.pieces.len() >= MAX_RANGES {
            return Err(invalid("too many ranges of guest memory"));
        }
        let piece = Piece::new(at..end, Arc::new(file), offset)?;
        self.unmap(at..end)?;
        let place = self.pieces.partition_point(|p| p.range.start < at);
        self.pieces.insert(place, piece);
        Ok(())
    }

    /// Takes a range out, also of the middle of others.
    pub(super) fn unmap(&mut self, range: Range<u64>) -> io::Result<()> {
        let mut kept = Vec::with_capacity(self.pieces.len() + 1);
        for piece in &self.pieces {
            let outside = range.end <= piece.range.start || piece.range.end <= range.start;
            if outside {
                kept.push(piece.clone());
                continue;
            }
            let before = piece.range.start..range.start.max(piece.range.start);
            let after = range.end.min(piece.range.end)..piece.range.end;
            for rest in [before, after] {
                if rest.start < rest.end {
                    let offset = piece.offset + (rest.start - piece.range.start);
                    kept.push(Piece::new(rest, piece.file.clone(), offset)?);
                }
            }
        }
        self.pieces = kept;
        Ok(())
    }

    /// Takes everything out.
    pub(super) fn clear(&mut self) {
        self.pieces.clear();
    }

    /// What the device's memory port takes.
    pub(super) fn memory(&self) -> GuestMemoryMmap {
        let regions = self.pieces.iter().map(|p| p.region.clone()).collect();
        // The pieces are ordered and apart; only "none at all" is refused.
        GuestMemoryMmap::from_arc_regions(regions).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GuestRam;
    use crate::ports::Dma;
    use extlb_spec::Gpa;
    use std::os::unix::fs::FileExt;

    fn file(fill: u8) -> File {
        let file = tempfile::tempfile().expect("a temporary file");
        file.write_all_at(&[fill; 0x4000], 0).expect("written");
        file
    }

    fn bytes(map: &MemoryMap) -> Vec<Option<u8>> {
        let ram = GuestRam::new(map.memory());
        let at = |page: u64| {
            let mut byte = [0];
            let read = ram.read(Gpa(page << 12), &mut byte);
            read.ok().map(|()| byte[0])
        };
        (0..6).map(at).collect()
    }

    #[test]
    fn a_new_range_takes_the_place_of_what_it_overlaps() {
        let mut map = MemoryMap::default();
        map.map(0x1000, 0x4000, file(1), 0).expect("mapped");
        map.map(0x2000, 0x1000, file(2), 0x1000).expect("mapped");
        assert_eq!(
            bytes(&map),
            [None, Some(1), Some(2), Some(1), Some(1), None]
        );
        map.unmap(0x2000..0x4000).expect("unmapped");
        assert_eq!(bytes(&map), [None, Some(1), None, None, Some(1), None]);
        map.clear();
        assert_eq!(bytes(&map), [None; 6]);
    }

    #[test]
    fn a_piece_that_was_cut_keeps_its_place_in_the_file() {
        let file = file(0);
        file.write_all_at(&[9], 0x3000).expect("written");
        let mut map = MemoryMap::default();
        map.map(0, 0x4000, file, 0).expect("mapped");
        map.unmap(0x1000..0x2000).expect("unmapped");
        assert_eq!(bytes(&map)[3], Some(9));
    }

    #[test]
    fn senseless_ranges_are_refused() {
        let mut map = MemoryMap::default();
        assert!(map.map(0x1000, 0x5000, file(1), 0).is_err(), "too short");
        assert!(map.map(0x1000, 0x1000, file(1), u64::MAX - 0xfff).is_err());
        assert!(map.map(0x1001, 0x1000, file(1), 0).is_err());
        assert!(map.map(0x1000, 0, file(1), 0).is_err());
        assert!(map.map(!0xfff, 0x2000, file(1), 0).is_err());
        assert_eq!(bytes(&map), [None; 6]);
    }
}
