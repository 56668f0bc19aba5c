//! The checks.

use std::fs;

use anyhow::{Context, Result, ensure};

use super::findings::{Finding, parse};
use super::tree::{Arch, Said, Tree, Variant, at};
use crate::progress::Step;

/// What was looked at, and what was found.
type Found = (String, Vec<Finding>);

/// A check.
pub struct Check {
    /// Its name.
    pub name: &'static str,
    /// What it does, for people.
    pub what: &'static str,
    /// Whether it takes too long to be done without being asked for.
    pub long: bool,
    /// Does it.
    pub run: fn(&mut Tree, &mut Step) -> Result<Found>,
}

/// All of them, in the order in which they are done: those that need no build first, and those that
/// share a configuration one after the other.
pub const CHECKS: [Check; 9] = [
    Check {
        name: "checkpatch",
        what: "checkpatch --strict on each patch and on the driver",
        long: false,
        run: checkpatch,
    },
    Check {
        name: "kernel-doc",
        what: "comments that describe functions and structures",
        long: false,
        run: kernel_doc,
    },
    Check {
        name: "coccinelle",
        what: "the kernel's semantic patches on our files and the driver",
        long: false,
        run: coccinelle,
    },
    Check {
        name: "without",
        what: "compiled with W=1, pte notifiers off",
        long: false,
        run: |tree, step| compile(tree, OFF, "without", step),
    },
    Check {
        name: "with",
        what: "compiled with W=1, pte notifiers on",
        long: false,
        run: |tree, step| compile(tree, ON, "with", step),
    },
    Check {
        name: "debug",
        what: "compiled with W=1, pte notifiers on, their debugging and their tests, too",
        long: false,
        run: |tree, step| compile(tree, DEBUG, "debug", step),
    },
    Check {
        name: "sparse",
        what: "sparse on what the series touches and on the driver",
        long: false,
        run: sparse,
    },
    Check {
        name: "arm64",
        what: "compiled with W=1 for arm64, pte notifiers on",
        long: false,
        run: |tree, step| compile(tree, ARM64, "arm64", step),
    },
    Check {
        name: "each-patch",
        what: "the whole kernel built after each patch; minutes for each",
        long: true,
        run: each_patch,
    },
];

const OFF: Variant = Variant {
    arch: Arch::X86,
    out: "out",
    symbols: &[("CONFIG_PTE_NOTIFIERS", "n")],
    whole: false,
};
const ON: Variant = Variant {
    symbols: &[("CONFIG_PTE_NOTIFIERS", "y")],
    ..OFF
};
const DEBUG: Variant = Variant {
    symbols: &[
        ("CONFIG_PTE_NOTIFIERS", "y"),
        ("CONFIG_DEBUG_KERNEL", "y"),
        ("CONFIG_PTE_NOTIFIERS_DEBUG", "y"),
        ("CONFIG_KUNIT", "y"),
        ("CONFIG_PTE_NOTIFIERS_KUNIT_TEST", "y"),
    ],
    whole: true,
    ..OFF
};
const ARM64: Variant = Variant {
    arch: Arch::Arm64,
    out: "out-arm64",
    symbols: &[
        ("CONFIG_PTE_NOTIFIERS", "y"),
        ("CONFIG_TRANSPARENT_HUGEPAGE", "y"),
        ("CONFIG_ARM64_CONTPTE", "y"),
    ],
    whole: false,
};

fn is_c(file: &str) -> bool {
    file.ends_with(".c") || file.ends_with(".h")
}

/// Our files, as the sandbox has them: those of the tree that are ours as a whole, and the driver's.
fn our_files(tree: &Tree) -> Result<Vec<String>> {
    let mut files = tree.copy_driver()?;
    files.extend(tree.ours.whole_files().map(str::to_owned));
    files.retain(|file| is_c(file));
    Ok(files)
}

fn checkpatch(tree: &mut Tree, step: &mut Step) -> Result<Found> {
    let patches = tree.patches_inside()?;
    let driver = tree.copy_driver()?;
    let mut found = Vec::new();
    for (files, as_files) in [(&patches, &[][..]), (&driver, &["--file"][..])] {
        let mut command = tree.command("perl");
        command
            .args(["scripts/checkpatch.pl", "--strict", "--terse"])
            .args(["--show-types", "--no-summary"])
            .args(as_files)
            .args(files);
        // Its exit code says whether there are findings; what else goes wrong it says, too.
        let said = tree.run(&mut command, "checkpatch", step)?;
        found.extend(findings_or_failure(&said));
    }
    let subject = format!(
        "{} patches, {} files of the driver",
        patches.len(),
        driver.len()
    );
    Ok((subject, found))
}

/// Everything that was said in the form of a finding, or that the checker failed without one.
fn findings_or_failure(said: &Said) -> Vec<Finding> {
    let mut found = parse(&said.text, at);
    if !said.success && found.is_empty() {
        found.push(Finding {
            file: "checker".to_owned(),
            line: 0,
            text: format!("error: it failed: {}", said.text.trim()),
        });
    }
    found
}

fn kernel_doc(tree: &mut Tree, step: &mut Step) -> Result<Found> {
    let files = our_files(tree)?;
    let mut command = tree.command("perl");
    command
        .args(["scripts/kernel-doc", "-none", "-Wall"])
        .args(&files);
    let said = tree.run(&mut command, "doc", step)?;
    Ok((format!("{} files", files.len()), findings_or_failure(&said)))
}

fn coccinelle(tree: &mut Tree, step: &mut Step) -> Result<Found> {
    let files = our_files(tree)?;
    let mut command = tree.command("bash");
    let script = fs::read_to_string(crate::paths::repo().join("qemu-config/kernel/coccicheck.sh"))
        .context("qemu-config/kernel/coccicheck.sh")?;
    command.args(["-c", &script, "coccicheck"]).args(&files);
    let said = tree.run(&mut command, "coccinelle", step)?;
    let text = said.text.trim_end();
    let (rest, patches) = text.rsplit_once('\n').unwrap_or(("", text));
    let count = patches.parse::<usize>();
    let patches = count.with_context(|| format!("coccicheck.sh said {text}"))?;
    ensure!(patches > 0, "the kernel's tree has no semantic patches");
    let said = Said {
        success: said.success,
        text: rest.to_owned(),
    };
    let subject = format!("{} files, {patches} semantic patches", files.len());
    Ok((subject, findings_or_failure(&said)))
}

/// The objects of the files that the series touches and this architecture compiles.
fn objects(tree: &Tree, arch: Arch) -> Vec<String> {
    let own = format!("arch/{}/", arch.folder());
    let compiled = tree.touched().iter().filter(|file| {
        let elsewhere = ["tools/", "samples/", "arch/"];
        let elsewhere = elsewhere.iter().any(|folder| file.starts_with(folder));
        file.ends_with(".c") && (!elsewhere || file.starts_with(&own))
    });
    compiled
        .map(|file| format!("{}o", file.trim_end_matches('c')))
        .collect()
}

fn compile(
    tree: &mut Tree,
    variant: Variant,
    name: &'static str,
    step: &mut Step,
) -> Result<Found> {
    compile_with(tree, variant, &["W=1"], name, step)
}

fn sparse(tree: &mut Tree, step: &mut Step) -> Result<Found> {
    let words = ["C=2", "CF=-fmax-warnings=unlimited"];
    compile_with(tree, DEBUG, &words, "sparse", step)
}

fn compile_with(
    tree: &mut Tree,
    variant: Variant,
    words: &[&str],
    name: &'static str,
    step: &mut Step,
) -> Result<Found> {
    if !tree.configure(variant, step)? {
        let finding = Finding {
            file: "mm/Kconfig".to_owned(),
            line: 0,
            text: format!("error: {:?} cannot be had", variant.symbols),
        };
        return Ok(("nothing".to_owned(), vec![finding]));
    }
    let objects = objects(tree, variant.arch);
    let (made, mut found) = tree.build_objects(words, &objects, name, step)?;
    found.extend(tree.build_driver(words, &format!("{name}-driver"), step)?);
    Ok((format!("{made} objects and the driver"), found))
}

/// The last check of all: it leaves the tree as it found it only if all goes well.
fn each_patch(tree: &mut Tree, step: &mut Step) -> Result<Found> {
    const EACH_ON: Variant = Variant {
        out: "out-each",
        ..ON
    };
    const EACH_OFF: Variant = Variant {
        out: "out-each-off",
        ..OFF
    };
    let patches = tree.patches()?;
    tree.take_off()?;
    let mut found = Vec::new();
    for patch in &patches {
        tree.put_on(patch)?;
        tree.configure(EACH_ON, step)?;
        let whole = ["bzImage".to_owned(), "modules".to_owned()];
        let mut here = tree.build(&[], &whole, "each", step)?;
        tree.configure(EACH_OFF, step)?;
        here.extend(tree.build(
            &["W=1"],
            &["mm/".to_owned(), "arch/x86/mm/".to_owned()],
            "each-off",
            step,
        )?);
        let name = patch.file_name().unwrap_or_default().display().to_string();
        found.extend(here.into_iter().map(|finding| Finding {
            text: format!("{} (with the patches up to {name})", finding.text),
            ..finding
        }));
    }
    Ok((format!("{} patches", patches.len()), found))
}
