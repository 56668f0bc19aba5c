//! A fault plan by way of the server: what its report says of it.

mod wire;
use wire::*;

use extlb_device::Config;
use extlb_spec::work::{Descriptor, Opcode, Status};
use extlb_spec::{Gpa, pte::Pte};

/// Memory at bus address and virtual address.
const PAGE: u64 = 0x20_000;

fn config(plan: &str) -> Config {
    Config::from_toml(plan).expect("a configuration")
}

fn fill(wire: &mut Wire) -> u32 {
    wire.leaf(PAGE, Pte::leaf(Gpa(PAGE), true));
    wire.submit(Descriptor {
        opcode: Opcode::Fill as u8,
        dst: PAGE,
        len: 4096,
        arg: u64::MAX,
        ..Default::default()
    })
}

#[test]
fn the_report_says_what_was_injected_when_and_to_what() {
    let plan = "fault_seed = 5\n[[fault]]\nkind = \"poison-data\"\nafter = 1\ntimes = 2\n";
    let served = Served::new(config(plan), true);
    let mut wire = Wire::connect(&served.socket);
    wire.start();
    for _ in 0..5 {
        let n = fill(&mut wire);
        assert_eq!(wire.wait(n).status, Status::Success as u32);
    }
    drop(wire);
    let report = served.report();
    let faults = events(&report, "fault");
    assert_eq!(faults.len(), 2);
    for (n, fault) in (1..).zip(faults) {
        assert_eq!(fault["kind"], "poison-data");
        assert_eq!(fault["number"], n);
        assert!(fault["at_us"].is_u64());
        assert_eq!(fault["to"], format!("write of 4096 bytes at {PAGE:#x}"));
    }
    assert_eq!(report.last().expect("a summary")["faults_injected"], 2);
}

#[test]
fn many_faults_are_all_counted_and_some_reported() {
    let served = Served::new(config("[[fault]]\nkind = \"poison-data\"\n"), true);
    let mut wire = Wire::connect(&served.socket);
    wire.start();
    for _ in 0..450 {
        let n = fill(&mut wire);
        wire.wait(n);
    }
    drop(wire);
    let report = served.report();
    assert_eq!(events(&report, "fault").len(), 400);
    assert_eq!(report.last().expect("a summary")["faults_injected"], 450);
}

#[test]
fn a_server_that_hangs_up_in_the_middle_of_an_access_leaves_silence() {
    // Awake all the time: a doorbell might not be answered any more.
    let plan = "poll_us = 1000000\n[[fault]]\nkind = \"disconnect-mid-dma\"\nafter = 1\n";
    let served = Served::new(config(plan), true);
    let mut wire = Wire::connect(&served.socket);
    wire.start();
    let n = fill(&mut wire);
    assert_eq!(wire.wait(n).status, Status::Success as u32);
    wire.leaf(PAGE, Pte::leaf(Gpa(PAGE), true));
    let n = wire.place(Descriptor {
        opcode: Opcode::Fill as u8,
        dst: PAGE,
        len: 4096,
        ..Default::default()
    });
    let mut byte = [0];
    let end = std::io::Read::read(&mut wire.client.stream, &mut byte);
    assert_eq!(end.expect("no error"), 0, "the end of the connection");
    let report = served.report();
    // The device was stopped, and waited for the access: it is whole, and nothing came after it.
    assert_eq!(wire.read(PAGE), [0; 4096]);
    assert_eq!(wire.record(n).status, Status::Pending as u32);
    assert_eq!(events(&report, "fault")[0]["kind"], "disconnect-mid-dma");
    assert_eq!(report.last().expect("a summary")["faults_injected"], 1);
}

#[test]
fn plans_that_make_no_sense_are_refused_by_name() {
    for (plan, want) in [
        ("[[fault]]\nkind = \"skip-ack\"\noften = 1\n", "often"),
        ("[[fault]]\nkind = \"skip-ack\"\nevery = 0\n", "every = 0"),
        ("[[fault]]\nafter = 1\n", "kind"),
        ("[[fault]]\nkind = \"skip-acks\"\n", "skip-acks"),
        ("[[fault]]\nkind = \"delay-ack\"\n", "needs delay_us"),
        ("[fault]\nkind = \"skip-ack\"\n", "sequence"),
    ] {
        let error = Config::from_toml(plan).expect_err(plan);
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            text += &format!(": {error}");
            cause = error.source();
        }
        assert!(text.contains(want), "{plan}{text}");
    }
    let broken = config("[[fault]]\nkind = \"skip-ack\"\ntimes = 3\n[debug]\nskip_drain = true\n");
    assert_eq!(broken.warnings().len(), 2);
    // What is sent to a device server, as text, is the same again.
    let text = toml::to_string(&broken).expect("text");
    assert_eq!(config(&text), broken);
}
