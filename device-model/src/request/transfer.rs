//! Transfer: one chunk of an operation, at most a page on each side.

use extlb_spec::work::{Opcode, Status};
use extlb_spec::{Iova, PAGE_SIZE};

use super::translate::{Page, pages, rest_of_page};
use super::{Access, Halt, Operation};
use crate::Device;

const CHUNK: usize = PAGE_SIZE as usize;

impl Device {
    /// Moves the next chunk, or ends the operation if there is none.
    pub(super) fn transfer(&self, access: &Access<'_>, op: &mut Operation) -> Result<(), Halt> {
        let left = op.descriptor.len - op.done;
        if op.opcode == Opcode::Nop || left == 0 {
            let result = match op.opcode {
                Opcode::Crc32c => u64::from(op.crc),
                _ => 0,
            };
            op.end(Status::Success, result);
            return Ok(());
        }
        // Neither overflows: fetch checked that both ranges lie in the address space.
        let src = Iova(op.descriptor.src.wrapping_add(op.done));
        let dst = Iova(op.descriptor.dst.wrapping_add(op.done));
        let both = left.min(rest_of_page(src)).min(rest_of_page(dst)) as usize;
        let len = match op.opcode {
            Opcode::Nop => 0,
            Opcode::Copy => {
                let (from, to) = pair(access, (src, false), (dst, true), left)?;
                from.copy_to(&to, both)?;
                both
            }
            Opcode::Fill => {
                let len = left.min(rest_of_page(dst)) as usize;
                let page = access.page(dst, true, pages(dst, left))?;
                page.write(&pattern(op.descriptor.arg, op.done)[..len])?;
                len
            }
            Opcode::Crc32c => {
                let len = left.min(rest_of_page(src)) as usize;
                let mut bytes = [0; CHUNK];
                let page = access.page(src, false, pages(src, left))?;
                page.read(&mut bytes[..len])?;
                op.crc = crc32c::crc32c_append(op.crc, &bytes[..len]);
                len
            }
            Opcode::Compare => {
                let (a, b) = pair(access, (src, false), (dst, false), left)?;
                let (mut left, mut right) = ([0; CHUNK], [0; CHUNK]);
                a.read(&mut left[..both])?;
                b.read(&mut right[..both])?;
                if let Some(at) = (0..both).find(|i| left[*i] != right[*i]) {
                    op.done += at as u64;
                    self.counters.bytes.add(at as u64);
                    op.end(Status::Mismatch, op.done);
                    return Ok(());
                }
                both
            }
        };
        op.done += len as u64;
        self.counters.bytes.add(len as u64);
        Ok(())
    }
}

/// Translates both operands; if both miss, both are asked for at once.
fn pair<'a>(
    access: &'a Access<'_>,
    (a, a_write): (Iova, bool),
    (b, b_write): (Iova, bool),
    left: u64,
) -> Result<(Page<'a>, Page<'a>), Halt> {
    match (
        access.page(a, a_write, pages(a, left)),
        access.page(b, b_write, pages(b, left)),
    ) {
        (Ok(a), Ok(b)) => Ok((a, b)),
        (Err(Halt::Missing(mut misses)), Err(Halt::Missing(more))) => {
            // Once, if it is the same page: the stronger request covers both.
            match (a.page() == b.page(), b_write) {
                (true, true) => misses = more,
                (true, false) => {}
                (false, _) => misses.extend(more),
            }
            Err(Halt::Missing(misses))
        }
        // A broken operand ends the operation, whatever the other one lacks.
        (Err(Halt::Missing(_)), Err(halt)) | (Err(halt), _) | (_, Err(halt)) => Err(halt),
    }
}

/// A page of the pattern, as it continues `done` bytes after its start.
fn pattern(arg: u64, done: u64) -> [u8; CHUNK] {
    let bits = (done % 8) as u32 * 8;
    // Bytes are little-endian: the byte at `done % 8` comes first.
    let word = arg.rotate_right(bits).to_le_bytes();
    let mut bytes = [0; CHUNK];
    for part in bytes.chunks_exact_mut(8) {
        part.copy_from_slice(&word);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pattern_goes_on_where_it_stopped() {
        let whole = pattern(0x0807_0605_0403_0201, 0);
        assert_eq!(whole[..9], [1, 2, 3, 4, 5, 6, 7, 8, 1]);
        let later = pattern(0x0807_0605_0403_0201, 4099);
        assert_eq!(later[..6], [4, 5, 6, 7, 8, 1]);
    }

    #[test]
    fn pages_count_the_first_and_the_last_partly_used_one() {
        assert_eq!(pages(Iova(0xfff), 1), 1);
        assert_eq!(pages(Iova(0xfff), 2), 2);
        assert_eq!(pages(Iova(0x1000), 0x2000), 2);
    }
}
