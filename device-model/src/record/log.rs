//! The file of a recorded run.
//!
//! ```text
//! "EXLBREC\0"  version u32  length u32  header (JSON, `length` bytes)  CRC32C u32 of all before
//! then blocks: length u32  CRC32C u32  entries (postcard, one after the other, `length` bytes)
//! ```
//!
//! Integers are little-endian. The CRC of a block covers its number (u64, from 0) and then its
//! bytes, so that none can be left out or change places. An entry lies within one block. A run
//! that ended in order ends with [`Entry::End`]; a file that was cut off is good up to its last
//! whole block.
//!
//! A reader holds one block at a time, and believes no length before the bytes are there.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use super::entry::Entry;

/// First bytes of the file.
pub const MAGIC: [u8; 8] = *b"EXLBREC\0";
/// Version of the format.
pub const VERSION: u32 = 1;
const MAX_HEADER: u32 = 1 << 16;
/// A block is written when it has grown to this.
const BLOCK: usize = 1 << 16;
/// No block is longer: a block of [`BLOCK`] bytes less one, and the longest entry.
const MAX_BLOCK: u32 = 8 << 20;

/// What was recorded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Interface version of the device (`VERSION`).
    pub interface: u32,
    /// Its configuration, in TOML.
    pub config: String,
}

/// A file that holds no run, or a damaged one.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// It cannot be read.
    #[error("cannot read the recorded run")]
    Read(#[source] io::Error),
    /// It is something else.
    #[error("this is no recorded run")]
    NotALog,
    /// A version that this program does not know.
    #[error("the recorded run has format {0}, and this program reads format {VERSION}")]
    Format(u32),
    /// The header is cut off, too long, damaged or makes no sense.
    #[error("the header of the recorded run is damaged: {0}")]
    Header(&'static str),
    /// A block that is longer than any, or whose checksum is wrong.
    #[error("block {block} of the recorded run, after entry {entries}, is damaged: {what}")]
    Block {
        /// Its number.
        block: u64,
        /// Entries in the blocks before.
        entries: u64,
        /// How.
        what: &'static str,
    },
    /// An entry that no run has at this place.
    #[error("entry {entry} of the recorded run makes no sense: {what}")]
    Entry {
        /// Its number.
        entry: u64,
        /// Why.
        what: &'static str,
    },
}

fn checksum(number: u64, block: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&number.to_le_bytes()), block)
}

/// Writes a log. A failure is kept, and told at the end: it must not stop the device.
pub(super) struct Writer {
    out: Box<dyn Write + Send>,
    block: Vec<u8>,
    blocks: u64,
    error: Option<io::Error>,
    ended: bool,
}

impl Writer {
    pub(super) fn new(mut out: Box<dyn Write + Send>, header: &Header) -> io::Result<Self> {
        let json = serde_json::to_vec(header).map_err(io::Error::other)?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((json.len() as u32).to_le_bytes());
        bytes.extend(json);
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        out.write_all(&bytes)?;
        Ok(Self {
            out,
            block: Vec::with_capacity(2 * BLOCK),
            blocks: 0,
            error: None,
            ended: false,
        })
    }

    pub(super) fn put(&mut self, entry: &Entry) {
        if self.error.is_some() || self.ended {
            return;
        }
        match postcard::to_extend(entry, std::mem::take(&mut self.block)) {
            Ok(block) => self.block = block,
            Err(error) => self.error = Some(io::Error::other(error)),
        }
        if self.block.len() >= BLOCK {
            self.flush();
        }
    }

    /// Hands everything so far to the file.
    pub(super) fn flush(&mut self) {
        if self.block.is_empty() || self.error.is_some() {
            return;
        }
        let written = self.write_block();
        self.block.clear();
        self.blocks += 1;
        self.error = written.err();
    }

    fn write_block(&mut self) -> io::Result<()> {
        let len = u32::try_from(self.block.len()).ok();
        let len = len.filter(|len| *len <= MAX_BLOCK);
        let len = len.ok_or_else(|| io::Error::other("an access is too long to be recorded"))?;
        self.out.write_all(&len.to_le_bytes())?;
        let checksum = checksum(self.blocks, &self.block);
        self.out.write_all(&checksum.to_le_bytes())?;
        self.out.write_all(&self.block)?;
        self.out.flush()
    }

    /// Ends the log, once; what went wrong, if anything did.
    pub(super) fn finish(&mut self, end: String) -> io::Result<()> {
        self.put(&Entry::End(end));
        self.ended = true;
        self.flush();
        self.error.take().map_or(Ok(()), Err)
    }
}

/// What a reader finds next.
pub(super) enum Next {
    Entry(Entry),
    /// The file ends, without [`Entry::End`].
    Cut,
}

/// Reads a log.
pub(super) struct Reader {
    input: Box<dyn Read + Send>,
    block: Vec<u8>,
    /// Bytes of the block that are decoded.
    at: usize,
    blocks: u64,
    /// Entries read.
    pub(super) entries: u64,
}

impl Reader {
    /// Reads the header.
    pub(super) fn new(mut input: Box<dyn Read + Send>) -> Result<(Self, Header), LogError> {
        let mut first = [0; 16];
        let got = fill(&mut *input, &mut first)?;
        if got < first.len() || first[..8] != MAGIC {
            return Err(LogError::NotALog);
        }
        let version = word(&first, 8);
        if version != VERSION {
            return Err(LogError::Format(version));
        }
        let len = word(&first, 12);
        if len > MAX_HEADER {
            return Err(LogError::Header("it is too long"));
        }
        let mut rest = vec![0; len as usize + 4];
        if fill(&mut *input, &mut rest)? < rest.len() {
            return Err(LogError::Header("the file ends within"));
        }
        let (json, sum) = rest.split_at(len as usize);
        if crc32c::crc32c_append(crc32c::crc32c(&first), json) != word(sum, 0) {
            return Err(LogError::Header("its checksum is wrong"));
        }
        let header =
            serde_json::from_slice(json).map_err(|_| LogError::Header("it is not understood"))?;
        let reader = Self {
            input,
            block: Vec::new(),
            at: 0,
            blocks: 0,
            entries: 0,
        };
        Ok((reader, header))
    }

    pub(super) fn next(&mut self) -> Result<Next, LogError> {
        if self.at == self.block.len() && !self.read_block()? {
            return Ok(Next::Cut);
        }
        let rest = &self.block[self.at..];
        let Ok((entry, left)) = postcard::take_from_bytes(rest) else {
            return Err(LogError::Entry {
                entry: self.entries,
                what: "it is not understood",
            });
        };
        self.at = self.block.len() - left.len();
        self.entries += 1;
        Ok(Next::Entry(entry))
    }

    /// Whether nothing follows; after the end of the run.
    pub(super) fn is_at_end(&mut self) -> Result<bool, LogError> {
        Ok(self.at == self.block.len() && fill(&mut *self.input, &mut [0])? == 0)
    }

    /// Reads the next block; false at the end of the file, be it in the middle of a block.
    fn read_block(&mut self) -> Result<bool, LogError> {
        let mut head = [0; 8];
        if fill(&mut *self.input, &mut head)? < head.len() {
            return Ok(false);
        }
        let (len, sum) = (word(&head, 0), word(&head, 4));
        let damaged = |what| LogError::Block {
            block: self.blocks,
            entries: self.entries,
            what,
        };
        if len == 0 || len > MAX_BLOCK {
            return Err(damaged("no block has this length"));
        }
        self.block.clear();
        self.at = 0;
        // Grows with what is there, whatever the length says.
        let block = (&mut self.input)
            .take(u64::from(len))
            .read_to_end(&mut self.block);
        block.map_err(LogError::Read)?;
        if self.block.len() < len as usize {
            self.block.clear();
            return Ok(false);
        }
        if checksum(self.blocks, &self.block) != sum {
            return Err(damaged("its checksum is wrong"));
        }
        self.blocks += 1;
        Ok(true)
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

/// Reads until the buffer is full or the file ends; how many bytes.
fn fill(input: &mut dyn Read, to: &mut [u8]) -> Result<usize, LogError> {
    let mut got = 0;
    while got < to.len() {
        match input.read(&mut to[got..]) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(LogError::Read(error)),
        }
    }
    Ok(got)
}
