//! The traits of a backing whose promises memory safety rests on, and views of memory that the
//! device works on at the same time.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

use extlb_spec::Iova;
use extlb_spec::uapi::{Audit, Info, Stats};

use crate::error::Result;

/// Where a device comes from: the kernel's driver, or a device in this process.
///
/// # Safety
/// What `allocate` and `map_file` return must keep the promises of [`Memory`].
pub unsafe trait Backing: Send + Sync + Sized + 'static {
    /// A context of this device.
    type Context: BackingContext;
    /// Memory that this device can be given.
    type Memory: Memory;

    /// What the driver and the device can do.
    fn info(&self) -> Result<Info>;
    /// Fresh zeroed memory of `len` bytes, a multiple of the page size.
    fn allocate(&self, len: usize, fork: Fork) -> Result<Self::Memory>;
    /// A range of a file; its start is a multiple of the page size.
    fn map_file(&self, file: &File, range: Range<u64>, sharing: Sharing) -> Result<Self::Memory>;
    /// Makes a context whose ring of `1 << ring_log2` descriptors is at `ring`. `flags` are the
    /// create flags of the driver's interface.
    fn create(&self, ring: Iova, ring_log2: u32, flags: u32) -> Result<Self::Context>;
    /// Resets the device and starts it afresh. Contexts from before are dead, new ones work.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] if the device is not this program's to reset.
    fn restart(&self) -> Result<()> {
        Err(crate::Error::Unsupported("a restart"))
    }
}

/// What a child process gets of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fork {
    /// A copy, made when one of both writes.
    Copy,
    /// Nothing: the memory stays where it is, whoever writes.
    Nothing,
}

/// How changes to a mapped file are shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Changes by others are seen.
    Shared,
    /// Pages are copied when they are written to.
    Private,
}

/// A context of a [`Backing`].
///
/// # Safety
/// When `unregister` returned `Ok`, the device does not touch the range through that registration
/// any more, not even with accesses that began before. Memory is freed on the strength of it.
pub unsafe trait BackingContext: Send + Sync + 'static {
    /// Number of the context.
    fn number(&self) -> u32;
    /// Lets the device use `[addr, addr + len)`, multiples of the page size; returns a handle.
    /// The device has no business with writing to memory that is [`Access::ReadOnly`].
    fn register(&self, addr: Iova, len: u64, access: Access) -> Result<u32>;
    /// Takes a registration back; see the trait's promise.
    fn unregister(&self, handle: u32) -> Result<()>;
    /// Writes the doorbell.
    fn ring_doorbell(&self);
    /// The shadow page.
    fn shadow(&self) -> &Shadow;
    /// Sleeps until completions asked for attention since the last call, the context stopped, or
    /// `timeout` passed. Takes the events that it reports. May report an event that is not there.
    fn wait(&self, timeout: Duration) -> Result<Wake>;
    /// Fails if the device is dead. Called about once a second by those who sleep.
    fn check(&self) -> Result<()>;
    /// Counters.
    fn stats(&self) -> Result<Stats>;
    /// Compares the device's translations with the process's page table.
    fn audit(&self) -> Result<Audit>;
}

/// Why [`BackingContext::wait`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Completions came.
    Event,
    /// The context stopped; the shadow page says why.
    Stopped,
    /// Nothing happened in time.
    TimedOut,
}

/// Memory that can be registered.
///
/// # Safety
/// `[addr, addr + len)` is mapped, readable, and at home at this address until the value is
/// dropped; `addr` and `len` never change and are multiples of the page size. With
/// [`Access::Exclusive`] it is writable too, and nobody but the holder of the value (and devices
/// it is registered with) reads or writes it.
pub unsafe trait Memory: Send + Sync + 'static {
    /// The start.
    fn addr(&self) -> NonNull<u8>;
    /// Bytes.
    fn len(&self) -> usize;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Who else may change it.
    fn access(&self) -> Access;
}

/// Who may change memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The holder only.
    Exclusive,
    /// Others too, at any time: a file. Never seen as `&[u8]`, and not written to.
    ReadOnly,
}

/// The shadow page of a context; see [`extlb_spec::context::ContextShadow`] for the words.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Shadow {
    /// Index after the last descriptor submitted.
    pub tail: AtomicU32,
    pad0: [AtomicU32; 15],
    /// Index after the last descriptor retired.
    pub head: AtomicU32,
    pad1: [AtomicU32; 15],
    /// Not 0: the device sleeps.
    pub need_kick: AtomicU32,
    pad2: [AtomicU32; 15],
    /// Completions that asked for an interrupt.
    pub event_seq: AtomicU32,
    pad3: [AtomicU32; 15],
    /// Why the context stopped.
    pub error: AtomicU32,
    pad4: AtomicU32,
    /// The address that the error is about.
    pub error_addr: AtomicU64,
    pad5: [AtomicU32; 956],
}

const _: () = {
    use extlb_spec::context::ContextShadow as Spec;
    use std::mem::offset_of;
    assert!(size_of::<Shadow>() == Spec::SIZE);
    assert!(offset_of!(Shadow, tail) == offset_of!(Spec, tail));
    assert!(offset_of!(Shadow, head) == offset_of!(Spec, head));
    assert!(offset_of!(Shadow, need_kick) == offset_of!(Spec, need_kick));
    assert!(offset_of!(Shadow, event_seq) == offset_of!(Spec, event_seq));
    assert!(offset_of!(Shadow, error) == offset_of!(Spec, error));
    assert!(offset_of!(Shadow, error_addr) == offset_of!(Spec, error_addr));
};

impl Shadow {
    /// Looks at a page as a shadow page.
    ///
    /// # Safety
    /// `page` is 4096-aligned, mapped read-write for `'a`, and everybody who accesses it during
    /// `'a` does so with accesses that count as atomic (the device's do).
    pub unsafe fn at<'a>(page: NonNull<u8>) -> &'a Self {
        // SAFETY: the caller's promise; every bit pattern is valid.
        unsafe { page.cast().as_ref() }
    }
}

/// All of exclusively held memory as words, for rings and completion records.
pub(crate) fn words<M: Memory>(memory: &M) -> &[AtomicU32] {
    assert_eq!(memory.access(), Access::Exclusive);
    // SAFETY: `Memory` promises that the range is mapped read-write and page-aligned as long as
    // `memory` lives, and that only its holder and devices access it. The library makes no other
    // view of ring memory than this one, and atomics may be shared with the device.
    unsafe { std::slice::from_raw_parts(memory.addr().cast().as_ptr(), memory.len() / 4) }
}

/// The same as double words.
pub(crate) fn double_words<M: Memory>(memory: &M) -> &[AtomicU64] {
    assert_eq!(memory.access(), Access::Exclusive);
    // SAFETY: as in `words`. A location is only ever accessed with one size at a time: what
    // is words in one structure and double words in the next is zeroed in between, while nobody
    // else knows it.
    unsafe { std::slice::from_raw_parts(memory.addr().cast().as_ptr(), memory.len() / 8) }
}

/// A page of exclusively held memory as a context's shadow page.
pub(crate) fn shadow_page<M: Memory>(memory: &M, page: usize) -> &Shadow {
    assert_eq!(memory.access(), Access::Exclusive);
    assert!(page < memory.len() / size_of::<Shadow>());
    // SAFETY: within the memory, which is mapped read-write as long as it lives, page-aligned, and
    // accessed by nobody but its holder, here as atomics, and devices.
    unsafe { Shadow::at(memory.addr().add(page * size_of::<Shadow>())) }
}

/// Bytes of exclusively held memory.
///
/// # Safety
/// `range` is within `memory`, and while the result is borrowed nobody, the device included, writes to it.
pub(crate) unsafe fn bytes<M: Memory>(memory: &M, range: Range<usize>) -> &[u8] {
    debug_assert!(memory.access() == Access::Exclusive && range.end <= memory.len());
    // SAFETY: mapped as long as `memory` lives; not written to by the caller's promise.
    unsafe { std::slice::from_raw_parts(memory.addr().add(range.start).as_ptr(), range.len()) }
}

/// Bytes of exclusively held memory, to be written.
///
/// # Safety
/// `range` is within `memory`, and while the result is borrowed nobody else, the device included, accesses it.
#[expect(
    clippy::mut_from_ref,
    reason = "exclusiveness is the caller's promise, per range"
)]
pub(crate) unsafe fn bytes_mut<M: Memory>(memory: &M, range: Range<usize>) -> &mut [u8] {
    debug_assert!(memory.access() == Access::Exclusive && range.end <= memory.len());
    // SAFETY: mapped read-write as long as `memory` lives; exclusive by the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(memory.addr().add(range.start).as_ptr(), range.len()) }
}

/// Copies from memory that others may be changing. Panics if the range is not within.
pub(crate) fn read_racy<M: Memory>(memory: &M, start: usize, to: &mut [u8]) {
    assert!(
        start
            .checked_add(to.len())
            .is_some_and(|end| end <= memory.len())
    );
    // A volatile read of memory that somebody outside of the program's own objects may change:
    // whatever bytes come are bytes.
    let mut at = start;
    for chunk in to.chunks_mut(8) {
        // SAFETY: `at + chunk.len()` is within the mapping (checked above), which is readable.
        unsafe {
            let from = memory.addr().add(at).as_ptr();
            if let Ok(whole) = <&mut [u8; 8]>::try_from(&mut *chunk) {
                *whole = from.cast::<[u8; 8]>().read_volatile();
            } else {
                for (i, byte) in chunk.iter_mut().enumerate() {
                    *byte = from.add(i).read_volatile();
                }
            }
        }
        at += chunk.len();
    }
}
