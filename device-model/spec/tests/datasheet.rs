//! The datasheet in the tree is the one that the tables and the prose print.

use std::process::Command;

#[test]
fn datasheet_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../DATASHEET.md");
    let kept = std::fs::read_to_string(path).expect("the datasheet is in the tree");
    let printer = Command::new(env!("CARGO_BIN_EXE_extlb-datasheet"))
        .output()
        .expect("the printer is built");
    let errors = String::from_utf8_lossy(&printer.stderr);
    assert!(printer.status.success(), "{errors}");
    assert!(
        kept.as_bytes() == printer.stdout,
        "DATASHEET.md is stale; run: cargo run -q -p extlb-spec --bin extlb-datasheet > device-model/DATASHEET.md"
    );
}
