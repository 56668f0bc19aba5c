//! Runs recorded by the server, with a client at a socket and the machine's clock, and replayed
//! without any of these.

mod wire;

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::process::{Command, Output};

use extlb_device::Config;
use extlb_device::record::{Ended, Options, Replayed, replay};
use extlb_spec::pte::Pte;
use extlb_spec::work::{Descriptor, Opcode, Status};
use extlb_spec::{Gpa, regs};
use wire::program::{BINARY, Program};
use wire::*;

const SRC: u64 = 0x10_0000;
const DST: u64 = 0x11_0000;

/// What a driver does, with work under way at the end if `leave_busy`.
fn drive(wire: &mut Wire, leave_busy: bool) {
    wire.start();
    for page in 0..4 {
        let at = page * 4096;
        wire.leaf(SRC + at, Pte::leaf(Gpa(0x8_0000 + at), true));
        wire.leaf(DST + at, Pte::leaf(Gpa(0x9_0000 + at), true));
        wire.write(0x8_0000 + at, &[page as u8 + 1; 4096]);
    }
    for opcode in [Opcode::Copy, Opcode::Crc32c, Opcode::Fill, Opcode::Compare] {
        let n = wire.submit(Descriptor {
            opcode: opcode as u8,
            src: SRC,
            dst: DST,
            len: 4 * 4096,
            ..Default::default()
        });
        let record = wire.wait(n);
        assert_ne!(record.status, Status::Pending as u32);
    }
    wire.shoot_down(DST + 4096);
    wire.get(regs::TLB_MISSES);
    // A page request that nobody answers.
    wire.submit(Descriptor {
        opcode: Opcode::Fill as u8,
        dst: DST,
        len: 2 * 4096,
        ..Default::default()
    });
    eventually("the page is asked for", || {
        wire.get(regs::PAGE_REQUESTS) == 1
    });
    if !leave_busy {
        // Stopped with the operation half done, and once more from the start.
        wire.set(regs::CTRL, regs::ctrl::RESET.into());
        wire.configure();
        wire.enable();
        wire.start_context();
    }
}

fn replayed(file: &Path) -> Replayed {
    let file = BufReader::new(File::open(file).expect("a file"));
    replay(Box::new(file), Options::default()).expect("the same")
}

fn command(arguments: &[&str]) -> Output {
    let output = Command::new(BINARY).args(arguments).output();
    output.expect("runs")
}

#[test]
fn a_served_run_is_replayed() {
    let served = Served::recorded(Config::default());
    let mut wire = Wire::connect(&served.socket);
    drive(&mut wire, false);
    drop(wire);
    let file = served.folder.path().join("run");
    let kept = tempfile::tempdir().expect("a folder");
    let copy = kept.path().join("run");
    // The folder goes with the server; the server ends with its client.
    let link = std::fs::hard_link(&file, &copy);
    link.expect("kept");
    let report = served.report();
    let summary = report.last().expect("a summary");
    let replayed = replayed(&copy);
    assert_eq!(replayed.ended, Ended::Complete);
    assert_eq!(replayed.totals.bytes, summary["bytes"]);
    assert!(replayed.totals.tlb_shot_down > 0 && replayed.totals.page_requests > 0);

    let path = copy.to_str().expect("UTF-8");
    let listed = command(&["replay", path, "--print"]);
    assert!(listed.status.success());
    let text = String::from_utf8(listed.stdout).expect("UTF-8");
    for part in [
        "mmio write CTRL = 0x1",
        "bus master on",
        "the same in all",
        "to the end of the run",
    ] {
        assert!(text.contains(part), "{part}");
    }
    let until = command(&["replay", path, "--until", "10"]);
    assert!(String::from_utf8_lossy(&until.stdout).contains("10 entries"));

    let config = kept.path().join("other.toml");
    std::fs::write(&config, "[tlb]\nsets = 1\nways = 1\n").expect("written");
    let other = command(&["replay", path, "--config", config.to_str().expect("UTF-8")]);
    assert_eq!(other.status.code(), Some(1));
    let text = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(
        text.contains("recorded: ") && text.contains("replayed: "),
        "{text}"
    );
    let none = command(&["replay", "/nonexistent"]);
    assert_eq!(none.status.code(), Some(1));
}

/// The record is of the device itself, and not of what breaks it.
#[test]
fn a_run_of_a_broken_device_is_replayed() {
    let config = Config::from_toml(
        "fault_seed = 7\n[[fault]]\nkind = \"poison-data\"\n[[fault]]\nkind = \"repeat-interrupt\"\n",
    );
    let served = Served::recorded(config.expect("a configuration"));
    let mut wire = Wire::connect(&served.socket);
    drive(&mut wire, false);
    let kept = tempfile::tempdir().expect("a folder");
    let copy = kept.path().join("run");
    std::fs::hard_link(served.folder.path().join("run"), &copy).expect("kept");
    drop(wire);
    let report = served.report();
    assert!(!events(&report, "fault").is_empty(), "none was injected");
    assert_eq!(replayed(&copy).ended, Ended::Complete);
}

#[test]
fn a_run_of_a_server_that_was_killed_is_replayed_as_far_as_it_goes() {
    let folder = tempfile::tempdir().expect("a folder");
    let (socket, run) = (folder.path().join("socket"), folder.path().join("run"));
    let recorded = ["--record", run.to_str().expect("UTF-8")];
    let server = Program::listening(&socket, &recorded);
    let mut wire = Wire::connect(&socket);
    drive(&mut wire, true);
    // The device sleeps soon: then all is in the file.
    let size = || std::fs::metadata(&run).expect("a file").len();
    let is_written = || size() > 10_000 && replayed(&run).calls > 20;
    eventually("the file is written", is_written);
    server.kill();
    let replayed = replayed(&run);
    assert_eq!(replayed.ended, Ended::Cut);
    assert!(replayed.calls > 20);
}
