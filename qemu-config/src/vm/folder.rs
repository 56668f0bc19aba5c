//! The folder of one run: sockets, initramfs, logs. Gone after the run.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use tempfile::TempDir;

use crate::paths::{self, Cache};
use crate::signals;

const LOCK: &str = "lock";

/// A folder that is removed at the end; if the rig is killed, by the next one.
pub struct RunFolder {
    folder: TempDir,
    handle: File,
    _lock: Flock<File>,
}

impl RunFolder {
    /// Makes a folder, and removes those that killed rigs have left.
    pub fn new(cache: &Cache) -> Result<Self> {
        let all = paths::target(cache)?.join("run");
        fs::create_dir_all(&all).with_context(|| format!("cannot make {}", all.display()))?;
        remove_left(&all);
        let folder = tempfile::Builder::new()
            .prefix("run-")
            .tempdir_in(&all)
            .with_context(|| format!("cannot make a folder in {}", all.display()))?;
        let lock = File::create(folder.path().join(LOCK))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, error)| error)
            .context("cannot lock the run folder")?;
        signals::remove_at_end(folder.path());
        let handle = File::open(folder.path())?;
        Ok(Self {
            folder,
            handle,
            _lock,
        })
    }

    /// A path to a socket in it that is short enough for one (108 bytes), wherever the folder is.
    pub fn short(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.handle.as_raw_fd()).into()
    }

    /// Its absolute path.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        signals::removed(self.folder.path());
    }
}

/// Removes folders whose lock nobody holds. One without a lock file is being made just now.
fn remove_left(all: &Path) {
    let folders = fs::read_dir(all)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    for folder in folders.collect::<Vec<PathBuf>>() {
        let Ok(lock) = File::open(folder.join(LOCK)) else {
            continue;
        };
        if Flock::lock(lock, FlockArg::LockExclusiveNonblock).is_ok() {
            let _ = fs::remove_dir_all(&folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_dead_rigs_go_and_those_in_use_stay() {
        let all = tempfile::tempdir().unwrap();
        let (left, used, new) = (
            all.path().join("left"),
            all.path().join("used"),
            all.path().join("new"),
        );
        for folder in [&left, &used, &new] {
            fs::create_dir(folder).unwrap();
        }
        fs::write(left.join(LOCK), "").unwrap();
        let lock = File::create(used.join(LOCK)).unwrap();
        let _held = Flock::lock(lock, FlockArg::LockExclusiveNonblock).unwrap();
        remove_left(all.path());
        assert!(!left.exists() && used.exists() && new.exists());
    }
}
