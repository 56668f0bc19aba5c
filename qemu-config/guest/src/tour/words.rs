//! What the pages under fire hold: 8-byte words that say whose they are.
//!
//! A word is 0 (a fresh page) or names the page it belongs to and who wrote it. A page that shows
//! anything else has been given to somebody else, or was written to by an operation that was meant
//! for somebody else.

/// Bits 63:48 of every word.
const MAGIC: u64 = 0xe71b;
const SEQUENCE_BITS: u32 = 30;
/// Largest sequence number of a word.
pub const MAX_SEQUENCE: u64 = (1 << SEQUENCE_BITS) - 1;

/// Who wrote a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// The device, copying from the source.
    Copy = 0,
    /// The device, filling; the sequence number is that of the operation.
    Fill = 1,
    /// The program.
    Program = 2,
}

/// What is wrong with a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// It does not belong to this page.
    Foreign,
    /// It was written before the page was taken back and replaced by a fresh one.
    Stale,
}

/// A word of a page.
pub fn word(page: usize, writer: Writer, sequence: u64) -> u64 {
    MAGIC << 48 | (page as u64) << 32 | (writer as u64) << SEQUENCE_BITS | sequence & MAX_SEQUENCE
}

/// Checks a word found in a page. Fills up to `floor` must not be seen any more.
pub fn check(found: u64, page: usize, floor: u64) -> Result<(), Wrong> {
    if found == 0 {
        return Ok(());
    }
    if found >> 32 != MAGIC << 16 | page as u64 {
        return Err(Wrong::Foreign);
    }
    match found >> SEQUENCE_BITS & 3 {
        0 | 2 => Ok(()),
        1 if found & MAX_SEQUENCE > floor => Ok(()),
        1 => Err(Wrong::Stale),
        _ => Err(Wrong::Foreign),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_right_in_its_own_page_only() {
        for writer in [Writer::Copy, Writer::Fill, Writer::Program] {
            let w = word(1023, writer, 77);
            assert_eq!(check(w, 1023, 76), Ok(()));
            assert_eq!(check(w, 1022, 76), Err(Wrong::Foreign));
            assert_eq!(check(w ^ 1 << 60, 1023, 76), Err(Wrong::Foreign));
        }
        assert_eq!(check(word(5, Writer::Fill, 77), 5, 77), Err(Wrong::Stale));
        assert_eq!(check(word(5, Writer::Program, 77), 5, 77), Ok(()));
        assert_eq!(
            check(word(5, Writer::Fill, 1) | 3 << 30, 5, 0),
            Err(Wrong::Foreign)
        );
        assert_eq!(check(0, 5, 99), Ok(()));
    }
}
