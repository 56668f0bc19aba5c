//! Whatever is done to the driver, it answers, and nobody else notices.

use std::collections::BTreeMap;

use extlb_tests::{output, transcript};

const RIG: &str = env!("CARGO_BIN_EXE_extlb-under-test");
const ABUSE: &str = env!("CARGO_BIN_EXE_extlb-abuse");

/// Runs kinds of abuse in a guest; the figures of each.
fn abuse(guest: &[&str], arguments: &[&str]) -> Vec<BTreeMap<String, u64>> {
    let run = ["run", "--timeout", "900"];
    let got = output(RIG, &[&run[..], guest, &["--", ABUSE], arguments].concat()).unwrap();
    let said = String::from_utf8_lossy(&got.stdout);
    assert_eq!(got.status.code(), Some(0), "{}", transcript(&got));
    assert!(!said.contains("not ok"), "{}", transcript(&got));
    let figures = said.lines().filter_map(|line| line.strip_prefix("# json "));
    figures
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn hostile_calls_get_an_errno_and_do_no_harm() {
    let figures = abuse(&[], &["fuzz", "--threads", "4"]);
    assert!(figures[0]["bystander_operations"] > 10, "{figures:?}");
}

#[test]
fn killed_processes_leave_nothing_behind() {
    let figures = abuse(&[], &["kill"]);
    assert!(figures[0]["killed_working"] > 100, "{figures:?}");
}

/// Unbound, reset, removed, unloaded: four times each.
#[test]
fn a_device_that_goes_is_an_error_and_no_hang() {
    let figures = abuse(&[], &["unload"]);
    for way in ["unbind", "reset", "remove", "reload"] {
        assert_eq!(figures[0][way], 4, "{figures:?}");
    }
    assert!(figures[0]["bystander_losses"] > 0, "{figures:?}");
}
