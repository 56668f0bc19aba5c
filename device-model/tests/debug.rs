//! The switches that break the device: what they break is noticed.
//!
//! The order of a driver in user space: pte cleared, translation invalidated, drain acknowledged,
//! then the memory is unmapped (DMA_UNMAP, as from a guest's IOMMU). A device that does not drain
//! has an access on the bus when that is over.

mod wire;

use std::fs::File;
use std::os::unix::fs::FileExt;

use extlb_device::config::{Config, DebugConfig};
use extlb_spec::Gpa;
use extlb_spec::pte::Pte;
use extlb_spec::regs;
use extlb_spec::work::{Completion, Descriptor, Opcode, Status};
use wire::*;

/// Memory of its own, apart from RAM on the bus.
const BUFFER: u64 = 0x1000_0000;
/// Its virtual address.
const BUFFER_AT: u64 = 0x10_000;

/// Unmaps a page while the device has a write to it on the bus. Returns how the write ended,
/// whether the page was written, and the report.
fn unmap_under_way(debug: DebugConfig) -> (Completion, bool, Vec<serde_json::Value>) {
    let served = Served::new(
        Config {
            debug,
            ..Config::default()
        },
        true,
    );
    let mut wire = Wire::connect(&served.socket);
    wire.start();
    let buffer: File = memory(4096);
    wire.map(BUFFER, &buffer, 0, 4096);
    wire.leaf(BUFFER_AT, Pte::leaf(Gpa(BUFFER), true));
    let before = wire.get(regs::TLB_MISSES);
    let fill = wire.submit(Descriptor {
        opcode: Opcode::Fill as u8,
        dst: BUFFER_AT,
        len: 4096,
        arg: u64::MAX,
        ..Default::default()
    });
    // Ring and buffer are translated: what is left of the operation is on its way.
    eventually("both are translated", || {
        wire.get(regs::TLB_MISSES) == before + 2
    });
    wire.shoot_down(BUFFER_AT);
    wire.client.dma_unmap(BUFFER, 4096).expect("unmapped");
    // From here on the memory is the program's.
    let mut page = [0; 4096];
    buffer.read_exact_at(&mut page, 0).expect("read");
    let written = page == [0xff; 4096];
    let record = wire.wait(fill);
    let mut later = [0; 4096];
    buffer.read_exact_at(&mut later, 0).expect("read");
    assert_eq!(page, later, "written after it was unmapped");
    let errors = wire.get(regs::BUS_ERRORS);
    drop(wire);
    let report = served.report();
    let lines = events(&report, "bus_error").len() as u64;
    assert_eq!(errors, lines, "each bus error has its line");
    (record, written, report)
}

#[test]
fn an_access_that_a_skipped_drain_left_under_way_is_a_bus_error_and_a_stale_access() {
    let (record, written, report) = unmap_under_way(DebugConfig {
        skip_drain: true,
        bus_delay_us: 1_000_000,
    });
    assert_eq!(record.status, Status::BusError as u32);
    assert_eq!(record.fault_addr, BUFFER_AT);
    assert!(!written);
    let [error] = events(&report, "bus_error")[..] else {
        panic!("one bus error: {report:?}");
    };
    assert_eq!(error["context"], 0);
    assert_eq!(error["iova"], format!("{BUFFER_AT:#x}"));
    assert_eq!(error["gpa"], format!("{BUFFER:#x}"));
    let stale = events(&report, "stale_access");
    let buffer = format!("{BUFFER_AT:#x}");
    let of_buffer = stale.iter().filter(|event| event["iova"] == buffer).count();
    assert_eq!(of_buffer, 1, "one stale access to the buffer: {report:?}");
    // A look at the ring may be under way, too: then the drain that was skipped was for that as well.
    assert!(stale.iter().all(|event| event["kind"] == "OutlivedDrain"));
    let summary = report.last().expect("a summary");
    assert_eq!(summary["bus_errors"], 1);
    assert_eq!(summary["oracle_stale"], stale.len());
}

#[test]
fn a_drain_waits_for_the_slow_bus() {
    let (record, written, report) = unmap_under_way(DebugConfig {
        skip_drain: false,
        bus_delay_us: 300_000,
    });
    assert_eq!(record.status, Status::Success as u32);
    assert!(written, "the drain ended before the access");
    assert!(events(&report, "bus_error").is_empty(), "{report:?}");
    assert!(events(&report, "stale_access").is_empty(), "{report:?}");
}

/// A program can make bus errors as it likes: they are counted, but fill no disk.
#[test]
fn bus_errors_are_all_counted_and_some_reported() {
    let served = Served::new(Config::default(), true);
    let mut wire = Wire::connect(&served.socket);
    wire.start();
    wire.leaf(BUFFER_AT, Pte::leaf(Gpa(BUFFER), true));
    for _ in 0..150 {
        let n = wire.submit(Descriptor {
            opcode: Opcode::Crc32c as u8,
            src: BUFFER_AT,
            len: 64,
            ..Default::default()
        });
        assert_eq!(wire.wait(n).status, Status::BusError as u32);
    }
    assert_eq!(wire.get(regs::BUS_ERRORS), 150);
    // A table outside RAM counts as well.
    wire.write(0x11_000, &Pte::table(Gpa(BUFFER)).0.to_le_bytes());
    // The walk cache knows the table that was there.
    wire.shoot_down(BUFFER_AT + 4096);
    let n = wire.submit(Descriptor {
        opcode: Opcode::Crc32c as u8,
        src: BUFFER_AT + 4096,
        len: 64,
        ..Default::default()
    });
    assert_eq!(wire.wait(n).status, Status::BusError as u32);
    assert_eq!(wire.get(regs::BUS_ERRORS), 151);
    drop(wire);
    let report = served.report();
    assert_eq!(events(&report, "bus_error").len(), 100);
    let summary = report.last().expect("a summary");
    assert_eq!(summary["bus_errors"], 151);
    // And the stop at the end, which a client can make as many of.
    assert_eq!(summary["events_left_out"], 52);
}
