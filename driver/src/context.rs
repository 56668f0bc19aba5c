//! Devices and contexts.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use bitflags::bitflags;
use extlb_spec::uapi::{self, Audit, Info, Stats};
use extlb_spec::{Iova, PAGE_SIZE, context, uapi::create};

use crate::error::{Error, Refused, Result};
use crate::memory_unsafe::{Access, Backing, BackingContext, Fork, Sharing};
use crate::queue::Queue;
use crate::region::{Mapping, Region};
use crate::slice_unsafe::{Slice, SliceMut};

bitflags! {
    /// How a context follows the process's page table.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Follow: u32 {
        /// Pages follow the process by pte notifiers; nothing is locked.
        const PTE = create::FOLLOW_PTE;
        /// Registered pages are pinned, as drivers without notifiers must.
        const PINNED = create::FOLLOW_PINNED;
        /// Pages follow the process by an mmu notifier, which needs no patch of the kernel; nothing
        /// is locked.
        const MMU = create::FOLLOW_MMU;
        /// Likewise, by mmu interval notifiers.
        const INTERVAL = create::FOLLOW_INTERVAL;
    }
}

/// What a context is to be like.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// log2 of the number of operations that can be under way at once.
    pub ring_log2: u32,
    /// How to follow the process; empty takes the driver's default.
    pub follow: Follow,
    /// How many times to look at an operation before its waiter goes to sleep.
    pub spins: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ring_log2: 8,
            follow: Follow::empty(),
            spins: 200,
        }
    }
}

/// A device.
#[derive(Debug)]
pub struct Device<B: Backing> {
    backing: Arc<B>,
    info: Info,
}

impl<B: Backing> Clone for Device<B> {
    fn clone(&self) -> Self {
        Self {
            backing: self.backing.clone(),
            info: self.info,
        }
    }
}

impl<B: Backing> Device<B> {
    /// Opens a device.
    ///
    /// # Errors
    /// [`Error::Version`] if the driver speaks another version of the interface.
    pub fn open(backing: B) -> Result<Self> {
        let info = backing.info()?;
        if info.version != uapi::UAPI_VERSION {
            return Err(Error::Version {
                found: info.version,
                wanted: uapi::UAPI_VERSION,
            });
        }
        Ok(Self {
            backing: Arc::new(backing),
            info,
        })
    }

    /// What the driver and the device can do.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// What the device comes from.
    pub fn backing(&self) -> &B {
        &self.backing
    }

    /// Makes a context: an address space of the device that is this process's.
    pub fn context(&self, options: Options) -> Result<Context<B>> {
        let ring_log2 = options.ring_log2;
        if !(context::MIN_WORK_RING_LOG2..=context::MAX_WORK_RING_LOG2).contains(&ring_log2) {
            return Err(Error::Argument("ring_log2 must be 1 to 12"));
        }
        let queue = Queue::create(&*self.backing, options)?;
        Ok(Context {
            backing: self.backing.clone(),
            queue,
        })
    }

    /// Fresh zeroed memory, not yet registered. `len` is rounded up to whole pages.
    pub fn map_anonymous(&self, len: usize) -> Result<Mapping<B>> {
        Ok(Mapping::new(
            self.backing.allocate(whole_pages(len)?, Fork::Copy)?,
            len,
        ))
    }

    /// A range of a file, for the device to read. Its start must be a multiple of the page size.
    pub fn map_file(&self, file: &File, range: Range<u64>, sharing: Sharing) -> Result<Mapping<B>> {
        let len = range
            .end
            .checked_sub(range.start)
            .and_then(|len| usize::try_from(len).ok())
            .ok_or(Error::Argument("a range that ends before it starts"))?;
        whole_pages(len)?;
        if !range.start.is_multiple_of(PAGE_SIZE) {
            return Err(Error::Argument(
                "a file is mapped from a multiple of the page size",
            ));
        }
        Ok(Mapping::new(
            self.backing.map_file(file, range, sharing)?,
            len,
        ))
    }
}

fn whole_pages(len: usize) -> Result<usize> {
    match len.checked_next_multiple_of(PAGE_SIZE as usize) {
        Some(0) => Err(Error::Argument("empty memory cannot be registered")),
        Some(len) => Ok(len),
        None => Err(Error::Argument("more memory than there are addresses")),
    }
}

/// A context: an address space of the device, with its queue.
///
/// It stops when it, its queue handles, its slices and its operations are all gone.
#[derive(Debug)]
pub struct Context<B: Backing> {
    backing: Arc<B>,
    queue: Queue<B>,
}

impl<B: Backing> Context<B> {
    /// The queue: where operations are submitted.
    pub fn queue(&self) -> &Queue<B> {
        &self.queue
    }

    /// Number of the context in the device.
    pub fn number(&self) -> u32 {
        self.inner().number()
    }

    /// Fresh zeroed memory of `len` bytes, registered.
    pub fn allocate(&self, len: usize) -> Result<SliceMut<B>> {
        let memory = self.backing.allocate(whole_pages(len)?, Fork::Copy)?;
        Ok(self.register(Mapping::new(memory, len))?)
    }

    /// Registers memory for the device to read and write.
    ///
    /// # Errors
    /// With the mapping given back. [`Error::Argument`] for a mapping of a file: that is for
    /// [`Context::register_source`].
    pub fn register(&self, mapping: Mapping<B>) -> Result<SliceMut<B>, Refused<Mapping<B>>> {
        if !mapping.is_exclusive() {
            let error = Error::Argument("memory that others can change is only for reading");
            return Err(Refused {
                error,
                buffers: mapping,
            });
        }
        let len = mapping.len();
        Ok(SliceMut::whole(
            Region::register(self.inner().clone(), mapping)?,
            len,
        ))
    }

    /// Registers memory for the device to read.
    pub fn register_source(&self, mapping: Mapping<B>) -> Result<Slice<B>, Refused<Mapping<B>>> {
        let len = mapping.len();
        Ok(Slice::whole(
            Region::register(self.inner().clone(), mapping)?,
            len,
        ))
    }

    /// Registers any addresses of the process, by themselves: the memory there is whatever the
    /// process has mapped, now and later. Only raw operations can name them.
    pub fn register_addresses(&self, range: Range<Iova>) -> Result<Registration<B>> {
        let len = range.end.0.checked_sub(range.start.0);
        let len = len.ok_or(Error::Argument("a range that ends before it starts"))?;
        let handle = self.inner().register(range.start, len, Access::Exclusive)?;
        Ok(Registration {
            context: self.inner().clone(),
            handle: Some(handle),
        })
    }

    /// Counters of the context and the device.
    pub fn stats(&self) -> Result<Stats> {
        self.inner().stats()
    }

    /// Lets the device compare its translations with the process's page table.
    pub fn audit(&self) -> Result<Audit> {
        self.inner().audit()
    }

    fn inner(&self) -> &Arc<B::Context> {
        self.queue.context()
    }
}

/// A registration of addresses that may hold anything; ends when dropped.
#[derive(Debug)]
pub struct Registration<B: Backing> {
    context: Arc<B::Context>,
    handle: Option<u32>,
}

impl<B: Backing> Registration<B> {
    /// Takes the range back. When it returns the device cannot touch it through this registration.
    pub fn unregister(mut self) -> Result<()> {
        self.handle
            .take()
            .map_or(Ok(()), |handle| self.context.unregister(handle))
    }
}

impl<B: Backing> Drop for Registration<B> {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take() {
            // Nobody to tell; the range ends with the context at the latest.
            let _ = self.context.unregister(handle);
        }
    }
}
