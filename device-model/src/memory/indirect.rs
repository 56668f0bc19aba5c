//! Memory that is not mapped here, and is asked for instead.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Whoever has the memory. Bytes, in no order and without atomicity: a word may be seen half
/// written.
pub(crate) trait Indirect: Debug + Send + Sync {
    /// Reads bytes.
    fn read(&self, at: u64, to: &mut [u8]) -> io::Result<()>;
    /// Writes bytes. When it has returned, whatever it says, none is written any more.
    fn write(&self, at: u64, from: &[u8]) -> io::Result<()>;
}

/// A file that may shrink: by its descriptor an access beyond its end is an error, while a mapping
/// would end this process.
impl Indirect for File {
    fn read(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(to, at)
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        // Beyond the end it would grow the file: that is not memory.
        let end = at.checked_add(from.len() as u64);
        match end.is_some_and(|end| self.metadata().is_ok_and(|meta| end <= meta.len())) {
            true => self.write_all_at(from, at),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}
