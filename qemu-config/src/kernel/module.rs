//! Modules for the guest's kernel: the driver, and the user's own.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::make::Maker;
use super::{Flavour, RECIPE, get};
use crate::child;
use crate::paths::{self, Cache, Key, files_under, remove_tree};
use crate::progress::Step;
use crate::toolbox::{BUILD, Toolbox};

/// What a module is built against.
pub struct Base<'a> {
    /// The kernel's tree, or what is left of it.
    pub tree: &'a Path,
    /// For `make`, if the top of the tree is not where it runs.
    pub arguments: &'a [&'a str],
    /// Stands for the kernel.
    pub key: &'a str,
}

impl<'a> Base<'a> {
    /// A tree with its makefile at the top.
    pub fn at(tree: &'a Path, key: &'a str) -> Self {
        Self {
            tree,
            arguments: &[],
            key,
        }
    }
}

/// The module in `folder`, built against the flavour's kernel or a given tree.
pub fn module(
    cache: &Cache,
    rig: &Path,
    flavour: Flavour,
    given: Option<&Path>,
    folder: &Path,
) -> Result<PathBuf> {
    let toolbox = Toolbox::get(cache, &BUILD)?;
    let (tree, key) = match given {
        Some(tree) => {
            let tree = fs::canonicalize(tree)
                .with_context(|| format!("no kernel at {}", tree.display()))?;
            let key = key_of_given(&tree)?;
            (tree, key)
        }
        None => {
            let (image, _) = get(cache, rig, flavour, false)?;
            let tree = image.parent().context("an image lies in a folder")?;
            let key = tree.file_name().unwrap_or_default().to_string_lossy();
            (tree.to_path_buf(), key.into_owned())
        }
    };
    let folder = fs::canonicalize(folder)
        .with_context(|| format!("no module's source at {}", folder.display()))?;
    build(cache, rig, &toolbox, &Base::at(&tree, &key), &folder)
}

/// What stands for a kernel tree that was not built here.
pub fn key_of_given(tree: &Path) -> Result<String> {
    let key = Key::new("given")
        .with(tree.to_string_lossy().as_bytes())
        .with_file(&tree.join("Module.symvers"))?
        .with_file(&tree.join(".config"))?;
    Ok(key.finish())
}

/// The driver.
pub fn driver_for(cache: &Cache, rig: &Path, toolbox: &Toolbox, base: &Base) -> Result<PathBuf> {
    let source = paths::repo().join("driver/kernel");
    build(cache, rig, toolbox, base, &source)
}

/// Builds the module in `source`, unless nothing has changed since the last time.
fn build(
    cache: &Cache,
    rig: &Path,
    toolbox: &Toolbox,
    base: &Base,
    source: &Path,
) -> Result<PathBuf> {
    let key = Key::new(RECIPE)
        .with(base.key)
        .with_folder(source, is_source)
        .with_context(|| format!("no module's source in {}", source.display()))?
        .finish();
    let folder = cache.path(format!("driver/{key}/x"))?.with_file_name("");
    if let Some(kept) = object_in(&folder)? {
        return Ok(kept);
    }
    let _lock = cache.lock("driver")?;
    if let Some(kept) = object_in(&folder)? {
        return Ok(kept);
    }
    let work = cache.scratch("driver")?;
    for file in files_under(source)?
        .into_iter()
        .filter(|file| is_source(file))
    {
        let to = work.join(&file);
        fs::create_dir_all(to.parent().unwrap_or(&work))?;
        fs::copy(source.join(&file), to)?;
    }
    let maker = Maker::find(rig, toolbox)?;
    let mut step = Step::begin("building the driver");
    let log = cache.path("log/driver.log")?;
    let mut command = maker.make(base.tree, &[&work]);
    command
        .args(base.arguments)
        .arg(format!("M={}", maker.path_of(&work, 0)))
        .arg("modules");
    child::run(&mut command, &log, &mut step, String::new)
        .with_context(|| format!("cannot build the module in {}", source.display()))?;
    step.done();
    let Some(built) = object_in(&work)? else {
        bail!("the build of {} left no module", source.display());
    };
    let kept = folder.join(built.file_name().context("a module has a name")?);
    fs::rename(&built, &kept)?;
    remove_tree(&work)?;
    Ok(kept)
}

/// The module in a folder.
fn object_in(folder: &Path) -> Result<Option<PathBuf>> {
    let files = files_under(folder)?;
    let mut objects = files
        .iter()
        .filter(|file| file.extension().is_some_and(|extension| extension == "ko"));
    Ok(objects.next().map(|object| folder.join(object)))
}

/// Whether a file in a module's folder is part of its source.
pub fn is_source(file: &Path) -> bool {
    let named = file
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let source = Path::new(named)
        .extension()
        .is_some_and(|extension| ["c", "h", "S"].iter().any(|source| extension == *source));
    !file.starts_with("selftests")
        && ((source && !named.ends_with(".mod.c"))
            || ["Kbuild", "Makefile", "Kconfig"].contains(&named))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sources_decide_about_a_module() {
        for name in ["extlb_main.c", "sub/extlb_hw.h", "Kbuild", "Makefile"] {
            assert!(is_source(Path::new(name)), "{name}");
        }
        for name in [
            "extlb.ko",
            "extlb.mod.c",
            ".extlb.o.cmd",
            "modules.order",
            "README.md",
            "selftests/extlb_test.c",
        ] {
            assert!(!is_source(Path::new(name)), "{name}");
        }
    }
}
