//! The kernel's tree with the series on it, the driver beside it, and the toolbox to work on both.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::fcntl::Flock;

use super::findings::{Finding, Ours, parse};
use super::objects::compiled;
use crate::child::{self, LineCounter};
use crate::kernel::{config, is_driver_source, source};
use crate::paths::{self, Cache, files_under, remove_tree};
use crate::progress::Step;
use crate::sandbox::{self, Bind};
use crate::toolbox::{self, CHECK, SOURCE, Toolbox};

/// Where the folder that holds everything is seen in the sandbox.
const INSIDE: &str = "/check";
/// In it: the kernel's tree.
const LINUX: &str = "linux";
/// In it: the driver.
const DRIVER: &str = "driver";
/// In it: the patches.
const PATCHES: &str = "patches";
/// What findings in the driver are named by.
const DRIVER_NAME: &str = "driver/kernel/";

/// Where the sources are.
#[derive(Clone, Debug)]
pub struct Sources {
    /// The folder of the series.
    pub patches: PathBuf,
    /// The driver's folder.
    pub driver: PathBuf,
}

/// A processor to compile for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// The one that guests have.
    X86,
    /// Another one.
    Arm64,
}

impl Arch {
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::X86 => &[],
            Self::Arm64 => &[
                "ARCH=arm64",
                "CROSS_COMPILE=aarch64-linux-gnu-",
                "CC=aarch64-linux-gnu-gcc-14",
            ],
        }
    }

    /// Its folder in `arch/`.
    pub fn folder(self) -> &'static str {
        match self {
            Self::X86 => "x86",
            Self::Arm64 => "arm64",
        }
    }
}

/// A configuration: the guest's, and these symbols.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    /// The processor.
    pub arch: Arch,
    /// The folder that it is built in, which may serve several.
    pub out: &'static str,
    /// Symbols that differ.
    pub symbols: &'static [(&'static str, &'static str)],
    /// Whether all that the series touches is compiled with them.
    pub whole: bool,
}

/// Everything that is checked, unpacked in one folder; it goes when this is dropped.
pub struct Tree {
    rig: PathBuf,
    toolbox: Toolbox,
    work: PathBuf,
    logs: PathBuf,
    sources: Sources,
    /// Files that the series touches, as in the tree.
    touched: Vec<String>,
    /// What of the tree is ours.
    pub ours: Ours,
    /// How it is configured, and whether the variant's symbols could be had.
    configured: Option<(Variant, bool)>,
    _lock: Flock<fs::File>,
}

/// What a checker printed, and whether it was content.
pub struct Said {
    /// Exit code 0.
    pub success: bool,
    /// Standard output and error.
    pub text: String,
}

impl Tree {
    /// Fetches what is missing, unpacks and patches.
    pub fn unpack(cache: &Cache, rig: &Path, sources: Sources) -> Result<Self> {
        toolbox::fetch_missing(cache, &[&CHECK, &SOURCE])?;
        let toolbox = Toolbox::get(cache, &CHECK)?;
        sandbox::check(rig, &toolbox.root).context(
            "the checkers run in a sandbox; allow user namespaces (sysctl \
             kernel.unprivileged_userns_clone=1 on some systems)",
        )?;
        let lock = cache.lock("kernel-check")?;
        let work = cache.scratch("kernel-check")?;
        let logs = cache.path("log/x")?.with_file_name("");
        let mut tree = Self {
            rig: rig.to_path_buf(),
            toolbox,
            work,
            logs,
            sources,
            touched: Vec::new(),
            ours: Ours::default(),
            configured: None,
            _lock: lock,
        };
        let archive = source::source_archive(&Toolbox::get(cache, &SOURCE)?)?;
        fs::create_dir(tree.at(LINUX))?;
        source::unpack_whole(
            &tree.toolbox,
            &archive,
            &tree.at(LINUX),
            &tree.log("unpack"),
        )?;
        tree.copy_patches()?;
        tree.apply_patches(&tree.patches()?)?;
        Ok(tree)
    }

    fn at(&self, below: impl AsRef<Path>) -> PathBuf {
        self.work.join(below)
    }

    fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("kernel-check-{name}.log"))
    }

    fn copy_patches(&self) -> Result<()> {
        fs::create_dir(self.at(PATCHES))?;
        for patch in source::series_in(&self.sources.patches)? {
            let name = patch.file_name().context("a patch has a name")?;
            fs::copy(&patch, self.at(PATCHES).join(name))?;
        }
        Ok(())
    }

    /// The patches, as they lie in the folder.
    pub fn patches(&self) -> Result<Vec<PathBuf>> {
        source::series_in(&self.at(PATCHES))
    }

    /// The patches by the names that the sandbox has for them.
    pub fn patches_inside(&self) -> Result<Vec<String>> {
        let inside = |patch: PathBuf| {
            let name = patch.file_name().unwrap_or_default();
            format!("{INSIDE}/{PATCHES}/{}", name.display())
        };
        Ok(self.patches()?.into_iter().map(inside).collect())
    }

    /// Applies patches and takes down which lines they add.
    fn apply_patches(&mut self, patches: &[PathBuf]) -> Result<()> {
        for patch in patches {
            let text = fs::read_to_string(patch)
                .with_context(|| format!("cannot read {}", patch.display()))?;
            self.touched.extend(touched_by(&text));
        }
        self.touched.sort();
        self.touched.dedup();
        for file in &self.touched {
            let original = self.at(LINUX).join(file);
            if original.exists() {
                let kept = self.at("original").join(file);
                fs::create_dir_all(kept.parent().context("a file has a folder")?)?;
                fs::copy(original, kept)?;
            }
        }
        source::patch(&self.toolbox, patches, &self.at(LINUX), &self.log("patch"))?;
        for file in &self.touched {
            let (before, now) = (self.at("original").join(file), self.at(LINUX).join(file));
            match (before.exists(), now.exists()) {
                (_, false) => {}
                (false, true) => self.ours.add_file(file),
                (true, true) => {
                    let lines = self.new_lines(&before, &now)?;
                    self.ours.add_lines(file, lines);
                }
            }
        }
        Ok(())
    }

    fn new_lines(&self, before: &Path, now: &Path) -> Result<Vec<u32>> {
        let mut command = self.toolbox.command("usr/bin/diff");
        command
            .args(["--unchanged-line-format=", "--old-line-format="])
            .args(["--new-line-format=%dn\n"])
            .args([before, now])
            .stdin(Stdio::null());
        let output = command.output().context("cannot start diff")?;
        if output.status.code().is_none_or(|code| code > 1) {
            bail!("cannot compare {} with its original", now.display());
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines = text
            .lines()
            .map(|line| line.parse().context("a line number"));
        lines.collect()
    }

    /// Files of the tree that the series touches and that are C, headers among them.
    pub fn touched(&self) -> &[String] {
        &self.touched
    }

    /// A program in the sandbox, in the kernel's tree.
    pub fn command(&self, program: &str) -> Command {
        let binds = [Bind {
            from: self.work.clone(),
            to: INSIDE.into(),
        }];
        let cwd = format!("{INSIDE}/{LINUX}");
        sandbox::command(&self.rig, &self.toolbox.root, &binds, &cwd, program)
    }

    /// Runs a checker to its end. What it printed is kept in the log called `name`.
    pub fn run(&self, command: &mut Command, name: &str, step: &mut Step) -> Result<Said> {
        let log = self.log(name);
        let mut objects = LineCounter::new(&log, &["CC ", "CHECK "]);
        let status = child::run_to_end(command, &log, step, || match objects.update() {
            0 => String::new(),
            count => format!("{count} objects"),
        })?;
        Ok(Said {
            success: status.success(),
            text: String::from_utf8_lossy(&fs::read(&log)?).into_owned(),
        })
    }

    /// `make` for the variant that is configured.
    fn make(&self, variant: &Variant) -> Command {
        let mut command = self.command("make");
        let jobs = std::thread::available_parallelism().map_or(2, usize::from);
        command
            .arg(format!("-j{jobs}"))
            .arg(format!("O={INSIDE}/{}", variant.out))
            .args(variant.arch.arguments());
        command
    }

    /// Configures the tree; whether the symbols could be had. Where one folder serves several
    /// variants, make sees what a symbol changes, and compiles that again.
    pub fn configure(&mut self, variant: Variant, step: &mut Step) -> Result<bool> {
        if let Some((configured, had)) = self.configured
            && configured == variant
        {
            return Ok(had);
        }
        let out = self.at(variant.out);
        fs::create_dir_all(&out)?;
        let folder = paths::repo().join("qemu-config/kernel");
        let fragments = ["base.config", "extlb.config"].map(|name| folder.join(name));
        let mut wanted = config::merge(&fragments)?;
        let symbols = variant.symbols.iter();
        let symbols = symbols.map(|(symbol, value)| (symbol.to_string(), value.to_string()));
        wanted.extend(symbols.clone());
        fs::write(self.at("wanted.config"), config::text(&wanted))?;
        let mut command = self.make(&variant);
        command
            .arg(format!("KCONFIG_ALLCONFIG={INSIDE}/wanted.config"))
            .arg("allnoconfig");
        self.must(&mut command, "config", step)?;
        let made = fs::read_to_string(out.join(".config"))?;
        // Much of the guest's configuration falls away on another processor; what matters here is
        // whether the variant's own symbols are there.
        let had = config::check(&symbols.collect(), &made).is_ok();
        let mut command = self.make(&variant);
        command.args(["prepare", "modules_prepare"]);
        self.must(&mut command, "prepare", step)?;
        self.configured = Some((variant, had));
        Ok(had)
    }

    fn must(&self, command: &mut Command, name: &str, step: &mut Step) -> Result<()> {
        let said = self.run(command, name, step)?;
        if !said.success {
            bail!("make failed:\n{}", child::last_lines(&said.text, 25));
        }
        Ok(())
    }

    /// Takes all patches off the tree.
    pub fn take_off(&self) -> Result<()> {
        let patches = self.patches()?;
        let patches: Vec<_> = patches.into_iter().rev().collect();
        source::unpatch(&self.toolbox, &patches, &self.at(LINUX), &self.log("patch"))
    }

    /// Puts one on.
    pub fn put_on(&self, patch: &Path) -> Result<()> {
        let patch = [patch.to_path_buf()];
        source::patch(&self.toolbox, &patch, &self.at(LINUX), &self.log("patch"))
    }

    /// Builds targets, with these words for `make`, and says what is wrong in our lines.
    pub fn build(
        &self,
        words: &[&str],
        targets: &[String],
        name: &str,
        step: &mut Step,
    ) -> Result<Vec<Finding>> {
        let (variant, _) = self.configured.context("nothing is configured")?;
        let mut command = self.make(&variant);
        command.arg("--keep-going").args(words).args(targets);
        let said = self.run(&mut command, name, step)?;
        Ok(self.judge(&said))
    }

    /// Compiles objects anew, with these words for `make`; how many, and what is wrong in our lines.
    /// One that the variant's configuration does not have is left out, unless the variant is to have
    /// it.
    pub fn build_objects(
        &self,
        words: &[&str],
        objects: &[String],
        name: &str,
        step: &mut Step,
    ) -> Result<(usize, Vec<Finding>)> {
        let (variant, _) = self.configured.context("nothing is configured")?;
        let out = self.at(variant.out);
        let config = fs::read_to_string(out.join(".config"))?;
        let mut absent = Vec::new();
        let mut present = Vec::new();
        for object in objects {
            let (folder, name) = object.rsplit_once('/').unwrap_or((".", object));
            let makefile = self.at(LINUX).join(folder).join("Makefile");
            let makefile = fs::read_to_string(&makefile)
                .with_context(|| format!("cannot read {}", makefile.display()))?;
            if compiled(&makefile, &config, name) {
                let _ = fs::remove_file(out.join(object));
                present.push(object);
            } else {
                absent.push(object);
            }
        }
        let mut found = Vec::new();
        // Without a target, make would build the whole kernel.
        if !present.is_empty() {
            let mut command = self.make(&variant);
            command.arg("--keep-going").args(words).args(&present);
            found = self.judge(&self.run(&mut command, name, step)?);
        }
        let made = present.iter().filter(|object| out.join(object).exists());
        let made = made.count();
        let wanted = absent.iter().filter(|object| {
            let own = format!("arch/{}/", variant.arch.folder());
            variant.whole || object.starts_with(&own)
        });
        found.extend(wanted.map(|object| Finding {
            file: format!("{}c", object.trim_end_matches('o')),
            line: 0,
            text: "error: it is not compiled".to_owned(),
        }));
        Ok((made, found))
    }

    /// Builds the driver, from a fresh copy.
    pub fn build_driver(
        &self,
        words: &[&str],
        name: &str,
        step: &mut Step,
    ) -> Result<Vec<Finding>> {
        self.copy_driver()?;
        let inside = format!("M={INSIDE}/{DRIVER}");
        // No kernel was built whole, so nobody knows what it exports.
        let words = [&[inside.as_str(), "KBUILD_MODPOST_WARN=1"], words].concat();
        self.build(&words, &["modules".to_owned()], name, step)
    }

    /// Puts a fresh copy of the driver beside the tree; its files, by the sandbox's names.
    pub fn copy_driver(&self) -> Result<Vec<String>> {
        let to = self.at(DRIVER);
        remove_tree(&to)?;
        let from = &self.sources.driver;
        let files = files_under(from)?;
        let files: Vec<_> = files.iter().filter(|file| is_driver_source(file)).collect();
        if files.is_empty() {
            bail!("no driver in {}", from.display());
        }
        for file in &files {
            let to = to.join(file);
            fs::create_dir_all(to.parent().context("a file has a folder")?)?;
            fs::copy(from.join(file), to)?;
        }
        let inside = |file: &&PathBuf| format!("{INSIDE}/{DRIVER}/{}", file.display());
        Ok(files.iter().map(inside).collect())
    }

    /// What of a checker's output is about lines of ours. A checker that failed has found something,
    /// even if it cannot be told where.
    pub fn judge(&self, said: &Said) -> Vec<Finding> {
        let mut found = parse(&said.text, at);
        // What stops a build is always ours, wherever it shows. Sparse calls things errors that stop
        // nothing.
        found.retain(|finding| {
            let stops = !said.success && finding.text.contains("error:");
            stops || finding.file.starts_with(DRIVER_NAME) || self.ours.concerns(finding)
        });
        if !said.success && found.is_empty() {
            found.push(Finding {
                file: "make".to_owned(),
                line: 0,
                text: format!("error: it failed:\n{}", child::last_lines(&said.text, 25)),
            });
        }
        found
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = remove_tree(&self.work);
    }
}

/// A path as people have it.
pub fn at(path: &str) -> Option<String> {
    let linux = format!("{INSIDE}/{LINUX}/");
    let driver = format!("{INSIDE}/{DRIVER}/");
    let patches = format!("{INSIDE}/{PATCHES}/");
    if let Some(file) = path.strip_prefix(&linux) {
        Some(file.to_owned())
    } else if let Some(file) = path.strip_prefix(&driver) {
        Some(format!("{DRIVER_NAME}{file}"))
    } else if let Some(file) = path.strip_prefix(&patches) {
        Some(file.to_owned())
    } else {
        // Relative to the tree, or to the folder beside it where it is built.
        let file = path.strip_prefix("../linux/").unwrap_or(path);
        (!file.starts_with(['/', '.'])).then(|| file.to_owned())
    }
}

/// The files that a patch changes or makes.
fn touched_by(patch: &str) -> Vec<String> {
    let files = patch.lines().filter_map(|line| line.strip_prefix("+++ b/"));
    files
        .map(|file| file.split('\t').next().unwrap_or(file).to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_names_what_it_touches() {
        let patch =
            "--- a/mm/a.c\n+++ b/mm/a.c\n@@ -1 +1 @@\n-x\n+y\n--- /dev/null\n+++ b/mm/b.h\t2026\n";
        assert_eq!(touched_by(patch), ["mm/a.c", "mm/b.h"]);
    }

    #[test]
    fn paths_are_named_as_people_know_them() {
        for (inside, outside) in [
            ("/check/linux/mm/a.c", Some("mm/a.c")),
            ("../linux/mm/a.c", Some("mm/a.c")),
            ("mm/a.c", Some("mm/a.c")),
            ("/check/driver/x.c", Some("driver/kernel/x.c")),
            ("/check/patches/0001-x.patch", Some("0001-x.patch")),
            ("/usr/include/stdio.h", None),
        ] {
            assert_eq!(at(inside).as_deref(), outside, "{inside}");
        }
    }
}
