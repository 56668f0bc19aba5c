//! What QEMU's monitor does to a guest whose device is driven from user space.

use std::time::{Duration, Instant};

use extlb::qmp::Qmp;
use extlb_tests::Running;
use serde_json::json;

const RIG: &str = env!("CARGO_BIN_EXE_extlb-under-test");
const WORKER: &str = env!("CARGO_BIN_EXE_extlb-vfio-worker");
/// For the guest to come up, with all there is to build before on a new machine.
const PATIENCE: Duration = Duration::from_secs(45 * 60);
/// For what takes moments in a guest that is up, and boots: emulated, on a busy machine.
const MOMENTS: Duration = Duration::from_secs(180);

/// The same in each boot, which the first line tells: the first works until the monitor restarts
/// it, the second restarts itself in the midst of work, the third is the last.
const SCRIPT: &str = r#"
set -eu
echo "boot $EXTLB_BOOT"
work="WORKER --device $EXTLB_BDF work"
case $EXTLB_BOOT in
0)
    exec $work
    ;;
1)
    $work --rounds 30
    $work > /tmp/said &
    until grep -q working /tmp/said; do
        kill -0 $! && sleep 0.01
    done
    # At once: nobody is asked to end, no driver to let go.
    reboot -f
    ;;
2)
    $work --rounds 30
    echo the last
    ;;
esac
"#;

#[test]
fn a_guest_is_not_saved_and_restarts_in_the_midst_of_work() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp");
    let script = SCRIPT.replace("WORKER", WORKER);
    let monitor = ["--qmp", socket.to_str().unwrap(), "--reboots", "2"];
    let run = ["run", "--kernel", "stock", "--add", WORKER];
    let command = ["--", "sh", "-c", &script];
    let running = Running::start(RIG, &[&run[..], &monitor, &command].concat()).unwrap();
    running.wait_for("boot 0", PATIENCE).unwrap();
    running.wait_for("working", MOMENTS).unwrap();
    let mut qmp = Qmp::connect(&socket).unwrap();

    save(&mut qmp);
    let save = json!({ "command-line": "savevm now" });
    let said = qmp.execute("human-monitor-command", save).unwrap();
    let said = said.as_str().unwrap();
    assert!(said.starts_with("Error:"), "{said}");
    let status = qmp.execute("query-status", json!({})).unwrap();
    assert_eq!(status["status"], "running");
    // More than was on its way when the monitor was asked.
    for _ in 0..5 {
        running.wait_for("working", MOMENTS).unwrap();
    }

    qmp.execute("system_reset", json!({})).unwrap();
    running.wait_for("boot 1", MOMENTS).unwrap();
    running.wait_for("worked", MOMENTS).unwrap();
    running.wait_for("boot 2", MOMENTS).unwrap();
    running.wait_for("worked", MOMENTS).unwrap();
    running.wait_for("the last", MOMENTS).unwrap();
    let got = running.finish().unwrap();
    let stderr = String::from_utf8_lossy(&got.stderr);
    assert_eq!(got.status.code(), Some(0), "{stderr}");
}

/// Asks for the guest to be saved. vfio-user can save no device. A QEMU that knows says so and names
/// it; up to 11.1 it does not know, and saves the rest without a word. Either way the guest can go
/// on.
fn save(qmp: &mut Qmp) {
    let to = json!({ "uri": "exec:cat > /dev/null" });
    if let Err(refused) = qmp.execute("migrate", to) {
        let refused = refused.to_string().to_lowercase();
        assert!(refused.contains("vfio"), "{refused}");
        return;
    }
    let end = Instant::now() + MOMENTS;
    loop {
        let migration = qmp.execute("query-migrate", json!({})).unwrap();
        match migration["status"].as_str() {
            Some("completed" | "failed") => break,
            _ => assert!(Instant::now() < end, "{migration}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    qmp.execute("cont", json!({})).unwrap();
}
