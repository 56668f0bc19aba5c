//! What locked memory costs: the tour by VFIO beside the latest tour with pte notifiers.
//!
//! Only what was measured is shown: the tour with pte notifiers leaves its result in the cache.

use std::fs;
use std::process::Command;

use anyhow::Result;
use serde_json::{Value, json};

use crate::child;
use crate::paths::{self, Cache};
use crate::toolbox::publish;

/// In the cache.
const KEPT: &str = "tour/latest.json";

/// Keeps the result of a tour with pte notifiers that has passed.
pub fn keep(cache: &Cache, result: &Value) -> Result<()> {
    let said = |command: &mut Command| {
        child::output(command)
            .ok()
            .map(|text| text.trim().to_owned())
    };
    let kept = json!({
        "date": said(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"])),
        "commit": said(
            Command::new("git")
                .arg("-C")
                .arg(paths::repo())
                .args(["describe", "--always", "--dirty"]),
        ),
        "result": result,
    });
    publish(&cache.path(KEPT)?, &serde_json::to_vec_pretty(&kept)?)
}

/// The result kept, if there is one that can be read.
pub fn kept(cache: &Cache) -> Option<Value> {
    let text = fs::read(cache.folder().join(KEPT)).ok()?;
    serde_json::from_slice(&text).ok()
}

/// The figure of a step.
fn figure<'a>(result: &'a Value, step: &str, name: &str) -> Option<&'a Value> {
    let steps = result["steps"].as_array()?;
    let step = steps.iter().find(|found| found["name"] == step)?;
    step["figures"].get(name)
}

fn number(result: &Value, step: &str, name: &str) -> Option<u64> {
    let value = figure(result, step, name)?;
    value
        .as_u64()
        .or_else(|| value.as_f64().map(|value| value as u64))
}

/// A row: what it is about, by VFIO, with pte notifiers.
type Row = [String; 3];

/// The rows for a result by VFIO and one with pte notifiers. A cell without a figure is a dash.
fn rows(vfio: &Value, notified: Option<&Value>) -> Vec<Row> {
    let mib = |kib: u64| format!("{} MiB", kib >> 10);
    let v = |step: &str, name: &str| number(vfio, step, name);
    let n = |step: &str, name: &str| number(notified?, step, name);
    let cell = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let dma = "first-dma";
    let vfio_locked = || {
        let locked = v(dma, "vm_lck_kib")? + v(dma, "vm_pin_kib")?;
        let registered = v(dma, "registered_kib")?;
        Some(format!("{} of {} registered", mib(locked), mib(registered)))
    };
    let faults = "demand-faults";
    let notified_locked = || {
        let locked = n(faults, "vm_lck_kib")? + n(faults, "vm_pin_kib")?;
        // A copy and two sums were counted; the device touched a source and a destination.
        Some(format!(
            "{} of {}",
            mib(locked),
            mib((n(faults, "bytes")? / 3 * 2) >> 10)
        ))
    };
    let pressure = "memory-pressure";
    let memory = |result: &Value| result["environment"]["guest_memory_mib"].as_u64();
    let in_memory = |result: Option<&Value>, held: Option<u64>| {
        Some(format!(
            "{} MiB in a guest of {} MiB",
            held?,
            memory(result?)?
        ))
    };
    let notified_held = || n(pressure, "bytes").map(|bytes| (bytes / 4) >> 20);
    let ended = || {
        Some(
            figure(vfio, pressure, "pinned_outcome")?
                .as_str()?
                .to_owned(),
        )
    };
    let followed = || {
        let (out, back) = (
            n(pressure, "swapped_out_kib")?,
            n(pressure, "swapped_in_kib")?,
        );
        Some(format!("swapped: {} out, {} in", mib(out), mib(back)))
    };
    let sum = |of: &dyn Fn(&str) -> Option<u64>, steps: &[&str]| {
        let found: Vec<u64> = steps.iter().filter_map(|step| of(step)).collect();
        (!found.is_empty()).then(|| found.iter().sum::<u64>().to_string())
    };
    let vfio_steps = [dma, "unmap-under-fire"];
    let steps = [faults, "unmap-under-fire", pressure];
    let row = |name: &str, vfio: Option<String>, notified: Option<String>| {
        [name.to_owned(), cell(vfio), cell(notified)]
    };
    vec![
        row("locked memory", vfio_locked(), notified_locked()),
        row(
            "largest working set",
            in_memory(Some(vfio), v(pressure, "working_set_mib")),
            in_memory(notified, notified_held()),
        ),
        row("beyond that", ended(), followed()),
        row(
            "left for others, at worst",
            v(pressure, "available_least_kib").map(mib),
            None,
        ),
        row(
            "page requests",
            sum(&|step| v(step, "page_requests"), &vfio_steps),
            sum(&|step| n(step, "page_requests"), &steps),
        ),
        row(
            "shootdowns",
            Some("none: the kernel cannot take a page".to_owned()),
            sum(&|step| n(step, "shootdowns"), &steps),
        ),
        row(
            "copies of 4 KiB per second",
            v(dma, "small_copies_per_second").map(|rate| rate.to_string()),
            n(faults, "small_copies_per_second").map(|rate| rate.to_string()),
        ),
    ]
}

/// The comparison as text.
pub fn table(vfio: &Value, kept: Option<&Value>) -> String {
    let rows = rows(vfio, kept.map(|kept| &kept["result"]));
    let head = ["", "VFIO, measured now", "pte notifiers"].map(str::to_owned);
    let lines: Vec<&Row> = std::iter::once(&head).chain(&rows).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
    let (first, second) = (width(0).unwrap_or(0), width(1).unwrap_or(0));
    let mut text = String::new();
    for [name, vfio, notified] in lines {
        let notified = if kept.is_some() || name.is_empty() {
            notified
        } else {
            ""
        };
        let line = format!("  {name:first$}   {vfio:second$}   {notified}");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    match kept {
        Some(kept) => {
            let said = |name: &str| kept[name].as_str().unwrap_or("unknown").to_owned();
            let (date, commit) = (said("date"), said("commit"));
            text.push_str(&format!(
                "  (pte notifiers: the latest tour on this machine, {date}, commit {commit})\n"
            ));
        }
        None => text.push_str(
            "  pte notifiers: not measured on this machine yet: run `cargo run --release`\n",
        ),
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vfio() -> Value {
        json!({
            "steps": [
                { "name": "first-dma", "figures": {
                    "vm_lck_kib": 65536, "vm_pin_kib": 0, "registered_kib": 65536,
                    "page_requests": 3, "small_copies_per_second": 1234.6
                } },
                { "name": "memory-pressure", "figures": {
                    "working_set_mib": 168, "pinned_outcome": "killed", "available_least_kib": 2048
                } }
            ],
            "environment": { "guest_memory_mib": 256 }
        })
    }

    #[test]
    fn nothing_is_shown_that_was_not_measured() {
        let text = table(&vfio(), None);
        assert!(text.contains("64 MiB of 64 MiB registered"), "{text}");
        assert!(text.contains("168 MiB in a guest of 256 MiB"), "{text}");
        assert!(text.contains("not measured on this machine yet"), "{text}");
        assert!(text.lines().all(|line| !line.contains(" 0 ")), "{text}");
        let empty = table(&json!({}), None);
        assert!(!empty.contains("MiB"), "{empty}");
    }

    #[test]
    fn the_latest_tour_stands_beside_with_its_date() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        assert!(kept(&cache).is_none());
        let notified = json!({
            "steps": [
                { "name": "demand-faults", "figures": {
                    "vm_lck_kib": 0, "vm_pin_kib": 0, "bytes": 3 * (144_u64 << 20),
                    "page_requests": 1271
                } },
                { "name": "memory-pressure", "figures": {
                    "bytes": 4 * (512_u64 << 20), "swapped_out_kib": 1 << 20,
                    "swapped_in_kib": 1 << 19, "shootdowns": 40, "page_requests": 29
                } }
            ],
            "environment": { "guest_memory_mib": 256 }
        });
        keep(&cache, &notified).unwrap();
        let text = table(&vfio(), kept(&cache).as_ref());
        assert!(text.contains("0 MiB of 288 MiB"), "{text}");
        assert!(text.contains("512 MiB in a guest of 256 MiB"), "{text}");
        assert!(text.contains("1300"), "{text}");
        assert!(text.contains(" UTC, commit "), "{text}");
    }
}
