//! Suites in C: the kernel's, compiled from its own source as it is, and ours, with the kernel's
//! harness. Statically linked, and kept by the hash of all that goes in.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Suite;
use crate::child;
use crate::kernel::{self, Maker};
use crate::paths::{self, Cache, Key, remove_tree};
use crate::progress::Step;
use crate::toolbox::{BUILD, SOURCE, Toolbox};

/// Raised when the way of building changes.
const RECIPE: &str = "1";

/// What suites need of the kernel's source.
const NEEDED: [&str; 5] = [
    "tools/testing/selftests/kselftest.h",
    "tools/testing/selftests/kselftest_harness.h",
    "tools/testing/selftests/mm/hmm-tests.c",
    "lib/test_hmm_uapi.h",
    "mm/gup_test.h",
];

/// The suite's program; built if it is not in the cache.
pub fn program(cache: &Cache, rig: &Path, suite: &Suite) -> Result<PathBuf> {
    let source = Toolbox::get(cache, &SOURCE)?;
    let toolbox = Toolbox::get(cache, &BUILD)?;
    let own = own_files(suite)?;
    let mut key = Key::new(RECIPE)
        .with(&source.key)
        .with(&toolbox.key)
        .with(suite.source)
        .with(NEEDED.join(" "));
    for file in &own {
        key = key.with_file(file)?;
    }
    let kept = cache.path(format!("suite/{}-{}", suite.name, key.finish()))?;
    if kept.is_file() {
        return Ok(kept);
    }
    let _lock = cache.lock("suite")?;
    if kept.is_file() {
        return Ok(kept);
    }
    let built = build(cache, rig, suite, &source, &toolbox, &own)
        .with_context(|| format!("cannot build the suite {}", suite.name))?;
    fs::rename(&built, &kept).with_context(|| format!("cannot make {}", kept.display()))?;
    Ok(kept)
}

/// The files of this repository that the suite is made of.
fn own_files(suite: &Suite) -> Result<Vec<PathBuf>> {
    let Some(folder) = suite.folder else {
        return Ok(Vec::new());
    };
    let folder = paths::repo().join(folder);
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "c" || e == "h"))
        .collect();
    files.push(paths::repo().join("driver/kernel/extlb_uapi.h"));
    files.sort();
    Ok(files)
}

fn build(
    cache: &Cache,
    rig: &Path,
    suite: &Suite,
    source: &Toolbox,
    toolbox: &Toolbox,
    own: &[PathBuf],
) -> Result<PathBuf> {
    let tree = harness(cache, source, toolbox)?;
    let work = cache.scratch("suite-build")?;
    for file in own {
        fs::copy(file, work.join(file.file_name().unwrap_or_default()))?;
    }
    let maker = Maker::find(rig, toolbox)?;
    let mut command = maker.command("gcc", &tree, &[&work]);
    let outside = maker.path_of(&work, 0);
    let main = match suite.folder {
        Some(_) => format!("{outside}/{}", suite.source),
        None => suite.source.to_owned(),
    };
    command.args(["-Wall", "-O2", "-static", "-D_GNU_SOURCE="]);
    command.args(["-I.", "-Itools/testing/selftests"]);
    command.arg("-o").arg(format!("{outside}/program"));
    command.arg(main).arg("-lpthread");
    let mut step = Step::begin(format!("building the suite {}", suite.name));
    let log = cache.path(format!("log/suite-{}.log", suite.name))?;
    child::run(&mut command, &log, &mut step, String::new)?;
    step.done();
    Ok(work.join("program"))
}

/// The part of the kernel's source that suites are built with.
fn harness(cache: &Cache, source: &Toolbox, toolbox: &Toolbox) -> Result<PathBuf> {
    let key = Key::new(RECIPE).with(&source.key).with(NEEDED.join(" "));
    let kept = cache.path(format!("suite/source-{}", key.finish()))?;
    if kept.is_dir() {
        return Ok(kept);
    }
    let work = cache.scratch("suite-source")?;
    let members: Vec<String> = NEEDED.iter().map(|file| format!("*/{file}")).collect();
    let members: Vec<&str> = members.iter().map(String::as_str).collect();
    let log = cache.path("log/suite-unpack.log")?;
    kernel::unpack(
        toolbox,
        &kernel::source_archive(source)?,
        &work,
        &log,
        &[&["--wildcards"][..], &members].concat(),
    )?;
    remove_tree(&kept)?;
    fs::rename(&work, &kept).with_context(|| format!("cannot make {}", kept.display()))?;
    Ok(kept)
}
