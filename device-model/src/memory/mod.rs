//! Guest RAM behind the [`Dma`] port: memory of this process, by `vm-memory`'s volatile access.

mod chunks;
mod files;
mod indirect;
mod ranges;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use extlb_spec::addr::GPA_BITS;
use extlb_spec::{Gpa, PAGE_SIZE};
use vm_memory::{MmapRegion, VolatileMemory as _, VolatileSlice};

use crate::ports::{BusError, Dma};
use crate::sync::lock;
pub(crate) use files::seal;
use files::{Files, invalid};
pub(crate) use indirect::Indirect;
use ranges::{Found, Ranges, Store, Target};
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
                store: Store::Mapped(Arc::new(region)),
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
                store: Store::Mapped(files.open(file, end, rights.write)?),
                offset,
                rights,
            };
            let replaced = ranges.insert(range, target);
            replaced.ok_or_else(|| invalid("too many ranges of memory"))
        })
    }

    /// Lets `[offset, offset + len)` of what has to be asked for answer at `[at, at + len)`;
    /// likewise. There, atomic operations are bus errors, and words are plain bytes.
    pub(crate) fn map_asked(
        &self,
        at: Gpa,
        len: u64,
        by: Arc<dyn Indirect>,
        offset: u64,
        rights: Rights,
    ) -> io::Result<Removed> {
        let range = checked(at, len)?;
        let end = offset.checked_add(len);
        end.ok_or_else(|| invalid("no memory is that long"))?;
        let target = Target {
            store: Store::Asked(by),
            offset,
            rights,
        };
        let replaced = self.change(|ranges, _| ranges.insert(range, target));
        replaced.ok_or_else(|| invalid("too many ranges of memory"))
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
}

/// A map of the moment.
struct Map<'a>(&'a Ranges);

impl Map<'_> {
    fn with<R>(
        &self,
        at: Gpa,
        len: usize,
        needed: Rights,
        mapped: impl FnOnce(VolatileSlice<'_>) -> Option<R>,
        asked: impl FnOnce(&dyn Indirect, u64) -> io::Result<R>,
    ) -> Result<R, BusError> {
        let error = BusError { addr: at, len };
        let (by, offset) = match self.0.find(at.0, len, needed).ok_or(error)? {
            Found::Mapped(slice) => return mapped(slice).ok_or(error),
            Found::Asked(by, offset) => (by, offset),
        };
        // One question an access: a drain that waits for it waits for one answer.
        match len <= PAGE_SIZE as usize {
            true => asked(&**by, offset).map_err(|_| error),
            false => Err(error),
        }
    }

    /// A word, which is one or a bus error: it has to be aligned wherever it is.
    fn word<R, const N: usize>(
        &self,
        at: Gpa,
        needed: Rights,
        mapped: impl FnOnce(VolatileSlice<'_>) -> Option<R>,
        asked: impl FnOnce(&dyn Indirect, u64) -> io::Result<R>,
    ) -> Result<R, BusError> {
        self.with(at, N, needed, mapped, |by, offset| {
            match offset.is_multiple_of(N as u64) {
                true => asked(by, offset),
                false => Err(io::ErrorKind::InvalidInput.into()),
            }
        })
    }

    /// A double word that only memory which is mapped can change at once.
    fn atomic(&self, at: Gpa, change: impl FnOnce(&AtomicU64) -> u64) -> Result<u64, BusError> {
        self.word::<_, 8>(
            at,
            Rights::ALL,
            |s| {
                let word: &AtomicU64 = s.get_atomic_ref(0).ok()?;
                Some(change(word))
            },
            |_, _| Err(io::ErrorKind::Unsupported.into()),
        )
    }
}

/// Reads a word that has to be asked for; what comes later is read later, whatever was ordered.
fn ask<const N: usize>(by: &dyn Indirect, at: u64) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    by.read(at, &mut bytes)?;
    fence(Ordering::SeqCst);
    Ok(bytes)
}

/// Writes one; what came before is written before.
fn tell(by: &dyn Indirect, at: u64, bytes: &[u8]) -> io::Result<()> {
    fence(Ordering::SeqCst);
    by.write(at, bytes)
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

impl Dma for Map<'_> {
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        // Either, not both: each needs it alone.
        let to = std::cell::RefCell::new(to);
        let mapped = |slice: VolatileSlice<'_>| {
            slice.copy_to(&mut to.borrow_mut()[..]);
            Some(())
        };
        let len = to.borrow().len();
        let asked = |by: &dyn Indirect, at| by.read(at, &mut to.borrow_mut());
        self.with(from, len, Rights::READ, mapped, asked)
    }

    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        let mapped = |slice: VolatileSlice<'_>| {
            slice.copy_from(from);
            Some(())
        };
        let asked = |by: &dyn Indirect, at| by.write(at, from);
        self.with(to, from.len(), Rights::WRITE, mapped, asked)
    }

    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        let find = |at: Gpa, needed| {
            let found = self.0.find(at.0, len, needed);
            found.ok_or(BusError { addr: at, len })
        };
        match (find(from, Rights::READ)?, find(to, Rights::WRITE)?) {
            (Found::Mapped(from), Found::Mapped(to)) => from.copy_to_volatile_slice(to),
            _ => {
                // By way of here; what overlaps is exact, since all is read before any is written.
                let mut bytes = [0; PAGE_SIZE as usize];
                let bytes = bytes.get_mut(..len).ok_or(BusError { addr: from, len })?;
                self.read(from, bytes)?;
                self.write(to, bytes)?;
            }
        }
        Ok(())
    }

    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32, BusError> {
        let mapped = |s: VolatileSlice<'_>| {
            let word: &AtomicU32 = s.get_atomic_ref(0).ok()?;
            Some(word.load(order))
        };
        let asked = |by: &dyn Indirect, at| ask(by, at).map(u32::from_le_bytes);
        self.word::<_, 4>(at, Rights::READ, mapped, asked)
    }

    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<(), BusError> {
        let mapped = |s: VolatileSlice<'_>| {
            let word: &AtomicU32 = s.get_atomic_ref(0).ok()?;
            word.store(value, order);
            Some(())
        };
        let asked = |by: &dyn Indirect, at| tell(by, at, &value.to_le_bytes());
        self.word::<_, 4>(at, Rights::WRITE, mapped, asked)
    }

    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64, BusError> {
        let mapped = |s: VolatileSlice<'_>| {
            let word: &AtomicU64 = s.get_atomic_ref(0).ok()?;
            Some(word.load(order))
        };
        let asked = |by: &dyn Indirect, at| ask(by, at).map(u64::from_le_bytes);
        self.word::<_, 8>(at, Rights::READ, mapped, asked)
    }

    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<(), BusError> {
        let mapped = |s: VolatileSlice<'_>| {
            let word: &AtomicU64 = s.get_atomic_ref(0).ok()?;
            word.store(value, order);
            Some(())
        };
        let asked = |by: &dyn Indirect, at| tell(by, at, &value.to_le_bytes());
        self.word::<_, 8>(at, Rights::WRITE, mapped, asked)
    }

    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<u64, BusError> {
        self.atomic(at, |word| {
            let found = word.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire);
            found.unwrap_or_else(|found| found)
        })
    }

    fn fetch_add_u64(&self, at: Gpa, value: u64) -> Result<u64, BusError> {
        self.atomic(at, |word| word.fetch_add(value, Ordering::AcqRel))
    }

    fn view(&self, f: &mut dyn FnMut(&dyn Dma)) {
        f(self);
    }
}

/// The map of a moment, and the RAM that it was of.
///
/// What was taken out since then may still be found: whoever took it out waits for the guard that
/// the view is of. What was added since must be found too, since a long guard may get to work that
/// was submitted after it: so what is not in the view is looked for again.
struct View<'a> {
    ram: &'a GuestRam,
    then: arc_swap::Guard<Arc<Ranges>>,
}

impl View<'_> {
    fn find<R>(
        &self,
        mut access: impl FnMut(Map<'_>) -> Result<R, BusError>,
    ) -> Result<R, BusError> {
        access(Map(&self.then)).or_else(|error| {
            let now = self.ram.ranges.load();
            match Arc::ptr_eq(&now, &self.then) {
                true => Err(error),
                false => access(Map(&now)),
            }
        })
    }
}

impl Dma for View<'_> {
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        self.find(|map| map.read(from, to))
    }

    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        self.find(|map| map.write(to, from))
    }

    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        self.find(|map| map.copy(from, to, len))
    }

    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32, BusError> {
        self.find(|map| map.load_u32(at, order))
    }

    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<(), BusError> {
        self.find(|map| map.store_u32(at, value, order))
    }

    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64, BusError> {
        self.find(|map| map.load_u64(at, order))
    }

    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<(), BusError> {
        self.find(|map| map.store_u64(at, value, order))
    }

    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<u64, BusError> {
        self.find(|map| map.compare_exchange_u64(at, current, new))
    }

    fn fetch_add_u64(&self, at: Gpa, value: u64) -> Result<u64, BusError> {
        self.find(|map| map.fetch_add_u64(at, value))
    }

    fn view(&self, f: &mut dyn FnMut(&dyn Dma)) {
        f(self);
    }
}

impl Dma for GuestRam {
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        Map(&self.ranges.load()).read(from, to)
    }

    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        Map(&self.ranges.load()).write(to, from)
    }

    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        Map(&self.ranges.load()).copy(from, to, len)
    }

    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32, BusError> {
        Map(&self.ranges.load()).load_u32(at, order)
    }

    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<(), BusError> {
        Map(&self.ranges.load()).store_u32(at, value, order)
    }

    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64, BusError> {
        Map(&self.ranges.load()).load_u64(at, order)
    }

    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<(), BusError> {
        Map(&self.ranges.load()).store_u64(at, value, order)
    }

    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<u64, BusError> {
        Map(&self.ranges.load()).compare_exchange_u64(at, current, new)
    }

    fn fetch_add_u64(&self, at: Gpa, value: u64) -> Result<u64, BusError> {
        Map(&self.ranges.load()).fetch_add_u64(at, value)
    }

    /// One look at the map: it costs as much as a small access.
    fn view(&self, f: &mut dyn FnMut(&dyn Dma)) {
        f(&View {
            ram: self,
            then: self.ranges.load(),
        });
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
    fn a_view_finds_what_is_added_and_keeps_what_is_taken_out() {
        let ram = GuestRam::anonymous(&[(Gpa(0x1000), 0x1000)]).expect("maps");
        let file = |fill: u8| {
            use std::os::unix::fs::FileExt;
            let file = tempfile::tempfile().expect("a file");
            file.write_all_at(&[fill; 0x1000], 0).expect("written");
            file
        };
        ram.view(&mut |view| {
            let at = |view: &dyn Dma, at| {
                let mut byte = [0];
                view.read(Gpa(at), &mut byte).ok().map(|()| byte[0])
            };
            assert_eq!(at(view, 0x3000), None);
            ram.map_file(Gpa(0x3000), 0x1000, file(7), 0, true)
                .expect("maps");
            assert_eq!(at(view, 0x3000), Some(7));
            assert!(ram.unmap(Gpa(0x1000), 0x1000).expect("taken out"));
            assert_eq!(at(view, 0x1000), Some(0), "until the guard ends");
            ram.view(&mut |view| assert_eq!(at(view, 0x1000), None));
        });
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
