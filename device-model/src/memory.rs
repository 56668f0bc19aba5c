//! Guest RAM behind the [`Dma`] port, by `vm-memory`.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use extlb_spec::Gpa;
use vm_memory::{
    GuestAddress, GuestAddressSpace as _, GuestMemoryAtomic, GuestMemoryBackend as _,
    GuestMemoryMmap, VolatileMemory as _, VolatileSlice,
};

use crate::ports::{BusError, Dma};

/// Guest RAM whose map can be replaced while the device runs.
#[derive(Clone, Debug)]
pub struct GuestRam {
    map: GuestMemoryAtomic<GuestMemoryMmap>,
}

impl Default for GuestRam {
    /// No RAM at all.
    fn default() -> Self {
        Self::new(GuestMemoryMmap::new())
    }
}

impl GuestRam {
    /// RAM as mapped.
    pub fn new(map: GuestMemoryMmap) -> Self {
        Self {
            map: GuestMemoryAtomic::new(map),
        }
    }

    /// Fresh zeroed RAM of this process: (start, bytes) of each piece, for a device in process.
    pub fn anonymous(ranges: &[(Gpa, usize)]) -> Result<Self, vm_memory::mmap::FromRangesError> {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|(start, len)| (GuestAddress(start.0), *len))
            .collect();
        Ok(Self::new(GuestMemoryMmap::from_ranges(&ranges)?))
    }

    /// Puts another map in place. Accesses that began before may still use the old one, which
    /// stays mapped for them; [`crate::Device::quiesce`] waits for their end.
    pub fn replace(&self, map: GuestMemoryMmap) {
        if let Ok(lock) = self.map.lock() {
            lock.replace(map);
        }
    }

    /// The map of the moment, for whoever plays the guest in process.
    pub fn map(&self) -> std::sync::Arc<GuestMemoryMmap> {
        self.map.memory().into_inner()
    }

    fn with<R>(
        &self,
        at: Gpa,
        len: usize,
        f: impl FnOnce(VolatileSlice<'_>) -> Option<R>,
    ) -> Result<R, BusError> {
        let map = self.map.memory();
        map.get_slice(GuestAddress(at.0), len)
            .ok()
            .and_then(f)
            .ok_or(BusError { addr: at, len })
    }
}

impl Dma for GuestRam {
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        self.with(from, to.len(), |slice| {
            slice.copy_to(to);
            Some(())
        })
    }

    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        self.with(to, from.len(), |slice| {
            slice.copy_from(from);
            Some(())
        })
    }

    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        let map = self.map.memory();
        let slice = |at: Gpa| {
            map.get_slice(GuestAddress(at.0), len)
                .map_err(|_| BusError { addr: at, len })
        };
        slice(from)?.copy_to_volatile_slice(slice(to)?);
        Ok(())
    }

    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32, BusError> {
        self.with(at, 4, |s| {
            let word: &AtomicU32 = s.get_atomic_ref(0).ok()?;
            Some(word.load(order))
        })
    }

    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<(), BusError> {
        self.with(at, 4, |s| {
            let word: &AtomicU32 = s.get_atomic_ref(0).ok()?;
            word.store(value, order);
            Some(())
        })
    }

    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64, BusError> {
        self.with(at, 8, |s| {
            let word: &AtomicU64 = s.get_atomic_ref(0).ok()?;
            Some(word.load(order))
        })
    }

    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<(), BusError> {
        self.with(at, 8, |s| {
            let word: &AtomicU64 = s.get_atomic_ref(0).ok()?;
            word.store(value, order);
            Some(())
        })
    }

    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<bool, BusError> {
        self.with(at, 8, |s| {
            let word: &AtomicU64 = s.get_atomic_ref(0).ok()?;
            Some(
                word.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
                    .is_ok(),
            )
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
