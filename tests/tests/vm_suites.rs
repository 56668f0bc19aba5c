//! Suites in C: the kernel's own for devices that mirror a page table, and the driver's. What is
//! expected of them is in `tests/expected`.

use std::collections::BTreeMap;

use extlb_tests::{output, transcript};
use nix::errno::Errno;
use serde_json::Value;

const RIG: &str = env!("CARGO_BIN_EXE_extlb-under-test");

/// Runs a suite; exit code, transcript and JSON.
fn suite(arguments: &[&str]) -> (Option<i32>, String, Value) {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("results.json");
    let json_argument = ["--json", json.to_str().unwrap()];
    let got = output(RIG, &[&["test"], arguments, &json_argument].concat()).unwrap();
    let results = std::fs::read(&json).unwrap_or_default();
    let results = serde_json::from_slice(&results).unwrap_or_default();
    (got.status.code(), transcript(&got), results)
}

/// That each test that is expected to fail does so for the error that its reason names, as the
/// suite has said it.
fn assert_reasons(results: &Value, text: &str) {
    let tests = results["tests"].as_array().unwrap();
    let mut wanted = BTreeMap::new();
    for test in tests.iter().filter(|test| test["expected"] == "fail") {
        let name = test["name"].as_str().unwrap();
        let why = test["why"].as_str().unwrap();
        let errno = match why.rsplit(": ").next().unwrap() {
            "EOPNOTSUPP" => Errno::EOPNOTSUPP,
            "EFAULT" => Errno::EFAULT,
            other => panic!("{name}: what error is {other}?"),
        };
        // The suite does not name the variant there.
        let short = name.rsplit('.').next().unwrap();
        let said = format!(":{short}:Expected ret (-{})", errno as i32);
        *wanted.entry(said).or_insert(0) += 1;
    }
    assert!(!wanted.is_empty(), "{text}");
    for (said, count) in wanted {
        assert_eq!(text.matches(&said).count(), count, "{said}\n{text}");
    }
}

/// The names of the tests of which something holds.
fn names(results: &Value, wanted: impl Fn(&Value) -> bool) -> Vec<&str> {
    let tests = results["tests"].as_array().map_or(&[][..], Vec::as_slice);
    let wanted = tests.iter().filter(|test| wanted(test));
    wanted.filter_map(|test| test["name"].as_str()).collect()
}

#[test]
fn the_kernels_suite_for_mirroring_devices_says_what_is_expected() {
    let (code, text, results) = suite(&["hmm"]);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(results["as_expected"], true, "{text}");
    let passed = names(&results, |test| test["result"] == "pass");
    // Reading, writing, copy-on-write, protection, files: whatever the expectations say.
    for test in [
        "anon_read",
        "anon_write_prot",
        "anon_write_child",
        "file_write",
        "anon_teardown",
    ] {
        let name = format!("hmm.hmm_device_private.{test}");
        assert!(passed.contains(&name.as_str()), "{name}\n{text}");
    }
    assert_reasons(&results, &text);
    // Nothing is pretended: what needs memory of the device, or shuts out the processor.
    for test in ["migrate", "exclusive", "snapshot", "double_map", "gup"] {
        let pretended = passed.iter().find(|name| name.contains(test));
        assert_eq!(pretended, None, "{text}");
    }
}

#[test]
fn the_drivers_suites_say_what_is_expected() {
    for name in ["selftest", "mirror"] {
        let (code, text, results) = suite(&[name]);
        assert_eq!(code, Some(0), "{text}");
        assert_eq!(results["as_expected"], true, "{text}");
    }
}

/// A driver that does not hear of changes: both suites find it, and so does the device.
#[test]
fn a_driver_that_hears_of_nothing_is_found() {
    const DEAF: &str = "echo 1 > /sys/kernel/debug/extlb/extlb0/ignore_notifier";
    for (name, found) in [
        ("hmm", "hmm.hmm_device_private.anon_read_multiple"),
        ("selftest", "extlb.mprotect_binds_the_device"),
    ] {
        let (code, text, results) = suite(&[name, "--before", DEAF]);
        assert!(matches!(code, Some(1 | 70)), "{text}");
        assert_eq!(results["as_expected"], false, "{text}");
        let wrong = names(&results, |test| test["result"] != test["expected"]);
        assert!(wrong.contains(&found), "{wrong:?}\n{text}");
    }
}
