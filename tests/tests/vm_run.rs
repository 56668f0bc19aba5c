//! `extlb run`: what goes in, what comes out, and every way in which it can end.

use std::time::{Duration, Instant};

use extlb_tests::{Running, ends_within, output, transcript};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const RIG: &str = env!("CARGO_BIN_EXE_extlb-under-test");
/// For the guest to come up, with all there is to build before on a new machine.
const PATIENCE: Duration = Duration::from_secs(45 * 60);

#[test]
fn output_and_exit_code_pass_through() {
    let script = "echo to out; echo to err >&2; exit 37";
    let got = output(RIG, &["run", "--", "sh", "-c", script]).unwrap();
    assert_eq!(got.status.code(), Some(37), "{}", transcript(&got));
    assert_eq!(String::from_utf8_lossy(&got.stdout), "to out\n");
    assert!(
        String::from_utf8_lossy(&got.stderr).contains("to err\n"),
        "{}",
        transcript(&got)
    );
}

#[test]
fn files_are_added_and_the_device_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a file");
    std::fs::write(&file, "content\n").unwrap();
    let add = format!("{}:/data/a file", file.display());
    let script = "cat '/data/a file' && test -c /dev/extlb0 && ls /sys/module/extlb";
    let got = output(RIG, &["run", "--add", &add, "--", "sh", "-c", script]).unwrap();
    assert_eq!(got.status.code(), Some(0), "{}", transcript(&got));
    assert!(String::from_utf8_lossy(&got.stdout).starts_with("content\n"));
}

#[test]
fn a_command_that_does_not_exist_is_not_the_guests_fault() {
    let got = output(RIG, &["run", "--", "no-such-command-anywhere"]).unwrap();
    assert!(
        ![0, 70, 124].contains(&got.status.code().unwrap()),
        "{}",
        transcript(&got)
    );
    assert!(String::from_utf8_lossy(&got.stderr).contains("no-such-command-anywhere"));
}

#[test]
fn a_program_killed_by_a_signal_gives_128_and_its_number() {
    let got = output(RIG, &["run", "--", "sh", "-c", "kill -9 $$"]).unwrap();
    assert_eq!(got.status.code(), Some(128 + 9), "{}", transcript(&got));
}

#[test]
fn time_runs_out_with_124() {
    // The limit counts from the boot; everything is built by then.
    assert!(
        output(RIG, &["run", "--", "true"])
            .unwrap()
            .status
            .success()
    );
    let begin = Instant::now();
    let got = output(RIG, &["run", "--timeout", "15", "--", "sleep", "1000"]).unwrap();
    assert_eq!(got.status.code(), Some(124), "{}", transcript(&got));
    assert!(begin.elapsed() >= Duration::from_secs(15));
}

#[test]
fn a_panic_gives_70_and_the_lines_that_matter() {
    let got = output(
        RIG,
        &["run", "--", "sh", "-c", "echo c > /proc/sysrq-trigger"],
    )
    .unwrap();
    assert_eq!(got.status.code(), Some(70), "{}", transcript(&got));
    assert!(String::from_utf8_lossy(&got.stderr).contains("sysrq triggered crash"));
}

/// Kills a child of the rig while a program runs, and expects a quick and clear end.
fn kill_child(words: &[&str], blamed: &str) {
    let script = "echo running; while :; do sleep 1; done";
    let running = Running::start(RIG, &["run", "--", "sh", "-c", script]).unwrap();
    running.wait_for("running", PATIENCE).unwrap();
    let children = running.children(words).unwrap();
    assert_eq!(children.len(), 1, "one child with {words:?}");
    let begin = Instant::now();
    kill(Pid::from_raw(children[0]), Signal::SIGKILL).unwrap();
    let got = running.finish().unwrap();
    let stderr = String::from_utf8_lossy(&got.stderr);
    assert_eq!(got.status.code(), Some(70), "{stderr}");
    assert!(stderr.contains(blamed), "{stderr}");
    assert!(
        begin.elapsed() < Duration::from_secs(60),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn a_killed_device_ends_the_run() {
    kill_child(&[" device ", "--socket"], "device");
}

#[test]
fn a_killed_qemu_ends_the_run() {
    kill_child(&["vfio-user-pci"], "QEMU");
}

#[test]
fn an_interrupted_rig_leaves_nothing_behind() {
    let script = "echo running; while :; do sleep 1; done";
    let running = Running::start(RIG, &["run", "--", "sh", "-c", script]).unwrap();
    running.wait_for("running", PATIENCE).unwrap();
    let children = running.children(&[]).unwrap();
    assert!(children.len() >= 2, "QEMU and the device: {children:?}");
    kill(Pid::from_raw(running.id()), Signal::SIGTERM).unwrap();
    let got = running.finish().unwrap();
    assert!(!got.status.success());
    for child in children {
        // The kernel kills them when the rig is gone; a large one takes a moment to die.
        assert!(
            ends_within(child, Duration::from_secs(20)),
            "{child} is still there"
        );
    }
}

#[test]
fn other_programs_run_beside_a_busy_device() {
    let script = "extlb-tour load --seconds 25 & load=$!
        for i in 1 2 3 4; do
            dd if=/dev/urandom of=/tmp/a bs=1M count=24 2>/dev/null && gzip -c /tmp/a > /tmp/b &&
            gunzip -c /tmp/b | cmp - /tmp/a || exit 1
            find /proc /sys -name '[0-9]*' > /tmp/c 2>/dev/null
            sort -r /tmp/c | md5sum > /dev/null
        done
        wait $load && grep -v '^$' /sys/kernel/debug/extlb/extlb0/stats";
    let got = output(RIG, &["run", "--memory", "256M", "--", "sh", "-c", script]).unwrap();
    assert_eq!(got.status.code(), Some(0), "{}", transcript(&got));
}

#[test]
fn stale_accesses_give_70_even_if_the_command_succeeds() {
    // The command passes when the oracle finds something; the run must not.
    let got = output(
        RIG,
        &["run", "--", "extlb-tour", "--step", "negative-control"],
    )
    .unwrap();
    let text = transcript(&got);
    assert!(text.contains("PASS negative-control"), "{text}");
    assert_eq!(got.status.code(), Some(70), "{text}");
    assert!(
        String::from_utf8_lossy(&got.stderr).contains("stale access"),
        "{text}"
    );
}
