//! The bus of a device in this process, with what an IOMMU does: bus addresses lead to memory that
//! was mapped there, with its rights, or to a fault.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use extlb_device::ports::{BusError, Dma};
use extlb_spec::Gpa;
use vm_memory::{MmapRegion, VolatileMemory as _, VolatileSlice};

/// Memory that is mapped at bus addresses: a mapping of the device's own.
#[derive(Debug)]
struct Target {
    region: MmapRegion,
    write: bool,
}

/// What is mapped, by its first bus address.
///
/// An access holds the lock for reading while it lasts. So when a change was made, no access to
/// what was taken out is under way, and none follows.
#[derive(Debug, Default)]
pub(super) struct Bus {
    targets: RwLock<BTreeMap<Gpa, Target>>,
    faults: AtomicU64,
}

impl Bus {
    /// Maps a region. False if something is mapped there already.
    pub(super) fn insert(&self, at: Gpa, region: MmapRegion, write: bool) -> bool {
        let mut targets = self.change();
        let Some(end) = at.checked_add(region.size() as u64) else {
            return false;
        };
        let last = targets.range(..end).next_back();
        if last.is_some_and(|(start, target)| start.0 + target.region.size() as u64 > at.0) {
            return false;
        }
        targets.insert(at, Target { region, write });
        true
    }

    /// Takes a region out, as a whole. False if there is no such region.
    pub(super) fn remove(&self, at: Gpa, len: u64) -> bool {
        let mut targets = self.change();
        match targets.get(&at) {
            Some(target) if target.region.size() as u64 == len => targets.remove(&at).is_some(),
            _ => false,
        }
    }

    /// Accesses that met no memory, or may not do what they tried.
    pub(super) fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    fn change(&self) -> RwLockWriteGuard<'_, BTreeMap<Gpa, Target>> {
        self.targets.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self) -> RwLockReadGuard<'_, BTreeMap<Gpa, Target>> {
        self.targets.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn slice<'a>(
        &self,
        targets: &'a BTreeMap<Gpa, Target>,
        at: Gpa,
        len: usize,
        write: bool,
    ) -> Result<VolatileSlice<'a>, BusError> {
        let slice = targets
            .range(..=at)
            .next_back()
            .and_then(|(start, target)| {
                let offset = usize::try_from(at.0 - start.0).ok()?;
                let slice = target.region.get_slice(offset, len).ok()?;
                (target.write || !write).then_some(slice)
            });
        slice.ok_or_else(|| self.fault(at, len))
    }

    fn fault(&self, addr: Gpa, len: usize) -> BusError {
        self.faults.fetch_add(1, Ordering::Relaxed);
        BusError { addr, len }
    }

    fn word<R>(
        &self,
        at: Gpa,
        write: bool,
        f: impl FnOnce(&AtomicU32) -> R,
    ) -> Result<R, BusError> {
        let targets = self.look();
        let slice = self.slice(&targets, at, 4, write)?;
        let word = slice.get_atomic_ref(0).map(f);
        word.map_err(|_| self.fault(at, 4))
    }

    fn double<R>(
        &self,
        at: Gpa,
        write: bool,
        f: impl FnOnce(&AtomicU64) -> R,
    ) -> Result<R, BusError> {
        let targets = self.look();
        let slice = self.slice(&targets, at, 8, write)?;
        let word = slice.get_atomic_ref(0).map(f);
        word.map_err(|_| self.fault(at, 8))
    }
}

impl Dma for Bus {
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        let targets = self.look();
        self.slice(&targets, from, to.len(), false)?.copy_to(to);
        Ok(())
    }

    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        let targets = self.look();
        self.slice(&targets, to, from.len(), true)?.copy_from(from);
        Ok(())
    }

    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        let targets = self.look();
        let source = self.slice(&targets, from, len, false)?;
        source.copy_to_volatile_slice(self.slice(&targets, to, len, true)?);
        Ok(())
    }

    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32, BusError> {
        self.word(at, false, |word| word.load(order))
    }

    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<(), BusError> {
        self.word(at, true, |word| word.store(value, order))
    }

    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64, BusError> {
        self.double(at, false, |word| word.load(order))
    }

    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<(), BusError> {
        self.double(at, true, |word| word.store(value, order))
    }

    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<u64, BusError> {
        self.double(at, true, |word| {
            word.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
                .unwrap_or_else(|found| found)
        })
    }

    fn fetch_add_u64(&self, at: Gpa, value: u64) -> Result<u64, BusError> {
        self.double(at, true, |word| word.fetch_add(value, Ordering::AcqRel))
    }

    fn view(&self, f: &mut dyn FnMut(&dyn Dma)) {
        f(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_mapped_or_only_for_reading_is_a_fault() {
        let bus = Bus::default();
        let region = || MmapRegion::new(0x2000).unwrap();
        assert!(bus.insert(Gpa(0x1_0000), region(), true));
        assert!(bus.insert(Gpa(0x1_2000), region(), false));
        for taken in [0xf000, 0x1_0000, 0x1_1000, 0x1_3000, !0xfff] {
            assert!(!bus.insert(Gpa(taken), region(), true), "{taken:#x}");
        }
        bus.write(Gpa(0x1_1ff8), &[7; 8]).unwrap();
        bus.copy(Gpa(0x1_2000), Gpa(0x1_0000), 16).unwrap();
        assert_eq!(
            bus.load_u64(Gpa(0x1_1ff8), Ordering::Relaxed),
            Ok(0x0707_0707_0707_0707)
        );
        assert_eq!(bus.faults(), 0);
        assert!(bus.copy(Gpa(0x1_0000), Gpa(0x1_2000), 16).is_err());
        assert!(bus.store_u32(Gpa(0x1_2000), 1, Ordering::Relaxed).is_err());
        assert!(
            bus.read(Gpa(0x1_1ff9), &mut [0; 8]).is_err(),
            "beyond the end"
        );
        assert!(bus.load_u64(Gpa(0x1_0004), Ordering::Relaxed).is_err());
        assert!(!bus.remove(Gpa(0x1_0000), 0x1000));
        assert!(bus.remove(Gpa(0x1_0000), 0x2000));
        assert!(bus.read(Gpa(0x1_0000), &mut [0; 8]).is_err());
        assert_eq!(bus.faults(), 5);
    }
}
