//! The guest's kernel: Debian's source, the patch series, a configuration; and the driver for it.
//!
//! Cached by the hash of everything that goes in. What is kept is the image and the part of the tree
//! that modules are built against.

mod config;
mod make;
pub mod stock;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::child::{self, LineCounter};
use crate::paths::{self, Cache, Key, files_under, remove_tree};
use crate::progress::Step;
use crate::spawn_unsafe::dies_with_us;
use crate::toolbox::{BUILD, SOURCE, Toolbox};
pub use make::{Maker, missing_tools};

/// Raised when the way of building changes.
const RECIPE: &str = "1";

/// Left packed: a third of the source, descriptions of hardware that this kernel is not for.
const LEFT_OUT: [&str; 2] = ["*/arch/*/boot/dts/*", "*/drivers/gpu/drm/amd/include/*"];

/// Which configuration the kernel is built with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Flavour {
    /// Quick to build and to run.
    #[default]
    Base,
    /// With lockdep, KASAN and the memory manager's own checks.
    Debug,
}

impl Flavour {
    fn name(self) -> &'static str {
        match self {
            Flavour::Base => "base",
            Flavour::Debug => "debug",
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

/// The patches, in order.
fn series() -> Result<Vec<PathBuf>> {
    let folder = paths::repo().join("kernel-patch/linux-6.12");
    let mut patches: Vec<PathBuf> = fs::read_dir(&folder)
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
        true => Some(driver_for(cache, rig, &toolbox, &tree, &[], &key)?),
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
        let key = Key::new("given")
            .with(path.to_string_lossy().as_bytes())
            .with_file(&path.join("Module.symvers"))?
            .with_file(&path.join(".config"))?
            .finish();
        let driver = driver_for(cache, rig, &toolbox, &path, &[], &key)?;
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
    driver_for(
        cache,
        rig,
        &toolbox,
        &headers.root,
        &arguments,
        &headers.key,
    )
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

    let left_out = LEFT_OUT.map(|pattern| format!("--exclude={pattern}"));
    let left_out = left_out.each_ref().map(String::as_str);
    let archive = source_archive(source)?;
    unpack(toolbox, &archive, &work, &log("unpack")?, &left_out)?;
    for patch in patches {
        let mut command = toolbox.command("usr/bin/patch");
        command
            .args(["-p1", "--batch", "--fuzz=0", "-d"])
            .arg(&work)
            .arg("-i")
            .arg(patch);
        let mut step = Step::begin("applying patches");
        child::run(&mut command, &log("patch")?, &mut step, String::new).with_context(|| {
            format!(
                "{} does not apply to {}",
                patch.file_name().unwrap_or_default().display(),
                source.packages.join(" ")
            )
        })?;
    }

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

/// Unpacks the source's archive; `which` are further arguments for tar.
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

/// The driver built against `tree`, from the cache if nothing has changed. `arguments` are for
/// `make`, if the top of the tree is not where it runs.
fn driver_for(
    cache: &Cache,
    rig: &Path,
    toolbox: &Toolbox,
    tree: &Path,
    arguments: &[&str],
    kernel_key: &str,
) -> Result<PathBuf> {
    let source = paths::repo().join("driver/kernel");
    let key = Key::new(RECIPE)
        .with(kernel_key)
        .with_folder(&source, is_driver_source)
        .with_context(|| format!("no driver in {}", source.display()))?
        .finish();
    let kept = cache.path(format!("driver/{key}/extlb.ko"))?;
    if kept.is_file() {
        return Ok(kept);
    }
    let _lock = cache.lock("driver")?;
    if kept.is_file() {
        return Ok(kept);
    }
    let work = cache.scratch("driver")?;
    for file in files_under(&source)?
        .into_iter()
        .filter(|file| is_driver_source(file))
    {
        let to = work.join(&file);
        fs::create_dir_all(to.parent().unwrap_or(&work))?;
        fs::copy(source.join(&file), to)?;
    }
    let maker = Maker::find(rig, toolbox)?;
    let mut step = Step::begin("building the driver");
    let log = cache.path("log/driver.log")?;
    let mut command = maker.make(tree, &[&work]);
    command
        .args(arguments)
        .arg(format!("M={}", maker.path_of(&work, 0)))
        .arg("modules");
    child::run(&mut command, &log, &mut step, String::new).context("cannot build the driver")?;
    step.done();
    let built = work.join("extlb.ko");
    fs::rename(&built, &kept).with_context(|| format!("the build left no {}", built.display()))?;
    remove_tree(&work)?;
    Ok(kept)
}

fn is_driver_source(file: &Path) -> bool {
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
    fn only_sources_decide_about_the_driver() {
        for name in ["extlb_main.c", "sub/extlb_hw.h", "Kbuild", "Makefile"] {
            assert!(is_driver_source(Path::new(name)), "{name}");
        }
        for name in [
            "extlb.ko",
            "extlb.mod.c",
            ".extlb.o.cmd",
            "modules.order",
            "README.md",
            "selftests/extlb_test.c",
        ] {
            assert!(!is_driver_source(Path::new(name)), "{name}");
        }
    }

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
