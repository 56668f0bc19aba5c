//! Memory of the client that came without a file: it is asked for it, by DMA_READ and DMA_WRITE.
//!
//! Whoever asks waits for the answer, which another thread receives; so the thread that receives
//! must never wait for whoever asks, and the one that carries out the client's requests must never
//! ask: the client may not answer before it has its own answer (QEMU does not, while a processor
//! of the guest waits for a register). On that thread such memory is a bus error. Kicks are handed
//! to the device's own threads for this reason; what is left is that the kernel's queues and
//! shadow page have to be in memory that is mapped when the device is enabled.
//!
//! A client that does not answer within the limit:
//! - to a DMA_READ: a bus error. As long as the answer has not come, all else is one at once, so
//!   that a drain waits for one limit and not for many.
//! - to a DMA_WRITE: the session ends. The client may carry it out at any later time, and nobody
//!   could say any more when the device is done with a page. For the same reason all memory and all
//!   interrupts are taken from the device *before* the access ends: a drain waits for the access
//!   to end, so its acknowledgement comes after that, and reaches nobody.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::protocol::{Header, command, message};
use super::vfio_user::Link;
use crate::memory::Indirect;
use crate::sync::lock;

/// How long a client may take for an answer: less than QEMU, which gives up after 5 s on a request
/// that waits for it.
const LIMIT: Duration = Duration::from_secs(2);

/// How memory is reached that came without a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum DmaMessages {
    /// Not at all.
    #[default]
    Off,
    /// By messages as the protocol defines them: the data after a count of 64 bits.
    Standard,
    /// By messages as QEMU (10.1 to 11.1) has them: the data after a count of 32 bits.
    Qemu,
}

impl DmaMessages {
    /// Where in a body the data begins.
    fn data_at(self) -> usize {
        match self {
            DmaMessages::Qemu => 12,
            DmaMessages::Off | DmaMessages::Standard => 16,
        }
    }
}

thread_local! {
    /// This thread carries out requests.
    static SERVES: Cell<bool> = const { Cell::new(false) };
}

/// Says that this thread carries out a client's requests, and so must not ask.
pub(super) fn this_thread_serves() {
    SERVES.set(true);
}

/// A question that waits for its answer.
#[derive(Debug)]
struct Asked {
    command: u16,
    at: u64,
    count: usize,
    /// The data of a read, or the refusal.
    answer: Option<Result<Vec<u8>, Errno>>,
}

#[derive(Debug, Default)]
struct State {
    next: u16,
    asked: BTreeMap<u16, Asked>,
    /// Reads that nobody waits for any more.
    late: BTreeSet<u16>,
    /// The most bytes that the client takes or gives at once; 0 before it has said so.
    most: usize,
    closed: bool,
}

/// The questions to one client.
#[derive(Debug)]
pub(super) struct Questions {
    how: DmaMessages,
    state: Mutex<State>,
    answered: Condvar,
}

/// The client answered what makes no sense.
pub(super) type Nonsense = &'static str;

impl Questions {
    pub(super) fn new(how: DmaMessages) -> Self {
        Self {
            how,
            state: Mutex::default(),
            answered: Condvar::new(),
        }
    }

    /// Whether there are any.
    pub(super) fn on(&self) -> bool {
        self.how != DmaMessages::Off
    }

    /// The client has said how much it takes at once.
    pub(super) fn open(&self, most: u64) {
        lock(&self.state).most = usize::try_from(most).unwrap_or(usize::MAX);
    }

    /// No answer will come any more: whoever waits is told.
    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.answered.notify_all();
    }

    /// Takes a reply.
    pub(super) fn answer(&self, header: &Header, body: &[u8]) -> Result<(), Nonsense> {
        let mut state = lock(&self.state);
        let Some(asked) = state.asked.get_mut(&header.id) else {
            return match state.late.remove(&header.id) {
                true => Ok(()),
                false => Err("the client answered what nobody asked"),
            };
        };
        if asked.command != header.command || asked.answer.is_some() {
            return Err("the client answered another question than it was asked");
        }
        let answer = match header.error() {
            Some(errno) => Err(errno),
            None => {
                let data = self.data(asked, body);
                Ok(data.ok_or("an answer about memory that is not what was asked for")?)
            }
        };
        asked.answer = Some(answer);
        drop(state);
        self.answered.notify_all();
        Ok(())
    }

    /// The data of an answer that fits its question: address, count, and of a read the data. QEMU
    /// leaves room for a count of 64 bits, and puts the data where it ends if it has 32.
    fn data(&self, asked: &Asked, body: &[u8]) -> Option<Vec<u8>> {
        let at = u64::from_le_bytes(*body.first_chunk()?);
        let count = u32::from_le_bytes(*body.get(8..)?.first_chunk()?);
        if at != asked.at || count as usize != asked.count {
            return None;
        }
        if asked.command == command::DMA_WRITE {
            return matches!(body.len(), 12 | 16).then(Vec::new);
        }
        let data = body.get(self.how.data_at()..)?.get(..asked.count)?;
        (body.len() == 16 + asked.count).then(|| data.to_vec())
    }

    /// Puts a question; its number.
    fn put(&self, command: u16, at: u64, count: usize) -> io::Result<u16> {
        let mut state = lock(&self.state);
        if state.closed || state.most == 0 {
            return Err(io::ErrorKind::NotConnected.into());
        }
        if !state.late.is_empty() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // There are as many at once as the device has threads.
        let id = loop {
            let id = state.next;
            state.next = id.wrapping_add(1);
            if !state.asked.contains_key(&id) {
                break id;
            }
        };
        let asked = Asked {
            command,
            at,
            count,
            answer: None,
        };
        state.asked.insert(id, asked);
        Ok(id)
    }

    /// Waits for an answer. `None`: it does not come.
    fn wait(&self, id: u16, until: Instant) -> Option<Result<Vec<u8>, Errno>> {
        let mut state = lock(&self.state);
        loop {
            let asked = state.asked.get_mut(&id)?;
            if let Some(answer) = asked.answer.take() {
                state.asked.remove(&id);
                return Some(answer);
            }
            let left = until.saturating_duration_since(Instant::now());
            if state.closed || left.is_zero() {
                state.asked.remove(&id);
                state.late.insert(id);
                return None;
            }
            state = self
                .answered
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Takes a question back that was not sent.
    fn take_back(&self, id: u16) {
        lock(&self.state).asked.remove(&id);
    }

    fn most(&self) -> usize {
        lock(&self.state).most.max(1)
    }
}

/// The client's memory, by questions.
#[derive(Debug)]
pub(super) struct ClientMemory(pub(super) Arc<Link>);

impl ClientMemory {
    fn ask(
        &self,
        command: u16,
        at: u64,
        count: usize,
        data: &[u8],
        until: Instant,
    ) -> io::Result<Vec<u8>> {
        let link = &self.0;
        if SERVES.get() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let id = link.questions.put(command, at, count)?;
        let mut body = Vec::with_capacity(16 + data.len());
        body.extend(at.to_le_bytes());
        body.extend((count as u64).to_le_bytes());
        body.truncate(link.questions.how.data_at());
        body.extend(data);
        // QEMU takes nothing shorter.
        body.resize(body.len().max(16), 0);
        let write = command == command::DMA_WRITE;
        if let Err(error) = link.connection.send(&message(id, command, &body)) {
            link.questions.take_back(id);
            if write {
                // A part of it may have gone out, though not all that the client would need.
                link.lose(command, at, count);
            }
            return Err(io::Error::other(error));
        }
        match link.questions.wait(id, until) {
            Some(Ok(data)) => Ok(data),
            Some(Err(errno)) => Err(io::Error::from_raw_os_error(errno as i32)),
            None => {
                link.lose(command, at, count);
                Err(io::ErrorKind::TimedOut.into())
            }
        }
    }
}

impl Indirect for ClientMemory {
    fn read(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        let until = Instant::now() + LIMIT;
        let mut at = at;
        for piece in to.chunks_mut(self.0.questions.most()) {
            let data = self.ask(command::DMA_READ, at, piece.len(), &[], until)?;
            piece.copy_from_slice(&data);
            // Within a range that ends below 2^64.
            at = at.wrapping_add(piece.len() as u64);
        }
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        let until = Instant::now() + LIMIT;
        let mut at = at;
        for piece in from.chunks(self.0.questions.most()) {
            self.ask(command::DMA_WRITE, at, piece.len(), piece, until)?;
            at = at.wrapping_add(piece.len() as u64);
        }
        Ok(())
    }
}
