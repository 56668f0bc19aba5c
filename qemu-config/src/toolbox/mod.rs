//! Programs that the machine need not have: unpacked from Debian packages into the cache.
//!
//! Several toolboxes, so that nobody waits for what is not needed: QEMU, the guest's tools, the
//! compiler and its company (to build a kernel), and the kernel's source. Packages come from the
//! mirror the machine itself uses, verified by the machine's own keyring; nothing is installed and no
//! package's script runs.
//!
//! A toolbox is keyed by its recipe and the exact packages that were resolved, and published by a
//! rename. Once there it is used without asking the network again.

mod apt;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::child;
use crate::paths::{Cache, Key, remove_tree};
use crate::progress::Step;
pub use apt::find_site as mirror;
use apt::{Apt, Request};

/// Raised when unpacking changes, so that old toolboxes are not taken for new ones.
const LAYOUT: &str = "1";

/// What a toolbox is made of.
#[derive(Clone, Debug)]
pub struct Recipe<'a> {
    /// Short name, part of folder names.
    pub name: &'a str,
    /// For people: what is being fetched.
    what: &'a str,
    packages: &'a [&'a str],
    /// Whether packages may come from backports.
    backports: bool,
    /// What comes along.
    dependencies: Dependencies,
    /// Links that maintainer scripts would have made: (link, target).
    links: &'a [(&'a str, &'a str)],
}

impl<'a> Recipe<'a> {
    /// Packages for the guest, with all that they depend on.
    pub fn for_guest(packages: &'a [&'a str]) -> Self {
        Self {
            name: "guest",
            what: "packages for the guest",
            packages,
            backports: false,
            dependencies: Dependencies::All,
            links: &[],
        }
    }

    /// What modules for Debian's own kernel are built against. The packages depend on a compiler,
    /// which is in a toolbox of its own.
    pub fn headers(packages: &'a [&'a str]) -> Self {
        Self {
            name: "headers",
            what: "what Debian's kernel is built against",
            packages,
            backports: false,
            dependencies: Dependencies::None,
            links: &[],
        }
    }
}

/// What is fetched beside the packages that a recipe names.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dependencies {
    /// Nothing.
    None,
    /// All that they depend on.
    All,
    /// The packages named are empty; meant are those that they depend on, and nothing beyond.
    Instead,
}

/// Printed as the truth value that it was before there were three: a recipe's key, and with it the
/// key of every kernel that was built with a toolbox, is made of this text.
impl fmt::Debug for Dependencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "false",
            Self::All => "true",
            Self::Instead => "instead",
        })
    }
}

/// QEMU with a vfio-user client.
pub const QEMU: Recipe<'static> = Recipe {
    name: "qemu",
    what: "QEMU",
    packages: &["qemu-system-x86"],
    backports: true,
    dependencies: Dependencies::All,
    links: &[],
};

/// The guest's shell tools, and what makes disk images.
pub const TOOLS: Recipe<'static> = Recipe {
    name: "tools",
    what: "the guest's tools",
    packages: &["busybox-static", "e2fsprogs"],
    backports: false,
    dependencies: Dependencies::All,
    links: &[],
};

/// Packages that build a kernel.
const COMPILER: [&str; 22] = [
    "gcc-14",
    "libc6-dev",
    "make",
    "flex",
    "bison",
    "bc",
    "libelf-dev",
    "perl",
    "bash",
    "coreutils",
    "mawk",
    "sed",
    "grep",
    "findutils",
    "diffutils",
    "patch",
    "tar",
    "gzip",
    "xz-utils",
    "hostname",
    "kmod",
    "cpio",
];

/// Links that go with them.
const COMPILER_LINKS: [(&str, &str); 4] = [
    ("usr/bin/sh", "bash"),
    ("usr/bin/awk", "mawk"),
    ("usr/bin/gcc", "gcc-14"),
    ("usr/bin/cc", "gcc-14"),
];

/// What builds a kernel.
pub const BUILD: Recipe<'static> = Recipe {
    name: "build",
    what: "the compiler",
    packages: &COMPILER,
    backports: false,
    dependencies: Dependencies::All,
    links: &COMPILER_LINKS,
};

/// What checks a kernel's source: it is compiled for that, too, and for another architecture.
pub const CHECK: Recipe<'static> = Recipe {
    name: "check",
    what: "the checkers",
    packages: &with_compiler::<4, 26>([
        "sparse",
        "coccinelle",
        "libpython3.13",
        "gcc-14-aarch64-linux-gnu",
    ]),
    backports: false,
    dependencies: Dependencies::All,
    links: &[
        COMPILER_LINKS[0],
        COMPILER_LINKS[1],
        COMPILER_LINKS[2],
        COMPILER_LINKS[3],
        // Coccinelle loads it by the name that only its development package has.
        (
            "usr/lib/libpython3.13.so",
            "x86_64-linux-gnu/libpython3.13.so.1.0",
        ),
    ],
};

const fn with_compiler<const MORE: usize, const ALL: usize>(
    more: [&'static str; MORE],
) -> [&'static str; ALL] {
    let mut all = [""; ALL];
    let mut at = 0;
    while at < ALL {
        all[at] = if at < MORE {
            more[at]
        } else {
            COMPILER[at - MORE]
        };
        at += 1;
    }
    all
}

/// The kernel's source, as one compressed archive.
pub const SOURCE: Recipe<'static> = Recipe {
    name: "source",
    what: "the kernel's source",
    packages: &["linux-source-6.12"],
    backports: false,
    dependencies: Dependencies::None,
    links: &[],
};

/// Debian's own kernel and its modules, as it is. The flavour for machines in clouds has all that a
/// guest of QEMU needs and a third of the size.
pub const STOCK: Recipe<'static> = Recipe {
    name: "stock",
    what: "Debian's kernel",
    packages: &["linux-image-cloud-amd64"],
    backports: false,
    dependencies: Dependencies::Instead,
    links: &[],
};

/// An unpacked toolbox.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Toolbox {
    /// Key of recipe and packages.
    pub key: String,
    /// File names of the packages, which tell their versions.
    pub packages: Vec<String>,
    /// The folder that holds `usr` and its siblings.
    #[serde(skip)]
    pub root: PathBuf,
}

impl Toolbox {
    /// The toolbox if it is in the cache already.
    pub fn find(cache: &Cache, recipe: &Recipe<'_>) -> Option<Self> {
        let text = fs::read_to_string(pointer(cache, recipe).ok()?).ok()?;
        let mut toolbox: Self = serde_json::from_str(&text).ok()?;
        toolbox.root = folder(cache, recipe, &toolbox.key);
        toolbox.root.is_dir().then_some(toolbox)
    }

    /// The toolbox; fetched and unpacked if need be.
    ///
    /// # Errors
    /// When the machine has no apt or no mirror, or fetching or unpacking fails.
    pub fn get(cache: &Cache, recipe: &Recipe<'_>) -> Result<Self> {
        if let Some(toolbox) = Self::find(cache, recipe) {
            return Ok(toolbox);
        }
        fetch_missing(cache, &[recipe])?;
        Self::find(cache, recipe).with_context(|| format!("{} went away", recipe.what))
    }

    /// A program of the toolbox, run without chroot: by the toolbox's own loader and libraries, so
    /// that the machine's files are at their own paths.
    ///
    /// `program` is relative to the root, e.g. `usr/bin/xz`. Works for programs that start no others.
    pub fn command(&self, program: &str) -> Command {
        let libraries = ["usr/lib/x86_64-linux-gnu", "usr/lib"]
            .map(|folder| self.root.join(folder).display().to_string())
            .join(":");
        let mut command = Command::new(self.root.join("usr/lib64/ld-linux-x86-64.so.2"));
        command
            .arg("--library-path")
            .arg(libraries)
            .arg(self.root.join(program));
        command
    }
}

fn recipe_key(recipe: &Recipe<'_>) -> String {
    Key::new(LAYOUT)
        .with(format!("{recipe:?}"))
        .with(apt::SUITE)
        .finish()
}

fn pointer(cache: &Cache, recipe: &Recipe<'_>) -> Result<PathBuf> {
    cache.path(format!(
        "toolbox/{}-{}.json",
        recipe.name,
        recipe_key(recipe)
    ))
}

fn folder(cache: &Cache, recipe: &Recipe<'_>, key: &str) -> PathBuf {
    cache
        .folder()
        .join(format!("toolbox/{}-{key}", recipe.name))
}

/// Fetches and unpacks what is missing of several toolboxes, reading the package lists once.
///
/// # Errors
/// When the machine has no apt or no mirror, or fetching or unpacking fails.
pub fn fetch_missing(cache: &Cache, recipes: &[&Recipe<'_>]) -> Result<()> {
    let absent = |recipe: &&&Recipe<'_>| Toolbox::find(cache, recipe).is_none();
    let mut recipes: Vec<&Recipe<'_>> = recipes.iter().filter(absent).copied().collect();
    // Everybody takes the locks in the same order.
    recipes.sort_by_key(|recipe| recipe.name);
    let mut locks = Vec::new();
    for recipe in &recipes {
        locks.push(cache.lock(recipe.name)?);
    }
    recipes.retain(|recipe| absent(&recipe));
    let Some(first) = recipes.first() else {
        return Ok(());
    };
    let what = recipes.iter().map(|recipe| recipe.what);
    let what = what.collect::<Vec<_>>().join(", ");
    let make_all = || -> Result<()> {
        let logs = cache.path("log/x")?.with_file_name("");
        let apt = Apt::prepare(cache, first.name)?;
        let mut step = Step::begin(format!("reading package lists for {what}"));
        apt.update(&logs, &mut step)?;
        step.done();
        for recipe in &recipes {
            make(cache, &apt, &logs, recipe)?;
        }
        apt.forget_downloads();
        Ok(())
    };
    make_all().with_context(|| format!("cannot fetch {what}"))
}

fn make(cache: &Cache, apt: &Apt, logs: &Path, recipe: &Recipe<'_>) -> Result<()> {
    let mut step = Step::begin(format!("downloading {}", recipe.what));
    let named: Vec<String> = match recipe.dependencies {
        Dependencies::Instead => apt.depends_of(recipe.packages)?,
        _ => recipe
            .packages
            .iter()
            .map(|name| name.to_string())
            .collect(),
    };
    let request = Request {
        packages: &named,
        backports: recipe.backports,
        dependencies: recipe.dependencies == Dependencies::All,
    };
    let wanted = apt.resolve(&request)?;
    let log = logs.join(format!("download-{}.log", recipe.name));
    let files = apt.download(&wanted, &request, &log, &mut step)?;
    step.done();

    let key = wanted
        .iter()
        .fold(Key::new(&recipe_key(recipe)), |key, package| {
            key.with(&package.uri).with(&package.hash)
        })
        .finish();
    let scratch = cache.scratch(&format!("toolbox-{}", recipe.name))?;
    let mut step = Step::begin(format!("unpacking {}", recipe.what));
    unpack(&files, &scratch, &mut step)?;
    for (link, target) in recipe.links {
        let link = scratch.join(link);
        if link.symlink_metadata().is_err() {
            std::os::unix::fs::symlink(target, &link)
                .with_context(|| format!("cannot make {}", link.display()))?;
        }
    }
    step.done();

    let root = folder(cache, recipe, &key);
    remove_tree(&root)?;
    fs::rename(&scratch, &root)
        .with_context(|| format!("cannot move the toolbox to {}", root.display()))?;
    let packages = wanted.into_iter().map(|package| package.file).collect();
    let toolbox = Toolbox {
        key,
        packages,
        root,
    };
    publish(
        &pointer(cache, recipe)?,
        &serde_json::to_vec_pretty(&toolbox)?,
    )
}

/// Unpacks packages into one folder: the first alone (it may hold the links that the others' files
/// go through), then as many at once as there are cores.
fn unpack(files: &[PathBuf], to: &Path, step: &mut Step) -> Result<()> {
    let unpack_one =
        |file: &PathBuf| child::output(Command::new("dpkg").arg("-x").arg(file).arg(to)).map(drop);
    let Some((first, rest)) = files.split_first() else {
        return Ok(());
    };
    unpack_one(first)?;
    let next = AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        let work = || -> Result<()> {
            while let Some(file) = rest.get(next.fetch_add(1, Ordering::Relaxed)) {
                // A failure leaves the rest to the others, who are soon through.
                unpack_one(file)?;
            }
            Ok(())
        };
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        while workers.iter().any(|worker| !worker.is_finished()) {
            let begun = next.load(Ordering::Relaxed).min(rest.len());
            step.tick(|| format!("package {} of {}", begun + 1, files.len()));
            std::thread::sleep(Duration::from_millis(10));
        }
        for worker in workers {
            worker.join().map_err(|_| anyhow!("unpacking panicked"))??;
        }
        Ok(())
    })
}

/// Writes a file so that others see all of it or none.
pub fn publish(path: &Path, content: &[u8]) -> Result<()> {
    let Some(folder) = path.parent() else {
        bail!("{} has no parent", path.display())
    };
    let mut file = tempfile::NamedTempFile::new_in(folder)
        .with_context(|| format!("cannot write in {}", folder.display()))?;
    std::io::Write::write_all(&mut file, content)?;
    file.persist(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_toolbox_is_found_by_its_recipe_and_only_if_it_is_there() {
        let folder_ = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder_.path());
        assert!(Toolbox::find(&cache, &QEMU).is_none());
        let toolbox = Toolbox {
            key: "k".into(),
            packages: vec!["a_1.deb".into()],
            root: PathBuf::new(),
        };
        publish(
            &pointer(&cache, &QEMU).unwrap(),
            &serde_json::to_vec(&toolbox).unwrap(),
        )
        .unwrap();
        assert!(
            Toolbox::find(&cache, &QEMU).is_none(),
            "its folder is absent"
        );
        fs::create_dir_all(folder(&cache, &QEMU, "k")).unwrap();
        let found = Toolbox::find(&cache, &QEMU).unwrap();
        assert_eq!(found.root, folder(&cache, &QEMU, "k"));
        assert!(Toolbox::find(&cache, &BUILD).is_none());
    }

    #[test]
    fn recipes_have_keys_of_their_own() {
        assert_ne!(recipe_key(&QEMU), recipe_key(&BUILD));
        assert_ne!(recipe_key(&BUILD), recipe_key(&SOURCE));
    }
}
