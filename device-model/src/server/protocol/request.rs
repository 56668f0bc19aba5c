//! Requests of the client, out of their bytes. Every length is checked here.

use std::borrow::Cow;

use nix::errno::Errno;
use vfio_bindings::bindings::vfio as v;

use super::{Fields, Header, MAX_DATA, command};

/// Bits of DMA_MAP's flags.
const MAP_READ: u32 = 1 << 0;
const MAP_WRITE: u32 = 1 << 1;
/// Bits of DMA_UNMAP's flags, as VFIO has them.
const UNMAP_DIRTY_BITMAP: u32 = 1 << 0;
const UNMAP_ALL: u32 = 1 << 1;
/// The same as some clients have it (the crate `vfio_user` 0.1).
const UNMAP_ALL_ELSEWHERE: u32 = 1 << 2;

/// Why a request is refused, and the same in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::server) struct RequestError(
    pub(in crate::server) Errno,
    pub(in crate::server) Cow<'static, str>,
);

/// It makes no sense.
pub(in crate::server) const fn invalid(why: &'static str) -> RequestError {
    RequestError(Errno::EINVAL, Cow::Borrowed(why))
}

const SHORT: RequestError = invalid("the message is too short");
const LONG: RequestError = invalid("the message is too long");
const ARGSZ: RequestError = invalid("argsz is too small");

/// What a SET_IRQS message does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) enum IrqAction {
    Mask,
    Unmask,
    Trigger,
}

/// What a SET_IRQS message does it with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) enum IrqData<'a> {
    /// All vectors of the range.
    None,
    /// Those whose byte is not zero.
    Bool(&'a [u8]),
    /// The event fds that came with the message.
    EventFd,
}

/// A SET_IRQS message; the range is not checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) struct SetIrqs<'a> {
    pub(in crate::server) index: u32,
    pub(in crate::server) start: u32,
    pub(in crate::server) count: u32,
    pub(in crate::server) action: IrqAction,
    pub(in crate::server) data: IrqData<'a>,
}

/// One write of a REGION_WRITE_MULTI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) struct WriteOne<'a> {
    pub(in crate::server) region: u32,
    pub(in crate::server) offset: u64,
    /// At most eight bytes.
    pub(in crate::server) data: &'a [u8],
}

impl<'a> WriteOne<'a> {
    /// Bytes of one in a message.
    const SIZE: usize = 24;

    fn parse(bytes: &'a [u8]) -> Result<Self, RequestError> {
        let mut fields = Fields(bytes);
        let (offset, region) = (fields.u64().ok_or(SHORT)?, fields.u32().ok_or(SHORT)?);
        let count = fields.u32().ok_or(SHORT)? as usize;
        let data = fields.rest().get(..count);
        Ok(Self {
            region,
            offset,
            data: data.ok_or(invalid("a write of several has more than 8 bytes"))?,
        })
    }
}

/// A request whose lengths are good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::server) enum Request<'a> {
    Version {
        major: u16,
        minor: u16,
        /// JSON and a zero byte, or nothing.
        data: &'a [u8],
    },
    DmaMap {
        read: bool,
        write: bool,
        offset: u64,
        address: u64,
        size: u64,
    },
    /// Without a range: all.
    DmaUnmap {
        range: Option<(u64, u64)>,
    },
    DeviceInfo,
    RegionInfo {
        index: u32,
    },
    IrqInfo {
        index: u32,
    },
    SetIrqs(SetIrqs<'a>),
    RegionRead {
        region: u32,
        offset: u64,
        count: usize,
    },
    RegionWrite {
        region: u32,
        offset: u64,
        data: &'a [u8],
    },
    RegionWriteMulti(Vec<WriteOne<'a>>),
    Reset,
}

impl<'a> Request<'a> {
    /// Reads the body of a command.
    pub(in crate::server) fn parse(number: u16, body: &'a [u8]) -> Result<Self, RequestError> {
        let mut fields = Fields(body);
        match number {
            command::VERSION => Ok(Request::Version {
                major: fields.u16().ok_or(SHORT)?,
                minor: fields.u16().ok_or(SHORT)?,
                data: fields.rest(),
            }),
            command::DMA_MAP => dma_map(body),
            command::DMA_UNMAP => dma_unmap(body),
            command::DEVICE_GET_INFO => index(body, 16, 16).map(|_| Request::DeviceInfo),
            command::DEVICE_GET_REGION_INFO => {
                index(body, 32, 32).map(|index| Request::RegionInfo { index })
            }
            command::DEVICE_GET_IRQ_INFO => {
                index(body, 16, 16).map(|index| Request::IrqInfo { index })
            }
            command::DEVICE_SET_IRQS => set_irqs(body).map(Request::SetIrqs),
            command::REGION_READ => {
                let (offset, region, count, rest) = access(body)?;
                match rest {
                    [] => Ok(Request::RegionRead {
                        region,
                        offset,
                        count,
                    }),
                    _ => Err(LONG),
                }
            }
            command::REGION_WRITE => {
                let (offset, region, count, data) = access(body)?;
                match data.len().cmp(&count) {
                    std::cmp::Ordering::Less => Err(SHORT),
                    std::cmp::Ordering::Greater => Err(LONG),
                    std::cmp::Ordering::Equal => Ok(Request::RegionWrite {
                        region,
                        offset,
                        data,
                    }),
                }
            }
            command::REGION_WRITE_MULTI => write_multi(body),
            command::DEVICE_RESET => match body {
                [] => Ok(Request::Reset),
                _ => Err(LONG),
            },
            command::DEVICE_GET_REGION_IO_FDS => Err(RequestError(
                Errno::EOPNOTSUPP,
                "no region has file descriptors for its accesses".into(),
            )),
            command::DIRTY_PAGES
            | command::DEVICE_FEATURE
            | command::MIG_DATA_READ
            | command::MIG_DATA_WRITE => Err(RequestError(
                Errno::EOPNOTSUPP,
                "the device cannot be migrated".into(),
            )),
            command::DMA_READ | command::DMA_WRITE => Err(RequestError(
                Errno::EOPNOTSUPP,
                "the command is for the client, not for the server".into(),
            )),
            _ => Err(RequestError(Errno::ENOSYS, "no such command".into())),
        }
    }

    /// Whether file descriptors may come with a command of this number.
    pub(in crate::server) fn takes_fds(number: u16) -> bool {
        matches!(number, command::DMA_MAP | command::DEVICE_SET_IRQS)
    }
}

/// A question about one of several: argsz, flags, index. `len`: the least length of the body, of
/// which a client may send more than there is to say; `reply`: what the reply needs.
fn index(body: &[u8], len: usize, reply: u32) -> Result<u32, RequestError> {
    let mut fields = Fields(body);
    if body.len() < len {
        return Err(SHORT);
    }
    if body.len() > Header::SIZE + 4096 {
        return Err(LONG);
    }
    let (argsz, flags) = (fields.u32().ok_or(SHORT)?, fields.u32().ok_or(SHORT)?);
    if argsz < reply {
        return Err(ARGSZ);
    }
    let index = fields.u32().ok_or(SHORT)?;
    match flags {
        0 => Ok(index),
        _ => Err(invalid("a question has flags")),
    }
}

fn dma_map<'a>(body: &[u8]) -> Result<Request<'a>, RequestError> {
    let mut fields = Fields(body);
    let (argsz, flags) = (fields.u32().ok_or(SHORT)?, fields.u32().ok_or(SHORT)?);
    let [offset, address, size] = [fields.u64(), fields.u64(), fields.u64()];
    let map = Request::DmaMap {
        read: flags & MAP_READ != 0,
        write: flags & MAP_WRITE != 0,
        offset: offset.ok_or(SHORT)?,
        address: address.ok_or(SHORT)?,
        size: size.ok_or(SHORT)?,
    };
    match fields.rest() {
        [] if argsz < 32 => Err(ARGSZ),
        // Other flags say how else the file might be accessed; mapped it can be all the same.
        [] => Ok(map),
        _ => Err(LONG),
    }
}

fn dma_unmap<'a>(body: &[u8]) -> Result<Request<'a>, RequestError> {
    let mut fields = Fields(body);
    let (argsz, flags) = (fields.u32().ok_or(SHORT)?, fields.u32().ok_or(SHORT)?);
    let (address, size) = (fields.u64().ok_or(SHORT)?, fields.u64().ok_or(SHORT)?);
    if flags & UNMAP_DIRTY_BITMAP != 0 {
        return Err(RequestError(
            Errno::EOPNOTSUPP,
            "the device does not track what it has written".into(),
        ));
    }
    if !fields.rest().is_empty() {
        return Err(LONG);
    }
    if argsz < 24 {
        return Err(ARGSZ);
    }
    match (flags, address, size) {
        (0, _, 0) => Err(invalid("a range of no bytes")),
        (0, ..) => Ok(Request::DmaUnmap {
            range: Some((address, size)),
        }),
        (UNMAP_ALL | UNMAP_ALL_ELSEWHERE, 0, 0) => Ok(Request::DmaUnmap { range: None }),
        (UNMAP_ALL | UNMAP_ALL_ELSEWHERE, ..) => Err(invalid("all, and a range as well")),
        _ => Err(invalid("flags of DMA_UNMAP that do not exist")),
    }
}

/// Offset, region, count and what follows, of a read or write of a region.
fn access(body: &[u8]) -> Result<(u64, u32, usize, &[u8]), RequestError> {
    let mut fields = Fields(body);
    let (offset, region) = (fields.u64().ok_or(SHORT)?, fields.u32().ok_or(SHORT)?);
    let count = fields.u32().ok_or(SHORT)? as usize;
    if count > MAX_DATA {
        return Err(RequestError(
            Errno::E2BIG,
            "an access of more bytes than max_data_xfer_size".into(),
        ));
    }
    Ok((offset, region, count, fields.rest()))
}

fn write_multi(body: &[u8]) -> Result<Request<'_>, RequestError> {
    let mut fields = Fields(body);
    let count = fields.u64().ok_or(SHORT)?;
    let writes = fields.rest();
    // The count is looked at only after it was found to be that of the bytes that are there.
    let len = usize::try_from(count)
        .ok()
        .and_then(|count| count.checked_mul(WriteOne::SIZE));
    if len != Some(writes.len()) {
        return Err(invalid("the writes are not as many as the message says"));
    }
    let writes = writes.chunks_exact(WriteOne::SIZE).map(WriteOne::parse);
    writes
        .collect::<Result<_, _>>()
        .map(Request::RegionWriteMulti)
}

fn set_irqs(body: &[u8]) -> Result<SetIrqs<'_>, RequestError> {
    let mut fields = Fields(body);
    let (argsz, flags) = (fields.u32().ok_or(SHORT)?, fields.u32().ok_or(SHORT)?);
    let [index, start, count] = [fields.u32(), fields.u32(), fields.u32()];
    let (index, start, count) = (
        index.ok_or(SHORT)?,
        start.ok_or(SHORT)?,
        count.ok_or(SHORT)?,
    );
    if argsz < 20 {
        return Err(ARGSZ);
    }
    let rest = fields.rest();
    let data = match flags & v::VFIO_IRQ_SET_DATA_TYPE_MASK {
        v::VFIO_IRQ_SET_DATA_NONE => IrqData::None,
        v::VFIO_IRQ_SET_DATA_EVENTFD => IrqData::EventFd,
        v::VFIO_IRQ_SET_DATA_BOOL => {
            let bools = rest.get(..count as usize);
            IrqData::Bool(bools.ok_or(SHORT)?)
        }
        _ => return Err(invalid("not one kind of data for interrupts")),
    };
    let used = match data {
        IrqData::Bool(bools) => bools.len(),
        IrqData::None | IrqData::EventFd => 0,
    };
    if rest.len() > used {
        return Err(LONG);
    }
    let action = match flags & !v::VFIO_IRQ_SET_DATA_TYPE_MASK {
        v::VFIO_IRQ_SET_ACTION_MASK => IrqAction::Mask,
        v::VFIO_IRQ_SET_ACTION_UNMASK => IrqAction::Unmask,
        v::VFIO_IRQ_SET_ACTION_TRIGGER => IrqAction::Trigger,
        _ => return Err(invalid("not one thing to do with interrupts")),
    };
    Ok(SetIrqs {
        index,
        start,
        count,
        action,
        data,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn errno(number: u16, body: &[u8]) -> Option<Errno> {
        Request::parse(number, body).err().map(|e| e.0)
    }

    /// Each command with a body that is good.
    fn good() -> Vec<(u16, Vec<u8>)> {
        vec![
            (1, [words(&[1 << 16]), b"{}\0".to_vec()].concat()),
            (2, words(&[32, 3, 0, 0, 0x1000, 0, 0x1000, 0])),
            (3, words(&[24, 0, 0x1000, 0, 0x1000, 0])),
            (3, words(&[24, 2, 0, 0, 0, 0])),
            (4, words(&[16, 0, 0, 0])),
            (5, words(&[32, 0, 7, 0, 0, 0, 0, 0])),
            (7, words(&[16, 0, 2, 0])),
            (8, words(&[20, 0x21, 2, 0, 4])),
            (8, [words(&[23, 0x22, 2, 0, 3]), vec![1, 0, 1]].concat()),
            (9, words(&[0, 0, 0, 8])),
            (10, words(&[0, 0, 0, 8, 1, 2])),
            (13, vec![]),
            (15, words(&[1, 0, 4, 0, 0, 8, 1, 2])),
        ]
    }

    #[test]
    fn every_byte_less_or_more_is_refused() {
        for (number, body) in good() {
            Request::parse(number, &body).expect("good");
            // VERSION's data and the questions' bodies have no length of their own.
            let least = match number {
                1 => 4,
                _ => body.len(),
            };
            for len in 0..least {
                let errno = errno(number, &body[..len]);
                assert_eq!(errno, Some(Errno::EINVAL), "{number}, {len} bytes");
            }
            if ![1, 4, 5, 7].contains(&number) {
                let longer = [&body[..], &[0]].concat();
                assert_eq!(errno(number, &longer), Some(Errno::EINVAL), "{number}");
            }
        }
    }

    #[test]
    fn numbers_that_make_no_sense_are_refused() {
        let max = u32::MAX;
        for (number, body, expected) in [
            // Counts beyond the limit and beyond the message.
            (9, words(&[0, 0, 0, max]), Errno::E2BIG),
            (9, words(&[0, 0, 0, (1 << 20) + 1]), Errno::E2BIG),
            (10, words(&[0, 0, 0, max, 1]), Errno::E2BIG),
            (15, words(&[max, max]), Errno::EINVAL),
            (15, words(&[0x0aaa_aaab, 0xaaaa_aaaa]), Errno::EINVAL),
            (15, words(&[1, 0, 0, 0, 0, 9, 1, 2]), Errno::EINVAL),
            (15, words(&[2, 0, 0, 0, 0, 8, 1, 2]), Errno::EINVAL),
            (8, words(&[20, 0x22, 2, 0, max]), Errno::EINVAL),
            // argsz.
            (2, words(&[31, 3, 0, 0, 0, 0, 4096, 0]), Errno::EINVAL),
            (3, words(&[23, 0, 0, 0, 4096, 0]), Errno::EINVAL),
            (4, words(&[15, 0, 0, 0]), Errno::EINVAL),
            (5, words(&[31, 0, 7, 0, 0, 0, 0, 0]), Errno::EINVAL),
            (7, words(&[15, 0, 2, 0]), Errno::EINVAL),
            (8, words(&[19, 0x21, 2, 0, 4]), Errno::EINVAL),
            // Flags: none, two, unknown.
            (3, words(&[24, 0, 0, 0, 0, 0]), Errno::EINVAL),
            (3, words(&[24, 2, 0, 0, 4096, 0]), Errno::EINVAL),
            (3, words(&[24, 8, 0, 0, 4096, 0]), Errno::EINVAL),
            (3, words(&[24, 1, 0, 0, 4096, 0]), Errno::EOPNOTSUPP),
            (5, words(&[32, 1, 7, 0, 0, 0, 0, 0]), Errno::EINVAL),
            (8, words(&[20, 0x20, 2, 0, 4]), Errno::EINVAL),
            (8, words(&[20, 0x25, 2, 0, 4]), Errno::EINVAL),
            (8, words(&[20, 0x01, 2, 0, 4]), Errno::EINVAL),
            (8, words(&[20, 0x39, 2, 0, 4]), Errno::EINVAL),
            (8, words(&[20, 0x61, 2, 0, 4]), Errno::EINVAL),
            // Commands that are not for us.
            (0, vec![], Errno::ENOSYS),
            (19, vec![], Errno::ENOSYS),
            (u16::MAX, vec![], Errno::ENOSYS),
            (6, words(&[16, 0, 0, 0]), Errno::EOPNOTSUPP),
            (11, words(&[0, 0, 8, 0]), Errno::EOPNOTSUPP),
            (16, vec![], Errno::EOPNOTSUPP),
        ] {
            assert_eq!(errno(number, &body), Some(expected), "{number}: {body:?}");
        }
    }

    #[test]
    fn writes_of_several_are_told_apart() {
        let body = words(&[2, 0, 0x10, 0, 0, 4, 7, 9, 0x1000, 0, 2, 8, 1, 2]);
        let Ok(Request::RegionWriteMulti(writes)) = Request::parse(15, &body) else {
            panic!("good");
        };
        let seen: Vec<_> = writes.iter().map(|w| (w.region, w.offset)).collect();
        assert_eq!(seen, [(0, 0x10), (2, 0x1000)]);
        assert_eq!(writes[0].data, [7, 0, 0, 0]);
        assert_eq!(writes[1].data, [1, 0, 0, 0, 2, 0, 0, 0]);
        let none = words(&[0, 0]);
        let none = Request::parse(15, &none);
        assert_eq!(none, Ok(Request::RegionWriteMulti(vec![])));
    }
}
