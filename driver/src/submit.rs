//! Submitting: the operations, and what is pending of them.

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::{Duration, Instant};

use extlb_spec::Iova;
use extlb_spec::work::{Descriptor, MAX_LEN, MAX_SEGMENTS, Opcode, Segment, flags};

use crate::error::{Error, Refused, Result};
use crate::memory_unsafe::Backing;
use crate::operation::{
    Compare, CompareSwap, Copy, Crc32c, Expect, Fence, FetchAdd, Fill, Nop, Operation, Raw,
};
use crate::queue::{Cell, Core, Queue, Work};
use crate::slice_unsafe::{Operand, SliceMut, Source};

/// What comes of submitting: the pending operation, or the buffers back.
pub type Submitted<B, O, T> = Result<Pending<B, O, T>, Refused<T>>;

/// The buffers of [`Queue::copy_lists`].
pub type Lists<B, S> = (SliceMut<B>, Vec<S>, Vec<SliceMut<B>>);

/// Source, destination, length, and what to hold.
type Operands<B> = (Iova, Iova, usize, [Option<Operand<B>>; 2]);

/// How to submit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// At once; wait when the ring is full.
    Now,
    /// At once; an error when the ring is full.
    Try,
    /// All together at the end; wait when the ring is full.
    Together,
}

/// Takes operations for a queue; see [`Queue::batch`] and [`Queue::try_submit`].
#[derive(Debug)]
pub struct Submitter<'q, B: Backing> {
    core: &'q Arc<Core<B>>,
    mode: Mode,
}

impl<'q, B: Backing> Submitter<'q, B> {
    pub(crate) fn new(queue: &'q Queue<B>, mode: Mode) -> Self {
        Self {
            core: &queue.core,
            mode,
        }
    }

    /// See [`Queue::copy`].
    pub fn copy<S: Source<B>>(
        &self,
        src: S,
        dst: SliceMut<B>,
    ) -> Submitted<B, Copy, (S, SliceMut<B>)> {
        self.two(Opcode::Copy, src, dst)
    }

    /// See [`Queue::fill`].
    pub fn fill(&self, dst: SliceMut<B>, pattern: u64) -> Submitted<B, Fill, SliceMut<B>> {
        let operands = self
            .operand(&dst)
            .map(|to| (Iova(0), to.addr, to.len, [None, Some(to)]));
        self.submit(Opcode::Fill, operands, pattern, dst)
    }

    /// See [`Queue::crc32c`].
    pub fn crc32c<S: Source<B>>(&self, src: S, seed: u32) -> Submitted<B, Crc32c, S> {
        let operands = self
            .operand(&src)
            .map(|of| (of.addr, Iova(0), of.len, [Some(of), None]));
        self.submit(Opcode::Crc32c, operands, seed.into(), src)
    }

    /// See [`Queue::compare`].
    pub fn compare<S: Source<B>, T: Source<B>>(&self, a: S, b: T) -> Submitted<B, Compare, (S, T)> {
        self.two(Opcode::Compare, a, b)
    }

    /// See [`Queue::nop`].
    pub fn nop(&self) -> Result<Pending<B, Nop, ()>> {
        Ok(self.submit(Opcode::Nop, Ok((Iova(0), Iova(0), 0, [None, None])), 0, ())?)
    }

    /// See [`Queue::fence`].
    pub fn fence(&self) -> Result<Pending<B, Fence, ()>> {
        Ok(self.submit(
            Opcode::Fence,
            Ok((Iova(0), Iova(0), 0, [None, None])),
            0,
            (),
        )?)
    }

    /// See [`Queue::fetch_add`].
    pub fn fetch_add(&self, word: SliceMut<B>, value: u64) -> Submitted<B, FetchAdd, SliceMut<B>> {
        let operands = self.word(&word, 0);
        self.submit(Opcode::FetchAdd, operands, value, word)
    }

    /// See [`Queue::compare_swap`].
    pub fn compare_swap(
        &self,
        word: SliceMut<B>,
        expected: u64,
        new: u64,
    ) -> Submitted<B, CompareSwap, SliceMut<B>> {
        let operands = self.word(&word, new);
        self.submit(Opcode::CompareSwap, operands, expected, word)
    }

    /// See [`Queue::copy_lists`].
    pub fn copy_lists<S: Source<B>>(
        &self,
        mut lists: SliceMut<B>,
        src: Vec<S>,
        dst: Vec<SliceMut<B>>,
    ) -> Submitted<B, Copy, Lists<B, S>> {
        match self
            .lists(&mut lists, &src, &dst)
            .and_then(|work| self.send(work))
        {
            Ok(cell) => Ok(Pending::new(self.core.clone(), cell, (lists, src, dst))),
            Err(error) => Err(Refused {
                error,
                buffers: (lists, src, dst),
            }),
        }
    }

    /// Writes the lists, and makes the descriptor.
    fn lists<S: Source<B>>(
        &self,
        lists: &mut SliceMut<B>,
        src: &[S],
        dst: &[SliceMut<B>],
    ) -> Result<Work<B>> {
        let list = self.operand(lists)?;
        if !list.addr.is_aligned(Segment::SIZE as u64) {
            return Err(Error::Argument("lists begin at a multiple of 16"));
        }
        if src.len().max(dst.len()) > MAX_SEGMENTS as usize {
            return Err(Error::Argument("a list of more than 4096 segments"));
        }
        if lists.len() / Segment::SIZE < src.len() + dst.len() {
            return Err(Error::Argument("16 bytes are needed for each segment"));
        }
        let from = src
            .iter()
            .map(|s| self.operand(s))
            .collect::<Result<Vec<_>>>()?;
        let to = dst
            .iter()
            .map(|s| self.operand(s))
            .collect::<Result<Vec<_>>>()?;
        let bytes = |list: &[Operand<B>]| list.iter().map(|operand| operand.len).sum::<usize>();
        if bytes(&from) != bytes(&to) {
            return Err(Error::Lengths {
                src: bytes(&from),
                dst: bytes(&to),
            });
        }
        let len = bytes(&from) as u64;
        if len > MAX_LEN {
            return Err(Error::TooLong { len });
        }
        let mut ranges = vec![(list.addr, ((src.len() + dst.len()) * Segment::SIZE) as u64)];
        for (operand, place) in from
            .iter()
            .chain(&to)
            .zip(lists.chunks_exact_mut(Segment::SIZE))
        {
            let segment = Segment {
                addr: operand.addr.0,
                len: operand.len as u64,
            };
            place.copy_from_slice(&segment.to_bytes());
            ranges.push((operand.addr, segment.len));
        }
        let descriptor = Descriptor {
            opcode: Opcode::Copy as u8,
            flags: flags::SRC_LIST | flags::DST_LIST,
            src: list.addr.0,
            dst: list.addr.0 + (src.len() * Segment::SIZE) as u64,
            len,
            src_segments: src.len() as u32,
            dst_segments: dst.len() as u32,
            ..Descriptor::default()
        };
        let segments = from.into_iter().chain(to).map(|operand| operand.hold);
        Ok(Work {
            descriptor,
            expect: Expect::Lists {
                ranges: ranges.into(),
                len,
            },
            holds: [Some(list.hold), None],
            segments: segments.collect(),
        })
    }

    /// The operands of an operation on a word; `src` is a value.
    fn word(&self, word: &SliceMut<B>, src: u64) -> Result<Operands<B>> {
        let to = self.operand(word)?;
        if to.len != 8 || !to.addr.is_aligned(8) {
            return Err(Error::Argument("a word is 8 bytes, at a multiple of 8"));
        }
        Ok((Iova(src), to.addr, to.len, [None, Some(to)]))
    }

    /// Gives the device what was taken so far; also done when dropped.
    pub fn submit_all(self) {}

    fn operand(&self, source: &impl Source<B>) -> Result<Operand<B>> {
        source.operand(&self.core.context)
    }

    fn two<O: Operation, S: Source<B>, T: Source<B>>(
        &self,
        opcode: Opcode,
        a: S,
        b: T,
    ) -> Submitted<B, O, (S, T)> {
        let operands = self.operand(&a).and_then(|from| {
            let to = self.operand(&b)?;
            if from.len != to.len {
                return Err(Error::Lengths {
                    src: from.len,
                    dst: to.len,
                });
            }
            Ok((from.addr, to.addr, to.len, [Some(from), Some(to)]))
        });
        self.submit(opcode, operands, 0, (a, b))
    }

    fn submit<O: Operation, T>(
        &self,
        opcode: Opcode,
        operands: Result<Operands<B>>,
        arg: u64,
        buffers: T,
    ) -> Submitted<B, O, T> {
        let (src, dst, len, operands) = match operands {
            Ok(operands) => operands,
            Err(error) => return Err(Refused { error, buffers }),
        };
        let len = len as u64;
        if len > MAX_LEN {
            return Err(Refused {
                error: Error::TooLong { len },
                buffers,
            });
        }
        let descriptor = Descriptor {
            opcode: opcode as u8,
            src: src.0,
            dst: dst.0,
            len,
            arg,
            ..Descriptor::default()
        };
        let work = Work {
            descriptor,
            expect: Expect::of(opcode, &descriptor),
            holds: operands.map(|operand| operand.map(|operand| operand.hold)),
            segments: Vec::new(),
        };
        match self.send(work) {
            Ok(cell) => Ok(Pending::new(self.core.clone(), cell, buffers)),
            Err(error) => Err(Refused { error, buffers }),
        }
    }

    pub(crate) fn raw(&self, work: Work<B>) -> Result<Pending<B, Raw, ()>> {
        Ok(Pending::new(self.core.clone(), self.send(work)?, ()))
    }

    fn send(&self, mut work: Work<B>) -> Result<Arc<Cell>> {
        loop {
            match self.core.try_write(&mut work) {
                Ok(cell) => {
                    if self.mode != Mode::Together {
                        self.core.publish();
                    }
                    return Ok(cell);
                }
                Err(Error::RingFull) if self.mode != Mode::Try => self.core.wait_for_room()?,
                Err(error) => return Err(error),
            }
        }
    }
}

impl<B: Backing> Drop for Submitter<'_, B> {
    fn drop(&mut self) {
        if self.mode == Mode::Together {
            self.core.publish();
        }
    }
}

/// The operations. All wait for room when the ring is full; an error comes with the buffers.
impl<B: Backing> Queue<B> {
    /// Copies `src` to `dst`, which must be equally long.
    pub fn copy<S: Source<B>>(
        &self,
        src: S,
        dst: SliceMut<B>,
    ) -> Submitted<B, Copy, (S, SliceMut<B>)> {
        self.submitter().copy(src, dst)
    }

    /// Fills `dst` with the 8 bytes (little-endian) of `pattern`; the last may be cut.
    pub fn fill(&self, dst: SliceMut<B>, pattern: u64) -> Submitted<B, Fill, SliceMut<B>> {
        self.submitter().fill(dst, pattern)
    }

    /// The CRC32C (Castagnoli) of `src`, going on from `seed`, the CRC of what came before (0 at
    /// first).
    pub fn crc32c<S: Source<B>>(&self, src: S, seed: u32) -> Submitted<B, Crc32c, S> {
        self.submitter().crc32c(src, seed)
    }

    /// The offset of the first difference of two equally long operands.
    pub fn compare<S: Source<B>, T: Source<B>>(&self, a: S, b: T) -> Submitted<B, Compare, (S, T)> {
        self.submitter().compare(a, b)
    }

    /// Does nothing, after all that was submitted before.
    pub fn nop(&self) -> Result<Pending<B, Nop, ()>> {
        self.submitter().nop()
    }

    /// Ends after all that was submitted before; how many of that, since the last fence, did not
    /// succeed (a compare that found a difference counts).
    pub fn fence(&self) -> Result<Pending<B, Fence, ()>> {
        self.submitter().fence()
    }

    /// Adds to the 8 bytes (little-endian) of `word`, modulo 2^64, and gives what was there before.
    /// `word` must be at a multiple of 8.
    pub fn fetch_add(&self, word: SliceMut<B>, value: u64) -> Submitted<B, FetchAdd, SliceMut<B>> {
        self.submitter().fetch_add(word, value)
    }

    /// Replaces the 8 bytes (little-endian) of `word` by `new` if they are `expected`, and gives what
    /// was there before. `word` must be at a multiple of 8.
    pub fn compare_swap(
        &self,
        word: SliceMut<B>,
        expected: u64,
        new: u64,
    ) -> Submitted<B, CompareSwap, SliceMut<B>> {
        self.submitter().compare_swap(word, expected, new)
    }

    /// Copies what the pieces of `src` hold, one after the other, to the pieces of `dst`; both must
    /// be equally long in all (scatter/gather). `lists` is room for the lists that the device reads:
    /// 16 bytes for each piece, at a multiple of 16.
    pub fn copy_lists<S: Source<B>>(
        &self,
        lists: SliceMut<B>,
        src: Vec<S>,
        dst: Vec<SliceMut<B>>,
    ) -> Submitted<B, Copy, Lists<B, S>> {
        self.submitter().copy_lists(lists, src, dst)
    }

    /// Takes many operations and gives them to the device together: one tail, at most one doorbell,
    /// one interrupt. What is taken is submitted when the batch is dropped, when the ring is full,
    /// or when one of it is waited for.
    pub fn batch(&self) -> Submitter<'_, B> {
        Submitter::new(self, Mode::Together)
    }

    /// Operations through this fail with [`Error::RingFull`] instead of waiting for room.
    pub fn try_submit(&self) -> Submitter<'_, B> {
        Submitter::new(self, Mode::Try)
    }
}

/// An operation that was submitted. It owns its buffers until it has ended.
///
/// Dropping or forgetting it loses the buffers, not the operation: their memory stays with the
/// queue until the device is done, and is then freed (never, after `mem::forget`).
#[must_use = "the buffers come back from `wait`"]
pub struct Pending<B: Backing, O, T> {
    core: Arc<Core<B>>,
    cell: Arc<Cell>,
    buffers: T,
    operation: PhantomData<fn() -> O>,
}

/// An operation that has ended.
#[derive(Debug)]
pub struct Completed<R, T> {
    /// What came of it. Errors here are the operation's own; the queue goes on.
    pub result: Result<R>,
    /// What it worked on. After an error a destination may be partly written.
    pub buffers: T,
}

impl<R, T> Completed<R, T> {
    /// The result and the buffers, or the error without them.
    pub fn into_result(self) -> Result<(R, T)> {
        let buffers = self.buffers;
        self.result.map(|result| (result, buffers))
    }
}

impl<B: Backing, O: Operation, T> Pending<B, O, T> {
    pub(crate) fn new(core: Arc<Core<B>>, cell: Arc<Cell>, buffers: T) -> Self {
        Self {
            core,
            cell,
            buffers,
            operation: PhantomData,
        }
    }

    /// Waits for the end: looks for a short while, then sleeps.
    ///
    /// # Errors
    /// Those of the queue: it stopped, the device is dead or makes no sense. The buffers are then
    /// lost, as nobody can say when the device is done with them; their memory is freed safely.
    pub fn wait(self) -> Result<Completed<O::Output, T>> {
        self.core.wait(&self.cell, None)?;
        let answer = self.cell.answer.get().expect("waited for");
        let result = answer
            .verdict
            .clone()
            .map(|mismatch| O::output(&answer.completion, mismatch));
        Ok(Completed {
            result,
            buffers: self.buffers,
        })
    }

    /// [`Pending::wait`] for those who need the buffers only after success.
    pub fn finish(self) -> Result<(O::Output, T)> {
        self.wait()?.into_result()
    }

    /// Waits for at most `timeout`; whether the operation has ended.
    pub fn wait_for(&self, timeout: Duration) -> Result<bool> {
        self.core
            .wait(&self.cell, Instant::now().checked_add(timeout))
    }

    /// Whether the operation has ended.
    pub fn is_done(&self) -> Result<bool> {
        self.core.look(&self.cell)
    }
}

impl<B: Backing, O, T> std::fmt::Debug for Pending<B, O, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pending on {:?}", self.core)
    }
}
