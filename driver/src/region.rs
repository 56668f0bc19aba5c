//! Memory before and while it is registered.

use std::sync::Arc;

use extlb_spec::Iova;

use crate::error::{Error, Refused};
use crate::memory_unsafe::{Access, Backing, BackingContext, Memory};

/// Memory that the device does not know (yet).
pub struct Mapping<B: Backing> {
    memory: B::Memory,
    /// What was asked for; the memory is whole pages.
    len: usize,
}

impl<B: Backing> Mapping<B> {
    pub(crate) fn new(memory: B::Memory, len: usize) -> Self {
        assert!(len <= memory.len());
        Self { memory, len }
    }

    /// Bytes asked for.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address.
    pub fn addr(&self) -> Iova {
        Iova(self.memory.addr().as_ptr().addr() as u64)
    }

    /// Whether nobody else can change the memory.
    pub fn is_exclusive(&self) -> bool {
        self.memory.access() == Access::Exclusive
    }
}

impl<B: Backing> std::fmt::Debug for Mapping<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mapping({}, {} bytes)", self.addr(), self.len)
    }
}

/// Registered memory.
///
/// Everything that can reach it holds an `Arc` of it: slices, and the queue for as long as the
/// device works on it. So when the last one goes, either no operation is left on it, or one whose
/// queue is gone as well. For the latter's sake the order of the end is: take the registration
/// back, which returns only after in-flight accesses have drained; then unmap. Memory that cannot
/// be taken back (the device is dead, or this is a forked child's copy) stays mapped for ever.
pub(crate) struct Region<B: Backing> {
    /// `Some` until the end.
    memory: Option<B::Memory>,
    len: usize,
    context: Arc<B::Context>,
    handle: u32,
}

impl<B: Backing> Region<B> {
    pub(crate) fn register(
        context: Arc<B::Context>,
        mapping: Mapping<B>,
    ) -> Result<Arc<Self>, Refused<Mapping<B>>> {
        let (len, access) = (mapping.memory.len() as u64, mapping.memory.access());
        match context.register(mapping.addr(), len, access) {
            Ok(handle) => {
                let Mapping { memory, len } = mapping;
                Ok(Arc::new(Self {
                    memory: Some(memory),
                    len,
                    context,
                    handle,
                }))
            }
            Err(error) => Err(Refused {
                error,
                buffers: mapping,
            }),
        }
    }

    pub(crate) fn memory(&self) -> &B::Memory {
        self.memory.as_ref().expect("only the end takes the memory")
    }

    pub(crate) fn context(&self) -> &Arc<B::Context> {
        &self.context
    }

    pub(crate) fn addr(&self) -> Iova {
        Iova(self.memory().addr().as_ptr().addr() as u64)
    }

    /// Takes the memory back from the device.
    pub(crate) fn unregister(mut self) -> Result<Mapping<B>, Error> {
        let len = self.len;
        match self.end() {
            Ok(Some(memory)) => Ok(Mapping::new(memory, len)),
            Ok(None) => unreachable!("the end comes once"),
            Err(error) => Err(error),
        }
    }

    fn end(&mut self) -> Result<Option<B::Memory>, Error> {
        let Some(memory) = self.memory.take() else {
            return Ok(None);
        };
        match self.context.unregister(self.handle) {
            Ok(()) => Ok(Some(memory)),
            Err(error) => {
                std::mem::forget(memory);
                Err(error)
            }
        }
    }
}

impl<B: Backing> Drop for Region<B> {
    fn drop(&mut self) {
        // Nobody to tell of an error; what it means is handled in `end`.
        drop(self.end());
    }
}
