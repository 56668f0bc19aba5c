//! Frames of guest RAM: which are free.

use extlb_spec::{Gpa, PAGE_SIZE};

use crate::error::{Error, Result};

/// Hands out frames in an order that is not that of their addresses, so that neighbours in an
/// address space are rarely neighbours in RAM. Repeatable: the order depends on the seed only.
#[derive(Debug)]
pub(super) struct Frames {
    free: Vec<Gpa>,
    random: u64,
}

impl Frames {
    pub(super) fn new(base: Gpa, len: u64, seed: u64) -> Self {
        let free = (0..len / PAGE_SIZE)
            .map(|n| Gpa(base.0 + n * PAGE_SIZE))
            .collect();
        Self {
            free,
            random: seed | 1,
        }
    }

    pub(super) fn take(&mut self) -> Result<Gpa> {
        if self.free.is_empty() {
            return Err(Error::Call {
                call: "allocate",
                errno: nix::errno::Errno::ENOMEM,
            });
        }
        // xorshift64
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let n = (self.random % self.free.len() as u64) as usize;
        Ok(self.free.swap_remove(n))
    }

    /// A run of adjacent frames, for rings. Only found while few frames were taken.
    pub(super) fn take_run(&mut self, frames: u64) -> Result<Gpa> {
        self.free.sort_unstable();
        let adjacent = |run: &[Gpa]| run.windows(2).all(|w| w[1].0 - w[0].0 == PAGE_SIZE);
        let run = self.free.windows(frames as usize).position(adjacent);
        let at = run.ok_or(Error::Argument("RAM is too small or too fragmented"))?;
        Ok(self
            .free
            .drain(at..at + frames as usize)
            .next()
            .expect("not empty"))
    }

    pub(super) fn give_back(&mut self, frame: Gpa) {
        debug_assert!(!self.free.contains(&frame), "{frame} is free twice");
        self.free.push(frame);
    }

    pub(super) fn free(&self) -> usize {
        self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_is_handed_out_once() {
        let mut frames = Frames::new(Gpa(0x10_0000), 16 * PAGE_SIZE, 7);
        let run = frames.take_run(4).unwrap();
        let mut all: Vec<_> = (0..4).map(|n| Gpa(run.0 + n * PAGE_SIZE)).collect();
        while let Ok(frame) = frames.take() {
            all.push(frame);
        }
        all.sort_unstable();
        let want: Vec<_> = (0..16).map(|n| Gpa(0x10_0000 + n * PAGE_SIZE)).collect();
        assert_eq!(all, want);
    }
}
