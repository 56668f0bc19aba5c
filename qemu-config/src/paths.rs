//! Where things are: the repository, the cache, the folders that may be written.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

/// The repository this program was built from: it holds the patches, the driver and the profiles.
pub fn repo() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// The user's cache for things that are costly to make: `$EXTLB_CACHE`, else `extlb` in
/// `$XDG_CACHE_HOME`, else in `~/.cache`. Safe to delete at any time.
#[derive(Clone, Debug)]
pub struct Cache(PathBuf);

impl Cache {
    /// Finds the folder and makes it.
    ///
    /// # Errors
    /// When no variable names a home, or the folder cannot be made.
    pub fn open() -> Result<Self> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let folder = if let Some(folder) = variable("EXTLB_CACHE") {
            PathBuf::from(folder)
        } else if let Some(base) = variable("XDG_CACHE_HOME").filter(|b| Path::new(b).is_absolute())
        {
            Path::new(&base).join("extlb")
        } else if let Some(home) = variable("HOME") {
            Path::new(&home).join(".cache/extlb")
        } else {
            anyhow::bail!("no place for the cache: set EXTLB_CACHE to a folder you can write");
        };
        let made = || -> Result<PathBuf> {
            fs::create_dir_all(&folder)?;
            Ok(fs::canonicalize(&folder)?)
        };
        let folder = made().with_context(|| {
            format!(
                "cannot make the cache folder {}; set EXTLB_CACHE to a folder you can write",
                folder.display()
            )
        })?;
        Ok(Self(folder))
    }

    /// A cache in a folder that exists.
    pub fn at(folder: &Path) -> Self {
        Self(folder.to_path_buf())
    }

    /// The folder itself.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// A path in the cache; its parent folder is made.
    pub fn path(&self, relative: impl AsRef<Path>) -> Result<PathBuf> {
        let path = self.0.join(relative);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)
                .with_context(|| format!("cannot make {}", parent.display()))?;
        }
        Ok(path)
    }

    /// A new, empty folder in the cache for something half made. Those left by processes that died
    /// are removed first: call this only while holding the lock for the same `name`.
    pub fn scratch(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(Path::new("partial").join(name))?;
        remove_tree(&path)?;
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }

    /// Waits until no other process makes `name`, and keeps others from it until dropped.
    pub fn lock(&self, name: &str) -> Result<Flock<fs::File>> {
        let path = self.path(Path::new("lock").join(name))?;
        let open =
            || fs::File::create(&path).with_context(|| format!("cannot open {}", path.display()));
        match Flock::lock(open()?, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(lock),
            Err(_) => {
                eprintln!("extlb: waiting for another extlb that works on {name}");
                Flock::lock(open()?, FlockArg::LockExclusive)
                    .map_err(|(_, error)| error)
                    .with_context(|| format!("cannot lock {}", path.display()))
            }
        }
    }
}

/// The repository's `target` folder, or one in the cache if that cannot be written.
pub fn target(cache: &Cache) -> Result<PathBuf> {
    let target = repo().join("target");
    let writable = fs::create_dir_all(&target).is_ok()
        && nix::unistd::access(&target, nix::unistd::AccessFlags::W_OK).is_ok();
    if writable {
        Ok(target)
    } else {
        cache.path("target")
    }
}

/// Removes a folder and all in it; absent is fine. Folders without write permission (packages have
/// some) are opened up first.
pub fn remove_tree(path: &Path) -> Result<()> {
    if path.symlink_metadata().is_err() {
        return Ok(());
    }
    if fs::remove_dir_all(path).is_ok() {
        return Ok(());
    }
    open_up(path);
    fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))
}

fn open_up(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let Ok(metadata) = path.symlink_metadata() else {
        return;
    };
    if metadata.is_dir() {
        let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o700));
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            open_up(&entry.path());
        }
    }
}

/// The files under a folder, relative to it, sorted; symbolic links are not followed.
pub fn files_under(folder: &Path) -> Result<Vec<PathBuf>> {
    fn walk(folder: &Path, below: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
        let here = folder.join(below);
        let entries =
            fs::read_dir(&here).with_context(|| format!("cannot read {}", here.display()))?;
        for entry in entries {
            let entry = entry?;
            let path = below.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                walk(folder, &path, found)?;
            } else {
                found.push(path);
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    walk(folder, Path::new(""), &mut found)?;
    found.sort();
    Ok(found)
}

/// A content key: everything that decides what is made goes in, with its length, so that no two
/// different lists of inputs feed the same bytes.
#[derive(Clone, Default)]
pub struct Key(Sha256);

impl Key {
    /// An empty key for one kind of thing.
    pub fn new(kind: &str) -> Self {
        Self::default().with(kind)
    }

    /// Adds an input.
    #[must_use]
    pub fn with(mut self, input: impl AsRef<[u8]>) -> Self {
        let input = input.as_ref();
        self.0.update((input.len() as u64).to_le_bytes());
        self.0.update(input);
        self
    }

    /// Adds a file's content.
    pub fn with_file(self, path: &Path) -> Result<Self> {
        let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(self.with(content))
    }

    /// Adds names and contents of all files under a folder for which `wanted` is true.
    pub fn with_folder(mut self, folder: &Path, wanted: impl Fn(&Path) -> bool) -> Result<Self> {
        for file in files_under(folder)? {
            if wanted(&file) {
                self = self
                    .with(file.as_os_str().as_bytes())
                    .with_file(&folder.join(&file))?;
            }
        }
        Ok(self)
    }

    /// Sixteen hexadecimal digits: enough for names in one user's cache.
    pub fn finish(self) -> String {
        self.0
            .finalize()
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_lists_apart_that_join_to_the_same_bytes() {
        let key = |parts: &[&str]| parts.iter().fold(Key::new("k"), |k, p| k.with(p)).finish();
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_ne!(key(&["a", ""]), key(&["a"]));
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_ne!(Key::new("x").finish(), Key::new("y").finish());
        assert_eq!(key(&["a"]).len(), 16);
    }

    #[test]
    fn a_folders_key_follows_names_and_contents_but_only_of_wanted_files() {
        let folder = tempfile::tempdir().unwrap();
        let key = || {
            let wanted = |path: &Path| path.extension().is_some_and(|e| e == "c");
            Key::new("k")
                .with_folder(folder.path(), wanted)
                .unwrap()
                .finish()
        };
        fs::create_dir(folder.path().join("sub")).unwrap();
        fs::write(folder.path().join("sub/a.c"), "1").unwrap();
        let first = key();
        fs::write(folder.path().join("a.o"), "x").unwrap();
        assert_eq!(key(), first);
        fs::write(folder.path().join("sub/a.c"), "2").unwrap();
        let second = key();
        assert_ne!(second, first);
        fs::rename(folder.path().join("sub/a.c"), folder.path().join("a.c")).unwrap();
        assert_ne!(key(), second);
    }

    #[test]
    fn a_tree_with_closed_folders_is_removed() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let closed = folder.path().join("tree/closed");
        fs::create_dir_all(&closed).unwrap();
        fs::write(closed.join("file"), "").unwrap();
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o500)).unwrap();
        remove_tree(&folder.path().join("tree")).unwrap();
        assert!(!folder.path().join("tree").exists());
        remove_tree(&folder.path().join("tree")).unwrap();
    }
}
