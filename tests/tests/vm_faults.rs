//! A device that is broken by a plan, in a guest: what the kernel's driver, its programs and the
//! rig notice.

use extlb_tests::{output, transcript};

const RIG: &str = env!("CARGO_BIN_EXE_extlb-under-test");
const PROBE: &str = env!("CARGO_BIN_EXE_extlb-probe");

/// The driver's own counters.
const STATS: &str = "cat /sys/kernel/debug/extlb/extlb0/stats";

/// A run in a guest.
struct Ran {
    code: Option<i32>,
    said: String,
}

impl Ran {
    /// The number behind a word.
    fn count(&self, name: &str) -> u64 {
        let mut words = self.said.split_whitespace();
        words.find(|word| *word == name);
        let value = words.next().and_then(|word| word.parse().ok());
        value.unwrap_or_else(|| panic!("no {name:?}: {}", self.said))
    }

    fn says(&self, text: &str) {
        assert!(self.said.contains(text), "no {text:?}: {}", self.said);
    }

    /// The kernel gave the device up, said so, and the rig with it.
    fn is_fenced(&self) {
        self.is_fenced_for("no acknowledgment of an invalidation");
    }

    fn is_fenced_for(&self, reason: &str) {
        self.says(&format!("{reason}; the device is fenced off"));
        self.says("error: the device is dead");
        self.says("\ndead 1\n");
        assert_eq!(self.code, Some(70), "{}", self.said);
    }
}

/// Runs a script on a device with a fault, given as lines of its table; the kernel's driver waits
/// for an acknowledgement for a second.
fn run(fault: &str, script: &str) -> Ran {
    let folder = tempfile::tempdir().unwrap();
    let profile = folder.path().join("profile.toml");
    let text = format!("append = \"extlb.ack_timeout_ms=1000\"\n[[device.fault]]\n{fault}\n");
    std::fs::write(&profile, text).unwrap();
    let profile = profile.to_str().unwrap();
    let rig = ["run", "--profile", profile, "--add", PROBE];
    let command = ["--timeout", "120", "--", "sh", "-c", script];
    let got = output(RIG, &[&rig[..], &command].concat()).unwrap();
    Ran {
        code: got.status.code(),
        said: transcript(&got),
    }
}

/// Ordinary work, with so much patience for one operation; then the driver's counters.
fn work(fault: &str, patience: u32) -> Ran {
    run(
        fault,
        &format!("{PROBE} patient --patience {patience} && {STATS}"),
    )
}

#[test]
fn an_acknowledgement_that_does_not_come_fences_the_device() {
    let ran = work("kind = 'skip-ack'\nafter = 10", 5000);
    ran.is_fenced();
    assert!(ran.count("completed") > 0, "{}", ran.said);
}

#[test]
fn a_bus_that_hangs_fences_the_device() {
    let ran = work(
        "kind = 'hang-bus'\ndelay_us = 3000000\nafter = 20\ntimes = 1",
        500,
    );
    ran.is_fenced();
    assert_eq!(ran.count("pending"), 1, "{}", ran.said);
}

/// There is no shootdown meanwhile that could find it out; the program that waits is told.
#[test]
fn a_device_that_resets_itself_is_fenced_by_the_watchdog() {
    let ran = work("kind = 'reset-mid-dma'\nafter = 20\ntimes = 1", 30_000);
    ran.is_fenced_for("the device has reset itself");
    assert_eq!(ran.count("pending"), 0, "{}", ran.said);
}

/// The watchdog finds what waits, and the program nothing but a delay.
#[test]
fn lost_interrupts_cost_time_and_nothing_else() {
    for (vector, missed) in [("page-request", 1), ("completion", 0)] {
        let fault = format!("kind = 'lose-interrupt'\nvector = '{vector}'\ntimes = 1");
        let ran = work(&fault, 30_000);
        assert_eq!(ran.code, Some(0), "{}", ran.said);
        assert_eq!(ran.count("pending"), 0, "{}", ran.said);
        assert_eq!(ran.count("completed"), 20, "{}", ran.said);
        assert_eq!(ran.count("missed_interrupts"), missed, "{}", ran.said);
        ran.says("\ndead 0\n");
    }
}

/// Nobody but the device knows of them. The program can give its context up.
#[test]
fn lost_requests_and_responses_are_noticed_by_the_program_only() {
    for fault in [
        "kind = 'lose-request'\ntimes = 1",
        "kind = 'lose-response'\ntimes = 1",
    ] {
        let ran = work(fault, 2000);
        assert_eq!(ran.code, Some(0), "{}", ran.said);
        assert_eq!(ran.count("pending"), 1, "{}", ran.said);
        assert_eq!(ran.count("completed"), 19, "{}", ran.said);
        ran.says("\ndead 0\n");
    }
}

#[test]
fn poisoned_data_is_noticed_by_the_program_only() {
    let ran = work("kind = 'poison-data'\nafter = 20\ntimes = 1", 5000);
    assert_eq!(ran.code, Some(0), "{}", ran.said);
    assert_eq!(ran.count("completed"), 20, "{}", ran.said);
    assert_eq!(ran.count("differs"), 1, "{}", ran.said);
    ran.says("\ndead 0\n");
}

/// Pages that were taken back are still written to: by the tour's own marks in them.
#[test]
fn a_translation_that_was_left_out_is_found_by_the_tour() {
    let ran = run(
        "kind = 'skip-tlb-entry'",
        "extlb-tour --step unmap-under-fire",
    );
    ran.says("FAIL unmap-under-fire");
    assert!(!matches!(ran.code, None | Some(0)), "{}", ran.said);
}
