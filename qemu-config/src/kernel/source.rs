//! The kernel's source: Debian's archive, unpacked, with the patch series on it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::child;
use crate::paths::{self, files_under};
use crate::progress::Step;
use crate::spawn_unsafe::dies_with_us;
use crate::toolbox::Toolbox;

/// Left packed: a third of the source, descriptions of hardware that this kernel is not for.
const LEFT_OUT: [&str; 2] = ["*/arch/*/boot/dts/*", "*/drivers/gpu/drm/amd/include/*"];

/// The patches, in order.
pub fn series() -> Result<Vec<PathBuf>> {
    series_in(&paths::repo().join("kernel-patch/linux-6.12"))
}

/// The patches in a folder, in order.
pub fn series_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut patches: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "patch")
        })
        .collect();
    patches.sort();
    if patches.is_empty() {
        bail!(
            "no patches in {}; is the repository whole?",
            folder.display()
        );
    }
    Ok(patches)
}

/// The archive of the kernel's source in its toolbox.
pub fn source_archive(source: &Toolbox) -> Result<PathBuf> {
    let folder = source.root.join("usr/src");
    let files = files_under(&folder)?;
    let archive = files
        .into_iter()
        .find(|file| file.to_string_lossy().ends_with(".tar.xz"));
    Ok(folder.join(archive.context("the source package holds no archive")?))
}

/// Applies patches, without guesses as to where.
pub fn patch(toolbox: &Toolbox, patches: &[PathBuf], tree: &Path, log: &Path) -> Result<()> {
    run_patch(toolbox, &[], patches, tree, log)
}

/// Takes patches off again, in the order given.
pub fn unpatch(toolbox: &Toolbox, patches: &[PathBuf], tree: &Path, log: &Path) -> Result<()> {
    run_patch(toolbox, &["--reverse"], patches, tree, log)
}

fn run_patch(
    toolbox: &Toolbox,
    words: &[&str],
    patches: &[PathBuf],
    tree: &Path,
    log: &Path,
) -> Result<()> {
    let mut step = Step::begin("applying patches");
    for patch in patches {
        let mut command = toolbox.command("usr/bin/patch");
        command
            .args(["-p1", "--batch", "--fuzz=0", "-d"])
            .arg(tree)
            .arg("-i")
            .arg(patch)
            .args(words);
        child::run(&mut command, log, &mut step, String::new).with_context(|| {
            let name = patch.file_name().unwrap_or_default().display().to_string();
            format!("{name} does not apply")
        })?;
    }
    step.done();
    Ok(())
}

/// Unpacks the archive, save what no guest here is for.
pub fn unpack_whole(toolbox: &Toolbox, archive: &Path, to: &Path, log: &Path) -> Result<()> {
    let left_out = LEFT_OUT.map(|pattern| format!("--exclude={pattern}"));
    unpack(
        toolbox,
        archive,
        to,
        log,
        &left_out.each_ref().map(String::as_str),
    )
}

/// Unpacks the archive; `which` are further arguments for tar.
pub fn unpack(
    toolbox: &Toolbox,
    archive: &Path,
    to: &Path,
    log: &Path,
    which: &[&str],
) -> Result<()> {
    let mut step = Step::begin("unpacking the kernel's source");
    let mut xz = toolbox.command("usr/bin/xz");
    xz.args(["--decompress", "--stdout"]).arg(archive);
    let mut unpacker = dies_with_us(xz.stdin(Stdio::null()).stdout(Stdio::piped())).spawn()?;
    let stdout = unpacker.stdout.take().context("no output of xz")?;
    let mut tar: Command = toolbox.command("usr/bin/tar");
    tar.args([
        "--extract",
        "--strip-components=1",
        "--no-same-owner",
        "--directory",
    ])
    .arg(to)
    .args(which);
    tar.stdin(stdout)
        .stdout(Stdio::null())
        .stderr(fs::File::create(log)?);
    let mut tar = dies_with_us(&mut tar).spawn()?;
    let status = loop {
        if let Some(status) = tar.try_wait()? {
            break status;
        }
        step.tick(String::new);
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    let source = unpacker.wait()?;
    if !status.success() || !source.success() {
        bail!(
            "cannot unpack {} (xz: {source}, tar: {status}): {}",
            archive.display(),
            child::last_lines(&fs::read_to_string(log).unwrap_or_default(), 5)
        );
    }
    step.done();
    Ok(())
}
