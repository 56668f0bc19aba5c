//! Guest RAM behind the [`Dma`] port: memory of this process, by `vm-memory`'s volatile access.

mod chunks;
mod files;
mod ranges;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use extlb_spec::addr::GPA_BITS;
use extlb_spec::{Gpa, PAGE_SIZE};
use vm_memory::{MmapRegion, VolatileMemory as _, VolatileSlice};

use crate::ports::{BusError, Dma};
use crate::sync::lock;
use files::{Files, invalid};
use ranges::{Ranges, Target};
pub(crate) use ranges::{Removed, Rights};

/// Guest RAM whose map can change while the device runs. Clones share the map.
///
/// An access uses the map as it was when the access began, without a lock; what that map names
/// stays mapped in this process so long. Accesses that begin after a change see the change.
#[derive(Clone, Debug, Default)]
pub struct GuestRam {
    ranges: Arc<ArcSwap<Ranges>>,
    /// Also the lock of those who change the map.
    files: Arc<Mutex<Files>>,
}

impl GuestRam {
    /// Fresh zeroed RAM of this process: (start, bytes) of each piece, for a device in process.
    pub fn anonymous(ranges: &[(Gpa, usize)]) -> io::Result<Self> {
        let ram = Self::default();
        for (start, len) in ranges {
            let region = MmapRegion::new(*len).map_err(io::Error::other)?;
            let target = Target {
                region: Arc::new(region),
                offset: 0,
                rights: Rights::ALL,
            };
            let range = checked(*start, *len as u64)?;
            let removed = ram.change(|ranges, _| ranges.insert(range, target));
            if removed.is_none_or(|removed| !removed.is_empty()) {
                return Err(invalid("pieces of RAM overlap"));
            }
        }
        Ok(ram)
    }

    /// Lets `[offset, offset + len)` of a file answer at `[at, at + len)`, where nothing is yet.
    /// All are multiples of the page size. The file must not shrink below.
    pub fn map_file(
        &self,
        at: Gpa,
        len: u64,
        file: File,
        offset: u64,
        write: bool,
    ) -> io::Result<()> {
        let rights = Rights { read: true, write };
        if !self.ranges.load().is_free(&checked(at, len)?) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.map_over(at, len, file, offset, rights).map(|_| ())
    }

    /// Takes `[at, at + len)` out; whether anything was there. Accesses that began before may
    /// still be under way: [`crate::Device::quiesce`] waits for their end.
    pub fn unmap(&self, at: Gpa, len: u64) -> io::Result<bool> {
        Ok(!self.remove(checked(at, len)?).is_empty())
    }

    /// As [`GuestRam::map_file`]; where the range overlaps others, it takes their place, and
    /// returns them.
    pub(crate) fn map_over(
        &self,
        at: Gpa,
        len: u64,
        file: File,
        offset: u64,
        rights: Rights,
    ) -> io::Result<Removed> {
        let range = checked(at, len)?;
        if !offset.is_multiple_of(PAGE_SIZE) {
            return Err(invalid("a range of memory must be whole pages"));
        }
        let end = offset.checked_add(len);
        let end = end.ok_or_else(|| invalid("no file is that long"))?;
        self.change(|ranges, files| {
            let target = Target {
                region: files.open(file, end, rights.write)?,
                offset,
                rights,
            };
            let replaced = ranges.insert(range, target);
            replaced.ok_or_else(|| invalid("too many ranges of memory"))
        })
    }

    /// Takes a range out, see [`GuestRam::unmap`].
    pub(crate) fn remove(&self, range: Range<u64>) -> Removed {
        self.change(|ranges, _| ranges.remove(range))
    }

    /// Takes everything out; likewise.
    pub(crate) fn clear(&self) -> Removed {
        self.change(|ranges, _| ranges.clear())
    }

    /// Whether a file was mapped that can shrink, in which case an access would end this process.
    pub(crate) fn can_shrink(&self) -> bool {
        lock(&self.files).can_shrink()
    }

    /// Puts a changed copy of the map in place. The copy shares all but a few nodes.
    fn change<R>(&self, change: impl FnOnce(&mut Ranges, &mut Files) -> R) -> R {
        let mut files = lock(&self.files);
        let mut ranges = Ranges::clone(&self.ranges.load());
        let result = change(&mut ranges, &mut files);
        self.ranges.store(Arc::new(ranges));
        result
    }

    fn with<R>(
        &self,
        at: Gpa,
        len: usize,
        needed: Rights,
        f: impl FnOnce(VolatileSlice<'_>) -> Option<R>,
    ) -> Result<R, BusError> {
        let ranges = self.ranges.load();
        let slice = ranges.slice(at.0, len, needed);
        slice.and_then(f).ok_or(BusError { addr: at, len })
    }
}

/// The range, if it is whole pages that the device can address.
fn checked(at: Gpa, len: u64) -> io::Result<Range<u64>> {
    let aligned = (at.0 | len).is_multiple_of(PAGE_SIZE) && len > 0;
    let end = at.0.checked_add(len).filter(|end| *end <= 1 << GPA_BITS);
    match end {
        Some(end) if aligned => Ok(at.0..end),
        _ => Err(invalid("a range of memory must be whole pages")),
    }
}

impl Dma for GuestRam {
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        self.with(from, to.len(), Rights::READ, |slice| {
            slice.copy_to(to);
            Some(())
        })
    }

    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        self.with(to, from.len(), Rights::WRITE, |slice| {
            slice.copy_from(from);
            Some(())
        })
    }

    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        let ranges = self.ranges.load();
        let slice = |at: Gpa, needed| {
            let slice = ranges.slice(at.0, len, needed);
            slice.ok_or(BusError { addr: at, len })
        };
        slice(from, Rights::READ)?.copy_to_volatile_slice(slice(to, Rights::WRITE)?);
        Ok(())
    }

    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32, BusError> {
        self.with(at, 4, Rights::READ, |s| {
            let word: &AtomicU32 = s.get_atomic_ref(0).ok()?;
            Some(word.load(order))
        })
    }

    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<(), BusError> {
        self.with(at, 4, Rights::WRITE, |s| {
            let word: &AtomicU32 = s.get_atomic_ref(0).ok()?;
            word.store(value, order);
            Some(())
        })
    }

    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64, BusError> {
        self.with(at, 8, Rights::READ, |s| {
            let word: &AtomicU64 = s.get_atomic_ref(0).ok()?;
            Some(word.load(order))
        })
    }

    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<(), BusError> {
        self.with(at, 8, Rights::WRITE, |s| {
            let word: &AtomicU64 = s.get_atomic_ref(0).ok()?;
            word.store(value, order);
            Some(())
        })
    }

    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<u64, BusError> {
        self.with(at, 8, Rights::ALL, |s| {
            let word: &AtomicU64 = s.get_atomic_ref(0).ok()?;
            let found = word.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire);
            Some(found.unwrap_or_else(|found| found))
        })
    }

    fn fetch_add_u64(&self, at: Gpa, value: u64) -> Result<u64, BusError> {
        self.with(at, 8, Rights::ALL, |s| {
            let word: &AtomicU64 = s.get_atomic_ref(0).ok()?;
            Some(word.fetch_add(value, Ordering::AcqRel))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_outside_ram_and_misaligned_words_are_bus_errors() {
        let ram = GuestRam::anonymous(&[(Gpa(0x1000), 0x2000)]).expect("maps");
        let mut byte = [0];
        assert!(ram.read(Gpa(0x2fff), &mut byte).is_ok());
        assert!(ram.read(Gpa(0x3000), &mut byte).is_err());
        assert!(ram.read(Gpa(u64::MAX), &mut [0; 8]).is_err());
        assert!(ram.load_u64(Gpa(0x1004), Ordering::Relaxed).is_err());
        assert!(ram.copy(Gpa(0x1000), Gpa(0x2ff8), 16).is_err());
        assert!(GuestRam::default().read(Gpa(0), &mut byte).is_err());
    }

    #[test]
    fn overlapping_copy_is_exact() {
        let ram = GuestRam::anonymous(&[(Gpa(0), 0x1000)]).expect("maps");
        ram.write(Gpa(0), b"abcdefgh").expect("in RAM");
        ram.copy(Gpa(0), Gpa(2), 6).expect("in RAM");
        let mut bytes = [0; 8];
        ram.read(Gpa(0), &mut bytes).expect("in RAM");
        assert_eq!(&bytes, b"ababcdef");
    }
}
