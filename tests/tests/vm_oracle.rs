//! The kernel's half of the oracle (`CONFIG_PTE_NOTIFIERS_DEBUG`): a page that is freed while the
//! device maps it is reported, whatever part of the chain is broken, and nothing else is.

use extlb_tests::{output, sections, transcript};

const RIG: &str = env!("CARGO_BIN_EXE_extlb-under-test");
const CHANGES: &str = env!("CARGO_BIN_EXE_extlb-changes");
/// What the kernel shows of the oracle, and the switches that break the chain.
const DEBUG: &str = "/sys/kernel/debug/pte_notifiers";

const FREED: &str = "BUG: pte_notifier: page freed while a device maps it: pfn 0x";
const NOT_MAPPED: &str = "BUG: pte_notifier: registered but not mapped: part of [0x";

/// Runs a script on the debug kernel, with more arguments for the rig.
fn run(arguments: &[&str], script: &str) -> (Option<i32>, String, String) {
    let rig = [
        "run",
        "--flavour",
        "debug",
        "--timeout",
        "1800",
        "--add",
        CHANGES,
    ];
    let command = ["--", "sh", "-c", script];
    let got = output(RIG, &[&rig[..], arguments, &command].concat()).unwrap();
    let said = String::from_utf8_lossy(&got.stdout).into_owned();
    (got.status.code(), said, transcript(&got))
}

/// The report names the page, who was given it and by whom, how it was mapped and who freed it.
fn tells_all(transcript: &str) {
    let mut lines = transcript.lines().skip_while(|line| !line.contains(FREED));
    let first = lines.next().unwrap_or_else(|| panic!("{transcript}"));
    for part in ["mapped 1 times", "of extlb-changes/", "[extlb]"] {
        assert!(first.contains(part), "no {part:?}: {first}");
    }
    let rest: Vec<_> = lines.map(str::trim).collect();
    let at = |text: &str| {
        let at = rest.iter().position(|line| line.contains(text));
        at.unwrap_or_else(|| panic!("no {text:?}: {transcript}"))
    };
    let (mapped, freed) = (at("Mapped at:"), at("Now in "));
    assert!(mapped < freed, "{transcript}");
    let filled = at("pte_notifier_fill+");
    assert!(mapped < filled && filled < freed, "{transcript}");
    assert!(freed < at("Call Trace:"), "{transcript}");
}

#[test]
fn a_flush_that_is_not_told_is_reported() {
    let script = format!("echo Y > {DEBUG}/skip_flush; {CHANGES} munmap");
    let (code, _, transcript) = run(&[], &script);
    tells_all(&transcript);
    assert_eq!(code, Some(70), "{transcript}");
}

#[test]
fn an_unmap_and_an_exit_that_are_not_told_are_reported() {
    let script = format!(
        "echo Y > {DEBUG}/skip_unmap; echo | {CHANGES} --live Unmap; echo N > {DEBUG}/skip_unmap; \
         cat {DEBUG}/reports; \
         echo Y > {DEBUG}/skip_exit; echo | {CHANGES} --live Exit"
    );
    let (code, _, transcript) = run(&[], &script);
    let first = transcript.find(NOT_MAPPED);
    let first = first.unwrap_or_else(|| panic!("{transcript}"));
    assert!(transcript[first..].contains("extlb_clear"), "{transcript}");
    // It was flushed: nothing could go wrong yet.
    assert!(transcript.find(FREED) > Some(first), "{transcript}");
    tells_all(&transcript);
    assert_eq!(code, Some(70), "{transcript}");
}

/// The device lets go of pages late, by more than a busy host may hold the guest up, and the driver
/// does not wait for that.
#[test]
fn an_acknowledgement_that_is_not_waited_for_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let profile = folder.path().join("profile.toml");
    let fault = "[[device.fault]]\nkind = 'delay-ack'\ndelay_us = 1000000\n";
    std::fs::write(&profile, fault).unwrap();
    let script =
        |skip| format!("echo {skip} > /sys/kernel/debug/extlb/extlb0/skip_wait; {CHANGES} munmap");
    // One processor: another one's list of new pages would keep them from being freed at once.
    let rig = [
        "--profile",
        profile.to_str().unwrap(),
        "--append",
        "nr_cpus=1",
    ];
    let (code, said, transcript) = run(&rig, &script("N"));
    assert!(said.contains("\nok 1 munmap"), "{transcript}");
    assert_eq!(code, Some(0), "{transcript}");

    let (code, _, transcript) = run(&rig, &script("Y"));
    tells_all(&transcript);
    assert_eq!(code, Some(70), "{transcript}");
}

/// Ways in which pages go, or change hands, one of each sort: the others differ for the process's page
/// table, but not for a page.
const CHANGED: &str = "munmap dontneed-huge truncate mremap-table mprotect-huge-part fork cow-fork \
    cow-huge ksm pageout-huge reclaim-batched migrate-huge hwpoison collapse exit kill";

#[test]
fn sound_changes_are_not_reported_and_the_cores_own_tests_pass() {
    let script = format!(
        "before=$(cat {DEBUG}/reports); {CHANGES} {CHANGED} && \
         echo == reports && echo $(($(cat {DEBUG}/reports) - before)) && \
         echo == kunit && cat /sys/kernel/debug/kunit/pte_notifier_*/results"
    );
    let (code, said, transcript) = run(&["--append", "numa=fake=2"], &script);
    assert_eq!(code, Some(0), "{transcript}");
    let parts = sections(&said);
    assert_eq!(parts["reports"], "0\n", "{transcript}");
    let results = parts["kunit"];
    let failed = results.lines().find(|line| line.contains("not ok "));
    assert_eq!(failed, None, "{results}");
    let totals = results
        .lines()
        .filter(|line| line.starts_with("# Totals: "));
    let mut passed = 0;
    for total in totals {
        assert!(total.contains("fail:0 skip:0"), "{results}");
        let number = total.split_once("pass:").unwrap().1.split(' ').next();
        passed += number.unwrap().parse::<u32>().unwrap();
    }
    assert!(passed >= 36, "{passed} passed: {results}");
}
