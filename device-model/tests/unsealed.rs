//! Guest memory in a file that may shrink: mapped, as it is by default; read and written; or
//! refused. The server is a process of its own, since what goes wrong here would end it.

mod wire;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use extlb_spec::pte::Pte;
use extlb_spec::work::{Completion, Descriptor, Opcode, Status};
use extlb_spec::{BAR_DOORBELLS, Gpa};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use wire::program::Program;
use wire::*;

/// Where the file is, how much of it, and from which offset on.
const BASE: u64 = 1 << 32;
const LEN: u64 = 0x4000;
const OFFSET: u64 = 0x1000;
/// Virtual addresses of its pages, and of a page of RAM.
const AT: u64 = 0x10_000;
const RAM_AT: u64 = 0x20_000;
const RAM_PAGE: u64 = 0x80_000;

fn memfd(flags: MFdFlags, len: u64) -> File {
    let file: File = memfd_create(c"memory", flags).expect("a memfd").into();
    file.set_len(len).expect("sized");
    file
}

/// A client whose tables and queues are in a file that can be kept from shrinking, and a server.
struct Rig {
    wire: Wire,
    program: Program,
    _folder: tempfile::TempDir,
}

impl Rig {
    fn new(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("s");
        let program = Program::listening(&socket, &[&["--once"], arguments].concat());
        let mut wire = Wire::connect(&socket);
        wire.ram = memfd(MFdFlags::MFD_ALLOW_SEALING, RAM);
        wire.start();
        for page in 0..4 {
            wire.leaf(AT + (page << 12), Pte::leaf(Gpa(BASE + (page << 12)), true));
        }
        wire.leaf(RAM_AT, Pte::leaf(Gpa(RAM_PAGE), true));
        Self {
            wire,
            program,
            _folder: folder,
        }
    }

    /// Gives the server a file, for reading (1), writing (2) or both.
    fn give(&mut self, file: &File, flags: u32) -> Result<(), Errno> {
        let fd = [file.as_raw_fd()];
        self.wire.client.dma_map_as(flags, OFFSET, BASE, LEN, &fd)
    }

    fn run(&mut self, opcode: Opcode, src: u64, dst: u64, len: u64) -> Completion {
        let n = self.wire.submit(Descriptor {
            opcode: opcode as u8,
            src,
            dst,
            len,
            arg: match opcode {
                Opcode::Fill => 0x0101_0101_0101_0101,
                Opcode::FetchAdd => 1,
                _ => 0,
            },
            ..Default::default()
        });
        eventually("the operation ends", || {
            assert!(self.program.is_running(), "the server has died");
            self.wire.record(n).status != 0
        });
        self.wire.record(n)
    }

    #[track_caller]
    fn ends(&mut self, opcode: Opcode, src: u64, dst: u64, len: u64, status: Status) -> Completion {
        let record = self.run(opcode, src, dst, len);
        assert_eq!(record.status, status as u32, "{opcode:?} {src:#x} {dst:#x}");
        record
    }

    /// The client leaves, and the server ends as it should.
    fn end(self) {
        let Self { wire, program, .. } = self;
        drop(wire);
        let ended = program.end();
        assert!(ended.success(), "{ended}");
    }
}

/// The file's bytes from the start of the range.
fn bytes<const N: usize>(file: &File, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, OFFSET + at).expect("read");
    bytes
}

/// Files that may shrink, with bytes that are all over them different.
fn shrinkable() -> [File; 2] {
    let files = [memory(OFFSET + LEN), memfd(MFdFlags::empty(), OFFSET + LEN)];
    let content: Vec<u8> = (0..OFFSET + LEN).map(|at| (at / 7) as u8).collect();
    for file in &files {
        file.write_all_at(&content, 0).expect("written");
    }
    files
}

#[test]
fn a_file_that_is_read_and_written_takes_all_but_atomic_operations() {
    for file in shrinkable() {
        let mut rig = Rig::new(&["--unsealed-memory", "io"]);
        rig.give(&file, 3).expect("taken");
        // First: if it were mapped, it would be found out here.
        let before: [u8; 8] = bytes(&file, 8);
        rig.ends(Opcode::FetchAdd, 0, AT + 8, 8, Status::BusError);
        assert_eq!(bytes(&file, 8), before);
        // Odd borders, over pages, and out of it, into it and within it.
        rig.ends(Opcode::Copy, AT + 0xff5, RAM_AT + 1, 100, Status::Success);
        assert_eq!(rig.wire.read::<100>(RAM_PAGE + 1), bytes(&file, 0xff5));
        rig.wire.write(RAM_PAGE, &[0xab; 300]);
        rig.ends(Opcode::Copy, RAM_AT, AT + 0x1f80, 300, Status::Success);
        assert_eq!(bytes(&file, 0x1f80), [0xab; 300]);
        let before: [u8; 0x1100] = bytes(&file, 0x100);
        rig.ends(
            Opcode::Copy,
            AT + 0x100,
            AT + 0x180,
            0x1100,
            Status::Success,
        );
        assert_eq!(bytes(&file, 0x180), before, "it overlaps");
        rig.ends(Opcode::Fill, 0, AT + 0x3001, 77, Status::Success);
        assert_eq!(bytes(&file, 0x3001), [1; 77]);
        assert_ne!(bytes(&file, 0x3000), [1]);
        let record = rig.ends(Opcode::Crc32c, AT, 0, LEN, Status::Success);
        let all: [u8; LEN as usize] = bytes(&file, 0);
        assert_eq!(record.result, u64::from(crc32c::crc32c(&all)));
        // A page table in it is read, but its bits cannot be set.
        let table = Pte::leaf(Gpa(RAM_PAGE), true).0.to_le_bytes();
        file.write_all_at(&table, OFFSET).expect("written");
        let entry = Pte::table(Gpa(BASE)).0.to_le_bytes();
        rig.wire.write(0x12_000 + 8, &entry);
        rig.ends(Opcode::Fill, 0, 0x20_0000, 8, Status::BusError);
        assert_eq!(bytes(&file, 0), table);
        // The kernel takes a page back.
        rig.wire.shoot_down(AT + 0x1000);
        rig.wire.client.dma_unmap(BASE, LEN).expect("unmapped");
        rig.ends(Opcode::Crc32c, AT, 0, 64, Status::BusError);
        rig.end();
    }
}

#[test]
fn a_file_that_shrinks_is_a_bus_error_and_never_grown() {
    for file in shrinkable() {
        let mut rig = Rig::new(&["--unsealed-memory", "io"]);
        rig.give(&file, 3).expect("taken");
        // In the middle of its second page.
        let len = OFFSET + 0x1800;
        file.set_len(len).expect("shrunk");
        rig.ends(Opcode::Crc32c, AT + 0x3000, 0, 64, Status::BusError);
        rig.ends(Opcode::Crc32c, AT + 0x17c1, 0, 64, Status::BusError);
        rig.ends(Opcode::Crc32c, AT + 0x17c0, 0, 64, Status::Success);
        rig.ends(Opcode::Fill, 0, AT + 0x3000, 64, Status::BusError);
        rig.ends(Opcode::Fill, 0, AT + 0x17c1, 64, Status::BusError);
        rig.ends(Opcode::Fill, 0, AT + 0x17c0, 64, Status::Success);
        assert_eq!(file.metadata().expect("its size").len(), len);
        // It is a range like any other when it is there again.
        file.set_len(OFFSET + LEN).expect("grown");
        rig.ends(Opcode::Fill, 0, AT + 0x3000, 64, Status::Success);
        assert_eq!(bytes(&file, 0x3000), [1; 64]);
        rig.end();
    }
}

#[test]
fn a_file_is_read_and_written_only_as_it_may_be() {
    let [file, _] = shrinkable();
    let mut rig = Rig::new(&["--unsealed-memory", "io"]);
    for (flags, read, write) in [
        (1, Status::Success, Status::BusError),
        (2, Status::BusError, Status::Success),
        (3, Status::Success, Status::Success),
    ] {
        rig.give(&file, flags).expect("taken");
        rig.ends(Opcode::Crc32c, AT, 0, 64, read);
        rig.ends(Opcode::Fill, 0, AT, 64, write);
    }
    // What is not there cannot be given, and what was there before stays.
    file.set_len(OFFSET + LEN - 1).expect("shrunk");
    assert_eq!(rig.give(&file, 1), Err(Errno::EINVAL));
    rig.ends(Opcode::Fill, 0, AT, 64, Status::Success);
    rig.end();
}

#[test]
fn a_file_that_may_shrink_is_refused() {
    let mut rig = Rig::new(&["--unsealed-memory", "refuse"]);
    for file in shrinkable() {
        assert_eq!(rig.give(&file, 3), Err(Errno::EACCES));
        rig.ends(Opcode::Crc32c, AT, 0, 64, Status::BusError);
    }
    // One that can be sealed is, though only against that.
    let file = memfd(MFdFlags::MFD_ALLOW_SEALING, OFFSET + LEN);
    rig.give(&file, 3).expect("taken");
    rig.ends(Opcode::FetchAdd, 0, AT, 8, Status::Success);
    assert!(file.set_len(OFFSET).is_err(), "shrunk under the device");
    file.set_len(OFFSET + 2 * LEN).expect("grown");
    // And stays when another is refused in its place.
    for other in shrinkable() {
        assert_eq!(rig.give(&other, 3), Err(Errno::EACCES));
    }
    rig.ends(Opcode::FetchAdd, 0, AT, 8, Status::Success);
    assert_eq!(bytes(&file, 0), 2u64.to_le_bytes());
    rig.end();
}

#[test]
fn a_file_that_may_shrink_is_mapped_by_default() {
    for arguments in [&[][..], &["--unsealed-memory", "map"]] {
        for file in shrinkable() {
            let before = u64::from_le_bytes(bytes(&file, 8));
            let mut rig = Rig::new(arguments);
            rig.give(&file, 3).expect("taken");
            rig.ends(Opcode::FetchAdd, 0, AT + 8, 8, Status::Success);
            assert_eq!(bytes(&file, 8), (before + 1).to_le_bytes());
            rig.end();
        }
    }
}

/// How the program is told; the layouts themselves have their own tests.
#[test]
fn memory_without_a_file_is_asked_for_in_the_layout_that_was_said() {
    for (how, data_at) in [("standard", 16), ("qemu", 12)] {
        let mut rig = Rig::new(&["--dma-messages", how]);
        let client = &mut rig.wire.client;
        client.dma_map_as(3, 0, BASE, LEN, &[]).expect("taken");
        rig.wire.place(Descriptor {
            opcode: Opcode::Fill as u8,
            dst: AT,
            len: 64,
            arg: 0x0202_0202_0202_0202,
            ..Default::default()
        });
        let client = &mut rig.wire.client;
        client.post(BAR_DOORBELLS.into(), 0, &[1, 0, 0, 0]);
        let asked = client.receive().expect("a question");
        assert_eq!(asked.command, client::DMA_WRITE);
        assert_eq!(asked.body.len(), data_at + 64, "{how}");
        assert_eq!(asked.body[data_at..], [2; 64], "{how}");
        rig.end();
    }
}
