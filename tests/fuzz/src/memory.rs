//! Guest memory that knows what the device may do with each page of it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use extlb_device::GuestRam;
use extlb_device::ports::{BusError, Dma};
use extlb_spec::{Gpa, PAGE_SHIFT, PAGE_SIZE};

/// What the device may do with a page.
pub(crate) mod may {
    /// Read bytes of it, or words.
    pub(crate) const READ: u8 = 1 << 0;
    /// Store words.
    pub(crate) const STORE: u8 = 1 << 1;
    /// Set bits by compare-and-swap.
    pub(crate) const SWAP: u8 = 1 << 2;
    /// Write bytes.
    pub(crate) const WRITE: u8 = 1 << 3;
    pub(crate) const ALL: u8 = READ | STORE | SWAP | WRITE;
}

struct Piece {
    start: u64,
    pages: Vec<AtomicU8>,
}

/// RAM in pieces. An access that is not allowed panics; one where no RAM is, is a bus error.
pub(crate) struct Watched {
    pub(crate) ram: GuestRam,
    pieces: Vec<Piece>,
    accesses: AtomicU64,
    /// Words that the device raises by one at a time, with what they are.
    counted: Mutex<Vec<(Gpa, u32)>>,
}

impl Watched {
    /// Zeroed RAM, of which nothing may be touched.
    pub(crate) fn new(pieces: &[(Gpa, u64)]) -> Self {
        let size = |(at, pages): &(Gpa, u64)| (*at, (pages * PAGE_SIZE) as usize);
        let sizes: Vec<_> = pieces.iter().map(size).collect();
        let piece = |(start, pages): &(Gpa, u64)| Piece {
            start: start.0,
            pages: (0..*pages).map(|_| AtomicU8::new(0)).collect(),
        };
        Self {
            ram: GuestRam::anonymous(&sizes).expect("memory for the guest"),
            pieces: pieces.iter().map(piece).collect(),
            accesses: AtomicU64::new(0),
            counted: Mutex::default(),
        }
    }

    fn page(&self, at: Gpa) -> Option<&AtomicU8> {
        let inside = |piece: &&Piece| {
            let pages =
                at.0.checked_sub(piece.start)
                    .map(|bytes| bytes >> PAGE_SHIFT);
            pages.is_some_and(|page| page < piece.pages.len() as u64)
        };
        let piece = self.pieces.iter().find(inside)?;
        Some(&piece.pages[((at.0 - piece.start) >> PAGE_SHIFT) as usize])
    }

    /// Says what the device may do with a page from now on.
    pub(crate) fn allow(&self, at: Gpa, what: u8) {
        let page = self.page(at).expect("a page of RAM");
        page.store(what, Ordering::Relaxed);
    }

    /// How often the device accessed memory.
    pub(crate) fn accesses(&self) -> u64 {
        self.accesses.load(Ordering::Relaxed)
    }

    /// The device must count in this word, from 0 on.
    pub(crate) fn count(&self, at: Gpa) {
        let mut counted = self.counted.lock().expect("nobody panicked");
        counted.retain(|(word, _)| *word != at);
        counted.push((at, 0));
    }

    /// What the device stored last in a word in which it counts, whatever software did to it.
    pub(crate) fn counted(&self, at: Gpa) -> u32 {
        let counted = self.counted.lock().expect("nobody panicked");
        let word = counted.iter().find(|(word, _)| *word == at);
        word.expect("a word that is counted").1
    }

    /// An access goes to one piece, or to no RAM.
    fn meet(&self, at: Gpa, len: usize, what: u8) {
        self.accesses.fetch_add(1, Ordering::Relaxed);
        let Some(last) = at.checked_add((len as u64).saturating_sub(1)) else {
            return;
        };
        let mut page = at.page();
        while page <= last {
            let Some(rights) = self.page(page) else {
                return;
            };
            let allowed = rights.load(Ordering::Relaxed);
            assert!(
                allowed & what == what,
                "the device may not do this: {what:#b} at {at:?}, {len} bytes; allowed {allowed:#b}"
            );
            page = Gpa(page.0 + PAGE_SIZE);
        }
    }

    /// Stores a double word, as software.
    pub(crate) fn put_u64(&self, at: Gpa, value: u64) {
        self.ram
            .store_u64(at, value, Ordering::SeqCst)
            .expect("a word of RAM");
    }

    /// Stores a word, as software.
    pub(crate) fn put_u32(&self, at: Gpa, value: u32) {
        self.ram
            .store_u32(at, value, Ordering::SeqCst)
            .expect("a word of RAM");
    }

    /// Loads a double word, as software.
    pub(crate) fn get_u64(&self, at: Gpa) -> u64 {
        let word = self.ram.load_u64(at, Ordering::SeqCst);
        word.expect("a word of RAM")
    }

    /// Loads a word, as software.
    pub(crate) fn get_u32(&self, at: Gpa) -> u32 {
        let word = self.ram.load_u32(at, Ordering::SeqCst);
        word.expect("a word of RAM")
    }
}

impl Dma for Watched {
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        self.meet(from, to.len(), may::READ);
        self.ram.read(from, to)
    }

    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        self.meet(to, from.len(), may::WRITE);
        self.ram.write(to, from)
    }

    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        self.meet(from, len, may::READ);
        self.meet(to, len, may::WRITE);
        self.ram.copy(from, to, len)
    }

    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32, BusError> {
        self.meet(at, 4, may::READ);
        self.ram.load_u32(at, order)
    }

    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<(), BusError> {
        self.meet(at, 4, may::STORE);
        let mut counted = self.counted.lock().expect("nobody panicked");
        if let Some((_, last)) = counted.iter_mut().find(|(word, _)| *word == at) {
            assert_eq!(value, last.wrapping_add(1), "a count at {at:?}");
            *last = value;
        }
        self.ram.store_u32(at, value, order)
    }

    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64, BusError> {
        self.meet(at, 8, may::READ);
        self.ram.load_u64(at, order)
    }

    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<(), BusError> {
        self.meet(at, 8, may::STORE);
        self.ram.store_u64(at, value, order)
    }

    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<u64, BusError> {
        self.meet(at, 8, may::SWAP);
        self.ram.compare_exchange_u64(at, current, new)
    }

    fn fetch_add_u64(&self, at: Gpa, value: u64) -> Result<u64, BusError> {
        self.meet(at, 8, may::SWAP);
        self.ram.fetch_add_u64(at, value)
    }
}
