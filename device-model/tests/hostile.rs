//! Guests that break the contract: a named error, for the context or the device, and no more.

mod common;
use common::*;

use std::sync::atomic::Ordering;

use extlb_device::ports::Dma;
use extlb_spec::addr::IOVA_END;
use extlb_spec::context::ContextError;
use extlb_spec::invalidation::{Command, CommandKind, wait};
use extlb_spec::pte::Pte;
use extlb_spec::regs::{self, FatalError};
use extlb_spec::work::{Descriptor, MAX_LEN, Opcode, Status};
use extlb_spec::{BAR_MSIX, BAR_REGS, Gpa, Iova, Vector};

const SRC: u64 = 0x5555_0000_0000;

fn ok(guest: &Guest, process: &Process) {
    let done = process.go(guest, Descriptor::default());
    assert_eq!(done.status, Status::Success as u32, "still runs");
}

#[test]
fn descriptors_that_make_no_sense_complete_with_the_reason() {
    let guest = Guest::new();
    let process = guest.process(1);
    let cases = [
        (
            Descriptor {
                opcode: 9,
                ..Default::default()
            },
            Status::BadDescriptor,
        ),
        (
            Descriptor {
                opcode: 255,
                ..Default::default()
            },
            Status::BadDescriptor,
        ),
        (
            Descriptor {
                flags: 2,
                ..Default::default()
            },
            Status::BadDescriptor,
        ),
        (
            Descriptor {
                reserved0: 1,
                ..Default::default()
            },
            Status::BadDescriptor,
        ),
        (
            Descriptor {
                reserved1: 1,
                ..Default::default()
            },
            Status::BadDescriptor,
        ),
        (
            Descriptor {
                src_segments: 1,
                ..Default::default()
            },
            Status::BadDescriptor,
        ),
        (
            Descriptor {
                arg: 1 << 32,
                ..op(Opcode::Crc32c, SRC, 0, 8)
            },
            Status::BadDescriptor,
        ),
        (op(Opcode::Fill, 0, SRC, MAX_LEN + 1), Status::BadLength),
        (op(Opcode::Nop, 0, 0, u64::MAX), Status::BadLength),
        (op(Opcode::Fill, 0, IOVA_END, 1), Status::BadAddress),
        (op(Opcode::Fill, 0, IOVA_END - 8, 9), Status::BadAddress),
        (op(Opcode::Fill, 0, u64::MAX, 2), Status::BadAddress),
        (
            op(Opcode::Copy, u64::MAX - 4, SRC, 4096),
            Status::BadAddress,
        ),
        (op(Opcode::Compare, SRC, 1 << 63, 1), Status::BadAddress),
    ];
    for (i, (descriptor, status)) in cases.iter().enumerate() {
        let done = process.go(&guest, *descriptor);
        assert_eq!(Status::from_raw(done.status), Some(*status), "{i}");
        assert_eq!(done.bytes, 0, "{i}");
    }
    ok(&guest, &process);
    assert_eq!((process.error(), guest.fatal()), (0, 0));
}

#[test]
fn a_record_that_cannot_be_written_stops_the_context() {
    for at in [SRC + 8, IOVA_END - 16, IOVA_END, u64::MAX - 31] {
        let guest = Guest::new();
        let process = guest.process(1);
        process.go(
            &guest,
            Descriptor {
                completion: at,
                ..Default::default()
            },
        );
        let record = guest.expect_error();
        assert_eq!(record.code, ContextError::CompletionFault as u32, "{at:#x}");
        assert_eq!(record.iova, at);
        assert_eq!(process.error(), ContextError::CompletionFault as u32);
        ok(&guest, &guest.process(2));
    }
}

#[test]
fn tails_beyond_the_ring_stop_the_context() {
    for tail in [(1 << RING_LOG2) + 1, u32::MAX, 1 << 31] {
        let guest = Guest::new();
        let process = guest.process(1);
        process.set_tail(tail);
        process.ring(&guest);
        guest.run();
        let record = guest.expect_error();
        assert_eq!(record.code, ContextError::RingOverrun as u32);
        assert_eq!(process.error(), ContextError::RingOverrun as u32);
        // It stays stopped, whatever its program writes, until the kernel starts it again.
        process.set_tail(0);
        process.submit(Descriptor::default());
        process.ring(&guest);
        guest.run();
        assert_eq!(process.status(0), Some(Status::Pending));
        ok(&guest, &guest.process(2));
    }
}

#[test]
fn words_of_the_device_in_the_shadow_page_are_not_believed() {
    let guest = Guest::new();
    let process = guest.process(1);
    ok(&guest, &process);
    // The program scribbles over everything but the tail.
    guest
        .ram
        .write(Gpa(process.shadow.0 + 4), &[0xff; 4092])
        .unwrap();
    ok(&guest, &process);
    assert_eq!(guest.fatal(), 0);
}

#[test]
fn entries_that_make_no_sense_are_reported_and_do_not_run() {
    let guest = Guest::new();
    let process = guest.process(1);
    process.write_entry(&guest, |e| e.ring_log2 = 31);
    guest.sync(1);
    guest.run();
    let record = guest.expect_error();
    assert_eq!(record.code, ContextError::BadEntry as u32);
    let n = process.submit(Descriptor::default());
    process.ring(&guest);
    guest.run();
    assert_eq!(process.status(n), Some(Status::Pending));
    process.write_entry(&guest, |_| {});
    guest.sync(1);
    guest.run();
    assert_eq!(process.status(n), Some(Status::Success), "mended");
}

#[test]
fn a_shadow_page_outside_ram_stops_the_context() {
    let guest = Guest::new();
    let process = guest.process(1);
    process.write_entry(&guest, |e| e.shadow = 1 << 40);
    guest.sync(1);
    guest.run();
    assert_eq!(guest.expect_error().code, ContextError::Shadow as u32);
    ok(&guest, &guest.process(2));
}

#[test]
fn broken_page_tables_are_bus_errors_at_the_address() {
    let guest = Guest::new();
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 2);
    let crc = op(Opcode::Crc32c, SRC + 4000, 0, 200);
    let broken = [
        Pte(1 << 62 | 1),
        Pte(0x80 | 1),
        Pte::leaf(Gpa(1 << 45), true),
        Pte::leaf(Gpa((1 << 52) - 4096), true),
    ];
    for pte in broken {
        process.set_device(Iova(SRC + PAGE), pte);
        let done = process.go(&guest, crc);
        assert_eq!(done.status, Status::BusError as u32, "{pte:?}");
        assert_eq!((done.fault_addr, done.bytes), (SRC + PAGE, 96));
        guest.shoot(1, SRC, SRC + 2 * PAGE);
        guest.run();
    }
    // The ring, and the record.
    process.set_device(process.records, Pte(1 << 62 | 1));
    guest.shoot(1, process.records.0, process.records.0 + PAGE);
    process.submit(Descriptor::default());
    process.ring(&guest);
    guest.run();
    assert_eq!(
        guest.expect_error().code,
        ContextError::CompletionFault as u32
    );
    let second = guest.process(2);
    second.set_device(second.ring, Pte(1 << 62 | 1));
    second.submit(Descriptor::default());
    second.ring(&guest);
    guest.run();
    let error = guest.expect_error();
    assert_eq!(error.code, ContextError::RingFault as u32);
    assert_eq!((error.context, error.iova), (2, second.ring.0));
    let third = guest.process(3);
    third.write_entry(&guest, |e| e.page_table = 1 << 40);
    guest.sync(3);
    third.submit(Descriptor::default());
    third.ring(&guest);
    guest.run();
    assert_eq!(guest.expect_error().code, ContextError::RingFault as u32);
    assert_eq!(guest.fatal(), 0);
}

#[test]
fn a_page_table_that_points_at_itself_harms_nobody() {
    let guest = Guest::new();
    let process = guest.process(1);
    for i in 0..512 {
        let at = Gpa(process.root.0 + i * 8);
        let value = process.root.0 | 3;
        guest.ram.store_u64(at, value, Ordering::SeqCst).unwrap();
    }
    guest.shoot(1, 0, 1 << 48);
    let audit = guest.pages.take();
    guest.post(Command {
        kind: CommandKind::Audit as u32,
        context: 1,
        addr: audit.0,
        ..Default::default()
    });
    // 2^36 leaves, all of them nonsense: the audit gives up in bounded time.
    let ack = guest.post_wait(wait::DRAINED);
    guest.run();
    assert_eq!(guest.ack(), ack);
    assert_eq!(guest.bytes(Gpa(audit.0 + 56), 1), [1]);
}

#[test]
fn senseless_commands_stop_the_device_and_a_reset_heals_it() {
    let bad = [
        (
            Command {
                kind: 77,
                ..Default::default()
            },
            FatalError::BadCommand,
        ),
        (
            Command {
                kind: CommandKind::ContextSync as u32,
                context: 64,
                ..Default::default()
            },
            FatalError::BadCommand,
        ),
        (
            Command {
                kind: CommandKind::Wait as u32,
                flags: wait::WRITE,
                addr: 1 << 40,
                ..Default::default()
            },
            FatalError::WaitWrite,
        ),
    ];
    for (command, error) in bad {
        let guest = Guest::new();
        let process = guest.process(1);
        guest.post_wait(0);
        guest.post(command);
        let index = 2; // after the sync of `process` and the wait
        process.submit(Descriptor::default());
        guest.run();
        assert_eq!(guest.fatal(), error as u64);
        if error == FatalError::BadCommand {
            assert_eq!(guest.get(regs::ERROR_INFO), index);
        }
        assert_eq!(guest.vectors.count(Vector::Error), 1);
        assert_eq!(guest.ack(), 1, "commands before were done");
        process.ring(&guest);
        guest.run();
        assert_eq!(process.status(0), Some(Status::Pending), "stopped");
        guest.set(regs::CTRL, regs::ctrl::RESET.into());
        assert_eq!((guest.get(regs::STATUS), guest.get(regs::ERROR)), (0, 0));
        guest.enable();
        ok(&guest, &guest.process(2));
    }
}

#[test]
fn an_overrun_queue_stops_the_device() {
    let guest = Guest::new();
    guest.set_kernel_word(0, (1 << IQ_LOG2) + 1);
    guest.run();
    assert_eq!(guest.fatal(), FatalError::IqOverrun as u64);
}

#[test]
fn bad_configurations_are_refused_with_the_register() {
    for (register, value) in [
        (regs::CTX_COUNT, 0),
        (regs::CTX_COUNT, 257),
        (regs::IQ_LOG2, 3),
        (regs::IQ_LOG2, 16),
        (regs::PRQ_LOG2, 31),
    ] {
        let guest = Guest::new();
        guest.set(regs::CTRL, 0);
        guest.set(register, value);
        guest.set(regs::CTRL, regs::ctrl::ENABLE.into());
        assert_eq!(guest.fatal(), FatalError::BadConfig as u64);
        assert_eq!(guest.get(regs::ERROR_INFO), register.offset);
    }
    for (register, error) in [
        (regs::SHADOW, FatalError::Shadow),
        (regs::IQ_BASE, FatalError::IqFetch),
        (regs::CTX_TABLE, FatalError::ContextTable),
    ] {
        let guest = Guest::new();
        guest.set(regs::CTRL, 0);
        guest.ram.write(SHADOW, &[0; 4096]).unwrap();
        guest.set(register, 1 << 40);
        guest.set(regs::CTRL, regs::ctrl::ENABLE.into());
        let sync = Command {
            kind: CommandKind::ContextSync as u32,
            ..Default::default()
        };
        guest.ram.write(IQ, &sync.to_bytes()).unwrap();
        guest.set_kernel_word(0, 1);
        guest.run();
        assert_eq!(guest.fatal(), error as u64);
    }
}

#[test]
fn a_request_ring_outside_ram_stops_the_device() {
    let guest = Guest::new();
    guest.set(regs::CTRL, 0);
    guest.set(regs::PRQ_BASE, 1 << 40);
    guest.enable_as_is();
    let process = guest.process(1);
    process.submit(op(Opcode::Fill, 0, SRC, 8));
    process.ring(&guest);
    guest.run();
    assert_eq!(guest.fatal(), FatalError::PrqWrite as u64);
}

#[test]
fn odd_accesses_to_the_bars_are_ignored() {
    let guest = Guest::new();
    let mut byte = [0xff; 3];
    for offset in [0, 1, 0xfff, u64::MAX] {
        guest.device.mmio_read(BAR_REGS, offset, &mut byte);
        assert_eq!(byte, [0; 3]);
        guest.device.mmio_write(BAR_REGS, offset, &byte);
        guest.device.mmio_write(BAR_MSIX, offset, &byte);
        guest.device.mmio_write(2, offset, &byte);
        guest.device.mmio_write(200, offset, &[]);
    }
    guest.set(regs::IQ_BASE, 0xdead_0000);
    assert_eq!(guest.get(regs::IQ_BASE), IQ.0, "locked while enabled");
    ok(&guest, &guest.process(1));
}
