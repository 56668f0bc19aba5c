//! The patches and the driver are clean under the kernel's own tools, and what is not would be found.

use std::fs;
use std::path::{Path, PathBuf};

use extlb_tests::{output, transcript};
use serde_json::Value;

const RIG: &str = env!("CARGO_BIN_EXE_extlb-under-test");

fn repo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

#[test]
fn the_kernels_own_tools_find_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("check.json");
    let got = output(RIG, &["kernel", "check", "--json", path.to_str().unwrap()]).unwrap();
    assert_eq!(got.status.code(), Some(0), "{}", transcript(&got));
    let json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert_eq!(json["passed"], true);
    let checks = json["checks"].as_array().unwrap();
    let listed = output(RIG, &["kernel", "check", "--list"]).unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let listed: Vec<_> = listed
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "each-patch")
        .collect();
    let done: Vec<_> = checks
        .iter()
        .map(|check| check["name"].as_str().unwrap())
        .collect();
    assert_eq!(done, listed);
}

/// A function with a fault for each checker. What it is called is how the finding is recognized.
const FAULTY: &str = r#"
#include <linux/slab.h>

int *plant_null;
void plant(void);

/**
 * plant() - an undocumented parameter
 */
static int plant_doc(int undescribed)
{
	return undescribed;
}

void plant(void)
{
	int unused_but_set = plant_doc(1);
	int *freed = kmalloc(64, GFP_KERNEL);

	unused_but_set = 2;
	plant_null = 0;
	kfree(freed);
	pr_info("%d", freed[0]);
	if(plant_null)
		return;
}
"#;

#[test]
fn a_fault_of_each_kind_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    copy(&repo().join("kernel-patch/linux-6.12"), &at("patches"));
    copy(&repo().join("driver/kernel"), &at("driver"));

    // The driver gets a faulty function, the series a faulty file.
    let source = at("driver/extlb_iq.c");
    let text = fs::read_to_string(&source).unwrap();
    fs::write(&source, text + FAULTY).unwrap();
    let faulty = format!("// SPDX-License-Identifier: GPL-2.0{FAULTY}");
    let added: String = faulty.lines().map(|line| format!("+{line}\n")).collect();
    let new_file = |name: &str| {
        let count = faulty.lines().count();
        format!("--- /dev/null\n+++ b/mm/{name}\n@@ -0,0 +1,{count} @@\n{added}")
    };
    // Only one of the two new files is named by a makefile.
    let patch = format!(
        "From: A <a@example.org>\nSubject: [PATCH] mm: plant faults\n\nTo be found.\n\n\
         Signed-off-by: A <a@example.org>\n---\n\
         --- a/mm/Makefile\n+++ b/mm/Makefile\n@@ -1 +1,2 @@\n+obj-m += pte_notifier_plant.o\n\
         \x20# SPDX-License-Identifier: GPL-2.0\n{}{}",
        new_file("pte_notifier_plant.c"),
        new_file("pte_notifier_orphan.c")
    );
    fs::write(at("patches/9999-plant.patch"), patch).unwrap();

    let path = at("check.json");
    let mut arguments = vec!["kernel", "check"];
    let words =
        [&at("patches"), &at("driver"), &path].map(|path| path.to_str().unwrap().to_owned());
    for (option, value) in ["--patches", "--driver", "--json"].iter().zip(&words) {
        arguments.extend([*option, value]);
    }
    // What is compiled for arm64 with W=1 stands for the other builds.
    for check in ["checkpatch", "kernel-doc", "coccinelle", "sparse", "arm64"] {
        arguments.extend(["--only", check]);
    }
    let got = output(RIG, &arguments).unwrap();
    assert_eq!(got.status.code(), Some(1), "{}", transcript(&got));
    let json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let found = |check: &str, file: &str, text: &str| {
        let checks = json["checks"].as_array().unwrap();
        let check = checks.iter().find(|it| it["name"] == check).unwrap();
        let findings = check["findings"].as_array().unwrap();
        findings.iter().any(|finding| {
            let has = |key: &str, part: &str| finding[key].as_str().unwrap().contains(part);
            has("file", file) && has("text", text)
        })
    };
    for (check, file, text) in [
        ("checkpatch", "driver/kernel/extlb_iq.c", "SPACING"),
        ("checkpatch", "9999-plant.patch", "SPACING"),
        ("kernel-doc", "driver/kernel/extlb_iq.c", "undescribed"),
        ("kernel-doc", "mm/pte_notifier_plant.c", "undescribed"),
        ("coccinelle", "driver/kernel/extlb_iq.c", "preceded by free"),
        ("coccinelle", "mm/pte_notifier_plant.c", "preceded by free"),
        ("arm64", "driver/kernel/extlb_iq.c", "unused_but_set"),
        ("sparse", "mm/pte_notifier_orphan.c", "it is not compiled"),
        ("arm64", "mm/pte_notifier_plant.c", "unused_but_set"),
        ("sparse", "driver/kernel/extlb_iq.c", "NULL pointer"),
        ("sparse", "mm/pte_notifier_plant.c", "NULL pointer"),
    ] {
        assert!(found(check, file, text), "{check} {file} {text}: {json:#}");
    }
}

#[test]
fn a_series_that_does_not_apply_is_not_called_clean() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("0001-x.patch");
    fs::write(
        path,
        "--- a/mm/mmap.c\n+++ b/mm/mmap.c\n@@ -1 +1 @@\n-no such line\n+x\n",
    )
    .unwrap();
    let patches = folder.path().to_str().unwrap();
    let got = output(
        RIG,
        &[
            "kernel",
            "check",
            "--only",
            "checkpatch",
            "--patches",
            patches,
        ],
    );
    let got = got.unwrap();
    assert_eq!(got.status.code(), Some(69), "{}", transcript(&got));
    assert!(String::from_utf8_lossy(&got.stderr).contains("does not apply"));
}
