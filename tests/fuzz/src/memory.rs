//! Guest memory that knows what the device may do with each page of it.
//!
//! It is made for many short runs: words that one thread uses, and pages that are cleared only if
//! something was written.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use extlb_device::ports::{BusError, Dma};
use extlb_spec::{Gpa, PAGE_SHIFT, PAGE_SIZE};

/// What the device may do with a page.
pub(crate) mod may {
    /// Read bytes of it, or words.
    pub(crate) const READ: u8 = 1 << 0;
    /// Store words.
    pub(crate) const STORE: u8 = 1 << 1;
    /// Change words atomically.
    pub(crate) const SWAP: u8 = 1 << 2;
    /// Write bytes.
    pub(crate) const WRITE: u8 = 1 << 3;
    pub(crate) const ALL: u8 = READ | STORE | SWAP | WRITE;
}

/// Set in a page's rights: somebody wrote to it.
const DIRTY: u8 = 1 << 7;

struct Piece {
    start: u64,
    pages: Vec<AtomicU8>,
    words: Vec<AtomicU64>,
}

#[derive(Default)]
struct Noted {
    /// Words that only go forwards, with what they are and the most that they go at once.
    counted: Vec<(Gpa, u32, u32)>,
    /// What the device changed, if somebody wants to know: where, bytes.
    changed: Option<Vec<(Gpa, usize)>>,
}

/// RAM in pieces. An access that is not allowed panics; one where no RAM is, is a bus error.
pub(crate) struct Watched {
    pieces: Vec<Piece>,
    accesses: AtomicU64,
    noted: Mutex<Noted>,
}

const BYTES: usize = 8;

impl Watched {
    /// Zeroed RAM, of which nothing may be touched: where, and how many pages.
    pub(crate) fn new(pieces: &[(Gpa, u64)]) -> Self {
        let piece = |(start, pages): &(Gpa, u64)| Piece {
            start: start.0,
            pages: (0..*pages).map(|_| AtomicU8::new(0)).collect(),
            words: (0..pages * PAGE_SIZE / 8)
                .map(|_| AtomicU64::new(0))
                .collect(),
        };
        Self {
            pieces: pieces.iter().map(piece).collect(),
            accesses: AtomicU64::new(0),
            noted: Mutex::default(),
        }
    }

    /// The piece that holds all of a range, and where in it the range begins.
    fn piece(&self, at: Gpa, len: usize) -> Option<(&Piece, usize)> {
        self.pieces.iter().find_map(|piece| {
            let offset = usize::try_from(at.0.checked_sub(piece.start)?).ok()?;
            let end = offset.checked_add(len)?;
            (end <= piece.words.len() * BYTES).then_some((piece, offset))
        })
    }

    fn expect(&self, at: Gpa, len: usize) -> (&Piece, usize) {
        self.piece(at, len).expect("software names RAM")
    }

    /// Says what the device may do with a page from now on.
    pub(crate) fn allow(&self, at: Gpa, what: u8) {
        let (piece, offset) = self.expect(at, 1);
        let page = &piece.pages[offset >> PAGE_SHIFT];
        page.store(
            page.load(Ordering::Relaxed) & DIRTY | what,
            Ordering::Relaxed,
        );
    }

    /// How often the device accessed memory.
    pub(crate) fn accesses(&self) -> u64 {
        self.accesses.load(Ordering::Relaxed)
    }

    fn noted(&self) -> std::sync::MutexGuard<'_, Noted> {
        self.noted.lock().expect("nobody panicked")
    }

    /// The device counts in this word, from 0 on, at most so many at once and never back.
    pub(crate) fn count(&self, at: Gpa, most: u32) {
        let counted = &mut self.noted().counted;
        counted.retain(|word| word.0 != at);
        counted.push((at, 0, most));
    }

    /// From here on the device may count further at once.
    pub(crate) fn may_count(&self, at: Gpa, most: u32) {
        let counted = &mut self.noted().counted;
        if let Some(word) = counted.iter_mut().find(|word| word.0 == at) {
            word.2 = most;
        }
    }

    /// What the device stored last in a word in which it counts, whatever software did to it.
    pub(crate) fn counted(&self, at: Gpa) -> u32 {
        let noted = self.noted();
        let word = noted.counted.iter().find(|word| word.0 == at);
        word.expect("a word that is counted").1
    }

    /// What the device changed since the last time, in order, from the first time on.
    pub(crate) fn changed(&self) -> Vec<(Gpa, usize)> {
        self.noted().changed.replace(Vec::new()).unwrap_or_default()
    }

    /// An access of the device.
    fn meet(&self, at: Gpa, len: usize, what: u8) -> Result<(&Piece, usize), BusError> {
        self.accesses.fetch_add(1, Ordering::Relaxed);
        let (piece, offset) = self.piece(at, len).ok_or(BusError { addr: at, len })?;
        let last = offset + len.saturating_sub(1);
        for page in &piece.pages[offset >> PAGE_SHIFT..=last >> PAGE_SHIFT] {
            let allowed = page.load(Ordering::Relaxed);
            assert!(
                allowed & what == what,
                "the device may not do this: {what:#b} at {at:?}, {len} bytes; allowed {allowed:#b}"
            );
            if what != may::READ {
                page.store(allowed | DIRTY, Ordering::Relaxed);
            }
        }
        if what != may::READ
            && let Some(changed) = &mut self.noted().changed
        {
            changed.push((at, len));
        }
        Ok((piece, offset))
    }

    /// An aligned word of the device.
    fn word(&self, at: Gpa, len: usize, what: u8) -> Result<&AtomicU64, BusError> {
        if !at.is_aligned(len as u64) {
            return Err(BusError { addr: at, len });
        }
        let (piece, offset) = self.meet(at, len, what)?;
        Ok(&piece.words[offset / BYTES])
    }

    /// Zeroes a page that was written to.
    pub(crate) fn clear(&self, at: Gpa) {
        let (piece, offset) = self.expect(at, PAGE_SIZE as usize);
        let page = &piece.pages[offset >> PAGE_SHIFT];
        let rights = page.load(Ordering::Relaxed);
        if rights & DIRTY != 0 {
            page.store(rights & !DIRTY, Ordering::Relaxed);
            for word in &piece.words[offset / BYTES..][..PAGE_SIZE as usize / BYTES] {
                word.store(0, Ordering::Relaxed);
            }
        }
    }

    /// Writes, as software.
    pub(crate) fn put(&self, at: Gpa, from: &[u8]) {
        let (piece, offset) = self.expect(at, from.len());
        let last = offset + from.len().saturating_sub(1);
        for page in &piece.pages[offset >> PAGE_SHIFT..=last >> PAGE_SHIFT] {
            page.fetch_or(DIRTY, Ordering::Relaxed);
        }
        piece.put(offset, from);
    }

    /// Reads, as software.
    pub(crate) fn get<const N: usize>(&self, at: Gpa) -> [u8; N] {
        let (piece, offset) = self.expect(at, N);
        let mut bytes = [0; N];
        piece.get(offset, &mut bytes);
        bytes
    }

    /// Stores a double word, as software.
    pub(crate) fn put_u64(&self, at: Gpa, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    /// Stores a word, as software.
    pub(crate) fn put_u32(&self, at: Gpa, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    /// Loads a double word, as software.
    pub(crate) fn get_u64(&self, at: Gpa) -> u64 {
        u64::from_le_bytes(self.get(at))
    }

    /// Loads a word, as software.
    pub(crate) fn get_u32(&self, at: Gpa) -> u32 {
        u32::from_le_bytes(self.get(at))
    }
}

impl Piece {
    /// Calls `f` with each word of a range, and where in the word and in the range its part is.
    fn words(&self, offset: usize, len: usize, mut f: impl FnMut(&AtomicU64, usize, usize, usize)) {
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let inside = at % BYTES;
            let part = (BYTES - inside).min(len - done);
            f(&self.words[at / BYTES], inside, done, part);
            done += part;
        }
    }

    fn get(&self, offset: usize, to: &mut [u8]) {
        self.words(offset, to.len(), |word, inside, done, part| {
            let bytes = word.load(Ordering::Relaxed).to_le_bytes();
            to[done..done + part].copy_from_slice(&bytes[inside..inside + part]);
        });
    }

    fn put(&self, offset: usize, from: &[u8]) {
        self.words(offset, from.len(), |word, inside, done, part| {
            let mut bytes = word.load(Ordering::Relaxed).to_le_bytes();
            bytes[inside..inside + part].copy_from_slice(&from[done..done + part]);
            word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
        });
    }
}

impl Dma for Watched {
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        let (piece, offset) = self.meet(from, to.len(), may::READ)?;
        piece.get(offset, to);
        Ok(())
    }

    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        let (piece, offset) = self.meet(to, from.len(), may::WRITE)?;
        piece.put(offset, from);
        Ok(())
    }

    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        // Both first: an access that fails moves nothing.
        self.piece(to, len).ok_or(BusError { addr: to, len })?;
        let mut bytes = vec![0; len.min(1 << 20)];
        self.read(from, &mut bytes[..])?;
        self.write(to, &bytes)
    }

    fn load_u32(&self, at: Gpa, _: Ordering) -> Result<u32, BusError> {
        let word = self.word(at, 4, may::READ)?.load(Ordering::Relaxed);
        Ok((word >> (8 * (at.0 & 4))) as u32)
    }

    fn store_u32(&self, at: Gpa, value: u32, _: Ordering) -> Result<(), BusError> {
        let word = self.word(at, 4, may::STORE)?;
        let shift = 8 * (at.0 & 4);
        let kept = word.load(Ordering::Relaxed) & !(u64::from(u32::MAX) << shift);
        word.store(kept | u64::from(value) << shift, Ordering::Relaxed);
        let counted = &mut self.noted().counted;
        if let Some((_, last, most)) = counted.iter_mut().find(|word| word.0 == at) {
            let more = value.wrapping_sub(*last);
            assert!(
                (1..=*most).contains(&more),
                "at {at:?}: {last}, then {value}"
            );
            *last = value;
        }
        Ok(())
    }

    fn load_u64(&self, at: Gpa, _: Ordering) -> Result<u64, BusError> {
        Ok(self.word(at, 8, may::READ)?.load(Ordering::Relaxed))
    }

    fn store_u64(&self, at: Gpa, value: u64, _: Ordering) -> Result<(), BusError> {
        self.word(at, 8, may::STORE)?
            .store(value, Ordering::Relaxed);
        Ok(())
    }

    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<u64, BusError> {
        let word = self.word(at, 8, may::SWAP)?;
        let found = word.load(Ordering::Relaxed);
        if found == current {
            word.store(new, Ordering::Relaxed);
        }
        Ok(found)
    }

    fn fetch_add_u64(&self, at: Gpa, value: u64) -> Result<u64, BusError> {
        let word = self.word(at, 8, may::SWAP)?;
        Ok(word.fetch_add(value, Ordering::Relaxed))
    }

    fn view(&self, f: &mut dyn FnMut(&dyn Dma)) {
        f(self);
    }
}
