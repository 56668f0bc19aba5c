//! What the kernel does with many pages at once costs few waits for the device.

use extlb_tests::{output, transcript};
use serde_json::Value;

const RIG: &str = env!("CARGO_BIN_EXE_extlb-under-test");
const CHANGES: &str = env!("CARGO_BIN_EXE_extlb-changes");
/// Two nodes, so that pages have somewhere to migrate to.
const GUEST: [&str; 4] = ["run", "--append", "numa=fake=2", "--"];
const PAGES: u64 = 4096;

/// Of these the kernel flushes each page on its own, because it is about to be written.
fn is_written_out(way: &str) -> bool {
    way.starts_with("reclaim to swap")
}

#[test]
fn many_pages_need_few_waits_unless_the_driver_takes_them_one_by_one() {
    let pages = PAGES.to_string();
    let figures = [CHANGES, "--figures", "--json", "--pages", &pages];
    let got = output(RIG, &[&GUEST[..], &figures].concat()).unwrap();
    assert_eq!(got.status.code(), Some(0), "{}", transcript(&got));
    let said = String::from_utf8_lossy(&got.stdout);
    let lines = said.lines().filter(|line| line.starts_with('{'));
    let figures: Vec<Value> = lines.map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(figures.len(), 12, "{}", transcript(&got));
    for line in figures {
        let way = line["way"].as_str().unwrap();
        let batch = line["batch"].as_bool().unwrap();
        let pages = line["pages"].as_u64().unwrap();
        let waits = line["waits"].as_u64().unwrap();
        let what = format!("{way}, batch={batch}: {pages} pages, {waits} waits");
        assert!(pages * 10 >= PAGES * 9, "{what}");
        match batch {
            // Reclaim takes 32 pages at a time, migration up to 512.
            true if !is_written_out(way) => assert!(waits * 16 <= pages, "{what}"),
            true => assert!(waits <= pages, "{what}"),
            // So the test can fail.
            false => assert!(waits * 10 >= pages * 9, "{what}"),
        }
    }
}

#[test]
fn a_batch_that_is_not_completed_is_found() {
    let broken = [CHANGES, "--figures", "--broken-batches"];
    let got = output(RIG, &[&GUEST[..], &broken].concat()).unwrap();
    let said = String::from_utf8_lossy(&got.stdout);
    assert!(said.contains("found: "), "{}", transcript(&got));
}
