//! A device that lies, falls silent or dies: named errors, never a hang, never memory freed too
//! early. The device here is a script that answers each descriptor at once.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use extlb_driver::spec::context::ContextError;
use extlb_driver::spec::uapi::{Audit, Info, Stats, UAPI_VERSION};
use extlb_driver::spec::work::{Completion, Descriptor, Status};
use extlb_driver::{
    Access, Backing, BackingContext, Context, Device, Error, Fork, Iova, Memory, Nonsense, Options,
    Result, Shadow, Sharing, Wake,
};
use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;

/// What the device does with a descriptor.
#[derive(Clone, Copy)]
enum Answer {
    /// Completes it so.
    Complete(Completion),
    /// Completes it well after a while, and tells nobody.
    Quietly(Duration),
    /// Nothing.
    Silence,
    /// Sets the head to this.
    Head(u32),
    /// Stops the context.
    Stop(u32, u64),
}

fn success(len: u64) -> Completion {
    Completion {
        status: Status::Success as u32,
        bytes: len,
        ..Completion::default()
    }
}

struct Script {
    answers: Mutex<Vec<Answer>>,
    dead: AtomicBool,
    refuse_unregister: AtomicBool,
    mapped: AtomicUsize,
    registered: AtomicUsize,
}

struct Liar(Arc<Script>);

struct LiarMemory(MmapRaw, Arc<Script>);

impl Drop for LiarMemory {
    fn drop(&mut self) {
        self.1.mapped.fetch_sub(1, Ordering::Relaxed);
    }
}

// SAFETY: a private anonymous mapping that lives as long as the value.
unsafe impl Memory for LiarMemory {
    fn addr(&self) -> NonNull<u8> {
        NonNull::new(self.0.as_mut_ptr()).unwrap()
    }
    fn len(&self) -> usize {
        self.0.len()
    }
    fn access(&self) -> Access {
        Access::Exclusive
    }
}

struct LiarContext {
    script: Arc<Script>,
    shadow: MmapRaw,
    ring: Iova,
    entries: u32,
    next: Mutex<u32>,
    events: AtomicU32,
}

// SAFETY: `allocate` keeps the promises of `Memory`.
unsafe impl Backing for Liar {
    type Context = LiarContext;
    type Memory = LiarMemory;

    fn info(&self) -> Result<Info> {
        Ok(Info {
            version: UAPI_VERSION,
            ..Info::default()
        })
    }
    fn allocate(&self, len: usize, _: Fork) -> Result<LiarMemory> {
        self.0.mapped.fetch_add(1, Ordering::Relaxed);
        Ok(LiarMemory(
            MmapOptions::new().len(len).map_anon().unwrap().into(),
            self.0.clone(),
        ))
    }
    fn map_file(&self, _: &File, _: Range<u64>, _: Sharing) -> Result<LiarMemory> {
        Err(Error::Unsupported("files"))
    }
    fn create(&self, ring: Iova, ring_log2: u32, _: u32) -> Result<LiarContext> {
        let context = LiarContext {
            script: self.0.clone(),
            shadow: MmapOptions::new().len(4096).map_anon().unwrap().into(),
            ring,
            entries: 1 << ring_log2,
            next: Mutex::new(0),
            events: AtomicU32::new(0),
        };
        // Every submission rings the doorbell, which is where the device does its work.
        context.shadow().need_kick.store(1, Ordering::Relaxed);
        Ok(context)
    }
}

// SAFETY: the device accesses ring and records in `ring_doorbell` only, not after `unregister`.
unsafe impl BackingContext for LiarContext {
    fn number(&self) -> u32 {
        0
    }
    fn register(&self, _: Iova, _: u64, _: Access) -> Result<u32> {
        self.script.registered.fetch_add(1, Ordering::Relaxed);
        Ok(1)
    }
    fn unregister(&self, _: u32) -> Result<()> {
        if self.script.refuse_unregister.load(Ordering::Relaxed) {
            return Err(Error::Dead { errno: Errno::EIO });
        }
        self.script.registered.fetch_sub(1, Ordering::Relaxed);
        Ok(())
    }
    fn ring_doorbell(&self) {
        let mut next = self.next.lock().unwrap();
        let shadow = self.shadow();
        while *next != shadow.tail.load(Ordering::Acquire) {
            let slot = u64::from(*next & (self.entries - 1)) * Descriptor::SIZE as u64;
            // SAFETY: in the ring, which is mapped as long as the context's queue is.
            let descriptor = unsafe {
                Descriptor::from_bytes(&*((self.ring.0 + slot) as *const [u8; Descriptor::SIZE]))
            };
            *next = next.wrapping_add(1);
            let mut answers = self.script.answers.lock().unwrap();
            let good = Answer::Complete(success(descriptor.len));
            let answer = if answers.is_empty() {
                good
            } else {
                answers.remove(0)
            };
            let write = |completion: Completion| {
                complete(descriptor.completion, completion);
                shadow.head.store(*next, Ordering::Release);
            };
            match answer {
                Answer::Complete(completion) => write(completion),
                Answer::Quietly(delay) => {
                    shadow.head.store(*next, Ordering::Release);
                    std::thread::spawn(move || {
                        std::thread::sleep(delay);
                        complete(descriptor.completion, success(descriptor.len));
                    });
                    continue;
                }
                Answer::Silence => continue,
                Answer::Head(head) => {
                    write(success(descriptor.len));
                    shadow.head.store(head, Ordering::Release);
                }
                Answer::Stop(error, addr) => {
                    shadow.error_addr.store(addr, Ordering::Relaxed);
                    shadow.error.store(error, Ordering::Release);
                }
            }
            self.events.fetch_add(1, Ordering::Release);
        }
    }
    fn shadow(&self) -> &Shadow {
        // SAFETY: a page that lives as long as `self`.
        unsafe { Shadow::at(NonNull::new(self.shadow.as_mut_ptr()).unwrap()) }
    }
    fn wait(&self, timeout: Duration) -> Result<Wake> {
        if self.events.swap(0, Ordering::Acquire) > 0 {
            return Ok(Wake::Event);
        }
        std::thread::sleep(timeout);
        Ok(Wake::TimedOut)
    }
    fn check(&self) -> Result<()> {
        if self.script.dead.load(Ordering::Relaxed) {
            return Err(Error::Dead { errno: Errno::EIO });
        }
        Ok(())
    }
    fn stats(&self) -> Result<Stats> {
        Ok(Stats::default())
    }
    fn audit(&self) -> Result<Audit> {
        Err(Error::Unsupported("audits"))
    }
}

/// Writes a completion record, as a device does: the status last.
fn complete(record: u64, completion: Completion) {
    let bytes = completion.to_bytes();
    // SAFETY: a record of the library, which waits for what is written to it, and keeps it mapped
    // meanwhile.
    unsafe {
        let record = record as *mut u8;
        std::ptr::copy(bytes[4..].as_ptr(), record.add(4), bytes.len() - 4);
        AtomicU32::from_ptr(record.cast()).store(completion.status, Ordering::Release);
    }
}

fn liar(answers: &[Answer]) -> (Arc<Script>, Context<Liar>) {
    let script = Arc::new(Script {
        answers: Mutex::new(answers.to_vec()),
        dead: AtomicBool::new(false),
        refuse_unregister: AtomicBool::new(false),
        mapped: AtomicUsize::new(0),
        registered: AtomicUsize::new(0),
    });
    let device = Device::open(Liar(script.clone())).unwrap();
    let context = device
        .context(Options {
            ring_log2: 2,
            ..Options::default()
        })
        .unwrap();
    (script, context)
}

/// What comes of one fill of 100 bytes, and what the queue says afterwards.
fn fill(answer: Answer) -> (Result<()>, Result<()>) {
    let (script, context) = liar(&[answer]);
    let queue = context.queue();
    let dst = context.allocate(100).unwrap();
    let first = queue
        .fill(dst, 1)
        .unwrap()
        .wait()
        .and_then(|done| done.result);
    let second = queue
        .nop()
        .and_then(|pending| pending.wait())
        .and_then(|done| done.result);
    drop(context);
    assert_eq!(
        script.mapped.load(Ordering::Relaxed),
        0,
        "all memory was freed at last"
    );
    assert_eq!(script.registered.load(Ordering::Relaxed), 0);
    (first, second)
}

#[test]
fn honest_answers_work_here() {
    assert_eq!(fill(Answer::Complete(success(100))), (Ok(()), Ok(())));
}

#[test]
fn answers_that_make_no_sense_end_the_queue() {
    let status = |status: u32| Completion {
        status,
        ..success(100)
    };
    let fault = |fault_addr| Completion {
        status: Status::PageFault as u32,
        fault_addr,
        ..Completion::default()
    };
    for completion in [
        status(8),
        status(u32::MAX),
        status(Status::Mismatch as u32),
        success(99),
        success(101),
        success(u64::MAX),
        fault(0),
        fault(u64::MAX),
    ] {
        let (first, second) = fill(Answer::Complete(completion));
        assert!(
            matches!(first, Err(Error::Protocol(_))),
            "{completion:?}: {first:?}"
        );
        assert_eq!(second, first, "the queue takes no more work");
    }
}

#[test]
fn a_head_that_makes_no_sense_ends_the_queue() {
    for head in [5, u32::MAX, 1 << 31] {
        let (first, second) = fill(Answer::Head(head));
        assert_eq!(first, Ok(()), "that operation had ended");
        let want = Nonsense::Head {
            head,
            from: 0,
            published: 1,
        };
        assert_eq!(second, Err(Error::Protocol(want)));
    }
}

#[test]
fn a_context_that_stops_says_why() {
    let code = ContextError::RingFault as u32;
    let (first, second) = fill(Answer::Stop(code, 0x1234));
    let want = Error::Stopped {
        error: ContextError::RingFault,
        addr: Iova(0x1234),
    };
    assert_eq!((first, second), (Err(want.clone()), Err(want)));
    let (first, _) = fill(Answer::Stop(77, 0));
    assert_eq!(first, Err(Error::Protocol(Nonsense::ContextError(77))));
}

#[test]
fn what_ended_before_the_stop_is_good() {
    let stop = Answer::Stop(ContextError::Shadow as u32, 0);
    let (_, context) = liar(&[Answer::Complete(success(0)), stop]);
    let batch = context.queue().batch();
    let (first, second) = (batch.nop().unwrap(), batch.nop().unwrap());
    batch.submit_all();
    assert!(second.wait().is_err());
    first.wait().unwrap();
}

#[test]
fn a_device_that_died_is_noticed() {
    let (script, context) = liar(&[Answer::Silence]);
    let pending = context.queue().nop().unwrap();
    assert!(!pending.wait_for(Duration::from_millis(30)).unwrap());
    script.dead.store(true, Ordering::Relaxed);
    let begun = Instant::now();
    assert_eq!(
        pending.wait().unwrap_err(),
        Error::Dead { errno: Errno::EIO }
    );
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(context.queue().nop().is_err());
}

#[test]
fn a_full_ring_on_a_dead_device_is_no_hang() {
    let (script, context) = liar(&[Answer::Silence; 4]);
    let pending: Vec<_> = (0..4).map(|_| context.queue().nop().unwrap()).collect();
    script.dead.store(true, Ordering::Relaxed);
    assert!(context.queue().nop().is_err());
    drop(pending);
}

#[test]
fn a_lost_interrupt_delays_and_is_counted() {
    let (_, context) = liar(&[Answer::Quietly(Duration::from_millis(100))]);
    let begun = Instant::now();
    context.queue().nop().unwrap().wait().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(context.queue().missed_wakeups(), 1);
}

#[test]
fn memory_that_cannot_be_taken_back_is_never_freed() {
    let (script, context) = liar(&[Answer::Silence]);
    let dst = context.allocate(4096).unwrap();
    drop(context.queue().fill(dst, 1).unwrap());
    script.refuse_unregister.store(true, Ordering::Relaxed);
    drop(context);
    assert_eq!(
        script.mapped.load(Ordering::Relaxed),
        3,
        "ring, records and buffer stay mapped"
    );
}

#[test]
fn memory_of_an_unanswered_operation_is_kept_until_the_queue_goes() {
    let (script, context) = liar(&[Answer::Silence]);
    let dst = context.allocate(4096).unwrap();
    let pending = context.queue().fill(dst, 1).unwrap();
    drop(pending);
    assert_eq!(script.mapped.load(Ordering::Relaxed), 3);
    drop(context);
    assert_eq!(script.mapped.load(Ordering::Relaxed), 0);
}
