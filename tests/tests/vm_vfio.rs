//! The device in a guest, driven from user space: the suite for all backings, and the order in
//! which memory is taken back.

use std::path::Path;

use extlb_tests::{output, transcript};

const RIG: &str = env!("CARGO_BIN_EXE_extlb-under-test");
const CONFORMANCE: &str = env!("CARGO_BIN_EXE_extlb-conformance");
const WORKER: &str = env!("CARGO_BIN_EXE_extlb-vfio-worker");

/// (passed, the names of those unsupported) in a table of the suite, of which none failed.
fn table(text: &str) -> (usize, Vec<&str>) {
    let with = |word: &str| -> Vec<&str> {
        let name = |line: &'_ str| Some(line.split_once(word)?.0.rsplit_once("  ")?.0.len());
        let lines = text.lines().filter(|line| line.starts_with("  "));
        lines
            .filter_map(|line| Some(line.get(..name(line)?)?.trim()))
            .collect()
    };
    assert_eq!(with(" ms  FAILED"), [""; 0], "{text}");
    (with(" ms  passed").len(), with(" ms  unsupported"))
}

/// Runs the suite in a guest: nothing may fail, and only these checks may be unsupported.
fn suite(rig: &[&str], way: &str, unsupported: &[&str]) {
    let script = format!("exec {CONFORMANCE} --backing {way} --device \"$EXTLB_BDF\"");
    let command = ["--add", CONFORMANCE, "--", "sh", "-c", &script];
    let got = output(RIG, &[&["run"], rig, &command].concat()).unwrap();
    assert_eq!(got.status.code(), Some(0), "{}", transcript(&got));
    let stdout = String::from_utf8_lossy(&got.stdout);
    let (passed, found) = table(&stdout);
    assert!(passed >= 30, "{passed} passed: {stdout}");
    assert_eq!(found, unsupported);
}

/// What a driver in user space cannot do.
const BY_VFIO: [&str; 5] = [
    "pages follow the process",
    "pages follow by an mmu notifier",
    "pages follow by interval notifiers",
    "one context registers memory twice",
    "translations agree with the process",
];

#[test]
fn the_suite_passes_by_vfio_group_on_a_stock_kernel() {
    suite(&["--kernel", "stock"], "vfio-group", &BY_VFIO);
}

/// Debian's kernel has no iommufd.
#[test]
fn the_suite_passes_by_iommufd_on_the_patched_kernel() {
    let rig = ["--iommu", "intel", "--bind", "vfio-pci"];
    suite(&rig, "vfio-cdev", &BY_VFIO);
}

#[test]
fn the_suite_passes_over_the_kernels_driver() {
    let unsupported = [
        "one context registers memory twice",
        "a restart begins afresh",
    ];
    suite(&[], "kernel", &unsupported);
}

/// Takes memory back in a guest under a device whose accesses take long; what the program saw, by
/// word, and the rig's exit code.
fn take_back(skip_drain: bool) -> (impl Fn(&str) -> u64, Option<i32>, String) {
    let folder = tempfile::tempdir().unwrap();
    let profile = folder.path().join("profile.toml");
    // Two engines, awake all the time: one serves commands while the other is in the midst of an
    // access.
    let text = format!(
        "memory = \"512M\"\nsmp = 2\n[device]\nengines = 2\npoll_us = 1000000\n\
         [device.debug]\n\
         bus_delay_us = 100000\nskip_drain = {skip_drain}\n"
    );
    std::fs::write(&profile, text).unwrap();
    let rig = ["run", "--kernel", "stock", "--profile", name(&profile)];
    let script = format!("{WORKER} --device $EXTLB_BDF take-back");
    let command = ["--add", WORKER, "--", "sh", "-c", &script];
    let got = output(RIG, &[&rig[..], &command].concat()).unwrap();
    let said = transcript(&got);
    let words: Vec<String> = String::from_utf8_lossy(&got.stdout)
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    let seen = said.clone();
    let count = move |name: &str| {
        let at = words.iter().position(|word| word == name);
        let value = at.and_then(|at| words.get(at + 1)?.parse().ok());
        value.unwrap_or_else(|| panic!("no {name:?}: {seen}"))
    };
    (count, got.status.code(), said)
}

fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn memory_is_taken_back_only_when_the_device_is_done() {
    let (count, code, said) = take_back(false);
    assert_eq!(code, Some(0), "{said}");
    assert!(count("cut") > 0, "nothing was under way: {said}");
    assert_eq!((count("late"), count("bus_errors")), (0, 0), "{said}");
}

#[test]
fn an_access_that_was_not_waited_for_finds_no_memory() {
    let (count, code, said) = take_back(true);
    // The IOMMU's mapping is gone, so nothing happens to whoever has the memory now.
    assert!(count("late") > 0, "nothing was late: {said}");
    assert!(count("bus_errors") >= count("late"), "{said}");
    // The device's own oracle tells, too.
    assert_eq!(code, Some(70), "{said}");
    assert!(said.contains("OutlivedDrain"), "{said}");
}
