//! A process with a context, and what its program and its page tables do.

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use extlb_device::GuestRam;
use extlb_device::ports::Dma;
use extlb_spec::context::{ContextEntry, ContextShadow, flags as context_flags};
use extlb_spec::pte::{self, Pte};
use extlb_spec::work::{Completion, Descriptor, Opcode, Status};
use extlb_spec::{BAR_DOORBELLS, DOORBELL_STRIDE, Gpa, Iova};

use super::memory::Pages;
use super::{CTX_TABLE, Guest, PAGE};

/// A process with a context: its two page tables, its ring, its shadow page.
#[derive(Clone)]
pub struct Process {
    pub context: u32,
    pub root: Gpa,
    pub cpu_root: Gpa,
    pub shadow: Gpa,
    pub ring: Iova,
    pub ring_page: Gpa,
    pub records: Iova,
    pub records_page: Gpa,
    ram: GuestRam,
    pages: Arc<Pages>,
    tail: Arc<AtomicU64>,
}

pub const RING_LOG2: u32 = 4;

impl Process {
    /// Its memory; the context table does not know it yet.
    pub fn new(guest: &Guest, context: u32) -> Self {
        let take = || guest.pages.take();
        let process = Self {
            context,
            root: take(),
            cpu_root: take(),
            shadow: take(),
            ring: Iova(0x7f00_0000_0000),
            ring_page: take(),
            records: Iova(0x7f00_0000_1000),
            records_page: take(),
            ram: guest.ram.clone(),
            pages: guest.pages.clone(),
            tail: Arc::default(),
        };
        process.map(process.ring, process.ring_page, true);
        process.map(process.records, process.records_page, true);
        process
    }

    /// Writes the entry of the context table, spoilt as given.
    pub fn write_entry(&self, guest: &Guest, spoil: impl Fn(&mut ContextEntry)) {
        let mut entry = ContextEntry {
            flags: context_flags::VALID | context_flags::ORACLE,
            page_table: self.root.0,
            ring: self.ring.0,
            ring_log2: RING_LOG2,
            credits: 4,
            shadow: self.shadow.0,
            cpu_page_table: self.cpu_root.0,
            ..Default::default()
        };
        spoil(&mut entry);
        let at = Gpa(CTX_TABLE.0 + u64::from(self.context) * ContextEntry::SIZE as u64);
        guest.ram.write(at, &entry.to_bytes()).unwrap();
    }

    pub fn stop(&self, guest: &Guest) {
        self.write_entry(guest, |e| e.flags = 0);
        guest.sync(self.context);
    }

    fn leaf(&self, root: Gpa, iova: Iova, table_bits: u64) -> Gpa {
        let mut table = root;
        for level in (2..=4).rev() {
            let at = Gpa(table.0 + pte::index(iova, level) * 8);
            let entry = self.ram.load_u64(at, Ordering::SeqCst).unwrap();
            table = if entry & 1 == 0 {
                let page = self.pages.take();
                let value = page.0 | table_bits;
                self.ram.store_u64(at, value, Ordering::SeqCst).unwrap();
                page
            } else {
                Gpa(entry & pte::ADDR_MASK)
            };
        }
        Gpa(table.0 + pte::index(iova, 1) * 8)
    }

    /// Where the leaf of the device's page table is.
    pub fn device_leaf(&self, iova: Iova) -> Gpa {
        self.leaf(self.root, iova, 1)
    }

    pub fn device_pte(&self, iova: Iova) -> Pte {
        let at = self.device_leaf(iova);
        Pte(self.ram.load_u64(at, Ordering::SeqCst).unwrap())
    }

    pub fn set_device(&self, iova: Iova, value: Pte) {
        let at = self.device_leaf(iova);
        self.ram.store_u64(at, value.0, Ordering::SeqCst).unwrap();
    }

    /// Writes where the device's page table leads, within a page.
    pub fn poke(&self, iova: Iova, bytes: &[u8]) {
        let at = Gpa(self.device_pte(iova).addr().0 + iova.page_offset());
        self.ram.write(at, bytes).unwrap();
    }

    /// Sets the process's own entry; `None` takes the page out.
    pub fn set_cpu(&self, iova: Iova, page: Option<(Gpa, bool)>) {
        let at = self.leaf(self.cpu_root, iova, 0x67);
        let value = page.map_or(0, |(gpa, write)| gpa.0 | 0x65 | u64::from(write) << 1);
        self.ram.store_u64(at, value, Ordering::SeqCst).unwrap();
    }

    /// Maps a page in both tables.
    pub fn map(&self, iova: Iova, page: Gpa, write: bool) {
        self.set_cpu(iova, Some((page, write)));
        self.set_device(iova, Pte::leaf(page, write));
    }

    /// Maps `count` fresh pages; returns them.
    pub fn map_fresh(&self, iova: Iova, count: u64) -> Vec<Gpa> {
        (0..count)
            .map(|i| {
                let page = self.pages.take();
                self.map(Iova(iova.0 + i * PAGE), page, true);
                page
            })
            .collect()
    }

    /// Address of the record that the n-th submission gets.
    pub fn record(&self, n: u64) -> Iova {
        Iova(self.records.0 + n % 128 * 32)
    }

    /// Writes a descriptor and rings, without waking; returns the number of the submission.
    pub fn submit(&self, mut descriptor: Descriptor) -> u64 {
        let n = self.tail.fetch_add(1, Ordering::SeqCst);
        if descriptor.completion == 0 {
            descriptor.completion = self.record(n).0;
            let record = Gpa(self.records_page.0 + n % 128 * 32);
            self.ram.write(record, &[0; 32]).unwrap();
        }
        let at = Gpa(self.ring_page.0 + (n & ((1 << RING_LOG2) - 1)) * 64);
        self.ram.write(at, &descriptor.to_bytes()).unwrap();
        self.set_tail(n as u32 + 1);
        n
    }

    /// Its queue is empty, and its records and its shadow page are zero: for a new life.
    pub fn restart(&self) {
        self.tail.store(0, Ordering::SeqCst);
        for page in [self.shadow, self.records_page] {
            self.ram.write(page, &[0; 4096]).unwrap();
        }
    }

    pub fn set_tail(&self, tail: u32) {
        let at = Gpa(self.shadow.0 + offset_of!(ContextShadow, tail) as u64);
        self.ram.store_u32(at, tail, Ordering::SeqCst).unwrap();
    }

    pub fn word(&self, offset: usize) -> u32 {
        let at = Gpa(self.shadow.0 + offset as u64);
        self.ram.load_u32(at, Ordering::SeqCst).unwrap()
    }

    pub fn error(&self) -> u32 {
        self.word(offset_of!(ContextShadow, error))
    }

    /// How many submissions there were.
    pub fn submitted(&self) -> u64 {
        self.tail.load(Ordering::SeqCst)
    }

    /// Submissions that are not retired.
    pub fn ahead(&self) -> u32 {
        let tail = self.tail.load(Ordering::SeqCst) as u32;
        tail.wrapping_sub(self.word(offset_of!(ContextShadow, head)))
    }

    /// Rings the doorbell.
    pub fn ring(&self, guest: &Guest) {
        let at = u64::from(self.context) * DOORBELL_STRIDE;
        guest.device.mmio_write(BAR_DOORBELLS, at, &[1, 0, 0, 0]);
    }

    pub fn completion(&self, n: u64) -> Completion {
        let mut bytes = [0; Completion::SIZE];
        let at = Gpa(self.records_page.0 + n % 128 * 32);
        self.ram.read(at, &mut bytes).unwrap();
        Completion::from_bytes(&bytes)
    }

    pub fn status(&self, n: u64) -> Option<Status> {
        Status::from_raw(self.completion(n).status)
    }

    /// Submits, rings, runs; the record.
    pub fn go(&self, guest: &Guest, descriptor: Descriptor) -> Completion {
        let n = self.submit(descriptor);
        self.ring(guest);
        guest.run();
        self.completion(n)
    }
}

/// How an operation ended.
pub fn status(done: &Completion) -> Status {
    Status::from_raw(done.status).expect("known")
}

pub fn op(opcode: Opcode, src: u64, dst: u64, len: u64) -> Descriptor {
    Descriptor {
        opcode: opcode as u8,
        src,
        dst,
        len,
        ..Default::default()
    }
}

pub fn copy(src: u64, dst: u64, len: u64) -> Descriptor {
    op(Opcode::Copy, src, dst, len)
}
