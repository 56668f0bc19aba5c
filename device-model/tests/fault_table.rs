//! The table of faults says what is there: every kind, under its name, with tests that exist.

use std::path::Path;

use extlb_device::fault::{Kind, Rule, TABLE, document, help};

#[test]
fn every_kind_has_its_entry_and_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for (n, entry) in TABLE.iter().enumerate() {
        assert_eq!(entry.kind as usize, n, "{}", entry.name);
        assert_eq!(entry.kind.name(), entry.name);
        let rule: String = entry.name.to_owned()
            + &entry
                .needs
                .iter()
                .map(|name| format!(",{name}=1"))
                .collect::<String>();
        let rule: Rule = rule.parse().expect("what it needs is enough");
        assert_eq!(rule.kind, entry.kind);
        assert!(help().contains(entry.name));
        for text in [entry.does, entry.noticed_by] {
            assert!(text.ends_with('.') && text.len() > 10, "{}", entry.name);
        }
        assert!(!entry.tests.is_empty(), "{}", entry.name);
        for test in entry.tests {
            let (file, function) = test.split_once("::").expect("file::function");
            let text = std::fs::read_to_string(root.join(file));
            let text = text.unwrap_or_else(|e| panic!("{file}: {e}"));
            assert!(text.contains(&format!("fn {function}()")), "{test}");
        }
    }
    assert_eq!(TABLE.len(), Kind::DisconnectMidDma as usize + 1, "the last");
}

#[test]
fn the_document_in_the_tree_is_the_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/FAULTS.md");
    let kept = std::fs::read_to_string(path).expect("FAULTS.md is in the tree");
    assert!(
        kept == document(),
        "FAULTS.md is stale; run: cargo run -q -p extlb-device --example faults > device-model/FAULTS.md"
    );
}
