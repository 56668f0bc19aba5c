//! Messages of every kind, and what becomes of them when they are mangled: to a device in this
//! process, without sockets. The checks are in `fuzz_messages`.

mod wire;

use std::time::{Duration, Instant};

use extlb_device::server::fuzz_messages;
use extlb_spec::{BAR_DOORBELLS, BAR_MSIX, BAR_REGS, regs};
use wire::client::*;

/// A session: each message with the byte that says what file descriptors it brings.
fn session() -> Vec<(u8, Vec<u8>)> {
    const MSIX: u32 = 2;
    const EVENTS: u8 = 1 << 4;
    let (regs, bells, msix) = (BAR_REGS.into(), BAR_DOORBELLS.into(), BAR_MSIX.into());
    let set = |register: regs::Register, value: u32| {
        let body = words(&[register.offset as u32, 0, regs, 4, value]);
        (0, message(0, REGION_WRITE, 0, &body))
    };
    let one = |command, body: &[u32]| (0, message(0, command, 0, &words(body)));
    vec![
        one(GET_INFO, &[16, 0, 0, 0]),
        one(REGION_INFO, &[32, 0, 7, 0, 0, 0, 0, 0]),
        one(IRQ_INFO, &[16, 0, MSIX, 0]),
        one(REGION_IO_FDS, &[16, 0, 0, 0]),
        one(DMA_MAP, &[32, 3, 0, 0, 0xa0000, 0, 0x10000, 0]),
        (
            1,
            message(1, DMA_MAP, 0, &words(&[32, 3, 0, 0, 0, 0, 0x10000, 0])),
        ),
        (
            1,
            message(
                1,
                DMA_MAP,
                0,
                &words(&[32, 1, 0x1000, 0, 0x8000, 0, 0x1000, 0]),
            ),
        ),
        (
            EVENTS | 4,
            message(2, SET_IRQS, 0, &words(&[20, 0x24, MSIX, 0, 4])),
        ),
        one(SET_IRQS, &[20, 0x21, MSIX, 0, 4]),
        (
            0,
            message(
                2,
                SET_IRQS,
                0,
                &[words(&[23, 0x0a, MSIX, 1, 3]), vec![1, 0, 1]].concat(),
            ),
        ),
        // Bus mastering, and the device on.
        one(REGION_WRITE, &[4, 0, 7, 2, 6]),
        (
            0,
            message(
                3,
                REGION_WRITE,
                0,
                &[words(&[4, 0, 7, 2]), vec![6, 0]].concat(),
            ),
        ),
        set(regs::CTX_TABLE, 0x1000),
        set(regs::CTX_COUNT, 16),
        set(regs::IQ_BASE, 0x2000),
        set(regs::IQ_LOG2, 4),
        set(regs::PRQ_BASE, 0x3000),
        set(regs::PRQ_LOG2, 4),
        set(regs::SHADOW, 0x4000),
        set(regs::CTRL, 1),
        set(regs::KICK, 1),
        (
            0,
            message(4, REGION_WRITE, NO_REPLY, &words(&[0, 0, bells, 4, 1])),
        ),
        one(
            WRITE_MULTI,
            &[2, 0, 0x1000, 0, bells, 4, 1, 0, 0x2000, 0, bells, 8, 1, 0],
        ),
        one(REGION_READ, &[regs::STATUS.offset as u32, 0, regs, 4]),
        one(REGION_READ, &[0x1000, 0, msix, 8]),
        one(REGION_READ, &[0, 0, 7, 256]),
        one(REGION_READ, &[0, 0, bells, 1 << 20]),
        one(DMA_UNMAP, &[24, 0, 0x8000, 0, 0x1000, 0]),
        one(RESET, &[]),
        one(DMA_UNMAP, &[24, 2, 0, 0, 0, 0]),
        one(99, &[1, 2, 3]),
    ]
}

fn bytes(session: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let bytes = |(with, message): &(u8, Vec<u8>)| [&[*with], &message[..]].concat();
    session.iter().flat_map(bytes).collect()
}

#[test]
fn every_message_of_a_session_is_answered_but_the_posted_one() {
    let session = session();
    // The version as well.
    assert_eq!(fuzz_messages(&bytes(&session)), session.len());
    // A stranger has to say it itself, and first.
    let mut stranger = session.clone();
    stranger[0].0 |= 1 << 7;
    assert_eq!(fuzz_messages(&bytes(&stranger)), 0);
    stranger.insert(0, (1 << 7, message(0, VERSION, 0, &version_body(0, QEMU))));
    assert_eq!(fuzz_messages(&bytes(&stranger)), session.len());
    assert_eq!(fuzz_messages(&[]), 1);
}

/// xorshift64*, seeded: a failure comes back.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// Bytes and words that tend to be borders.
const BORDERS: [u64; 12] = [
    0,
    1,
    15,
    16,
    0x7f,
    0xfff,
    0x1000,
    0x7fff_ffff,
    0xffff_ffff,
    !0xfff,
    u64::MAX - 1,
    u64::MAX,
];

fn mangle(session: &mut Vec<(u8, Vec<u8>)>, random: &mut Random) {
    let at = random.below(session.len());
    let other = session[random.below(session.len())].clone();
    let (with, message) = &mut session[at];
    match random.below(8) {
        0 => *with = random.next() as u8,
        1 => {
            let byte = random.below(message.len());
            message[byte] ^= 1 << random.below(8);
        }
        // A border, as a word of some width somewhere behind the message's size.
        2 | 3 => {
            let border = BORDERS[random.below(BORDERS.len())].to_le_bytes();
            let width = [2, 4, 8][random.below(3)];
            let to = 8 + 2 * random.below(message.len() / 2);
            for (byte, value) in message.iter_mut().skip(to).zip(&border[..width]) {
                *byte = *value;
            }
        }
        // A body of another length, and a size that says so, or not.
        4 | 5 => {
            message.resize(16 + random.below(2 * message.len()), random.next() as u8);
            if random.below(4) > 0 {
                let size = message.len() as u32;
                message[4..8].copy_from_slice(&size.to_le_bytes());
            }
        }
        6 => session[at] = other,
        _ => drop(session.remove(at)),
    }
    if session.is_empty() {
        session.push(other_end());
    }
}

fn other_end() -> (u8, Vec<u8>) {
    (0, message(0, RESET, 0, &[]))
}

#[test]
fn mangled_messages_are_refused_or_done_and_nothing_else() {
    let end = Instant::now() + Duration::from_secs(3);
    let (mut sessions, mut answered) = (0u64, 0);
    // By time, though at least as many as any machine does in moments.
    while Instant::now() < end || sessions < 200 {
        let mut random = Random(0x9e37_79b9 + sessions);
        let mut session = session();
        for _ in 0..1 + random.below(6) {
            mangle(&mut session, &mut random);
        }
        answered += fuzz_messages(&bytes(&session));
        sessions += 1;
    }
    println!("{sessions} sessions, {answered} messages answered");
    assert!(answered as u64 > sessions);
}
