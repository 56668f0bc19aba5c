//! The ports of a device that is replayed: each answers from the log, if it is asked what the
//! log says that it was asked.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use extlb_spec::{Gpa, Vector};

use super::entry::{Answer, Call, Entry, Request, Return};
use super::listing::Listing;
use super::log::{LogError, Next, Reader};
use super::replay::{Difference, Seen};
use super::taps::len32;
use crate::ports::{BusError, Clock, Dma, Event, Interrupts, Ports, Trace, Wake};
use crate::sync::lock;

/// Why the log is not followed any further.
pub(super) enum Stop {
    /// The device does something else.
    Differs(Box<Difference>),
    /// The log cannot be understood.
    Log(LogError),
    /// The file ends without the end of the run.
    Cut,
    /// So much was asked for.
    Until,
    /// The run ended here.
    End,
}

struct Inner {
    reader: Reader,
    until: Option<u64>,
    seen: Option<Box<Seen>>,
    listing: Listing,
    calls: u64,
    /// The call under way.
    call: Option<String>,
    time: Duration,
    stop: Option<Stop>,
}

/// All ports at once, and the log behind them.
///
/// Once the log is not followed any further, memory fails, time stands still, and the rest is
/// swallowed: the call that the device is in comes to its end, and is the last.
pub(super) struct Player(Mutex<Inner>);

impl Player {
    pub(super) fn new(reader: Reader, until: Option<u64>, seen: Option<Box<Seen>>) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Inner {
            reader,
            until,
            seen,
            listing: Listing::default(),
            calls: 0,
            call: None,
            time: Duration::ZERO,
            stop: None,
        })))
    }

    pub(super) fn ports(self: &Arc<Self>) -> Ports {
        Ports {
            memory: self.clone(),
            interrupts: self.clone(),
            clock: self.clone(),
            trace: self.clone(),
            wake: self.clone(),
        }
    }

    /// The next call to make; `None` at the end, for whatever reason.
    pub(super) fn next_call(&self, summary: impl FnOnce() -> String) -> Option<Call> {
        let mut inner = lock(&self.0);
        match inner.next()? {
            Entry::Call(call) => {
                inner.calls += 1;
                inner.call = Some(inner.listing.call(&call));
                Some(call)
            }
            Entry::End(logged) => {
                let replayed = summary();
                inner.stop = Some(match inner.reader.is_at_end() {
                    Err(error) => Stop::Log(error),
                    Ok(false) => inner.nonsense("the run has ended already", 0),
                    Ok(true) if logged != replayed => inner.differs(logged, replayed),
                    Ok(true) => Stop::End,
                });
                None
            }
            _ => {
                inner.stop = Some(inner.nonsense("no call is under way", 1));
                None
            }
        }
    }

    /// The call has returned.
    pub(super) fn returned(&self, returned: &Return) {
        let mut inner = lock(&self.0);
        match inner.next() {
            None => {}
            Some(Entry::Return(logged)) if logged == *returned => inner.call = None,
            Some(entry @ (Entry::Return(_) | Entry::Port(..))) => {
                let logged = inner.listing.entry(&entry);
                inner.stop = Some(inner.differs(logged, Listing::returned(returned)));
            }
            Some(_) => inner.stop = Some(inner.nonsense("a call is under way", 1)),
        }
    }

    /// Why the log was not followed further, the entries that were, and the calls.
    pub(super) fn end(&self) -> (Option<Stop>, u64, u64) {
        let mut inner = lock(&self.0);
        let stop = inner.stop.take();
        (stop, inner.reader.entries, inner.calls)
    }

    /// The device asks; `None`: the log is not followed any further.
    fn ask(&self, request: Request) -> Option<Answer> {
        let mut inner = lock(&self.0);
        match inner.next()? {
            Entry::Port(logged, answer) if logged == request => {
                if logged.is_answered_by(&answer) {
                    return Some(answer);
                }
                inner.stop = Some(inner.nonsense("the answer is to another question", 1));
            }
            entry @ (Entry::Port(..) | Entry::Return(_)) => {
                let logged = inner.listing.entry(&entry);
                let replayed = inner.listing.request(&request);
                inner.stop = Some(inner.differs(logged, replayed));
            }
            _ => inner.stop = Some(inner.nonsense("a call is under way", 1)),
        }
        None
    }

    /// An access to memory.
    fn access(&self, request: Request, addr: Gpa, len: usize) -> Result<Answer, BusError> {
        match self.ask(request) {
            Some(Answer::BusError { addr, len }) => Err(BusError {
                addr: Gpa(addr),
                len: usize::try_from(len).unwrap_or(usize::MAX),
            }),
            Some(answer) => Ok(answer),
            None => Err(BusError { addr, len }),
        }
    }

    /// An access that answers with a word.
    fn word(&self, request: Request, at: Gpa, len: usize) -> Result<u64, BusError> {
        match self.access(request, at, len)? {
            Answer::Word(word) => Ok(word),
            _ => Err(BusError { addr: at, len }),
        }
    }
}

impl Inner {
    /// The next entry, unless the log is not followed any further.
    fn next(&mut self) -> Option<Entry> {
        if self.stop.is_some() {
            return None;
        }
        if self.until.is_some_and(|until| self.reader.entries >= until) {
            self.stop = Some(Stop::Until);
            return None;
        }
        let number = self.reader.entries;
        match self.reader.next() {
            Ok(Next::Entry(entry)) => {
                self.listing.follow(&entry);
                if let Some(seen) = &mut self.seen {
                    seen(number, &self.listing.entry(&entry));
                }
                return Some(entry);
            }
            Ok(Next::Cut) => self.stop = Some(Stop::Cut),
            Err(error) => self.stop = Some(Stop::Log(error)),
        }
        None
    }

    /// The entry read last, or the one `back` before the next, has no place here.
    fn nonsense(&self, what: &'static str, back: u64) -> Stop {
        Stop::Log(LogError::Entry {
            entry: self.reader.entries.saturating_sub(back),
            what,
        })
    }

    /// The entry read last is not what the device did.
    fn differs(&self, logged: String, replayed: String) -> Stop {
        Stop::Differs(Box::new(Difference {
            entry: self.reader.entries.saturating_sub(1),
            calls: self.calls,
            call: self.call.clone(),
            logged,
            replayed,
        }))
    }
}

impl Dma for Player {
    fn read(&self, from: Gpa, to: &mut [u8]) -> Result<(), BusError> {
        let request = Request::Read {
            from: from.0,
            len: len32(to.len()),
        };
        match self.access(request, from, to.len())? {
            Answer::Bytes(bytes) if bytes.len() == to.len() => {
                to.copy_from_slice(&bytes);
                Ok(())
            }
            _ => Err(BusError {
                addr: from,
                len: to.len(),
            }),
        }
    }

    fn write(&self, to: Gpa, from: &[u8]) -> Result<(), BusError> {
        let request = Request::Write {
            to: to.0,
            data: from.to_vec(),
        };
        self.access(request, to, from.len()).map(drop)
    }

    fn copy(&self, from: Gpa, to: Gpa, len: usize) -> Result<(), BusError> {
        let request = Request::Copy {
            from: from.0,
            to: to.0,
            len: len32(len),
        };
        self.access(request, from, len).map(drop)
    }

    fn load_u32(&self, at: Gpa, _: Ordering) -> Result<u32, BusError> {
        let word = self.word(Request::LoadU32(at.0), at, 4)?;
        u32::try_from(word).map_err(|_| BusError { addr: at, len: 4 })
    }

    fn store_u32(&self, at: Gpa, value: u32, _: Ordering) -> Result<(), BusError> {
        self.access(Request::StoreU32(at.0, value), at, 4).map(drop)
    }

    fn load_u64(&self, at: Gpa, _: Ordering) -> Result<u64, BusError> {
        self.word(Request::LoadU64(at.0), at, 8)
    }

    fn store_u64(&self, at: Gpa, value: u64, _: Ordering) -> Result<(), BusError> {
        self.access(Request::StoreU64(at.0, value), at, 8).map(drop)
    }

    fn compare_exchange_u64(&self, at: Gpa, current: u64, new: u64) -> Result<u64, BusError> {
        let request = Request::Exchange {
            at: at.0,
            current,
            new,
        };
        self.word(request, at, 8)
    }

    fn fetch_add_u64(&self, at: Gpa, value: u64) -> Result<u64, BusError> {
        self.word(Request::Add(at.0, value), at, 8)
    }

    fn view(&self, f: &mut dyn FnMut(&dyn Dma)) {
        f(self);
    }
}

impl Interrupts for Player {
    fn raise(&self, vector: Vector) {
        self.ask(Request::Raise(vector as u32));
    }
}

impl Clock for Player {
    fn now(&self) -> Duration {
        let answer = self.ask(Request::Now);
        let mut inner = lock(&self.0);
        if let Some(Answer::Time(time)) = answer {
            inner.time = Duration::from_nanos(time);
        }
        inner.time
    }
}

impl Trace for Player {
    fn event(&self, event: Event) {
        self.ask(Request::Event(format!("{event:?}")));
    }
}

impl Wake for Player {
    fn work(&self) {
        self.ask(Request::WakeWork);
    }

    fn invalidation(&self) {
        self.ask(Request::WakeInvalidation);
    }
}
