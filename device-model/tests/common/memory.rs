//! The guest's memory, with a hook in each access.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use extlb_device::GuestRam;
use extlb_device::ports::{BusError, Dma};
use extlb_spec::Gpa;

use super::PAGE;

/// An access of the device, for a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read(Gpa),
    Write(Gpa),
    Copy(Gpa, Gpa),
    /// Before a word or a double word is loaded.
    Load(Gpa),
    /// After a double word was loaded.
    Loaded(Gpa),
    /// Before a word is stored, swapped or added to.
    Store(Gpa),
}

/// An access that is held in its middle.
pub struct Held {
    inside: Receiver<()>,
    release: Sender<()>,
}

impl Held {
    /// Waits until the access is made.
    pub fn wait(&self) {
        self.inside.recv().unwrap();
    }

    /// Lets it go on.
    pub fn release(self) {
        self.release.send(()).unwrap();
    }
}

type Hook = Box<dyn FnMut(Access) -> bool + Send>;

/// Memory with a hook that runs in the middle of an access. A hook that returns true is done.
pub struct Hooked {
    pub ram: GuestRam,
    hook: Mutex<Option<Hook>>,
    pub accesses: AtomicU64,
    /// All of RAM has been taken away: every access is a bus error.
    pub gone: AtomicBool,
    /// How often a word other than 0 was stored, by address: completions, above all.
    pub stores: Mutex<HashMap<Gpa, u64>>,
}

impl Hooked {
    pub fn new(ram: GuestRam) -> Self {
        Self {
            ram,
            hook: Mutex::new(None),
            accesses: AtomicU64::new(0),
            gone: AtomicBool::new(false),
            stores: Mutex::default(),
        }
    }

    pub fn hook(&self, hook: impl FnMut(Access) -> bool + Send + 'static) {
        *self.hook.lock().unwrap() = Some(Box::new(hook));
    }

    /// The thread that makes this access is held in the middle of it.
    pub fn hold(&self, which: Access) -> Held {
        let (enter, inside) = channel();
        let (release, released) = channel();
        self.hook(move |access| {
            let hit = access == which;
            if hit {
                enter.send(()).unwrap();
                released.recv().unwrap();
            }
            hit
        });
        Held { inside, release }
    }

    fn meet(&self, access: Access) -> Result<(), BusError> {
        self.accesses.fetch_add(1, Ordering::SeqCst);
        self.look(access);
        let (Access::Read(addr)
        | Access::Write(addr)
        | Access::Copy(addr, _)
        | Access::Load(addr)
        | Access::Loaded(addr)
        | Access::Store(addr)) = access;
        match self.gone.load(Ordering::SeqCst) {
            true => Err(BusError { addr, len: 1 }),
            false => Ok(()),
        }
    }

    fn look(&self, access: Access) {
        // Out of its place while it runs: it may use the device, and so get here again.
        let hook = self.hook.lock().unwrap().take();
        if let Some(mut hook) = hook
            && !hook(access)
        {
            self.hook.lock().unwrap().get_or_insert(hook);
        }
    }

    pub fn is_done(&self) -> bool {
        self.hook.lock().unwrap().is_none()
    }
}

impl Dma for Hooked {
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        self.meet(Access::Read(from))?;
        self.ram.read(from, to)
    }
    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        self.meet(Access::Write(to))?;
        self.ram.write(to, from)
    }
    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        self.meet(Access::Copy(from, to))?;
        self.ram.copy(from, to, len)
    }
    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32, BusError> {
        self.meet(Access::Load(at))?;
        self.ram.load_u32(at, order)
    }
    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<(), BusError> {
        self.meet(Access::Store(at))?;
        if value != 0 {
            *self.stores.lock().unwrap().entry(at).or_default() += 1;
        }
        self.ram.store_u32(at, value, order)
    }
    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64, BusError> {
        self.meet(Access::Load(at))?;
        let value = self.ram.load_u64(at, order);
        self.look(Access::Loaded(at));
        value
    }
    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<(), BusError> {
        self.meet(Access::Store(at))?;
        self.ram.store_u64(at, value, order)
    }
    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<u64, BusError> {
        self.meet(Access::Store(at))?;
        self.ram.compare_exchange_u64(at, current, new)
    }
    fn fetch_add_u64(&self, at: Gpa, value: u64) -> Result<u64, BusError> {
        self.meet(Access::Store(at))?;
        self.ram.fetch_add_u64(at, value)
    }

    fn view(&self, f: &mut dyn FnMut(&dyn Dma)) {
        f(self);
    }
}

/// Pages are handed out once, in order.
#[derive(Debug)]
pub struct Pages(AtomicU64);

impl Pages {
    /// From this one on.
    pub fn from(first: Gpa) -> Self {
        Self(AtomicU64::new(first.0))
    }

    pub fn take(&self) -> Gpa {
        Gpa(self.0.fetch_add(PAGE, Ordering::SeqCst))
    }
}
