//! The ways to follow a process, on the patched kernel and on Debian's own, under the device's oracle:
//! it compares each access with the process's page table, and a stale one ends the run with 70.

use extlb_tests::{output, sections, transcript};

const RIG: &str = env!("CARGO_BIN_EXE_extlb-under-test");
const CONFORMANCE: &str = env!("CARGO_BIN_EXE_extlb-conformance");
const CHANGES: &str = env!("CARGO_BIN_EXE_extlb-changes");
const STOCK: [&str; 4] = ["--kernel", "stock", "--bind", "extlb"];
const DEBUGFS: &str = "/sys/kernel/debug/extlb/extlb0";

/// Runs a script in a guest: its standard output, the exit code, and all that was printed.
fn run(rig: &[&str], follow: &str, script: &str) -> (String, Option<i32>, String) {
    let given = ["--follow", follow, "--append", "numa=fake=2"];
    let added = ["--add", CONFORMANCE, "--add", CHANGES];
    let command = ["--", "sh", "-c", script];
    let got = output(RIG, &[&["run"], rig, &given, &added, &command].concat()).unwrap();
    let stdout = String::from_utf8_lossy(&got.stdout).into_owned();
    (stdout, got.status.code(), transcript(&got))
}

/// The suite for all backings, what the driver says of a context, and the program's memory taken
/// away, moved and protected under a device that is busy with it.
fn suite() -> String {
    format!(
        "echo == way; extlb-tour load --seconds 1 & sleep 0.5; cut -d, -f1 {DEBUGFS}/contexts; wait; \
         echo == suite; {CONFORMANCE} --backing kernel || exit 1; \
         echo == checks; grep oracle_checks {DEBUGFS}/stats"
    )
}

const UNDER_FIRE: &str = "extlb-tour --step unmap-under-fire --operations 1500 || exit 1";

/// The lines of a report that say that a row does not hold.
fn failed(report: &str) -> Vec<&str> {
    let lines = report.lines();
    lines.filter(|line| line.starts_with("not ok")).collect()
}

/// A way of its own is taken, the device's oracle is on, and all holds.
fn holds(rig: &[&str], follow: &str, more: &str) {
    let script = format!("{}; echo == more; {more}", suite());
    let (stdout, code, said) = run(rig, follow, &script);
    assert_eq!(code, Some(0), "{said}");
    let parts = sections(&stdout);
    let way = parts["way"]
        .lines()
        .any(|line| line == format!("0: {follow}"));
    assert!(way, "{said}");
    let passed = parts["suite"].matches(" ms  passed").count();
    assert!(passed >= 30, "{passed} passed: {said}");
    let checks: u64 = parts["checks"]
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    assert!(checks > 0 || follow == "pinned", "{said}");
    assert_eq!(failed(parts["more"]), [""; 0], "{said}");
}

/// What each way does on the patched kernel when memory changes, at any time.
fn all_changes() -> String {
    format!("{UNDER_FIRE}; {CHANGES} --held; {CHANGES}")
}

#[test]
fn by_an_mmu_notifier() {
    holds(&[], "mmu", &all_changes());
}

#[test]
fn by_interval_notifiers() {
    holds(&[], "interval", &all_changes());
}

/// All changes: see `vm_changes.rs`.
#[test]
fn by_pte_notifiers() {
    holds(&[], "pte", UNDER_FIRE);
}

#[test]
fn by_pinned_memory() {
    holds(&[], "pinned", "true");
}

#[test]
fn by_an_mmu_notifier_without_the_patch() {
    holds(&STOCK, "mmu", &format!("{UNDER_FIRE}; {CHANGES} --held"));
}

#[test]
fn by_interval_notifiers_without_the_patch() {
    holds(
        &STOCK,
        "interval",
        &format!("{UNDER_FIRE}; {CHANGES} --held"),
    );
}

#[test]
fn by_pinned_memory_without_the_patch() {
    holds(&STOCK, "pinned", "true");
}

/// A fill that does not look again whether its pages were taken away in the meantime.
#[test]
fn a_fill_that_does_not_look_again_is_found() {
    // Reads only: what the device would write to is somebody else's.
    let rows = "held-dontneed held-remap held-unmap";
    for follow in ["mmu", "interval"] {
        let script = format!("echo 1 > {DEBUGFS}/ignore_stale; {CHANGES} --held {rows}");
        let (stdout, code, said) = run(&[], follow, &script);
        assert_eq!(failed(&stdout).len(), 3, "{said}");
        // The device has told the rig, too.
        assert_eq!(code, Some(70), "{said}");
    }
}

#[test]
fn what_needs_the_patch_is_refused_without() {
    let got = output(
        RIG,
        &[&["run"], &STOCK[..], &["--follow", "pte", "--", "true"]].concat(),
    );
    let got = got.unwrap();
    assert_eq!(got.status.code(), Some(69), "{}", transcript(&got));
    assert!(transcript(&got).contains("needs the patched kernel"));
    let got = output(
        RIG,
        &["run", "--kernel", "stock", "--follow", "mmu", "--", "true"],
    )
    .unwrap();
    assert_eq!(got.status.code(), Some(69), "{}", transcript(&got));
    assert!(transcript(&got).contains("--bind extlb"));
}

/// The comparison runs, and shows that a way takes from the device what changes, and hardly more.
#[test]
fn what_each_way_takes_away_is_compared() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("figures.json");
    let json = json.to_str().unwrap();
    let got = output(RIG, &["bench", "notifiers", "--size", "32", "--json", json]).unwrap();
    let said = transcript(&got);
    assert_eq!(got.status.code(), Some(0), "{said}");
    let figures: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let ways = figures["ways"].as_array().unwrap();
    let names: Vec<_> = ways
        .iter()
        .map(|way| way["way"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["no device", "pte", "mmu", "interval", "pinned"]);
    for way in &ways[1..4] {
        let changes = way["changes"].as_array().unwrap();
        let change = |name: &str| {
            changes
                .iter()
                .find(|change| change["name"] == name)
                .unwrap()
        };
        // 16 of 8192 pages at a time, 500 times; with 4096 pages beside them.
        assert_eq!(change("parts")["shot"], 8000, "{way}");
        assert_eq!(change("parts")["beyond"], 0, "{way}");
        assert!(
            change("reclaim")["shot"].as_u64().unwrap() >= 8192 * 9 / 10,
            "{way}"
        );
        assert!(
            change("parts, busy")["page_requests"].as_u64().unwrap() > 0,
            "{way}"
        );
    }
}
