//! Operations: what is asked of the device, and what its answer means.

use std::sync::Arc;

use extlb_spec::Iova;
use extlb_spec::work::{Completion, Descriptor, Opcode, Status, fault};

use crate::error::{Error, Nonsense};

/// A kind of operation, as a type: decides what its result is.
pub trait Operation {
    /// What it finds out.
    type Output;
    /// Reads it from a completion that [`judge`] accepted; `mismatch` if the status said so.
    #[doc(hidden)]
    fn output(completion: &Completion, mismatch: bool) -> Self::Output;
}

macro_rules! operations {
    ($( $(#[doc = $doc:literal])* $name:ident -> $output:ty = $read:expr; )*) => { $(
        $(#[doc = $doc])*
        #[derive(Debug)]
        pub enum $name {}
        impl Operation for $name {
            type Output = $output;
            fn output(completion: &Completion, mismatch: bool) -> $output {
                let read: fn(&Completion, bool) -> $output = $read;
                read(completion, mismatch)
            }
        }
    )* };
}

operations! {
    /// Does nothing.
    Nop -> () = |_, _| ();
    /// Copies.
    Copy -> () = |_, _| ();
    /// Writes a pattern.
    Fill -> () = |_, _| ();
    /// The CRC32C of the source.
    Crc32c -> u32 = |completion, _| completion.result as u32;
    /// The offset of the first difference; `None` if there is none.
    Compare -> Option<u64> = |completion, mismatch| mismatch.then_some(completion.result);
    /// Adds to a word: what was there before.
    FetchAdd -> u64 = |completion, _| completion.result;
    /// Replaces a word: what was there before, which is what was expected if it was replaced.
    CompareSwap -> u64 = |completion, _| completion.result;
    /// How many earlier operations, since the last fence, did not succeed.
    Fence -> u64 = |completion, _| completion.result;
    /// An operation of the program's own making: the completion as it came.
    Raw -> Completion = |completion, _| *completion;
}

/// What the answer is measured against.
#[derive(Clone, Debug)]
pub(crate) enum Expect {
    /// Nothing but a known status.
    Anything,
    /// The answer to this operation.
    Operation {
        opcode: Opcode,
        src: Iova,
        dst: Iova,
        len: u64,
    },
    /// The answer to a copy of so many bytes, by lists; where the lists and their segments are.
    Lists {
        ranges: Arc<[(Iova, u64)]>,
        len: u64,
    },
}

impl Expect {
    pub(crate) fn of(opcode: Opcode, descriptor: &Descriptor) -> Self {
        Expect::Operation {
            opcode,
            src: Iova(descriptor.src),
            dst: Iova(descriptor.dst),
            len: descriptor.len,
        }
    }
}

/// An answer that makes sense.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub completion: Completion,
    /// `Ok(mismatch)`.
    pub verdict: Result<bool, Error>,
}

/// Checks a completion against what was asked. The device is not trusted to make sense; it cannot
/// be checked whether it did to memory what it says.
pub(crate) fn judge(completion: Completion, expect: &Expect) -> Result<Answer, Nonsense> {
    let status = Status::from_raw(completion.status)
        .filter(|status| *status != Status::Pending)
        .ok_or(Nonsense::Status(completion.status))?;
    let verdict = match *expect {
        Expect::Anything => Ok(status == Status::Mismatch),
        Expect::Operation {
            opcode,
            src,
            dst,
            len,
        } => {
            check(&completion, status, opcode, len)?;
            let reads_src = matches!(opcode, Opcode::Copy | Opcode::Crc32c | Opcode::Compare);
            let uses_dst = reads_src && opcode != Opcode::Crc32c
                || matches!(
                    opcode,
                    Opcode::Fill | Opcode::FetchAdd | Opcode::CompareSwap
                );
            let operands = [(reads_src, src), (uses_dst, dst)].into_iter();
            let used = operands.filter(|(used, _)| *used);
            check_fault(&completion, status, used.map(|(_, start)| (start, len)))?;
            verdict(&completion, status)
        }
        Expect::Lists { ref ranges, len } => {
            check(&completion, status, Opcode::Copy, len)?;
            check_fault(&completion, status, ranges.iter().copied())?;
            verdict(&completion, status)
        }
    };
    Ok(Answer {
        completion,
        verdict,
    })
}

fn verdict(completion: &Completion, status: Status) -> Result<bool, Error> {
    match status {
        // A fence that tells of failures has not failed itself.
        Status::Pending | Status::Success | Status::EarlierFailed => Ok(false),
        Status::Mismatch => Ok(true),
        Status::PageFault => Err(Error::Fault {
            addr: Iova(completion.fault_addr),
            write: completion.fault & fault::WRITE != 0,
            bytes: completion.bytes,
        }),
        Status::BusError => Err(Error::Bus {
            addr: Iova(completion.fault_addr),
        }),
        Status::BadDescriptor
        | Status::BadLength
        | Status::BadAddress
        | Status::Misaligned
        | Status::BadSegments
        | Status::NestedBatch => Err(Error::Refused { status }),
    }
}

fn check(
    completion: &Completion,
    status: Status,
    opcode: Opcode,
    len: u64,
) -> Result<(), Nonsense> {
    let bytes = completion.bytes;
    let all_done = status == Status::Success;
    if bytes > len || all_done && bytes != len {
        return Err(Nonsense::Bytes {
            bytes,
            len,
            status: completion.status,
        });
    }
    match status {
        Status::Success if opcode == Opcode::Crc32c && completion.result > u32::MAX.into() => {
            Err(Nonsense::Result(completion.result))
        }
        Status::Success | Status::EarlierFailed if opcode == Opcode::Fence => {
            match (status == Status::Success) == (completion.result == 0) {
                true => Ok(()),
                false => Err(Nonsense::Result(completion.result)),
            }
        }
        // Of operations that are not submitted in this way.
        Status::Misaligned | Status::EarlierFailed | Status::BadSegments | Status::NestedBatch => {
            Err(Nonsense::Status(completion.status))
        }
        Status::Mismatch if opcode != Opcode::Compare => Err(Nonsense::Status(completion.status)),
        Status::Mismatch if completion.result >= len => Err(Nonsense::Result(completion.result)),
        _ => Ok(()),
    }
}

/// A fault must be in one of the ranges that the operation uses.
fn check_fault(
    completion: &Completion,
    status: Status,
    mut ranges: impl Iterator<Item = (Iova, u64)>,
) -> Result<(), Nonsense> {
    let addr = Iova(completion.fault_addr);
    let faulted = matches!(status, Status::PageFault | Status::BusError);
    match !faulted || ranges.any(|(start, len)| within(addr, start, len)) {
        true => Ok(()),
        false => Err(Nonsense::FaultAddress(addr)),
    }
}

/// Whether a fault at `addr` can belong to `[start, start + len)`. A device may name the page of
/// the access instead of its first byte.
fn within(addr: Iova, start: Iova, len: u64) -> bool {
    addr >= start.page() && addr.0.wrapping_sub(start.0.min(addr.0)) < len
}

#[cfg(test)]
mod tests {
    use super::*;

    const COPY: Expect = Expect::Operation {
        opcode: Opcode::Copy,
        src: Iova(0x1800),
        dst: Iova(0x9000),
        len: 4096,
    };

    fn completion(status: Status, bytes: u64, fault_addr: u64, result: u64) -> Completion {
        Completion {
            status: status as u32,
            fault: 0,
            bytes,
            fault_addr,
            result,
        }
    }

    #[test]
    fn sense_is_accepted() {
        for (c, want) in [
            (completion(Status::Success, 4096, 0, 0), Ok(false)),
            (
                completion(Status::PageFault, 2048, 0x2000, 0),
                Err(Error::Fault {
                    addr: Iova(0x2000),
                    write: false,
                    bytes: 2048,
                }),
            ),
            (
                completion(Status::PageFault, 0, 0x1000, 0), // the page of the first byte
                Err(Error::Fault {
                    addr: Iova(0x1000),
                    write: false,
                    bytes: 0,
                }),
            ),
            (
                completion(Status::BusError, 0, 0x9fff, 0),
                Err(Error::Bus { addr: Iova(0x9fff) }),
            ),
            (
                completion(Status::BadLength, 0, 0, 0),
                Err(Error::Refused {
                    status: Status::BadLength,
                }),
            ),
        ] {
            assert_eq!(judge(c, &COPY).unwrap().verdict, want, "{c:?}");
        }
    }

    #[test]
    fn nonsense_is_not() {
        for c in [
            Completion {
                status: 99,
                ..Completion::default()
            },
            Completion::default(),                          // pending
            completion(Status::Success, 4095, 0, 0),        // not all done
            completion(Status::PageFault, 4097, 0x2000, 0), // more than all
            completion(Status::PageFault, 0, 0x2800, 0),    // behind the source
            completion(Status::PageFault, 0, 0xa000, 0),    // behind the destination
            completion(Status::PageFault, 0, 0xfff, 0),     // before both
            completion(Status::PageFault, 0, u64::MAX, 0),
            completion(Status::Mismatch, 0, 0, 0), // of a copy
            completion(Status::EarlierFailed, 0, 0, 1), // of a copy
        ] {
            assert!(judge(c, &COPY).is_err(), "{c:?}");
        }
        let lists = Expect::Lists {
            ranges: [(Iova(0x5000), 64), (Iova(0x9000), 16)].into(),
            len: 80,
        };
        let fault = |addr| judge(completion(Status::PageFault, 0, addr, 0), &lists);
        assert!(fault(0x503f).is_ok() && fault(0x900f).is_ok());
        assert!(fault(0x5040).is_err() && fault(0x9010).is_err());
        let of = |opcode| Expect::Operation {
            opcode,
            src: Iova(0),
            dst: Iova(0),
            len: 8,
        };
        assert!(judge(completion(Status::Mismatch, 0, 0, 8), &of(Opcode::Compare)).is_err());
        assert!(judge(completion(Status::Mismatch, 0, 0, 7), &of(Opcode::Compare)).is_ok());
        let fence = |status, result| {
            let expect = Expect::Operation {
                opcode: Opcode::Fence,
                src: Iova(0),
                dst: Iova(0),
                len: 0,
            };
            judge(completion(status, 0, 0, result), &expect).map(|answer| answer.verdict)
        };
        assert_eq!(fence(Status::EarlierFailed, 3).unwrap(), Ok(false));
        assert!(fence(Status::EarlierFailed, 0).is_err());
        assert!(fence(Status::Success, 1).is_err());
        assert!(
            judge(
                completion(Status::Success, 8, 0, 1 << 32),
                &of(Opcode::Crc32c)
            )
            .is_err()
        );
    }
}
