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

#[test]
fn processes_that_end_stop_or_share_disturb_nobody() {
    let kinds = ["oom", "exhaust", "limit", "stop", "share", "forks"];
    let figures = abuse(&["--memory", "384M"], &kinds);
    assert_eq!(figures.len(), kinds.len(), "{figures:?}");
    for short in [0, 1] {
        assert_eq!(figures[short]["killed"], 2, "{figures:?}");
    }
}

#[test]
fn memory_that_the_device_uses_can_be_taken_out_of_the_machine() {
    let guest = ["--append", "movablecore=512M"];
    let figures = abuse(&guest, &["offline"]);
    assert!(figures[0]["pages_moved"] > 1000, "{figures:?}");
}

/// The kernel, the programs and a bystander measure how long they are held up; see the program.
#[test]
fn a_device_that_does_not_acknowledge_holds_memory_up_no_longer_than_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    let profile = folder.path().join("profile.toml");
    // For each limit; 8 are more than can be waited for at a time.
    let fault =
        |after| format!("[[device.fault]]\nkind = 'skip-ack'\nafter = {after}\ntimes = 8\n");
    std::fs::write(&profile, [200, 800, 1600].map(fault).concat()).unwrap();
    let profile = profile.to_str().unwrap();
    let run = ["run", "--timeout", "600", "--profile", profile, "--"];
    let got = output(RIG, &[&run[..], &[ABUSE, "timeout"]].concat()).unwrap();
    let said = transcript(&got);
    // A fence is a report of the kernel's.
    assert_eq!(got.status.code(), Some(70), "{said}");
    let report = "no acknowledgment of an invalidation; the device is fenced off";
    assert!(said.contains(report), "{said}");
    assert!(said.contains("\nok 1 timeout\n"), "{said}");
    for limit in [200, 1000, 3000] {
        assert!(said.contains(&format!("driver_ms_of_{limit}")), "{said}");
    }
}
