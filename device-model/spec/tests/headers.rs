//! The C headers in the tree are the ones that the tables print.

use std::fmt::{Result, Write};

fn check(name: &str, print: fn(&mut dyn Write) -> Result) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../driver/kernel/").to_owned() + name;
    let kept = std::fs::read_to_string(&path).expect("the header is in the tree");
    let mut printed = String::new();
    print(&mut printed).expect("a String takes everything");
    assert!(
        kept == printed,
        "{name} is stale; run: cargo run -p extlb-spec --bin extlb-headers"
    );
}

#[test]
fn uapi_header_is_current() {
    check("extlb_uapi.h", extlb_spec::c_header::uapi);
}

#[test]
fn hardware_header_is_current() {
    check("extlb_hw.h", extlb_spec::c_header::hardware);
}
