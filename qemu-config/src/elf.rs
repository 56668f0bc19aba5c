//! Which files a program needs to start: its loader, its shared libraries, a script's interpreter.
//!
//! As the dynamic loader would find them, and without running the program.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use goblin::elf::Elf;

/// Longest `#!` line that the kernel reads.
const SCRIPT_LINE: usize = 256;

/// Where the loader looks when nothing else says so.
const DEFAULT_FOLDERS: [&str; 6] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
];

/// Files to take along: path where it is expected → file that has the content.
pub type Needed = BTreeMap<PathBuf, PathBuf>;

/// Looks for libraries in the folders that this machine's loader knows.
pub struct Resolver {
    folders: Vec<PathBuf>,
}

impl Resolver {
    /// The machine's folders: those of `/etc/ld.so.conf`, then the loader's own.
    pub fn of_machine() -> Self {
        let mut folders = configured(Path::new("/etc/ld.so.conf"), 0);
        folders.extend(DEFAULT_FOLDERS.map(PathBuf::from));
        Self { folders }
    }

    /// Looks in these folders only.
    pub fn with_folders(folders: Vec<PathBuf>) -> Self {
        Self { folders }
    }

    /// Adds to `needed` what `file` needs beside itself. Files that are neither ELF nor scripts
    /// need nothing.
    ///
    /// # Errors
    /// When a library or interpreter is nowhere to be found, or the file is broken.
    pub fn add_needs(&self, file: &Path, needed: &mut Needed) -> Result<()> {
        let mut seen = BTreeSet::new();
        let mut waiting = vec![(file.to_path_buf(), Vec::new())];
        while let Some((file, inherited)) = waiting.pop() {
            if !seen.insert(fs::canonicalize(&file).unwrap_or_else(|_| file.clone())) {
                continue;
            }
            let found = self
                .direct_needs(&file, &inherited)
                .with_context(|| format!("what {} needs", file.display()))?;
            for (path, rpaths) in found {
                needed.insert(path.clone(), path.clone());
                waiting.push((path, rpaths));
            }
        }
        Ok(())
    }

    /// What one file asks for: (path, search folders it hands on to its own libraries).
    fn direct_needs(
        &self,
        file: &Path,
        inherited: &[PathBuf],
    ) -> Result<Vec<(PathBuf, Vec<PathBuf>)>> {
        let content = fs::read(file)?;
        if let Some(interpreter) = script_interpreter(&content) {
            return Ok(vec![(interpreter, Vec::new())]);
        }
        if !content.starts_with(b"\x7fELF") {
            return Ok(Vec::new());
        }
        let elf = Elf::parse(&content).context("not a sound ELF file")?;
        let mut found = Vec::new();
        if let Some(loader) = elf.interpreter {
            let loader = PathBuf::from(loader);
            if !loader.exists() {
                bail!("its loader {} does not exist", loader.display());
            }
            found.push((loader, Vec::new()));
        }
        let origin = fs::canonicalize(file)?
            .parent()
            .map(Path::to_path_buf)
            .unwrap_or_default();
        let runpaths = search_folders(&elf.runpaths, &origin);
        // RPATH counts only without RUNPATH, and then for the libraries' own needs too.
        let mut rpaths = Vec::new();
        if runpaths.is_empty() {
            rpaths = search_folders(&elf.rpaths, &origin);
            rpaths.extend_from_slice(inherited);
        }
        for name in &elf.libraries {
            let candidates: Vec<PathBuf> = if name.contains('/') {
                vec![PathBuf::from(name)]
            } else {
                let folders = rpaths.iter().chain(&runpaths).chain(&self.folders);
                folders.map(|folder| folder.join(name)).collect()
            };
            let library = candidates.into_iter().find(|path| same_kind(path, &elf));
            let library = library.with_context(|| format!("no shared library {name}"))?;
            found.push((library, rpaths.clone()));
        }
        Ok(found)
    }
}

/// A candidate counts only if it is an ELF file for the same processor and word size.
fn same_kind(path: &Path, wanted: &Elf) -> bool {
    let Ok(content) = fs::read(path) else {
        return false;
    };
    Elf::parse(&content).is_ok_and(|elf| {
        elf.header.e_machine == wanted.header.e_machine && elf.is_64 == wanted.is_64
    })
}

fn search_folders(paths: &[&str], origin: &Path) -> Vec<PathBuf> {
    let origin = origin.to_string_lossy();
    paths
        .iter()
        .flat_map(|list| list.split(':'))
        .filter(|path| !path.is_empty())
        .map(|path| {
            path.replace("${ORIGIN}", &origin)
                .replace("$ORIGIN", &origin)
                .into()
        })
        .collect()
}

/// The program named in a script's first line, if it is an absolute path.
fn script_interpreter(content: &[u8]) -> Option<PathBuf> {
    let line = content.strip_prefix(b"#!")?;
    let line = &line[..line.len().min(SCRIPT_LINE)];
    let line = line.split(|byte| *byte == b'\n').next()?;
    let name = std::str::from_utf8(line).ok()?.split_whitespace().next()?;
    name.starts_with('/').then(|| name.into())
}

/// Folders of a loader configuration file, `include` lines followed.
fn configured(file: &Path, depth: usize) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    let text = fs::read_to_string(file).unwrap_or_default();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if let Some(pattern) = line.strip_prefix("include ") {
            if depth < 4 {
                for included in matching(Path::new(pattern.trim())) {
                    folders.extend(configured(&included, depth + 1));
                }
            }
        } else if line.starts_with('/') {
            folders.push(PathBuf::from(line));
        }
    }
    folders
}

/// Files for a pattern with a star in its last part (`/etc/ld.so.conf.d/*.conf`).
fn matching(pattern: &Path) -> Vec<PathBuf> {
    let (Some(folder), Some(name)) = (pattern.parent(), pattern.file_name()) else {
        return Vec::new();
    };
    let name = name.to_string_lossy();
    let Some((before, after)) = name.split_once('*') else {
        return vec![pattern.to_path_buf()];
    };
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.len() >= before.len() + after.len()
                && name.starts_with(before)
                && name.ends_with(after)
        })
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_real_program_gets_its_loader_and_c_library() {
        // The test program itself: dynamically linked, wherever the tests run.
        let this = std::env::current_exe().unwrap();
        let mut needed = Needed::new();
        Resolver::of_machine()
            .add_needs(&this, &mut needed)
            .unwrap();
        let names: Vec<_> = needed
            .keys()
            .filter_map(|path| path.file_name())
            .map(|n| n.to_string_lossy())
            .collect();
        assert!(
            names.iter().any(|name| name.starts_with("ld-linux")),
            "{names:?}"
        );
        assert!(names.iter().any(|name| *name == "libc.so.6"), "{names:?}");
        assert!(needed.values().all(|file| file.is_file()));
    }

    #[test]
    fn a_library_that_is_nowhere_is_named() {
        let this = std::env::current_exe().unwrap();
        let nowhere = Resolver::with_folders(vec!["/nonexistent".into()]);
        let error = nowhere.add_needs(&this, &mut Needed::new()).unwrap_err();
        assert!(
            format!("{error:#}").contains("no shared library lib"),
            "{error:#}"
        );
    }

    #[test]
    fn broken_files_are_errors_and_plain_ones_need_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let resolver = Resolver::of_machine();
        let file = folder.path().join("file");
        let mut needed = Needed::new();
        fs::write(&file, "plain text").unwrap();
        resolver.add_needs(&file, &mut needed).unwrap();
        assert!(needed.is_empty());
        let this = fs::read(std::env::current_exe().unwrap()).unwrap();
        for cut in [5, 17, 63, 64, 100, 500, 1000] {
            fs::write(&file, &this[..cut]).unwrap();
            let _ = resolver.add_needs(&file, &mut Needed::new());
        }
        fs::write(&file, b"\x7fELF\xff\xff").unwrap();
        assert!(resolver.add_needs(&file, &mut Needed::new()).is_err());
    }

    #[test]
    fn a_script_brings_its_interpreter() {
        assert_eq!(
            script_interpreter(b"#! /bin/sh -e\nx"),
            Some("/bin/sh".into())
        );
        assert_eq!(script_interpreter(b"#!sh\n"), None);
        assert_eq!(script_interpreter(b"#!"), None);
        assert_eq!(script_interpreter(b"text"), None);
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("script");
        fs::write(&script, "#!/bin/sh\n").unwrap();
        let mut needed = Needed::new();
        Resolver::of_machine()
            .add_needs(&script, &mut needed)
            .unwrap();
        assert!(needed.contains_key(Path::new("/bin/sh")));
    }

    #[test]
    fn origins_are_replaced_and_includes_followed() {
        let folders = search_folders(
            &["$ORIGIN/../lib:${ORIGIN}:/x", ""],
            Path::new("/opt/a/bin"),
        );
        let expected: [&str; 3] = ["/opt/a/bin/../lib", "/opt/a/bin", "/x"];
        assert_eq!(folders, expected.map(PathBuf::from));

        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(
            at("main"),
            format!("include {}\n/last # why\n", at("*.conf").display()),
        )
        .unwrap();
        fs::write(at("b.conf"), "/b\n").unwrap();
        fs::write(at("a.conf"), "/a\n").unwrap();
        fs::write(at("c.other"), "/c\n").unwrap();
        let expected: [&str; 3] = ["/a", "/b", "/last"];
        assert_eq!(configured(&at("main"), 0), expected.map(PathBuf::from));
        fs::write(at("loop"), format!("include {}\n", at("loop").display())).unwrap();
        assert!(configured(&at("loop"), 0).is_empty());
    }
}
