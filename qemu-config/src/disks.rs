//! Disk images for the guest.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tempfile::NamedTempFile;

use crate::child;
use crate::paths::{self, Key, remove_tree};
use crate::profile::Mebibytes;
use crate::progress::Step;
use crate::qemu::command::Disk;
use crate::rig::Rig;

/// Serial number of the disk that holds the input file.
pub const INPUT: &str = "extlb-input";
/// Serial number of the disk to swap to.
pub const SWAP: &str = "extlb-swap";
/// Name of the input file on its disk.
pub const INPUT_NAME: &str = "input";

/// A disk that is gone after the run.
pub struct TemporaryDisk {
    image: NamedTempFile,
    serial: &'static str,
}

impl TemporaryDisk {
    /// As QEMU takes it.
    pub fn disk(&self) -> Disk {
        Disk {
            serial: self.serial,
            image: self.image.path().to_path_buf(),
            read_only: false,
        }
    }
}

/// An empty disk to swap to. It takes no room before it is written to.
pub fn swap(rig: &Rig, size: Mebibytes) -> Result<TemporaryDisk> {
    let folder = paths::target(&rig.cache)?;
    let image = tempfile::Builder::new()
        .prefix("swap-")
        .tempfile_in(&folder)
        .with_context(|| format!("cannot make a disk in {}", folder.display()))?;
    image.as_file().set_len(size.0 << 20)?;
    Ok(TemporaryDisk {
        image,
        serial: SWAP,
    })
}

/// A read-only ext4 disk that holds `file`; kept in the cache by the file's content.
pub fn input(rig: &Rig, file: &Path) -> Result<Disk> {
    let mut step = Step::begin("making the input's disk");
    let metadata = fs::metadata(file).with_context(|| format!("no input at {}", file.display()))?;
    if !metadata.is_file() {
        bail!("the input {} is not a file", file.display());
    }
    let image = match remembered(rig, file)? {
        Some(image) => image,
        None => {
            let _lock = rig.cache.lock("input")?;
            make(rig, file, metadata.len(), &mut step)?
        }
    };
    step.done();
    Ok(Disk {
        serial: INPUT,
        image,
        read_only: true,
    })
}

/// Where the image is, by the file's identity: reading a large file to find its hash takes longer
/// than all the rest of a run's preparation.
fn identity(rig: &Rig, file: &Path) -> Result<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    let file = fs::canonicalize(file)?;
    let metadata = fs::metadata(&file)?;
    let key = Key::new("input")
        .with(file.to_string_lossy().as_bytes())
        .with(format!(
            "{} {} {} {} {}",
            metadata.dev(),
            metadata.ino(),
            metadata.len(),
            metadata.mtime(),
            metadata.mtime_nsec()
        ))
        .finish();
    rig.cache.path(format!("input/{key}.ext4"))
}

fn remembered(rig: &Rig, file: &Path) -> Result<Option<PathBuf>> {
    let image = identity(rig, file)?;
    Ok(image.is_file().then_some(image))
}

fn make(rig: &Rig, file: &Path, length: u64, step: &mut Step) -> Result<PathBuf> {
    let image = identity(rig, file)?;
    if image.is_file() {
        return Ok(image);
    }
    let work = rig.cache.scratch("input")?;
    let content = work.join("content");
    fs::create_dir(&content)?;
    fs::copy(file, content.join(INPUT_NAME))?;
    let unfinished = work.join("image");
    // Room for the file system's own tables beside the file.
    File::create(&unfinished)?.set_len((length + length / 16 + (16 << 20)) & !4095)?;
    let mut command = rig.tools.command("usr/sbin/mke2fs");
    command
        .env("MKE2FS_CONFIG", rig.tools.root.join("etc/mke2fs.conf"))
        .args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-m",
            "0",
            "-O",
            "^has_journal",
            "-d",
        ])
        .arg(&content)
        .arg(&unfinished);
    child::run(
        &mut command,
        &rig.cache.path("log/mke2fs.log")?,
        step,
        String::new,
    )?;
    fs::rename(&unfinished, &image)?;
    remove_tree(&work)?;
    Ok(image)
}
