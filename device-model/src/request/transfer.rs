//! Transfer: the next piece of an operation.

use extlb_spec::work::{Opcode, Segment, Status, flags};
use extlb_spec::{Iova, PAGE_SIZE};

use super::operation::{Cursor, Operation};
use super::translate::{Page, pages, rest_of_page};
use super::{Access, Halt, STEP};

const CHUNK: usize = PAGE_SIZE as usize;
/// Pieces of a copy that are translated before the first is copied, after that one.
const TOGETHER: usize = 15;
/// For so many bytes no whole page is cleared first to read them into.
const SMALL: usize = 256;

/// How far the lists of an operation got.
enum Lists {
    /// Each operand has bytes, unless the operation is done.
    Ready,
    /// A segment of no bytes was read, which is enough for a step.
    Skipping,
    /// One does not fit the operation, which has ended.
    Bad,
}

/// Moves the next piece, at most `limit` bytes, or ends the operation if there is none. What it
/// cost: the bytes that it moved, and the segments that it read. `failed`: operations since the
/// last fence that did not succeed.
pub(super) fn transfer(
    access: &Access<'_>,
    op: &mut Operation,
    failed: u64,
    limit: u64,
) -> Result<u64, Halt> {
    let (before, segments) = (op.done, op.src.segments + op.dst.segments);
    let result = match op.opcode {
        Opcode::Nop | Opcode::Batch => {
            op.end(Status::Success, 0);
            Ok(())
        }
        Opcode::Fence => {
            let status = match failed {
                0 => Status::Success,
                _ => Status::EarlierFailed,
            };
            op.end(status, failed);
            Ok(())
        }
        Opcode::FetchAdd | Opcode::CompareSwap => atomic(access, op),
        _ => move_piece(access, op, limit),
    };
    let moved = op.done - before;
    access.moved(moved);
    let read = segments - (op.src.segments + op.dst.segments);
    result.map(|()| moved + STEP * u64::from(read))
}

/// Changes a word. Once only: it ends the operation in the same step, and what is left is to write
/// the record, which may wait for a page request as long as it likes.
fn atomic(access: &Access<'_>, op: &mut Operation) -> Result<(), Halt> {
    let Operation { descriptor, .. } = op;
    let page = access.page(Iova(descriptor.dst), true, 1)?;
    let found = match op.opcode {
        Opcode::FetchAdd => page.fetch_add_u64(descriptor.arg)?,
        _ => page.compare_exchange_u64(descriptor.arg, descriptor.src)?,
    };
    op.done = descriptor.len;
    op.end(Status::Success, found);
    Ok(())
}

/// The next piece of an operation on ranges of memory. What is done is noted also if the rest of
/// the piece fails.
fn move_piece(access: &Access<'_>, op: &mut Operation, limit: u64) -> Result<(), Halt> {
    match lists(access, op)? {
        Lists::Ready => {}
        Lists::Skipping | Lists::Bad => return Ok(()),
    }
    let left = op.left();
    if left == 0 {
        let result = match op.opcode {
            Opcode::Crc32c => u64::from(op.crc),
            _ => 0,
        };
        op.end(Status::Success, result);
        return Ok(());
    }
    // At most so much of the range, or of the segments, that the operation is in.
    let of = |cursor: &Cursor| cursor.left.min(limit);
    match op.opcode {
        Opcode::Copy if op.down => copy_down(access, op),
        Opcode::Copy => copy_up(access, op, limit),
        Opcode::Fill => {
            let (_, dst) = op.piece(0);
            let to = access.page(dst, true, pages(dst, op.dst.left))?;
            let len = of(&op.dst).min(to.rest());
            let (arg, done) = (op.descriptor.arg, op.done);
            by_pages(op, (dst, dst), len, |_, offset, len| {
                let mut bytes = [0; CHUNK];
                let bytes = &mut bytes[..len];
                pattern(arg, done + offset, bytes);
                to.within(offset).write(bytes)
            })
        }
        Opcode::Crc32c => {
            let (src, _) = op.piece(0);
            let from = access.page(src, false, pages(src, op.src.left))?;
            let len = of(&op.src).min(from.rest());
            let (mut small, mut large);
            let bytes: &mut [u8] = if len <= SMALL as u64 {
                small = [0; SMALL];
                &mut small
            } else {
                large = [0; CHUNK];
                &mut large
            };
            by_pages(op, (src, src), len, |op, offset, len| {
                from.within(offset).read(&mut bytes[..len])?;
                op.crc = crc32c::crc32c_append(op.crc, &bytes[..len]);
                Ok(())
            })
        }
        _ => {
            let (src, dst) = op.piece(0);
            let (a, b) = pair(access, (src, op.src.left, false), (dst, op.dst.left, false))?;
            let len = of(&op.src).min(of(&op.dst)).min(a.rest()).min(b.rest());
            by_pages(op, (src, dst), len, |op, offset, len| {
                let (mut left, mut right) = ([0; CHUNK], [0; CHUNK]);
                let (left, right) = (&mut left[..len], &mut right[..len]);
                a.within(offset).read(left)?;
                b.within(offset).read(right)?;
                if left != right {
                    let same = left.iter().zip(&*right).take_while(|(a, b)| a == b);
                    op.done += same.count() as u64;
                    op.end(Status::Mismatch, op.done);
                }
                Ok(())
            })
        }
    }
}

/// Copies from where it is on.
fn copy_up(access: &Access<'_>, op: &mut Operation, limit: u64) -> Result<(), Halt> {
    let (src, dst) = op.piece(0);
    let (src_left, dst_left) = (op.src.left, op.dst.left);
    let len = limit.min(src_left).min(dst_left);
    let (from, to) = pair(access, (src, src_left, false), (dst, dst_left, true))?;
    let first = len.min(from.rest()).min(to.rest());
    if first == len {
        return copy_piece(op, &from, &to, len);
    }
    // Several pages are translated before the first is copied: a walk ends with an atomic
    // instruction, which would wait for every byte of the copy before it to leave the processor.
    let mut pieces = [const { None }; TOGETHER];
    let mut ahead = first;
    let mut halt = Ok(());
    for piece in &mut pieces {
        let from = (Iova(src.0 + ahead), src_left - ahead, false);
        match pair(access, from, (Iova(dst.0 + ahead), dst_left - ahead, true)) {
            Ok((from, to)) => {
                let len = (len - ahead).min(from.rest()).min(to.rest());
                *piece = Some((from, to, len));
                ahead += len;
            }
            // Its turn comes when all before it is copied.
            Err(later) => {
                halt = Err(later);
                break;
            }
        }
        if ahead == len || access.is_awaited() {
            break;
        }
    }
    copy_piece(op, &from, &to, first)?;
    for (from, to, len) in pieces.iter().flatten() {
        // A drain waits for what was translated, so for as little of it as can be.
        if access.is_awaited() || access.still().is_err() {
            return Ok(());
        }
        copy_piece(op, from, to, *len)?;
    }
    halt
}

/// Copies what one leaf maps to what another one does.
fn copy_piece(op: &mut Operation, from: &Page<'_>, to: &Page<'_>, len: u64) -> Result<(), Halt> {
    // RAM may be in several ranges, of which one leaf covers more than one: the page at which
    // nothing answers is to be found.
    if from.try_copy_to(to, len as usize) {
        op.advance(len);
        return Ok(());
    }
    let at = op.piece(0);
    by_pages(op, at, len, |_, offset, len| {
        from.within(offset).copy_to(&to.within(offset), len)
    })
}

/// The last page of what is left: nothing below it has been written yet.
fn copy_down(access: &Access<'_>, op: &mut Operation) -> Result<(), Halt> {
    let into_page = |last: Iova| last.page_offset() + 1;
    let (src, dst) = op.piece(1);
    let len = op.left().min(into_page(src)).min(into_page(dst));
    let (src, dst) = op.piece(len);
    let (from, to) = pair(access, (src, len, false), (dst, len, true))?;
    from.copy_to(&to, len as usize)?;
    op.advance(len);
    Ok(())
}

/// Does `len` bytes page by page, of both operands, until one ends the operation.
fn by_pages(
    op: &mut Operation,
    (src, dst): (Iova, Iova),
    len: u64,
    mut f: impl FnMut(&mut Operation, u64, usize) -> Result<(), Halt>,
) -> Result<(), Halt> {
    let mut offset = 0;
    while offset < len {
        let rest = |start: Iova| rest_of_page(Iova(start.0 + offset));
        let piece = (len - offset).min(rest(src)).min(rest(dst));
        f(op, offset, piece as usize)?;
        if op.outcome.is_some() {
            break;
        }
        op.advance(piece);
        offset += piece;
    }
    Ok(())
}

/// Reads the next segment of an operand that has no bytes left.
fn lists(access: &Access<'_>, op: &mut Operation) -> Result<Lists, Halt> {
    let left = op.left();
    for flag in [flags::SRC_LIST, flags::DST_LIST] {
        if op.descriptor.flags & flag == 0 {
            continue;
        }
        let cursor = match flag {
            flags::SRC_LIST => &mut op.src,
            _ => &mut op.dst,
        };
        if cursor.left == 0 && cursor.segments > 0 {
            // The list is aligned to a segment, so none crosses a page; the check of the
            // descriptor found the whole list in the address space.
            let at = Iova(cursor.next);
            let mut bytes = [0; Segment::SIZE];
            let size = bytes.len() as u64;
            let more = pages(at, size * u64::from(cursor.segments));
            access.page(at, false, more)?.read(&mut bytes)?;
            let segment = Segment::from_bytes(&bytes);
            if segment.len > left {
                op.end_at(Status::BadSegments, at, false);
                return Ok(Lists::Bad);
            }
            if !Iova(segment.addr).range_is_valid(segment.len) {
                op.end_at(Status::BadAddress, Iova(segment.addr), false);
                return Ok(Lists::Bad);
            }
            cursor.at = segment.addr;
            cursor.left = segment.len;
            cursor.next += size;
            cursor.segments -= 1;
            if segment.len == 0 {
                return Ok(Lists::Skipping);
            }
        }
        if cursor.left == 0 && left > 0 {
            let end = Iova(cursor.next);
            op.end_at(Status::BadSegments, end, false);
            return Ok(Lists::Bad);
        }
    }
    Ok(Lists::Ready)
}

/// Translates both operands; if both miss, both are asked for at once.
fn pair<'a>(
    access: &'a Access<'_>,
    (a, a_left, a_write): (Iova, u64, bool),
    (b, b_left, b_write): (Iova, u64, bool),
) -> Result<(Page<'a>, Page<'a>), Halt> {
    match (
        access.page(a, a_write, pages(a, a_left)),
        access.page(b, b_write, pages(b, b_left)),
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

/// The pattern, as it continues `done` bytes after its start.
fn pattern(arg: u64, done: u64, bytes: &mut [u8]) {
    let bits = (done % 8) as u32 * 8;
    // Bytes are little-endian: the byte at `done % 8` comes first.
    let word = arg.rotate_right(bits).to_le_bytes();
    for part in bytes.chunks_mut(8) {
        part.copy_from_slice(&word[..part.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pattern_goes_on_where_it_stopped() {
        let at = |done| {
            let mut bytes = [0; 9];
            pattern(0x0807_0605_0403_0201, done, &mut bytes);
            bytes
        };
        assert_eq!(at(0), [1, 2, 3, 4, 5, 6, 7, 8, 1]);
        assert_eq!(at(4099), [4, 5, 6, 7, 8, 1, 2, 3, 4]);
    }

    #[test]
    fn pages_count_the_first_and_the_last_partly_used_one() {
        assert_eq!(pages(Iova(0xfff), 1), 1);
        assert_eq!(pages(Iova(0xfff), 2), 2);
        assert_eq!(pages(Iova(0x1000), 0x2000), 2);
    }
}
