//! The guest's kernel: Debian's source, the patch series, a configuration; and the driver for it.
//!
//! Cached by the hash of everything that goes in. What is kept is the image and the part of the tree
//! that modules are built against.

pub mod config;
mod make;
mod module;
pub mod source;
pub mod stock;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::child::{self, LineCounter};
use crate::paths::{self, Cache, Key, files_under, remove_tree};
use crate::progress::Step;
use crate::toolbox::{BUILD, SOURCE, Toolbox};
pub use make::{Maker, missing_tools};
use module::{Base, driver_for};
pub use module::{is_source as is_driver_source, module};
use source::series;
pub use source::{source_archive, unpack};

/// Raised when the way of building changes.
const RECIPE: &str = "1";

/// Which configuration the kernel is built with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Flavour {
    /// Quick to build and to run.
    #[default]
    Base,
    /// With lockdep, KASAN, kmemleak and the memory manager's own checks.
    Debug,
}

impl Flavour {
    fn name(self) -> &'static str {
        match self {
            Flavour::Base => "base",
            Flavour::Debug => "debug",
        }
    }

    /// How many times longer things may take than with the base flavour.
    pub fn slowness(self) -> u32 {
        match self {
            Flavour::Base => 1,
            Flavour::Debug => 5,
        }
    }

    /// The profile that takes the place of another one: a kernel that keeps books on all of its
    /// memory needs more of it.
    pub fn profile(self, usual: &str) -> String {
        match self {
            Flavour::Base => usual.to_owned(),
            Flavour::Debug => format!("{usual}-debug"),
        }
    }

    /// Fragments in the order in which they are merged.
    fn fragments(self) -> Vec<PathBuf> {
        let folder = paths::repo().join("qemu-config/kernel");
        let names: &[&str] = match self {
            Flavour::Base => &["base.config", "extlb.config"],
            Flavour::Debug => &["base.config", "extlb.config", "debug.config"],
        };
        names.iter().map(|name| folder.join(name)).collect()
    }
}

/// A kernel's image and the driver built for it.
pub type Kernel = (PathBuf, Option<PathBuf>);

/// The kernel and (if wanted) its driver, built if they are not in the cache.
pub fn get(cache: &Cache, rig: &Path, flavour: Flavour, with_driver: bool) -> Result<Kernel> {
    let source = Toolbox::get(cache, &SOURCE)?;
    let toolbox = Toolbox::get(cache, &BUILD)?;
    let patches = series()?;
    let mut key = Key::new(RECIPE).with(&source.key).with(&toolbox.key);
    for file in patches.iter().chain(&flavour.fragments()) {
        key = key.with_file(file)?;
    }
    let key = key.finish();
    let tree = cache.path(format!("kernel/{}-{key}", flavour.name()))?;
    if !tree.is_dir() {
        let _lock = cache.lock(&format!("kernel-{}", flavour.name()))?;
        if !tree.is_dir() {
            let maker = Maker::find(rig, &toolbox)?;
            build(cache, &source, &toolbox, &maker, &patches, flavour, &tree)
                .context("cannot build the guest's kernel")?;
        }
    }
    let driver = match with_driver {
        true => Some(driver_for(cache, rig, &toolbox, &Base::at(&tree, &key))?),
        false => None,
    };
    Ok((tree.join("bzImage"), driver))
}

/// Whether the kernel is in the cache; does not build or fetch anything.
pub fn find(cache: &Cache, flavour: Flavour) -> Option<PathBuf> {
    let source = Toolbox::find(cache, &SOURCE)?;
    let toolbox = Toolbox::find(cache, &BUILD)?;
    let mut key = Key::new(RECIPE).with(&source.key).with(&toolbox.key);
    for file in series().ok()?.iter().chain(&flavour.fragments()) {
        key = key.with_file(file).ok()?;
    }
    let tree = cache
        .folder()
        .join(format!("kernel/{}-{}", flavour.name(), key.finish()));
    tree.is_dir().then(|| tree.join("bzImage"))
}

/// A kernel given by hand: an image with the driver beside it, or a whole build tree.
pub fn given(cache: &Cache, rig: &Path, path: &Path, with_driver: bool) -> Result<Kernel> {
    let path =
        fs::canonicalize(path).with_context(|| format!("no kernel at {}", path.display()))?;
    if path.is_dir() {
        let image = path.join("arch/x86/boot/bzImage");
        if !image.is_file() || !path.join("Module.symvers").is_file() {
            bail!(
                "{} is not a built kernel tree (make bzImage modules)",
                path.display()
            );
        }
        if !with_driver {
            return Ok((image, None));
        }
        let toolbox = Toolbox::get(cache, &BUILD)?;
        let key = module::key_of_given(&path)?;
        let driver = driver_for(cache, rig, &toolbox, &Base::at(&path, &key))?;
        return Ok((image, Some(driver)));
    }
    if !with_driver {
        return Ok((path, None));
    }
    let driver = path.with_file_name("extlb.ko");
    if !driver.is_file() {
        bail!(
            "{} is missing: beside a kernel image given by hand its driver is needed; or give the \
             kernel's build tree",
            driver.display()
        );
    }
    Ok((path, Some(driver)))
}

/// The driver for Debian's own kernel, without what only the patched one has.
pub fn driver_for_stock(cache: &Cache, rig: &Path, stock: &stock::Stock) -> Result<PathBuf> {
    let headers = stock.headers(cache)?;
    let toolbox = Toolbox::get(cache, &BUILD)?;
    // No descriptions of types for tracers: they would need a program more.
    let arguments = [
        "-C",
        &headers.folder,
        "-f",
        &headers.makefile,
        "CONFIG_DEBUG_INFO_BTF_MODULES=",
    ];
    let base = Base {
        tree: &headers.root,
        arguments: &arguments,
        key: &headers.key,
    };
    driver_for(cache, rig, &toolbox, &base)
}

fn build(
    cache: &Cache,
    source: &Toolbox,
    toolbox: &Toolbox,
    maker: &Maker,
    patches: &[PathBuf],
    flavour: Flavour,
    tree: &Path,
) -> Result<()> {
    let work = cache.scratch(&format!("kernel-{}", flavour.name()))?;
    let log = |name: &str| cache.path(format!("log/kernel-{}-{name}.log", flavour.name()));

    let archive = source_archive(source)?;
    source::unpack_whole(toolbox, &archive, &work, &log("unpack")?)?;
    source::patch(toolbox, patches, &work, &log("patch")?)
        .with_context(|| format!("they are for {}", source.packages.join(" ")))?;

    let wanted = config::merge(&flavour.fragments())?;
    fs::write(work.join("wanted.config"), config::text(&wanted))?;
    let mut step = Step::begin("configuring the kernel");
    let mut command = maker.make(&work, &[]);
    command.args(["KCONFIG_ALLCONFIG=wanted.config", "allnoconfig"]);
    child::run(&mut command, &log("config")?, &mut step, String::new)?;
    config::check(&wanted, &fs::read_to_string(work.join(".config"))?)?;
    step.done();

    let mut step = Step::begin("building the kernel (a few minutes, once)");
    let jobs = std::thread::available_parallelism().map_or(2, usize::from);
    let mut command = maker.make(&work, &[]);
    command
        .arg(format!("-j{jobs}"))
        .args(["bzImage", "modules"]);
    let log = log("build")?;
    let mut objects = LineCounter::new(&log, &["CC ", "AS "]);
    child::run(&mut command, &log, &mut step, || {
        format!("{} objects", objects.update())
    })?;
    step.done();

    let mut step = Step::begin("putting the kernel into the cache");
    prune(&work, &mut step)?;
    remove_tree(tree)?;
    fs::rename(&work, tree).with_context(|| format!("cannot move it to {}", tree.display()))?;
    forget_old(tree, flavour)?;
    step.done();
    Ok(())
}

/// Removes kernels that were built longest ago; who changes patches makes many.
fn forget_old(tree: &Path, flavour: Flavour) -> Result<()> {
    const KEPT: usize = 4;
    let all = tree.parent().context("a kernel lies in a folder")?;
    let prefix = format!("{}-", flavour.name());
    let mut kernels = Vec::new();
    for entry in fs::read_dir(all)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            kernels.push((
                fs::metadata(entry.path().join("bzImage"))?.modified()?,
                entry.path(),
            ));
        }
    }
    kernels.sort();
    for (_, old) in kernels.iter().rev().skip(KEPT) {
        remove_tree(old)?;
    }
    Ok(())
}

/// Removes what neither booting nor building modules needs.
fn prune(tree: &Path, step: &mut Step) -> Result<()> {
    fs::rename(tree.join("arch/x86/boot/bzImage"), tree.join("bzImage"))
        .context("the build left no bzImage")?;
    let kept_folders = ["include", "scripts", "arch/x86/include", "tools/objtool"];
    let kept_files = [
        ".config",
        "Kbuild",
        "Makefile",
        "Module.symvers",
        "System.map",
        "arch/x86/Makefile",
        "arch/x86/Makefile.postlink",
        "bzImage",
    ];
    for file in files_under(tree)? {
        let kept = kept_files.iter().any(|kept| file == Path::new(kept))
            || (kept_folders.iter().any(|kept| file.starts_with(kept))
                && file.extension().is_none_or(|extension| extension != "o"));
        if !kept {
            fs::remove_file(tree.join(&file))?;
        }
        step.tick(String::new);
    }
    remove_empty(tree)?;
    Ok(())
}

fn remove_empty(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_empty(&entry.path())?;
            // Fails where something is left in it, which is right.
            let _ = fs::remove_dir(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernels_of_a_flavour_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["base-1", "base-2", "base-3", "base-4", "base-5", "debug-1"] {
            let tree = folder.path().join(name);
            fs::create_dir(&tree).unwrap();
            let image = fs::File::create(tree.join("bzImage")).unwrap();
            let seconds = name.bytes().last().unwrap().into();
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            image.set_modified(time).unwrap();
        }
        forget_old(&folder.path().join("base-5"), Flavour::Base).unwrap();
        assert!(!folder.path().join("base-1").exists());
        for kept in ["base-2", "base-5", "debug-1"] {
            assert!(folder.path().join(kept).exists(), "{kept}");
        }
    }

    #[test]
    fn pruning_keeps_what_modules_need() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path();
        let put = |name: &str| {
            let path = tree.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        };
        for name in [
            "arch/x86/boot/bzImage",
            "arch/x86/kernel/a.o",
            "arch/x86/include/asm/page.h",
            "drivers/net/x.c",
            "scripts/mod/modpost",
            "scripts/mod/modpost.o",
            "tools/objtool/objtool",
            "Makefile",
        ] {
            put(name);
        }
        prune(tree, &mut Step::begin("x")).unwrap();
        let left: Vec<String> = files_under(tree)
            .unwrap()
            .iter()
            .map(|p| p.display().to_string())
            .collect();
        let expected = [
            "Makefile",
            "arch/x86/include/asm/page.h",
            "bzImage",
            "scripts/mod/modpost",
            "tools/objtool/objtool",
        ];
        assert_eq!(left, expected);
        assert!(!tree.join("drivers").exists());
    }
}
