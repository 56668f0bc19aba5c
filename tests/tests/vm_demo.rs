//! The tour, and what it says to machines.

use extlb_tests::{output, transcript};
use serde_json::Value;

const RIG: &str = env!("CARGO_BIN_EXE_extlb-under-test");

#[test]
fn the_tour_passes_and_its_json_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tour.json");
    let got = output(RIG, &["demo", "--json", path.to_str().unwrap()]).unwrap();
    assert_eq!(got.status.code(), Some(0), "{}", transcript(&got));

    let json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(json["passed"], true);
    for key in ["qemu", "accelerator", "kernel", "cores"] {
        assert!(
            !json["environment"][key].is_null(),
            "environment.{key}: {json:#}"
        );
    }
    let steps = json["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 4);
    assert!(steps.iter().all(|step| step["passed"] == true), "{json:#}");
    let figure = |name: &str, figure: &str| {
        let step = steps.iter().find(|step| step["name"] == name);
        let step = step.unwrap_or_else(|| panic!("no step {name}: {json:#}"));
        step["figures"][figure]
            .as_u64()
            .unwrap_or_else(|| panic!("{name}.{figure}: {json:#}"))
    };
    assert!(figure("demand-faults", "page_requests") > 0);
    assert_eq!(figure("demand-faults", "vm_lck_kib"), 0);
    assert_eq!(figure("demand-faults", "vm_pin_kib"), 0);
    assert!(figure("unmap-under-fire", "shootdowns") >= 5_000);
    assert!(figure("unmap-under-fire", "operations") > 0);
    for name in ["demand-faults", "unmap-under-fire", "memory-pressure"] {
        assert_eq!(figure(name, "stale_accesses"), 0);
    }
    assert!(figure("negative-control", "stale_accesses") > 0);
    let fire = steps
        .iter()
        .find(|step| step["name"] == "unmap-under-fire")
        .unwrap();
    let latency = &fire["figures"]["shootdown_ns"];
    let [p50, p99, max] = ["p50", "p99", "max"].map(|key| latency[key].as_u64().unwrap());
    assert!(0 < p50 && p50 <= p99 && p99 <= max, "{latency}");
}

#[test]
fn the_tour_by_vfio_passes_on_a_stock_kernel() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tour.json");
    let got = output(RIG, &["demo", "--vfio", "--json", path.to_str().unwrap()]).unwrap();
    assert_eq!(got.status.code(), Some(0), "{}", transcript(&got));
    let json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(json["passed"], true);
    let steps = json["steps"].as_array().unwrap();
    let names: Vec<_> = steps.iter().map(|step| &step["name"]).collect();
    assert_eq!(names, ["first-dma", "unmap-under-fire", "memory-pressure"]);
    assert!(steps.iter().all(|step| step["passed"] == true), "{json:#}");
    // What is registered is locked, used or not.
    let figures = &steps[0]["figures"];
    let kib = |name: &str| figures[name].as_u64().unwrap_or_default();
    let locked = kib("vm_lck_kib") + kib("vm_pin_kib");
    assert!(locked >= kib("registered_kib") && locked > 0, "{figures:#}");
    let said = String::from_utf8_lossy(&got.stdout);
    assert!(said.contains("pte notifiers"), "no comparison: {said}");
}
