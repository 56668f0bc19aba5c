//! Every change of a pte reaches the device, and where the driver does not hear of it, that is seen.

use std::collections::BTreeSet;

use extlb_tests::{output, transcript};

const RIG: &str = env!("CARGO_BIN_EXE_extlb-under-test");
const CHANGES: &str = env!("CARGO_BIN_EXE_extlb-changes");
/// Two nodes, so that pages have somewhere to migrate to.
const GUEST: [&str; 4] = ["run", "--append", "numa=fake=2", "--"];

/// The rows, and how each is found to be broken.
fn rows() -> Vec<(String, String)> {
    let got = output(CHANGES, &["--list"]).unwrap();
    assert!(got.status.success(), "{}", transcript(&got));
    let text = String::from_utf8(got.stdout).unwrap();
    let rows = text.lines().map(|line| line.split_once('\t').unwrap());
    rows.map(|(name, how)| (name.to_owned(), how.to_owned()))
        .collect()
}

/// The lines of a KTAP report: each `ok NUMBER NAME` or `not ok NUMBER NAME`, with ` # SKIP`.
fn expected(rows: &[(String, String)]) -> Vec<String> {
    let numbered = (1..).zip(rows);
    numbered
        .map(|(number, (name, _))| format!("ok {number} {name}"))
        .collect()
}

/// The only row that may be skipped: nobody can make compaction take a certain page.
const MAY_BE_SKIPPED: &str = "compaction";

/// What a report says of each row, without the remarks; a skipped one stays recognizable.
fn said(report: &str) -> Vec<String> {
    let lines = report.lines().filter(|line| line.contains("ok "));
    lines
        .map(|line| match line.split_once(" # ") {
            Some((row, remark)) if remark.starts_with("SKIP") && !row.ends_with(MAY_BE_SKIPPED) => {
                format!("{row} # {remark}")
            }
            Some((row, _)) => row.to_owned(),
            None => line.to_owned(),
        })
        .collect()
}

#[test]
fn every_change_reaches_the_device() {
    let got = output(RIG, &[&GUEST[..], &[CHANGES]].concat()).unwrap();
    let report = String::from_utf8_lossy(&got.stdout);
    assert_eq!(said(&report), expected(&rows()), "{}", transcript(&got));
    assert_eq!(got.status.code(), Some(0), "{}", transcript(&got));
}

#[test]
fn every_change_that_the_driver_does_not_hear_of_is_found() {
    let got = output(RIG, &[&GUEST[..], &[CHANGES, "--expect-broken"]].concat()).unwrap();
    let report = String::from_utf8_lossy(&got.stdout);
    assert_eq!(said(&report), expected(&rows()), "{}", transcript(&got));
    // The device has told the rig, too.
    assert_eq!(got.status.code(), Some(70), "{}", transcript(&got));
}

/// The rows that the table of the kernel patch names: all in the last columns of its tests.
#[test]
fn the_table_names_every_row() {
    let table = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../kernel-patch/CHANGES-OF-A-PTE.md"
    );
    let table = std::fs::read_to_string(table).unwrap();
    let mut named = BTreeSet::new();
    let mut has_tests = false;
    for line in table.lines() {
        let Some(cells) = line.strip_suffix(" |").filter(|l| l.starts_with("| ")) else {
            has_tests &= line.starts_with("|--");
            continue;
        };
        let (_, last) = cells.rsplit_once(" | ").unwrap();
        has_tests |= last == "Test";
        if has_tests {
            named.extend(last.split('`').skip(1).step_by(2).map(str::to_owned));
        }
    }
    let rows: BTreeSet<_> = rows().into_iter().map(|(name, _)| name).collect();
    assert_eq!(named, rows);
}
