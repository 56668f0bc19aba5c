//! Memory that comes without a file: the server asks for it by messages, and the client answers,
//! late, wrongly, or not at all.

mod wire;

use std::time::{Duration, Instant};

use extlb_device::server::{DmaMessages, Options};
use extlb_spec::invalidation::{Command, CommandKind, wait};
use extlb_spec::pte::Pte;
use extlb_spec::regs::FatalError;
use extlb_spec::work::{Completion, Descriptor, Opcode, Status};
use extlb_spec::{BAR_DOORBELLS, BAR_REGS, Gpa, regs};
use wire::client::*;
use wire::*;

/// Where the memory without a file is, and how much.
const BASE: u64 = 1 << 32;
const LEN: usize = 0x4000;
/// Virtual addresses of its pages, and of a page of RAM.
const AT: u64 = 0x10_000;
const RAM_AT: u64 = 0x20_000;
const RAM_PAGE: u64 = 0x80_000;

const ERROR: u32 = 1 << 5;
const REPLY: u32 = 1;

fn served(how: DmaMessages, once: bool) -> Served {
    Served::with(Options {
        once,
        dma_messages: how,
        ..Options::default()
    })
}

/// A client with memory of its own, which it hands out on request.
struct Rig {
    wire: Wire,
    how: DmaMessages,
    memory: Vec<u8>,
    /// Lengths of the questions so far.
    asked: Vec<usize>,
}

impl Rig {
    fn new(served: &Served, how: DmaMessages, capabilities: &str) -> Self {
        let mut wire = Wire::silent(&served.socket);
        wire.client.greet_as(capabilities);
        wire.start();
        wire.client
            .dma_map_as(3, 0, BASE, LEN as u64, &[])
            .expect("taken note of");
        for page in 0..4 {
            wire.leaf(AT + (page << 12), Pte::leaf(Gpa(BASE + (page << 12)), true));
        }
        wire.leaf(RAM_AT, Pte::leaf(Gpa(RAM_PAGE), true));
        Self {
            wire,
            how,
            memory: (0..LEN).map(|at| (at / 7) as u8).collect(),
            asked: Vec::new(),
        }
    }

    /// The answer to a question.
    fn answer(&mut self, asked: &Received) -> Vec<u8> {
        assert!(!asked.is_reply(), "{asked:?}");
        let at = u64::from_le_bytes(*asked.body.first_chunk().expect("an address"));
        let count = u32::from_le_bytes(*asked.body[8..].first_chunk().expect("a count"));
        let (at, count) = ((at - BASE) as usize, count as usize);
        self.asked.push(count);
        let data_at = match self.how {
            DmaMessages::Qemu => 12,
            _ => 16,
        };
        let mut body = asked.body[..16].to_vec();
        match asked.command {
            DMA_READ => {
                assert_eq!(asked.body.len(), 16);
                body.truncate(data_at);
                body.extend(&self.memory[at..at + count]);
                body.resize(16 + count, 0);
            }
            DMA_WRITE => {
                let data = &asked.body[data_at..data_at + count];
                assert_eq!(asked.body.len(), (data_at + count).max(16));
                self.memory[at..at + count].copy_from_slice(data);
            }
            other => panic!("asked for {other}"),
        }
        message(asked.id, asked.command, REPLY, &body)
    }

    fn receive(&mut self) -> Received {
        self.wire.client.receive().expect("a message")
    }

    fn send(&mut self, bytes: &[u8]) {
        self.wire.client.send_bytes(bytes, &[]).expect("sent");
    }

    /// Submits without waiting for anything.
    fn begin(&mut self, descriptor: Descriptor) -> u32 {
        let n = self.wire.place(descriptor);
        self.wire
            .client
            .post(BAR_DOORBELLS.into(), 0, &[1, 0, 0, 0]);
        n
    }

    /// Answers until the operation has ended.
    fn run(&mut self, descriptor: Descriptor) -> Completion {
        let n = self.begin(descriptor);
        let patience = Some(Duration::from_millis(5));
        let stream = self.wire.client.stream.try_clone().expect("cloned");
        let end = Instant::now() + Duration::from_secs(20);
        while self.wire.record(n).status == 0 {
            assert!(Instant::now() < end, "the operation does not end");
            stream.set_read_timeout(patience).expect("set");
            let mut byte = [0];
            let ready = nix::sys::socket::recv(
                std::os::fd::AsRawFd::as_raw_fd(&stream),
                &mut byte,
                nix::sys::socket::MsgFlags::MSG_PEEK,
            );
            stream
                .set_read_timeout(Some(Duration::from_secs(20)))
                .expect("set");
            if ready.is_ok() {
                let asked = self.receive();
                let answer = self.answer(&asked);
                self.send(&answer);
            }
        }
        self.wire.record(n)
    }

    /// Posts a wait for a drain, without waiting; the word it writes.
    fn begin_drain(&mut self) -> (u64, u64) {
        let (at, value) = (SHADOW + 0x180, 0x1234_5678);
        self.wire.write(at, &[0; 8]);
        self.wire.post(Command {
            kind: CommandKind::Wait as u32,
            flags: wait::WRITE | wait::DRAINED,
            addr: at,
            value,
            ..Default::default()
        });
        let kick = regs::KICK;
        self.wire
            .client
            .post(BAR_REGS.into(), kick.offset, &[1, 0, 0, 0]);
        (at, value)
    }
}

/// A descriptor; fields that its opcode does not use are zero.
fn op(opcode: Opcode, src: u64, dst: u64, len: u64) -> Descriptor {
    let (src, dst, arg) = match opcode {
        Opcode::Fill => (0, dst, 0x0101_0101_0101_0101),
        Opcode::Crc32c => (src, 0, 0),
        _ => (src, dst, 0),
    };
    Descriptor {
        opcode: opcode as u8,
        src,
        dst,
        len,
        arg,
        ..Default::default()
    }
}

#[test]
fn operations_work_on_it_in_both_layouts_and_in_small_pieces() {
    for (how, most) in [
        (DmaMessages::Standard, 1 << 20),
        (DmaMessages::Qemu, 1 << 20),
        (DmaMessages::Standard, 1000),
        (DmaMessages::Qemu, 3),
    ] {
        let served = served(how, true);
        let said = format!("{{\"capabilities\":{{\"max_data_xfer_size\":{most}}}}}");
        let mut rig = Rig::new(&served, how, &said);
        // Odd borders, over pages.
        let record = rig.run(op(Opcode::Copy, AT + 5, RAM_AT + 1, 100));
        assert_eq!((record.status, record.bytes), (Status::Success as u32, 100));
        assert_eq!(rig.wire.read::<100>(RAM_PAGE + 1)[..], rig.memory[5..105]);
        let before = rig.memory.clone();
        let record = rig.run(op(Opcode::Copy, AT + 0x100, AT + 0x1f00, 0x300));
        assert_eq!(record.status, Status::Success as u32);
        assert_eq!(rig.memory[0x1f00..0x2200], before[0x100..0x400]);
        let record = rig.run(op(Opcode::Fill, 0, AT + 0x3001, 77));
        assert_eq!(record.status, Status::Success as u32);
        assert_eq!(rig.memory[0x3001..0x3001 + 77], [1; 77]);
        assert_eq!(rig.memory[0x3000], before[0x3000]);
        let record = rig.run(op(Opcode::Crc32c, AT, 0, 0x2000));
        let crc = crc32c::crc32c(&rig.memory[..0x2000]);
        assert_eq!(
            (record.status, record.result),
            (Status::Success as u32, crc.into())
        );
        assert!(
            rig.asked.iter().all(|count| *count <= most.min(4096)),
            "{how:?}"
        );
        let drops = rig.wire.get(regs::BUS_ERRORS);
        assert_eq!(drops, 0);
    }
}

#[test]
fn by_default_nothing_is_there() {
    let served = served(DmaMessages::Off, true);
    let mut rig = Rig::new(&served, DmaMessages::Off, QEMU);
    let record = rig.run(op(Opcode::Crc32c, AT, 0, 64));
    assert_eq!(record.status, Status::BusError as u32);
    assert!(rig.asked.is_empty());
}

#[test]
fn atomic_operations_and_what_the_client_refuses_are_bus_errors() {
    let how = DmaMessages::Standard;
    let served = served(how, true);
    let mut rig = Rig::new(&served, how, QEMU);
    // A page table there: it is read, but its bits cannot be set.
    let table = Pte::leaf(Gpa(RAM_PAGE), true).0;
    rig.memory[..8].copy_from_slice(&table.to_le_bytes());
    rig.wire
        .write(0x12_000 + 8, &Pte::table(Gpa(BASE)).0.to_le_bytes());
    let record = rig.run(op(Opcode::Fill, 0, 0x20_0000, 8));
    assert_eq!(record.status, Status::BusError as u32);
    assert_eq!(rig.asked, [8]);
    let n = rig.begin(op(Opcode::Crc32c, AT, 0, 64));
    let asked = rig.receive();
    let mut refusal = message(asked.id, asked.command, REPLY | ERROR, &[]);
    refusal[12] = 14;
    rig.send(&refusal);
    assert_eq!(rig.wire.wait(n).status, Status::BusError as u32);
    // And it goes on.
    let record = rig.run(op(Opcode::Crc32c, AT, 0, 64));
    assert_eq!(record.status, Status::Success as u32);
}

#[test]
fn a_read_that_is_not_answered_is_a_bus_error_until_it_is() {
    let how = DmaMessages::Standard;
    let served = served(how, true);
    let mut rig = Rig::new(&served, how, QEMU);
    let n = rig.begin(op(Opcode::Crc32c, AT, 0, 64));
    let first = rig.receive();
    // Meanwhile requests are served.
    assert_eq!(rig.wire.get(regs::STATUS), 1);
    assert_eq!(rig.wire.wait(n).status, Status::BusError as u32);
    // At once: nothing more is asked.
    let begun = Instant::now();
    for _ in 0..20 {
        let n = rig.begin(op(Opcode::Fill, 0, AT, 64));
        assert_eq!(rig.wire.wait(n).status, Status::BusError as u32);
    }
    assert!(begun.elapsed() < Duration::from_secs(20), "each waited");
    let late = rig.answer(&first);
    rig.send(&late);
    rig.wire.get(regs::STATUS);
    let record = rig.run(op(Opcode::Fill, 0, AT, 64));
    assert_eq!(record.status, Status::Success as u32);
    drop(rig);
    let report = served.report();
    let lines = events(&report, "no_answer");
    assert_eq!(lines.len(), 1, "{report:?}");
    assert_eq!(lines[0]["question"], "DMA_READ");
    assert_eq!(lines[0]["gpa"], "0x100000000");
    assert_eq!(lines[0]["len"], 64);
}

#[test]
fn memory_is_taken_back_only_when_it_is_not_read_any_more() {
    let how = DmaMessages::Standard;
    let served = served(how, true);
    let mut rig = Rig::new(&served, how, QEMU);
    for answered in [true, false] {
        let n = rig.begin(op(Opcode::Crc32c, AT, 0, 64));
        let asked = rig.receive();
        let begun = Instant::now();
        let mut body = words(&[24, 0]);
        body.extend(
            [BASE, LEN as u64]
                .iter()
                .flat_map(|value| value.to_le_bytes()),
        );
        let id = rig.wire.client.send(DMA_UNMAP, 0, &body, &[]);
        // The server has the request now, and so much longer nothing is said.
        let stream = rig.wire.client.stream.try_clone().expect("cloned");
        stream
            .set_read_timeout(Some(Duration::from_millis(300)))
            .expect("set");
        if answered {
            let mut byte = [0];
            let fd = std::os::fd::AsRawFd::as_raw_fd(&stream);
            let flags = nix::sys::socket::MsgFlags::MSG_PEEK;
            assert!(
                nix::sys::socket::recv(fd, &mut byte, flags).is_err(),
                "unmapped under a read"
            );
            let answer = rig.answer(&asked);
            rig.send(&answer);
        }
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .expect("set");
        rig.wire.client.reply(id, DMA_UNMAP).expect("unmapped");
        let status = match answered {
            true => Status::Success,
            // After the limit, and not before it.
            false => Status::BusError,
        };
        assert_eq!(rig.wire.wait(n).status, status as u32);
        assert!(answered || begun.elapsed() > Duration::from_secs(1));
        rig.wire
            .client
            .dma_map_as(3, 0, BASE, LEN as u64, &[])
            .expect("again");
    }
}

#[test]
fn after_a_write_that_is_not_answered_nothing_is_acknowledged() {
    let how = DmaMessages::Standard;
    let served = served(how, false);
    let mut rig = Rig::new(&served, how, QEMU);
    rig.begin(op(Opcode::Fill, 0, AT, 64));
    let asked = rig.receive();
    assert_eq!(asked.command, DMA_WRITE);
    // The kernel takes the page back, and waits until the device is done with it. The client
    // holds the write all the while, and could carry it out now or later.
    let (at, _) = rig.begin_drain();
    // The session cannot end before the access does: it takes back a page that is not the one.
    let mut body = words(&[24, 0]);
    let page = [BASE + 0x3000, 0x1000];
    body.extend(page.iter().flat_map(|value| value.to_le_bytes()));
    rig.wire.client.send(DMA_UNMAP, 0, &body, &[]);
    assert_eq!(rig.wire.client.receive(), None, "the session ends");
    // Served: so the device of the session before is gone.
    let mut next = Wire::connect(&served.socket);
    assert_eq!(rig.wire.read(at), [0; 8], "acknowledged under a write");
    next.start();
    let report = std::fs::read_to_string(served.folder.path().join("report.json"));
    let report = report.expect("a report");
    assert!(report.contains("\"question\":\"DMA_WRITE\""), "{report}");
}

#[test]
fn whoever_carries_out_a_request_does_not_ask() {
    let served = served(DmaMessages::Standard, true);
    let mut wire = Wire::connect(&served.socket);
    wire.map_ram();
    wire.start_bus();
    let mapped = wire.client.dma_map_as(3, 0, BASE, LEN as u64, &[]);
    mapped.expect("taken note of");
    wire.configure();
    wire.set(regs::SHADOW, BASE);
    // Enabled by this very request, and answered without a question before: a client that waits
    // for a register may answer nothing until it has it.
    wire.set(regs::CTRL, regs::ctrl::ENABLE.into());
    assert_eq!(wire.get(regs::STATUS), u64::from(regs::status::FATAL));
    assert_eq!(wire.get(regs::ERROR), FatalError::Shadow as u64);
}

/// A wrong answer, out of a question and the right one.
type Mangle = fn(&Received, Vec<u8>) -> Vec<u8>;

#[test]
fn answers_that_make_no_sense_end_the_session_and_nothing_else() {
    let how = DmaMessages::Standard;
    let served = served(how, false);
    let answers: [Mangle; 6] = [
        // Another number.
        |asked, mut good| {
            good[0] = asked.id as u8 ^ 1;
            good
        },
        // Another command.
        |_, mut good| {
            good[2] = DMA_WRITE as u8;
            good
        },
        // A byte less or more.
        |asked, good| message(asked.id, asked.command, REPLY, &good[16..good.len() - 1]),
        |asked, good| {
            message(
                asked.id,
                asked.command,
                REPLY,
                &[&good[16..], &[0]].concat(),
            )
        },
        // Another address; no body at all.
        |_, mut good| {
            good[16] ^= 1;
            good
        },
        |asked, _| message(asked.id, asked.command, REPLY, &[]),
    ];
    for answer in answers {
        let mut rig = Rig::new(&served, how, QEMU);
        rig.begin(op(Opcode::Crc32c, AT, 0, 64));
        let asked = rig.receive();
        let good = rig.answer(&asked);
        rig.send(&answer(&asked, good));
        assert_eq!(rig.wire.client.receive(), None);
    }
    // Twice the same.
    let mut rig = Rig::new(&served, how, QEMU);
    rig.begin(op(Opcode::Crc32c, AT, 0, 64));
    let asked = rig.receive();
    let good = rig.answer(&asked);
    rig.send(&[&good[..], &good].concat());
    assert_eq!(rig.wire.client.receive(), None);
    // Gone in the middle of a question, of a read and of a write.
    for opcode in [Opcode::Crc32c, Opcode::Fill] {
        let mut rig = Rig::new(&served, how, QEMU);
        rig.begin(op(opcode, AT, AT, 64));
        rig.receive();
    }
    let mut rig = Rig::new(&served, how, QEMU);
    let record = rig.run(op(Opcode::Crc32c, AT, 0, 64));
    assert_eq!(record.status, Status::Success as u32);
}
