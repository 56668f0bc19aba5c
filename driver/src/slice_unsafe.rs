//! Handles to registered memory: [`SliceMut`] owns a range alone, [`Slice`] shares it for reading.
//!
//! They are owned, not borrowed, so that the device's use of memory does not depend on a
//! destructor that `mem::forget` could skip: an operation takes the handles, its pending half
//! gives them back when it has ended, and the queue itself keeps a [`Hold`] on the memory until
//! the device says that it is done, whatever the program does with the pending half.
#![allow(unsafe_code)]

use std::ops::{Bound, Deref, DerefMut, Range, RangeBounds};
use std::sync::Arc;

use extlb_spec::Iova;

use crate::error::Error;
use crate::memory_unsafe::{Access, Backing, Memory, bytes, bytes_mut, read_racy};
use crate::region::{Mapping, Region};

/// A range of a region. There is never another piece that overlaps it: pieces come from
/// registering (all of the region) and from splitting.
struct Piece<B: Backing> {
    region: Arc<Region<B>>,
    range: Range<usize>,
}

impl<B: Backing> Piece<B> {
    fn addr(&self) -> Iova {
        Iova(self.region.addr().0 + self.range.start as u64)
    }
}

/// Keeps a piece of memory registered, mapped, and out of everybody's hands.
pub(crate) struct Hold<B: Backing> {
    _piece: Arc<Piece<B>>,
}

/// Registered memory that its holder alone may read and write: `&mut [u8]`, in an owned form.
pub struct SliceMut<B: Backing> {
    /// Shared with the [`Hold`] of an operation only; and then `self` is in the pending half of
    /// that operation (or lost), and comes out of it after the hold is gone.
    piece: Arc<Piece<B>>,
}

/// Registered memory for reading, by the holders of its clones and the device.
pub struct Slice<B: Backing> {
    piece: Arc<Piece<B>>,
    /// In the region, within the piece.
    range: Range<usize>,
}

impl<B: Backing> SliceMut<B> {
    /// All of a region that was registered just now.
    pub(crate) fn whole(region: Arc<Region<B>>, len: usize) -> Self {
        assert_eq!(region.memory().access(), Access::Exclusive);
        assert!(len <= region.memory().len());
        Self {
            piece: Arc::new(Piece {
                region,
                range: 0..len,
            }),
        }
    }

    /// The address that the device knows it by, which is the program's as well.
    pub fn addr(&self) -> Iova {
        self.piece.addr()
    }

    /// Splits into `[0, at)` and `[at, len)`. Panics if `at` is more than the length.
    #[must_use]
    pub fn split_at(self, at: usize) -> (Self, Self) {
        let Range { start, end } = self.piece.range.clone();
        assert!(at <= end - start, "split at {at} of {} bytes", end - start);
        let piece = |range| Self {
            piece: Arc::new(Piece {
                region: self.piece.region.clone(),
                range,
            }),
        };
        (piece(start..start + at), piece(start + at..end))
    }

    /// Splits into pieces of `len` bytes; the last may be shorter. Panics if `len` is 0.
    pub fn chunks(self, len: usize) -> impl Iterator<Item = Self> {
        assert!(len > 0, "chunks of no bytes");
        let mut rest = Some(self);
        std::iter::from_fn(move || {
            let all = rest.take().filter(|slice| !slice.is_empty())?;
            let at = len.min(all.len());
            let (first, more) = all.split_at(at);
            rest = Some(more);
            Some(first)
        })
    }

    /// Joins with the piece right behind. Gives both back if `next` is not that.
    pub fn join(self, next: Self) -> Result<Self, (Self, Self)> {
        let (a, b) = (&self.piece, &next.piece);
        if Arc::ptr_eq(&a.region, &b.region) && a.range.end == b.range.start {
            let (region, range) = (a.region.clone(), a.range.start..b.range.end);
            Ok(Self {
                piece: Arc::new(Piece { region, range }),
            })
        } else {
            Err((self, next))
        }
    }

    /// Gives writing up, in order to share.
    pub fn freeze(self) -> Slice<B> {
        let range = self.piece.range.clone();
        Slice {
            piece: self.piece,
            range,
        }
    }

    /// Takes the memory back from the device. Gives the slice back if others hold pieces of the
    /// same memory.
    ///
    /// # Errors
    /// `Ok(Err(slice))` as said; [`Error`] if the driver could not take it back: then the memory
    /// is lost, because it can never be reused safely.
    pub fn unregister(self) -> Result<Result<Mapping<B>, Self>, Error> {
        match Arc::try_unwrap(self.piece) {
            Ok(Piece { region, range }) => match Arc::try_unwrap(region) {
                Ok(region) => region.unregister().map(Ok),
                Err(region) => Ok(Err(Self {
                    piece: Arc::new(Piece { region, range }),
                })),
            },
            Err(piece) => Ok(Err(Self { piece })),
        }
    }
}

impl<B: Backing> Deref for SliceMut<B> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        let piece = &*self.piece;
        // SAFETY: within the region (`whole`, `split_at`). Pieces do not overlap and this handle
        // is the only one to its piece, so nobody writes while `&self` is borrowed; the device
        // does not either, as an operation on it would hold `self`.
        unsafe { bytes(piece.region.memory(), piece.range.clone()) }
    }
}

impl<B: Backing> DerefMut for SliceMut<B> {
    fn deref_mut(&mut self) -> &mut [u8] {
        let piece = &*self.piece;
        // SAFETY: as in `deref`, and `&mut self` excludes other borrows of this handle.
        unsafe { bytes_mut(piece.region.memory(), piece.range.clone()) }
    }
}

impl<B: Backing> Slice<B> {
    /// All of a region that was registered just now.
    pub(crate) fn whole(region: Arc<Region<B>>, len: usize) -> Self {
        assert!(len <= region.memory().len());
        Self {
            piece: Arc::new(Piece {
                region,
                range: 0..len,
            }),
            range: 0..len,
        }
    }

    /// The address that the device knows it by, which is the program's as well.
    pub fn addr(&self) -> Iova {
        Iova(self.piece.region.addr().0 + self.range.start as u64)
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// A part of it. Panics if the range is not within.
    #[must_use]
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Self {
        let start = match range.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&before) => before + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&last) => last + 1,
            Bound::Excluded(&end) => end,
            Bound::Unbounded => self.len(),
        };
        assert!(
            start <= end && end <= self.len(),
            "{start}..{end} of {} bytes",
            self.len()
        );
        let base = self.range.start;
        Self {
            piece: self.piece.clone(),
            range: base + start..base + end,
        }
    }

    /// The bytes; `None` if others can change them at any time, as those of a file.
    pub fn as_bytes(&self) -> Option<&[u8]> {
        let memory = self.piece.region.memory();
        // SAFETY: within the region. The piece is shared between `Slice`s and holds of operations
        // that read; it becomes writable again only in `thaw`, when it is not shared.
        (memory.access() == Access::Exclusive).then(|| unsafe { bytes(memory, self.range.clone()) })
    }

    /// Copies bytes from `offset` on, as they are at some moment during the call. Panics if the
    /// range is not within.
    pub fn read_at(&self, offset: usize, to: &mut [u8]) {
        assert!(
            offset
                .checked_add(to.len())
                .is_some_and(|end| end <= self.len())
        );
        read_racy(self.piece.region.memory(), self.range.start + offset, to);
    }

    /// Makes it writable again: all of what was frozen. Gives it back if it has clones, if an
    /// operation works on it, or if it is of a file.
    pub fn thaw(self) -> Result<SliceMut<B>, Self> {
        if self.piece.region.memory().access() != Access::Exclusive {
            return Err(self);
        }
        let range = self.range;
        match Arc::try_unwrap(self.piece) {
            Ok(piece) => Ok(SliceMut {
                piece: Arc::new(piece),
            }),
            Err(piece) => Err(Self { piece, range }),
        }
    }
}

impl<B: Backing> Clone for Slice<B> {
    fn clone(&self) -> Self {
        Self {
            piece: self.piece.clone(),
            range: self.range.clone(),
        }
    }
}

impl<B: Backing> std::fmt::Debug for SliceMut<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SliceMut({}, {} bytes)", self.addr(), self.len())
    }
}

impl<B: Backing> std::fmt::Debug for Slice<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Slice({}, {} bytes)", self.addr(), self.len())
    }
}

/// An operand of an operation, as the queue sees it.
pub struct Operand<B: Backing> {
    pub(crate) addr: Iova,
    pub(crate) len: usize,
    pub(crate) hold: Hold<B>,
}

/// What an operation can read: [`Slice`] or [`SliceMut`].
pub trait Source<B: Backing>: sealed::Source<B> {}
impl<B: Backing> Source<B> for Slice<B> {}
impl<B: Backing> Source<B> for SliceMut<B> {}

mod sealed {
    use super::*;

    pub trait Source<B: Backing> {
        /// The operand, for the queue of `context`.
        fn operand(&self, context: &Arc<B::Context>) -> Result<Operand<B>, Error>;
    }

    impl<B: Backing> Source<B> for SliceMut<B> {
        fn operand(&self, context: &Arc<B::Context>) -> Result<Operand<B>, Error> {
            operand(&self.piece, self.addr(), self.len(), context)
        }
    }

    impl<B: Backing> Source<B> for Slice<B> {
        fn operand(&self, context: &Arc<B::Context>) -> Result<Operand<B>, Error> {
            operand(&self.piece, self.addr(), self.len(), context)
        }
    }

    fn operand<B: Backing>(
        piece: &Arc<Piece<B>>,
        addr: Iova,
        len: usize,
        context: &Arc<B::Context>,
    ) -> Result<Operand<B>, Error> {
        // An address means something in its own context only.
        if !Arc::ptr_eq(piece.region.context(), context) {
            return Err(Error::Foreign { addr });
        }
        Ok(Operand {
            addr,
            len,
            hold: Hold {
                _piece: piece.clone(),
            },
        })
    }
}
