//! A sorted list in chunks that copies share.
//!
//! Accesses look a range up without a lock, in a map that never changes; a change makes a copy.
//! Copying a list of n costs n; here it costs the list of chunks and the one chunk that differs.

use std::sync::Arc;

use super::ranges::Target;

/// What answers at `[start, end)`.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) target: Target,
}

/// Pieces, ordered by their starts, at most `CHUNK` in a chunk and at least one.
#[derive(Clone, Debug, Default)]
pub(super) struct Chunks<const CHUNK: usize> {
    /// The start of a chunk's first piece when the chunk was made, which none of its pieces is
    /// below and no piece of the chunk before reaches; and the chunk.
    chunks: Vec<(u64, Arc<Vec<Piece>>)>,
    len: usize,
}

impl<const CHUNK: usize> Chunks<CHUNK> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The piece with the greatest start that is not above `at`.
    pub(super) fn at_or_before(&self, at: u64) -> Option<&Piece> {
        let chunks = self.chunks.partition_point(|(start, _)| *start <= at);
        // The last of these chunks may have lost the pieces at its start.
        let mut chunks = self.chunks[..chunks].iter().rev().take(2);
        chunks.find_map(|(_, chunk)| {
            let pieces = chunk.partition_point(|piece| piece.start <= at);
            chunk[..pieces].last()
        })
    }

    /// Adds a piece where none begins.
    pub(super) fn insert(&mut self, piece: Piece) {
        self.len += 1;
        let after = self
            .chunks
            .partition_point(|(start, _)| *start <= piece.start);
        let Some((start, chunk)) = self.chunks.get_mut(after.saturating_sub(1)) else {
            self.chunks.push((piece.start, Arc::new(vec![piece])));
            return;
        };
        *start = piece.start.min(*start);
        let chunk = Arc::make_mut(chunk);
        let place = chunk.partition_point(|other| other.start < piece.start);
        chunk.insert(place, piece);
        if chunk.len() > CHUNK {
            // Those who map in order fill chunks.
            let half = if place == CHUNK { CHUNK } else { CHUNK / 2 };
            let rest = chunk.split_off(half);
            let start = rest[0].start;
            self.chunks
                .insert(after.saturating_sub(1) + 1, (start, Arc::new(rest)));
        }
    }

    /// Takes the piece out that begins at `start`.
    pub(super) fn remove(&mut self, start: u64) -> Option<Piece> {
        let after = self.chunks.partition_point(|(first, _)| *first <= start);
        let index = after.checked_sub(1)?;
        let chunk = &mut self.chunks[index].1;
        let place = chunk
            .binary_search_by_key(&start, |piece| piece.start)
            .ok()?;
        let piece = Arc::make_mut(chunk).remove(place);
        self.len -= 1;
        if chunk.is_empty() {
            self.chunks.remove(index);
        }
        Some(piece)
    }
}
