//! The queue: from descriptors to completions.
//!
//! All bookkeeping is under one lock. A descriptor is *written* into the ring, then *published*
//! with the tail, carried out by the device, and *harvested* when its completion record was read.
//! Until then the queue holds the operands' memory ([`Hold`]), whatever the program did with the
//! pending half of the operation.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use extlb_spec::Iova;
use extlb_spec::context::ContextError;
use extlb_spec::work::{Completion, Descriptor, Status};

use crate::context::Options;
use crate::error::{Error, Nonsense, Result};
use crate::memory_unsafe::{Backing, BackingContext, Fork};
use crate::operation::{Answer, Expect, judge};
use crate::region::Mapping;
use crate::ring::Rings;
use crate::slice_unsafe::Hold;
use crate::submit::Submitter;
use crate::wait::Sleepers;

/// How long the head may stand still although everything was completed. The device writes it right
/// behind the completion; only a device that does not run takes any time.
const HEAD_PATIENCE: Duration = Duration::from_secs(3);

/// A queue of a context. Clones are handles to the same queue; threads may share it.
#[derive(Debug)]
pub struct Queue<B: Backing> {
    pub(crate) core: Arc<Core<B>>,
}

impl<B: Backing> Clone for Queue<B> {
    fn clone(&self) -> Self {
        Self {
            core: self.core.clone(),
        }
    }
}

impl<B: Backing> Queue<B> {
    /// Makes a context with its queue.
    pub(crate) fn create(backing: &B, options: Options) -> Result<Self> {
        let pages = |bytes: usize| bytes.next_multiple_of(extlb_spec::PAGE_SIZE as usize);
        let allocate = |bytes| -> Result<Mapping<B>> {
            // A child has no business with the rings of its parent.
            let memory = backing.allocate(pages(bytes), Fork::Nothing)?;
            Ok(Mapping::new(memory, bytes))
        };
        let descriptors = allocate(Descriptor::SIZE << options.ring_log2)?;
        let records = allocate(Completion::SIZE << options.ring_log2)?;
        let context =
            backing.create(descriptors.addr(), options.ring_log2, options.follow.bits())?;
        let context = Arc::new(context);
        let rings = Rings::register(&context, descriptors, records, options.ring_log2)?;
        let state = Mutex::new(State {
            written: 0,
            published: 0,
            harvested: 0,
            head: 0,
            flights: VecDeque::with_capacity(rings.entries() as usize),
            failed: None,
        });
        let sleepers = Sleepers::default();
        let core = Core {
            rings,
            state,
            sleepers,
            context,
            spins: options.spins,
        };
        Ok(Self {
            core: Arc::new(core),
        })
    }

    pub(crate) fn context(&self) -> &Arc<B::Context> {
        &self.core.context
    }

    /// Operations that the ring can hold.
    pub fn entries(&self) -> u32 {
        self.core.rings.entries()
    }

    /// Operations under way.
    pub fn in_flight(&self) -> usize {
        let mut state = self.core.lock();
        self.core.harvest(&mut state);
        state.flights.len()
    }

    /// Waits until every operation submitted so far has ended.
    pub fn flush(&self) -> Result<()> {
        let last = {
            let mut state = self.core.lock();
            self.core.harvest(&mut state);
            state.flights.back().map(|flight| flight.cell.clone())
        };
        last.map_or(Ok(()), |cell| self.core.wait(&cell, None).map(drop))
    }

    /// How often a sleeper found its operation done without having been woken. Anything but 0
    /// (or a rare coincidence with the sleeper's own look once a second) is a lost interrupt.
    pub fn missed_wakeups(&self) -> u64 {
        self.core.sleepers.missed()
    }

    pub(crate) fn submitter(&self) -> Submitter<'_, B> {
        Submitter::new(self, crate::submit::Mode::Now)
    }
}

/// The shared part of a queue, its operations included.
pub(crate) struct Core<B: Backing> {
    rings: Rings<B>,
    state: Mutex<State<B>>,
    pub sleepers: Sleepers,
    pub context: Arc<B::Context>,
    pub spins: u32,
}

impl<B: Backing> std::fmt::Debug for Core<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "queue of context {}", self.context.number())
    }
}

/// Indices count freely modulo 2^32; harvested <= published <= written <= harvested + entries.
pub(crate) struct State<B: Backing> {
    written: u32,
    published: u32,
    harvested: u32,
    /// The device's head when it was last looked at.
    head: u32,
    /// The operations `[harvested, written)`.
    flights: VecDeque<Flight<B>>,
    /// Why the queue takes no more work.
    failed: Option<Error>,
}

struct Flight<B: Backing> {
    cell: Arc<Cell>,
    expect: Expect,
    holds: [Option<Hold<B>>; 2],
    segments: Vec<Hold<B>>,
}

/// Where an operation's answer goes; shared by the queue and the operation's pending half.
#[derive(Debug, Default)]
pub(crate) struct Cell {
    pub answer: OnceLock<Answer>,
}

/// What is to be submitted.
pub(crate) struct Work<B: Backing> {
    pub descriptor: Descriptor,
    pub expect: Expect,
    /// The operands.
    pub holds: [Option<Hold<B>>; 2],
    /// Their segments, if they are lists.
    pub segments: Vec<Hold<B>>,
}

impl<B: Backing> Core<B> {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State<B>> {
        // The state is consistent between any two statements that can panic (there are none).
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a descriptor if there is room, without publishing it; takes the work's holds then.
    pub(crate) fn try_write(&self, work: &mut Work<B>) -> Result<Arc<Cell>> {
        let mut state = self.lock();
        self.harvest(&mut state);
        if self.room(&mut state)? == 0 {
            return Err(Error::RingFull);
        }
        let cell = Arc::new(Cell::default());
        self.rings.write(state.written, work.descriptor);
        state.written = state.written.wrapping_add(1);
        state.flights.push_back(Flight {
            cell: cell.clone(),
            expect: work.expect.clone(),
            holds: std::mem::take(&mut work.holds),
            segments: std::mem::take(&mut work.segments),
        });
        Ok(cell)
    }

    /// Gives the device what was written. Whenever something is published, its last descriptor
    /// asks for an interrupt, so behind every operation under way there is an interrupt to come.
    pub(crate) fn publish(&self) {
        let mut state = self.lock();
        self.publish_locked(&mut state);
    }

    fn publish_locked(&self, state: &mut State<B>) {
        if state.written == state.published {
            return;
        }
        self.rings.ask_for_interrupt(state.written.wrapping_sub(1));
        let shadow = self.context.shadow();
        state.published = state.written;
        // The handshake with a device that goes to sleep. We: store the tail; fence; load
        // need_kick. It: stores need_kick; fence; loads the tail. Whatever the interleaving, at
        // least one load comes after the other's store: either we see that it wants a kick, or it
        // sees the new tail and stays awake.
        shadow
            .tail
            .store(state.published.to_le(), Ordering::Release);
        fence(Ordering::SeqCst);
        if shadow.need_kick.load(Ordering::Relaxed) != 0 {
            self.context.ring_doorbell();
        }
    }

    /// Free slots. A slot is free when the device retired its descriptor (head) and its
    /// completion record was read.
    fn room(&self, state: &mut State<B>) -> Result<u32> {
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        let head = u32::from_le(self.context.shadow().head.load(Ordering::Acquire));
        let (from, published) = (state.head, state.published);
        if head.wrapping_sub(from) > published.wrapping_sub(from) {
            let error = Error::Protocol(Nonsense::Head {
                head,
                from,
                published,
            });
            return Err(self.fail(state, error));
        }
        state.head = head;
        let unretired = state.written.wrapping_sub(head);
        let unread = state.written.wrapping_sub(state.harvested);
        Ok(self.rings.entries().saturating_sub(unretired.max(unread)))
    }

    /// Reads the completions that have come, in order.
    pub(crate) fn harvest(&self, state: &mut State<B>) {
        while state.failed.is_none() && state.harvested != state.published {
            let (Some(completion), Some(flight)) = (
                self.rings.completion(state.harvested),
                state.flights.front(),
            ) else {
                break;
            };
            match judge(completion, &flight.expect) {
                Ok(answer) => {
                    state.harvested = state.harvested.wrapping_add(1);
                    if let Some(flight) = state.flights.pop_front() {
                        // The device has said that it is done. The holds go first, so that those
                        // who see the answer see the memory free of them.
                        drop((flight.holds, flight.segments));
                        let _ = flight.cell.answer.set(answer);
                    }
                }
                Err(nonsense) => {
                    self.fail(state, Error::Protocol(nonsense));
                }
            }
        }
    }

    /// The queue takes no more work, and what is under way is never answered: the device can no
    /// longer be trusted to be done with it. Its memory is held until the queue is gone and the
    /// registrations were taken back.
    fn fail(&self, state: &mut State<B>, error: Error) -> Error {
        state.failed.get_or_insert(error).clone()
    }

    /// Marks the device as dead.
    pub(crate) fn fail_now(&self, error: Error) -> Error {
        let mut state = self.lock();
        self.harvest(&mut state);
        self.fail(&mut state, error)
    }

    /// Whether the operation has its answer. Looks at the ring and at the context's state.
    pub(crate) fn look(&self, cell: &Cell) -> Result<bool> {
        if cell.answer.get().is_some() {
            return Ok(true);
        }
        let mut state = self.lock();
        self.look_locked(&mut state);
        if cell.answer.get().is_some() {
            return Ok(true);
        }
        state.failed.clone().map_or(Ok(false), Err)
    }

    /// For an operation that has no answer after a while: whether the device says that it has
    /// retired it. The record is written before the head, so then it never comes.
    pub(crate) fn check_record(&self, cell: &Cell) -> Result<()> {
        let mut state = self.lock();
        // The head first: records of what it says is retired were written before.
        let head = self.room(&mut state);
        self.harvest(&mut state);
        if cell.answer.get().is_some() {
            return Ok(());
        }
        head?;
        if state.head.wrapping_sub(state.harvested) as i32 > 0 {
            let error = Error::Protocol(Nonsense::Status(Status::Pending as u32));
            return Err(self.fail(&mut state, error));
        }
        Ok(())
    }

    fn look_locked(&self, state: &mut State<B>) {
        let shadow = self.context.shadow();
        // The error is loaded before the completions: those that came before it are still good.
        let raw = u32::from_le(shadow.error.load(Ordering::Acquire));
        self.harvest(state);
        if raw != 0 {
            let addr = Iova(u64::from_le(shadow.error_addr.load(Ordering::Relaxed)));
            let error = match ContextError::from_raw(raw) {
                Some(error) => Error::Stopped { error, addr },
                None => Error::Protocol(Nonsense::ContextError(raw)),
            };
            self.fail(state, error);
        }
    }

    /// Waits until there is room for one more.
    pub(crate) fn wait_for_room(&self) -> Result<()> {
        let mut next_check = Instant::now() + Sleepers::LIVENESS;
        let mut all_answered: Option<Instant> = None;
        loop {
            let oldest = {
                let mut state = self.lock();
                self.look_locked(&mut state);
                if self.room(&mut state)? > 0 {
                    return Ok(());
                }
                self.publish_locked(&mut state);
                state.flights.front().map(|flight| flight.cell.clone())
            };
            match oldest {
                Some(cell) => {
                    self.wait(&cell, None)?;
                    all_answered = None;
                }
                // All are answered: the head follows at once, without an interrupt of its own.
                None => {
                    let since = *all_answered.get_or_insert_with(Instant::now);
                    if since.elapsed() > HEAD_PATIENCE {
                        let mut state = self.lock();
                        let (head, published) = (state.head, state.published);
                        let error = Nonsense::Head {
                            head,
                            from: published,
                            published,
                        };
                        return Err(self.fail(&mut state, Error::Protocol(error)));
                    }
                    std::thread::sleep(Duration::from_micros(20));
                }
            }
            if Instant::now() > next_check {
                self.context.check().map_err(|error| self.fail_now(error))?;
                next_check = Instant::now() + Sleepers::LIVENESS;
            }
        }
    }
}
