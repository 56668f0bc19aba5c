//! The guest's first and only root file system: one newc archive.
//!
//! `/bin`, `/sbin`, `/lib` and `/lib64` are links into `/usr`, as on Debian, so that programs of the
//! machine find their files at the paths they know.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use cpio::newc::{Builder, trailer};

use crate::elf::{Needed, Resolver};
use crate::paths::files_under;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// Folders that are links into `usr`.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

/// Folders of packages that no program needs to run.
const LEFT_OUT: [&str; 8] = [
    "usr/share/bug",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/share/i18n",
];

/// The guest's search path for programs.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

enum Entry {
    Directory,
    Link(PathBuf),
    File { source: PathBuf, mode: u32 },
    Text { content: Vec<u8>, mode: u32 },
}

/// The content of an archive, by path in the guest.
pub struct Archive {
    /// Paths are relative to the root and go through no link.
    entries: BTreeMap<PathBuf, Entry>,
    resolver: Resolver,
    dynamic: bool,
}

impl Default for Archive {
    fn default() -> Self {
        Self::new()
    }
}

impl Archive {
    /// The root's folders and links.
    pub fn new() -> Self {
        let mut archive = Self {
            entries: BTreeMap::new(),
            resolver: Resolver::of_machine(),
            dynamic: false,
        };
        for name in MERGED {
            archive.directory(&Path::new("usr").join(name));
            archive
                .entries
                .insert(name.into(), Entry::Link(Path::new("usr").join(name)));
        }
        for name in ["dev", "proc", "sys", "root", "run", "mnt", "etc", "tmp"] {
            archive.directory(Path::new(name));
        }
        for (path, content) in [
            ("passwd", "root:x:0:0:root:/root:/bin/sh\n"),
            ("group", "root:x:0:\n"),
            ("hosts", "127.0.0.1 localhost\n"),
        ] {
            let content = content.into();
            let entry = Entry::Text {
                content,
                mode: 0o644,
            };
            archive.entries.insert(Path::new("etc").join(path), entry);
        }
        archive
    }

    /// Whether the guest has something at this path.
    pub fn contains(&self, guest: &Path) -> bool {
        normal(guest).is_ok_and(|path| self.entries.contains_key(&path))
    }

    /// Where the guest's search path finds a program.
    pub fn find_program(&self, name: &str) -> Option<PathBuf> {
        PATH.split(':')
            .map(|folder| Path::new(folder).join(name))
            .find(|path| self.contains(path))
    }

    /// Puts a file of the machine into the guest, without what it may need.
    pub fn file(&mut self, guest: &Path, source: &Path) -> Result<()> {
        let metadata =
            fs::metadata(source).with_context(|| format!("cannot read {}", source.display()))?;
        if !metadata.is_file() {
            bail!("{} is not a file", source.display());
        }
        if metadata.len() > u64::from(u32::MAX) {
            bail!("{} is too long for an initramfs (4 GiB)", source.display());
        }
        let path = normal(guest)?;
        self.directory(path.parent().unwrap_or(Path::new("")));
        let mode = metadata.permissions().mode() & 0o777;
        self.entries.insert(
            path,
            Entry::File {
                source: source.to_path_buf(),
                mode,
            },
        );
        Ok(())
    }

    /// Puts a file into the guest and, if it is a program, a library or a script, all it needs to
    /// start.
    pub fn program(&mut self, guest: &Path, source: &Path) -> Result<()> {
        self.file(guest, source)?;
        let mut needed = Needed::new();
        self.resolver.add_needs(source, &mut needed)?;
        for (path, source) in needed {
            if !self.contains(&path) {
                self.file(&path, &source)?;
                self.dynamic = true;
            }
        }
        Ok(())
    }

    /// Puts a file or a whole folder into the guest, with what the programs among them need.
    pub fn tree(&mut self, guest: &Path, source: &Path) -> Result<()> {
        let kind =
            fs::metadata(source).with_context(|| format!("cannot add {}", source.display()))?;
        if !kind.is_dir() {
            return self.program(guest, source);
        }
        self.directory(&normal(guest)?);
        let entries = fs::read_dir(source)
            .with_context(|| format!("cannot read the folder {}", source.display()))?;
        for entry in entries {
            let entry = entry?;
            let (guest, source) = (guest.join(entry.file_name()), entry.path());
            let kind = entry.file_type()?;
            if kind.is_symlink() {
                let path = normal(&guest)?;
                self.entries
                    .insert(path, Entry::Link(fs::read_link(&source)?));
            } else if kind.is_dir() || kind.is_file() {
                self.tree(&guest, &source)?;
            }
        }
        Ok(())
    }

    /// Puts the files of unpacked packages into the guest, over what is there: they bring all that
    /// they need, and none of it is looked for on the machine. Documentation is left out.
    pub fn packages(&mut self, root: &Path) -> Result<()> {
        for file in files_under(root)? {
            let source = root.join(&file);
            let merged = file.to_str().is_some_and(|name| MERGED.contains(&name));
            if merged || LEFT_OUT.iter().any(|folder| file.starts_with(folder)) {
                continue;
            }
            let guest = Path::new("/").join(&file);
            let kind = fs::symlink_metadata(&source)?.file_type();
            if kind.is_symlink() {
                self.link(&guest, &fs::read_link(&source)?)?;
            } else if kind.is_file() {
                self.file(&guest, &source)?;
            }
        }
        Ok(())
    }

    /// Puts a symbolic link into the guest.
    pub fn link(&mut self, guest: &Path, target: &Path) -> Result<()> {
        let path = normal(guest)?;
        self.directory(path.parent().unwrap_or(Path::new("")));
        self.entries.insert(path, Entry::Link(target.to_path_buf()));
        Ok(())
    }

    /// Puts a file with this content into the guest.
    pub fn text(&mut self, guest: &Path, content: &str, mode: u32) -> Result<()> {
        let path = normal(guest)?;
        self.directory(path.parent().unwrap_or(Path::new("")));
        let content = content.into();
        self.entries.insert(path, Entry::Text { content, mode });
        Ok(())
    }

    /// `path` is normal already.
    fn directory(&mut self, path: &Path) {
        for folder in path
            .ancestors()
            .filter(|folder| !folder.as_os_str().is_empty())
        {
            self.entries
                .entry(folder.to_path_buf())
                .or_insert(Entry::Directory);
        }
    }

    /// Writes the archive and returns its length in bytes.
    ///
    /// # Errors
    /// When a file cannot be read whole (it changed meanwhile), or the archive cannot be written.
    pub fn write(&mut self, to: &Path) -> Result<u64> {
        let cache = Path::new("/etc/ld.so.cache");
        if self.dynamic && cache.is_file() {
            // Without it the loader would not look in the machine's configured folders.
            self.file(cache, cache)?;
        }
        let file = File::create(to).with_context(|| format!("cannot write {}", to.display()))?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        for (number, (path, entry)) in (1..).zip(&self.entries) {
            write_entry(&mut out, number, path, entry)
                .with_context(|| format!("cannot put {} into the guest", path.display()))?;
        }
        trailer(&mut out)?;
        let file = out.into_inner().map_err(|error| error.into_error())?;
        Ok(file.metadata()?.len())
    }
}

fn write_entry(out: impl Write, number: u32, path: &Path, entry: &Entry) -> Result<()> {
    let name = path.to_str().context("its name is not UTF-8")?;
    let (mode, mut content): (u32, Box<dyn Read + '_>) = match entry {
        Entry::Directory => (DIRECTORY | 0o755, Box::new(io::empty())),
        Entry::Link(target) => (LINK | 0o777, Box::new(target.as_os_str().as_bytes())),
        Entry::Text { content, mode } => (REGULAR | mode, Box::new(content.as_slice())),
        Entry::File { source, mode } => (REGULAR | mode, Box::new(File::open(source)?)),
    };
    let length = match entry {
        Entry::Directory => 0,
        Entry::Link(target) => target.as_os_str().len() as u64,
        Entry::Text { content, .. } => content.len() as u64,
        Entry::File { source, .. } => fs::metadata(source)?.len(),
    };
    let header = Builder::new(name).ino(number).nlink(1).mode(mode);
    let mut writer = header.write(out, u32::try_from(length)?);
    let copied = io::copy(&mut content.by_ref().take(length), &mut writer)?;
    if copied != length {
        bail!("it became shorter while it was read");
    }
    writer.finish()?;
    Ok(())
}

/// A path relative to the root, with `.` and `..` resolved by name and the merged folders replaced.
fn normal(guest: &Path) -> Result<PathBuf> {
    let mut path = PathBuf::new();
    for component in guest.components() {
        match component {
            Component::Normal(name) => {
                let merged = path.as_os_str().is_empty()
                    && name.to_str().is_some_and(|name| MERGED.contains(&name));
                if merged {
                    path.push("usr");
                }
                path.push(name);
            }
            Component::ParentDir => {
                path.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if path.as_os_str().is_empty() && guest != Path::new("/") {
        bail!("{} is no path in the guest", guest.display());
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (name, mode, content) of each entry.
    fn read(archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut rest = archive;
        let mut found = Vec::new();
        loop {
            let reader = cpio::newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                return found;
            }
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            assert_eq!(
                reader.entry().nlink(),
                1,
                "the kernel would look for hard links"
            );
            let mut content = Vec::new();
            rest = reader.to_writer(&mut content).unwrap();
            found.push((name, mode, content));
        }
    }

    fn written(archive: &mut Archive) -> Vec<(String, u32, Vec<u8>)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("archive");
        let length = archive.write(&path).unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, length);
        read(&bytes)
    }

    #[test]
    fn parents_come_first_and_merged_folders_are_followed() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("tool");
        fs::write(&source, "x").unwrap();
        fs::set_permissions(&source, fs::Permissions::from_mode(0o4755)).unwrap();
        let mut archive = Archive::new();
        archive
            .file(Path::new("/bin/../bin/./deep/tool"), &source)
            .unwrap();
        archive
            .link(Path::new("/sbin/t"), Path::new("/bin/deep/tool"))
            .unwrap();
        assert!(archive.contains(Path::new("/usr/bin/deep/tool")));
        assert_eq!(archive.find_program("t"), Some("/usr/sbin/t".into()));
        let entries = written(&mut archive);
        let at = |name: &str| entries.iter().position(|entry| entry.0 == name).unwrap();
        assert!(at("usr") < at("usr/bin") && at("usr/bin") < at("usr/bin/deep"));
        assert_eq!(entries[at("usr/bin/deep/tool")].1, REGULAR | 0o755);
        assert_eq!(
            entries[at("bin")],
            ("bin".into(), LINK | 0o777, b"usr/bin".to_vec())
        );
        assert_eq!(entries[at("usr/sbin/t")].2, b"/bin/deep/tool");
    }

    #[test]
    fn folders_come_whole_with_their_links_and_programs_with_libraries() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("sub")).unwrap();
        fs::write(folder.path().join("sub/data"), [7; 5000]).unwrap();
        std::os::unix::fs::symlink("sub/data", folder.path().join("link")).unwrap();
        fs::copy(std::env::current_exe().unwrap(), folder.path().join("prog")).unwrap();
        let mut archive = Archive::new();
        archive.tree(Path::new("/data"), folder.path()).unwrap();
        let entries = written(&mut archive);
        let get = |name: &str| entries.iter().find(|entry| entry.0 == name);
        assert_eq!(get("data/sub/data").unwrap().2, [7; 5000]);
        assert_eq!(get("data/link").unwrap().2, b"sub/data");
        assert!(get("data/prog").is_some());
        assert!(entries.iter().any(|entry| entry.0.ends_with("/libc.so.6")));
        assert!(
            entries
                .iter()
                .all(|e| !e.0.starts_with("lib/") && !e.0.starts_with("bin/"))
        );
    }

    #[test]
    fn packages_go_over_what_is_there_and_leave_the_merged_folders() {
        let folder = tempfile::tempdir().unwrap();
        for (path, content) in [("usr/bin/lspci", "elf"), ("usr/share/doc/x/README", "long")] {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        std::os::unix::fs::symlink("usr/bin", folder.path().join("bin")).unwrap();
        std::os::unix::fs::symlink("lspci", folder.path().join("usr/bin/pci")).unwrap();
        let mut archive = Archive::new();
        let applet = Path::new("/bin/busybox");
        archive.link(Path::new("/bin/lspci"), applet).unwrap();
        archive.packages(folder.path()).unwrap();
        let entries = written(&mut archive);
        let get = |name: &str| entries.iter().find(|entry| entry.0 == name);
        assert_eq!(get("usr/bin/lspci").unwrap().2, b"elf");
        assert_eq!(get("usr/bin/pci").unwrap().2, b"lspci");
        assert_eq!(get("usr/bin").unwrap().1, DIRECTORY | 0o755);
        assert!(get("usr/share/doc/x/README").is_none());
    }

    #[test]
    fn what_cannot_be_taken_is_named() {
        let mut archive = Archive::new();
        let error = archive
            .tree(Path::new("/x"), Path::new("/nonexistent/x"))
            .unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/x"));
        assert!(
            archive
                .file(Path::new("/x"), Path::new("/dev/null"))
                .is_err()
        );
        assert!(normal(Path::new("..")).is_err());
    }
}
