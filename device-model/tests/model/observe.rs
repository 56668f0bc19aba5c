//! The memory port, with the model behind it: each access is judged as it is made.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};

use extlb_device::ports::{BusError, Dma, Interrupts};
use extlb_spec::invalidation::KernelShadow;
use extlb_spec::page_request::PageRequest;
use extlb_spec::work::Completion;
use extlb_spec::{Gpa, Vector};

use super::Model;
use crate::common::{ACK, CTX_TABLE, IQ, PRQ, SHADOW};

type Within = Box<dyn Fn() + Send + Sync>;

/// Memory that is watched.
pub struct Observed {
    pub inner: Arc<dyn Dma>,
    pub model: Arc<Mutex<Model>>,
    /// Called in the middle of each access to data, and of each step of a walk.
    pub within: Arc<OnceLock<Within>>,
}

/// Interrupts that are watched.
pub struct Heard {
    pub inner: Arc<dyn Interrupts>,
    pub model: Arc<Mutex<Model>>,
}

impl Interrupts for Heard {
    fn raise(&self, vector: Vector) {
        self.model.lock().unwrap().raised(vector);
        self.inner.raise(vector);
    }
}

fn word(offset: usize) -> Gpa {
    Gpa(SHADOW.0 + offset as u64)
}

impl Observed {
    fn with<R>(&self, f: impl FnOnce(&mut Model) -> R) -> R {
        f(&mut self.model.lock().unwrap())
    }

    /// An access of the device begins.
    fn begin(&self, at: Gpa) {
        self.with(|model| {
            if !model.powered {
                model.fail(format!("{at}: accessed by a device that is stopped"));
            }
        });
    }

    /// In the middle of an access, under its guard.
    fn middle(&self) {
        self.with(|model| {
            model.accesses += 1;
            model.during = model.accesses;
        });
        if let Some(within) = self.within.get() {
            within();
        }
        self.with(|model| model.during = 0);
    }

    /// An access to data begins: what happens in the middle of it happens now, before the data is
    /// moved. Its pages must be the context's still when it is.
    fn data(&self, pages: &[(Gpa, bool)]) -> Option<(u32, Vec<u64>)> {
        let judge = |model: &mut Model| {
            let found = pages.iter().map(|(at, write)| model.access(*at, *write));
            found.collect::<Option<Vec<_>>>()
        };
        let found = self.with(judge)?;
        self.middle();
        self.with(|model| {
            for (at, _) in pages {
                if model.back.contains(&at.page().0) {
                    model.fail(format!("{at}: under way when its page was taken away"));
                }
            }
        });
        let context = found.first()?.0;
        Some((context, found.into_iter().map(|(_, iova)| iova).collect()))
    }

    /// A read or a write of a frame of a context.
    fn bytes(&self, context: u32, at: Gpa, iova: u64, bytes: &[u8], write: bool) {
        self.with(|model| {
            let c = &model.contexts[context as usize];
            let (ring, records) = (c.ring, c.records);
            if super::page_of(iova) == ring && !write {
                return;
            }
            if super::page_of(iova) == c.batches {
                if write || !model.reach_batch(context) {
                    model.fail(format!("context {context}, {iova:#x}: of no batch"));
                }
                return;
            }
            if super::page_of(iova) == c.lists {
                let next = model.under_way(context);
                if !next.is_some_and(|op| !write && op.saw_segment(iova, bytes.len())) {
                    model.fail(format!(
                        "context {context}, {iova:#x}: not the next segment"
                    ));
                }
                return;
            }
            if at.page() == records {
                // All of a record but its status.
                let (own, offset) = match model.under_way(context) {
                    Some(op) => (op.record, at.page_offset()),
                    None => return model.fail("a record of nothing"),
                };
                if !write || offset < own + 4 || offset + bytes.len() as u64 > own + 32 {
                    model.fail(format!("context {context}: a record that is not its own"));
                }
                return;
            }
            let Some(operand) = model.operand(context, iova, bytes.len() as u64, write) else {
                return;
            };
            let op = &mut model.contexts[context as usize].operations[0];
            if !write {
                op.saw(operand, bytes);
            } else if !op.wrote(operand, bytes) {
                model.fail(format!(
                    "context {context}, {iova:#x}: other bytes than asked for"
                ));
            }
        });
    }

    /// The status of a record is written.
    fn completed(&self, context: u32, at: Gpa, status: u32) {
        let mut bytes = [0; Completion::SIZE];
        let read = self.inner.read(at, &mut bytes);
        let record = Completion {
            status,
            ..Completion::from_bytes(&bytes)
        };
        self.with(|model| {
            let what = format!(
                "context {context}, record {:#x}: {record:?}",
                at.page_offset()
            );
            model.under_way(context);
            let tally = model.contexts[context as usize].tally;
            let Some(op) = model.retire(context, status == 1) else {
                return model.fail(format!("{what}: nothing is under way"));
            };
            if read.is_err() || at.page_offset() != op.record {
                model.fail(format!("{what}: out of order"));
            }
            if let Err(why) = op.may_end(&record, &tally) {
                model.fail(format!("{what}: {why}: {:?}", op.descriptor));
            }
        });
    }

    fn atomic(
        &self,
        at: Gpa,
        (add, current, new): (bool, u64, u64),
        run: impl FnOnce() -> Result<u64, BusError>,
    ) -> Result<u64, BusError> {
        self.begin(at);
        // A swap in a page table is none of an operation.
        if !self.with(|model| model.frames.contains_key(&at.page().0)) {
            return run();
        }
        let place = self.data(&[(at, true)]);
        let found = run()?;
        if let Some((context, iovas)) = place {
            self.with(|model| {
                let Some(_) = model.operand(context, iovas[0], 8, true) else {
                    return;
                };
                let op = &mut model.contexts[context as usize].operations[0];
                if !op.swapped(add, current, new, found) {
                    model.fail(format!("context {context}: another atomic operation"));
                }
            });
        }
        Ok(found)
    }
}

impl Dma for Observed {
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        self.begin(from);
        let place = self.data(&[(from, false)]);
        self.inner.read(from, to)?;
        match place {
            Some((context, iovas)) => self.bytes(context, from, iovas[0], to, false),
            None if [IQ, CTX_TABLE].contains(&from.page()) => {}
            None => self.with(|model| model.fail(format!("{from}: read, and nobody's"))),
        }
        Ok(())
    }

    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        self.begin(to);
        if to.page() == PRQ {
            let record = from.try_into().map(PageRequest::from_bytes);
            self.with(|model| match record {
                Ok(record) => model.record(&record),
                Err(_) => model.fail("half a record"),
            });
        } else if let Some((context, iovas)) = self.data(&[(to, true)]) {
            self.bytes(context, to, iovas[0], from, true);
        } else {
            self.with(|model| model.fail(format!("{to}: written, and nobody's")));
        }
        self.inner.write(to, from)
    }

    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        self.begin(from);
        let place = self.data(&[(from, false), (to, true)]);
        if let Some((context, iovas)) = place {
            let mut bytes = vec![0; len];
            self.inner.read(from, &mut bytes)?;
            self.bytes(context, from, iovas[0], &bytes, false);
            self.bytes(context, to, iovas[1], &bytes, true);
        } else {
            self.with(|model| model.fail(format!("{from} to {to}: copied, and nobody's")));
        }
        self.inner.copy(from, to, len)
    }

    fn load_u32(&self, at: Gpa, order: Ordering) -> Result<u32, BusError> {
        self.begin(at);
        self.inner.load_u32(at, order)
    }

    fn store_u32(&self, at: Gpa, value: u32, order: Ordering) -> Result<(), BusError> {
        self.begin(at);
        if at == word(std::mem::offset_of!(KernelShadow, iq_head)) {
            self.with(|model| model.reached(value));
        } else if let Some(context) = self.with(|model| model.head_at(at)) {
            self.with(|model| model.told(context, value));
        } else if let Some((context, _)) = self.data(&[(at, true)]) {
            self.completed(context, at, value);
        }
        self.inner.store_u32(at, value, order)
    }

    fn load_u64(&self, at: Gpa, order: Ordering) -> Result<u64, BusError> {
        self.begin(at);
        let value = self.inner.load_u64(at, order);
        // A step of a walk: what it has found may be overtaken now.
        self.middle();
        value
    }

    fn store_u64(&self, at: Gpa, value: u64, order: Ordering) -> Result<(), BusError> {
        self.begin(at);
        if at == ACK {
            self.with(|model| model.acknowledged(value));
        } else if self.with(|model| model.access(at, true)).is_some() {
            self.with(|model| model.fail("a double word in a page of data"));
        }
        self.inner.store_u64(at, value, order)
    }

    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<u64, BusError> {
        let run = || self.inner.compare_exchange_u64(at, current, new);
        self.atomic(at, (false, current, new), run)
    }

    fn fetch_add_u64(&self, at: Gpa, value: u64) -> Result<u64, BusError> {
        let run = || self.inner.fetch_add_u64(at, value);
        self.atomic(at, (true, 0, value), run)
    }

    fn view(&self, f: &mut dyn FnMut(&dyn Dma)) {
        f(self);
    }
}
