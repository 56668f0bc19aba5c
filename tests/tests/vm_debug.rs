//! The guest with the kernel's own checkers switched on: clean at work, and they do notice.

use std::path::Path;

use extlb_tests::{output, transcript};

const RIG: &str = env!("CARGO_BIN_EXE_extlb-under-test");
const FLAVOUR: [&str; 2] = ["--flavour", "debug"];

fn with_flavour<'a>(command: &'a str, words: &[&'a str]) -> Vec<&'a str> {
    [&[command], &FLAVOUR[..], words].concat()
}

/// A guest with the planted faults' module, which is made to plant these.
fn plant(faults: &[&str]) -> std::process::Output {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("plant");
    let folder = folder.to_str().unwrap();
    let got = output(RIG, &["--flavour", "debug", "kernel", "module", folder]).unwrap();
    assert!(got.status.success(), "{}", transcript(&got));
    let built = String::from_utf8(got.stdout).unwrap();
    let add = format!("{}:/plant.ko", built.trim());
    let script = faults
        .iter()
        .map(|fault| format!("insmod /plant.ko what={fault} && rmmod extlb_plant && "))
        .collect::<String>()
        + "echo planted";
    let words = ["--add", &add, "--", "sh", "-c", &script];
    let got = output(RIG, &with_flavour("run", &words)).unwrap();
    let said = String::from_utf8_lossy(&got.stdout);
    assert!(said.contains("planted"), "{}", transcript(&got));
    got
}

/// The device under changes of its memory; the whole tour takes many times as long here.
#[test]
fn memory_changes_under_the_device_without_a_report() {
    let step = "extlb-tour --step unmap-under-fire --operations 300 && echo passed";
    let words = ["--timeout", "1800", "--", "sh", "-c", step];
    let got = output(RIG, &with_flavour("run", &words)).unwrap();
    assert_eq!(got.status.code(), Some(0), "{}", transcript(&got));
    let said = String::from_utf8_lossy(&got.stdout);
    assert!(said.ends_with("passed\n"), "{}", transcript(&got));
}

/// The checkers are really there, one by one: each of these is somebody's to notice.
#[test]
fn each_checker_notices_its_fault() {
    // Locks first: the other reports switch lockdep off.
    let got = plant(&["lock", "list", "timer", "page", "free", "sleep"]);
    assert_eq!(got.status.code(), Some(70), "{}", transcript(&got));
    let said = String::from_utf8_lossy(&got.stderr);
    for report in [
        "list_del corruption",
        "ODEBUG: init active",
        "pagealloc: ",
        "BUG: KASAN: slab-use-after-free in plant_free",
        "BUG: sleeping function called from invalid context",
        "WARNING: possible circular locking dependency detected",
    ] {
        assert!(
            said.contains(report),
            "nobody said {report}: {}",
            transcript(&got)
        );
    }
}

/// What leaked is only looked for at the very end, and nothing else gives this guest away.
#[test]
fn a_leak_is_noticed_when_the_guest_is_switched_off() {
    let got = plant(&["leak"]);
    assert_eq!(got.status.code(), Some(70), "{}", transcript(&got));
    let said = String::from_utf8_lossy(&got.stderr);
    let others = said
        .split("the guest's kernel reported:\n")
        .skip(1)
        .filter(|report| {
            !report
                .trim_start()
                .starts_with("kmemleak: unreferenced object")
        });
    assert_eq!(others.count(), 0, "{}", transcript(&got));
    for part in ["kmemleak: unreferenced object", "(size 192)", "insmod"] {
        assert!(said.contains(part), "no {part}: {}", transcript(&got));
    }
}
