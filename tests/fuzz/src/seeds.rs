//! Inputs to begin with: one for each thing that a target can do. The corpus in the tree is these,
//! and what fuzzing found beside them.

use extlb_spec::invalidation::{Command, CommandKind, InvalidationScope, wait};
use extlb_spec::pte::bit;
use extlb_spec::work::{Descriptor, Opcode, flags};
use extlb_spec::{BAR_DOORBELLS, BAR_MSIX, BAR_REGS, regs};

/// Maps a page of the window to a frame.
fn map(place: u8, frame: u8, write: bool) -> Vec<u8> {
    vec![7, place - 2, 0x40 | frame << 1 | u8::from(write)]
}

/// A descriptor of few bytes; operands are offsets in the window.
fn compact(opcode: Opcode, len: u16, src: u16, dst: u16) -> Vec<u8> {
    let (s, d, l) = (src.to_le_bytes(), dst.to_le_bytes(), len.to_le_bytes());
    let flags = 1;
    vec![
        0,
        l[0],
        l[1],
        opcode as u8,
        flags,
        0,
        s[0],
        s[1],
        0,
        d[0],
        d[1],
        0x5a,
    ]
}

/// Steps of the engine.
const STEP: [u8; 2] = [15, 31];
/// The kernel maps what was asked for; says no; fails.
const YES: [u8; 2] = [11, 0x00];
const NO: [u8; 2] = [11, 0x60];
const FAIL: [u8; 2] = [11, 0x70];

fn other(mut action: Vec<u8>) -> Vec<u8> {
    action[0] |= 0x80;
    action
}

/// Scripts.
pub fn descriptors() -> Vec<Vec<u8>> {
    let pages = [map(4, 0, true), map(5, 1, true), map(6, 2, false)].concat();
    let copy = compact(Opcode::Copy, 0x0410, 0x4f00, 0x5800);
    let mut seeds = Vec::new();
    let ask = [STEP, YES, YES, STEP, NO].concat();
    for (opcode, len) in [
        (Opcode::Nop, 0),
        (Opcode::Copy, 0x0420),
        (Opcode::Fill, 0x0420),
        (Opcode::Crc32c, 0x0420),
        (Opcode::Compare, 0x0420),
        (Opcode::FetchAdd, 8),
        (Opcode::CompareSwap, 8),
        (Opcode::Fence, 0),
        (Opcode::Batch, 4),
    ] {
        let op = compact(opcode, len, 0x4000, 0x5020);
        seeds.push([pages.clone(), op.clone(), STEP.into()].concat());
        // Nothing is mapped: asked for, and given, or not.
        seeds.push([op, ask.clone()].concat());
    }
    // A batch of three, of which one faults, and a fence; lists on both sides.
    let mut batch = vec![22, 0x10, 4];
    for (opcode, len, src) in [
        (Opcode::Copy, 0x0410, 0x4200),
        (Opcode::Copy, 0x0410, 0x9000),
        (Opcode::Fence, 0, 0),
        (Opcode::Fill, 0x20, 0),
    ] {
        batch.extend_from_slice(&compact(opcode, len, src, 0x5080)[1..]);
    }
    let run = compact(Opcode::Batch, 4, 0x4000, 0);
    seeds.push(
        [
            pages.clone(),
            batch,
            run,
            STEP.into(),
            NO.into(),
            STEP.into(),
        ]
        .concat(),
    );
    let segments = [0x40u8, 0x44, 0x50]
        .map(|page| vec![0, 8, page, 0x20])
        .concat();
    let list = [vec![22, 0x00, 3], segments].concat();
    for flags in [
        flags::SRC_LIST,
        flags::SRC_LIST | flags::DST_LIST,
        flags::QUIET,
    ] {
        let mut copy = compact(Opcode::Copy, 0x60, 0x4000, 0x4000);
        (copy[4], copy[11]) = (flags, 3);
        seeds.push([pages.clone(), list.clone(), copy, STEP.into(), NO.into()].concat());
    }
    // Overlapping, from above and from below.
    for (src, dst) in [(0x4000, 0x4010), (0x4010, 0x4000)] {
        let op = compact(Opcode::Copy, 0x05ff, src, dst);
        seeds.push([pages.clone(), op, STEP.into(), NO.into(), STEP.into()].concat());
    }
    // Both contexts, and pages taken back in the middle.
    let both = [
        pages.clone(),
        other(map(4, 0, true)),
        copy.clone(),
        other(copy.clone()),
    ]
    .concat();
    let back = vec![7, 2, 0x00, 15, 3, 7, 3, 0x43];
    seeds.push([both.clone(), vec![15, 2], back.clone(), STEP.into(), back].concat());
    // Used, taken back, given to another address, and used again.
    let used = [
        map(4, 3, true),
        copy.clone(),
        map(5, 4, true),
        copy.clone(),
        STEP.into(),
    ]
    .concat();
    let moved = [vec![7, 2, 0x00, 7, 3, 0x00], map(6, 4, true)].concat();
    seeds.push([used, moved, copy.clone(), STEP.into()].concat());
    // Failure, a repeated answer, a stop and a start, a reset, bus mastering.
    seeds.push(
        [
            copy.clone(),
            STEP.into(),
            FAIL.into(),
            STEP.into(),
            vec![25, 7],
        ]
        .concat(),
    );
    seeds.push(
        [
            copy.clone(),
            STEP.into(),
            YES.into(),
            vec![11, 0x80],
            vec![26],
        ]
        .concat(),
    );
    seeds.push([both.clone(), vec![15, 2, 29, 0x55], copy.clone()].concat());
    seeds.push([both.clone(), vec![15, 2, 27, 0], copy.clone(), STEP.into()].concat());
    // Tails, shadow pages and heads that make no sense.
    seeds.push([copy.clone(), vec![23, 0xff, 0xff, 0, 0], STEP.into()].concat());
    seeds.push([copy.clone(), vec![23, 9, 0, 0, 0], STEP.into()].concat());
    seeds.push([vec![24, 16, 0xff, 0xff, 0xff, 0xff], copy.clone(), vec![28]].concat());
    // Large leaves, broken leaves, long operations.
    let large = vec![7, 14, 0x41, 7, 15, 0x41];
    let over = vec![0, 0xff, 12, Opcode::Copy as u8, 0, 4, 0, 0x10, 5, 0, 0, 0];
    seeds.push([large, over, STEP.into()].concat());
    seeds.push([vec![7, 2, 0xe1, 7, 3, 0xe9], copy, STEP.into()].concat());
    let whole = Descriptor {
        opcode: Opcode::Fill as u8,
        dst: 0x7f40_0000_2000,
        len: 1 << 31,
        completion: 0x7f40_0000_1fe0,
        ..Default::default()
    };
    seeds.push([vec![6], whole.to_bytes().into(), STEP.into(), YES.into()].concat());
    seeds
}

/// An entry of a table that points into the same memory.
fn entry(page: u16, index: u16, to: u16, bits: u64) -> Vec<u8> {
    let slot = 2 << 12 | page << 9 | index;
    let value = to << 12 | bits as u16;
    [slot.to_le_bytes(), value.to_le_bytes()].concat()
}

/// An entry of any value.
fn raw(page: u16, index: u16, value: u64) -> Vec<u8> {
    let slot = page << 9 | index;
    [&slot.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

fn tables(entries: &[Vec<u8>], accesses: &[Vec<u8>]) -> Vec<u8> {
    [
        vec![entries.len() as u8],
        entries.concat(),
        accesses.concat(),
    ]
    .concat()
}

/// Reads, or writes, the byte at an offset of the page with these indices.
fn access(write: bool, indices: [u8; 4], offset: u8) -> Vec<u8> {
    let [a, b, c, d] = indices;
    vec![0x70 | u8::from(write), a, b, c, d, offset]
}

/// Tables and addresses.
pub fn page_tables() -> Vec<Vec<u8>> {
    const P: u64 = bit::PRESENT;
    const W: u64 = bit::PRESENT | bit::WRITE;
    let way = [entry(0, 1, 1, P), entry(1, 2, 2, P), entry(2, 3, 3, P)];
    let to = |leaf: Vec<u8>| [&way[..], &[leaf]].concat();
    let reads = [
        access(false, [1, 2, 3, 4], 5),
        access(true, [1, 2, 3, 4], 9),
    ];
    let mut seeds = vec![
        tables(&to(entry(3, 4, 5, W)), &reads),
        tables(&to(entry(3, 4, 5, P)), &reads),
        tables(&to(entry(3, 4, 5, W | bit::ACCESSED | bit::DIRTY)), &reads),
        tables(&to(raw(3, 4, 1 << 62 | 0x5000 | W)), &reads),
        tables(&to(raw(3, 4, 1 << 45 | W)), &reads),
        tables(&to(raw(3, 4, 0xe00 | 0x5000 | W)), &reads),
        tables(&way, &reads),
        // A root that points at itself, by one entry and by several.
        tables(&[entry(0, 1, 0, W)], &[access(false, [1, 1, 1, 1], 0)]),
        tables(&[entry(0, 1, 0, W)], &[access(true, [1, 1, 1, 1], 64)]),
        tables(
            &[entry(0, 1, 0, P), entry(0, 2, 4, W)],
            &[access(true, [1, 1, 1, 2], 64)],
        ),
    ];
    for (level, page, index) in [(2, 2, 3), (3, 1, 2), (4, 0, 1)] {
        for address in [2u64 << 20, 1 << 30, 0x1000] {
            let mut entries = way[..4 - level].to_vec();
            entries.push(raw(page, index, address | W | bit::LEAF));
            seeds.push(tables(&entries, &reads));
        }
    }
    seeds.push(tables(
        &way,
        &[vec![8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]],
    ));
    seeds
}

/// A command in full.
fn command(command: Command) -> Vec<u8> {
    [vec![7, 0x80], command.to_bytes().into()].concat()
}

/// Queues.
pub fn commands() -> Vec<Vec<u8>> {
    let of = |kind: CommandKind| Command {
        kind: kind as u32,
        ..Default::default()
    };
    let waits = [0, wait::WRITE, wait::ALL, wait::WRITE | wait::DRAINED];
    let wait = |flags: u32| Command {
        flags,
        addr: 0x5000,
        value: 7,
        ..of(CommandKind::Wait)
    };
    let range = Command {
        context: 1,
        addr: 0x7000_0000,
        value: 0x3000,
        ..of(CommandKind::Invalidate)
    };
    let with_flags = |flags: u32| Command {
        flags,
        context: 1,
        ..of(CommandKind::Invalidate)
    };
    let sync = Command {
        context: 1,
        ..of(CommandKind::ContextSync)
    };
    let audit = Command {
        context: 1,
        addr: 0x6000,
        ..of(CommandKind::Audit)
    };
    let response = Command {
        context: 1,
        group: 3,
        ..of(CommandKind::PageResponse)
    };
    let ack = command(wait(wait::WRITE | wait::DRAINED));
    let entry = [vec![0, 0x41], vec![0; 64]].concat();
    let engine = vec![1, 7];
    let mut seeds: Vec<Vec<u8>> = waits.iter().map(|flags| command(wait(*flags))).collect();
    seeds.extend(
        [
            range,
            with_flags(InvalidationScope::Context as u32),
            Command {
                flags: InvalidationScope::All as u32,
                ..of(CommandKind::Invalidate)
            },
            sync,
            audit,
            response,
        ]
        .map(|c| [command(c), ack.clone()].concat()),
    );
    let start = [entry, command(sync), engine.clone(), ack.clone()].concat();
    seeds.push([start.clone(), command(audit), command(range)].concat());
    seeds.push([start.clone(), command(response), engine, ack.clone()].concat());
    // What makes no sense, each in one way.
    for bad in [
        Command { kind: 0, ..sync },
        Command { group: 1, ..sync },
        Command { context: 9, ..sync },
        Command { flags: 3, ..range },
        Command { addr: 8, ..range },
        Command {
            addr: !0xfff,
            ..range
        },
        Command {
            addr: 4,
            ..wait(wait::WRITE)
        },
        Command {
            addr: 1 << 50,
            ..wait(wait::WRITE)
        },
        Command {
            addr: 1 << 50,
            ..audit
        },
        Command {
            flags: 4,
            ..wait(0)
        },
    ] {
        seeds.push([ack.clone(), command(bad)].concat());
    }
    seeds.push(vec![2, 0xaa, 0, 0, 0, 0]);
    seeds
}

/// A message of vfio-user: what comes with it, its command, flags and words, and the bytes after.
fn message(with: u8, command: u16, flags: u32, words: &[u32], rest: &[u8]) -> Vec<u8> {
    let body = words.iter().flat_map(|word| word.to_le_bytes());
    let body: Vec<u8> = body.chain(rest.iter().copied()).collect();
    let mut bytes = vec![with];
    bytes.extend(1u16.to_le_bytes());
    bytes.extend(command.to_le_bytes());
    bytes.extend((16 + body.len() as u32).to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(body);
    bytes
}

/// Sessions of a client, by the numbers of the vfio-user specification.
pub fn messages() -> Vec<Vec<u8>> {
    const MSIX: u32 = 2;
    const CONFIG: u32 = 7;
    const EVENTS: u8 = 1 << 4;
    const STRANGER: u8 = 1 << 7;
    let (registers, bells) = (u32::from(BAR_REGS), u32::from(BAR_DOORBELLS));
    let ask = |command: u16, words: &[u32]| message(0, command, 0, words, &[]);
    let set = |register: &regs::Register, value: u32| {
        ask(10, &[register.offset as u32, 0, registers, 4, value])
    };
    let version = message(STRANGER, 1, 0, &[0], b"{\"capabilities\":{}}\0");
    let map = message(1, 2, 0, &[32, 3, 0, 0, 0, 0, 0x1_0000, 0], &[]);
    let part = message(1, 2, 0, &[32, 1, 0x1000, 0, 0x8000, 0, 0x1000, 0], &[]);
    let no_file = ask(2, &[32, 3, 0, 0, 0xa_0000, 0, 0x1_0000, 0]);
    let (unmap, unmap_all) = (
        ask(3, &[24, 0, 0, 0, 0x1_0000, 0]),
        ask(3, &[24, 2, 0, 0, 0, 0]),
    );
    let events = message(EVENTS | 4, 8, 0, &[20, 0x24, MSIX, 0, 4], &[]);
    let master = message(0, 10, 0, &[4, 0, CONFIG, 2], &[6, 0]);
    let enable = [
        set(&regs::CTX_TABLE, 0x1000),
        set(&regs::CTX_COUNT, 16),
        set(&regs::IQ_BASE, 0x2000),
        set(&regs::IQ_LOG2, 4),
        set(&regs::PRQ_BASE, 0x3000),
        set(&regs::PRQ_LOG2, 4),
        set(&regs::SHADOW, 0x4000),
        set(&regs::CTRL, 1),
    ];
    let start = [map.clone(), events.clone(), master, enable.concat()].concat();
    let kick = [
        set(&regs::KICK, 1),
        ask(9, &[regs::STATUS.offset as u32, 0, registers, 4]),
    ]
    .concat();
    let bell = message(0, 10, 1 << 4, &[0x1000, 0, bells, 4, 1], &[]);
    vec![
        [version, ask(4, &[16, 0, 0, 0])].concat(),
        ask(4, &[16, 0, 0, 0]),
        (0..10)
            .flat_map(|region| ask(5, &[32, 0, region, 0, 0, 0, 0, 0]))
            .collect(),
        ask(6, &[16, 0, 0, 0]),
        (0..6)
            .flat_map(|index| ask(7, &[16, 0, index, 0]))
            .collect(),
        [map.clone(), unmap.clone()].concat(),
        [map.clone(), part.clone(), unmap].concat(),
        [no_file, map.clone(), part, unmap_all.clone()].concat(),
        [events, ask(8, &[20, 0x21, MSIX, 0, 4])].concat(),
        message(0, 8, 0, &[23, 0x0a, MSIX, 1, 3], &[1, 0, 1]),
        ask(9, &[0, 0, CONFIG, 256]),
        ask(9, &[0x1000, 0, u32::from(BAR_MSIX), 8]),
        ask(9, &[0, 0, bells, 1 << 20]),
        [start.clone(), kick.clone(), bell].concat(),
        [start.clone(), ask(13, &[]), kick.clone()].concat(),
        [start, unmap_all, kick].concat(),
        ask(
            15,
            &[2, 0, 0x1000, 0, bells, 4, 1, 0, 0x2000, 0, bells, 8, 1, 0],
        ),
        ask(99, &[1, 2, 3]),
    ]
}
