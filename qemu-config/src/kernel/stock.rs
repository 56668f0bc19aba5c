//! Debian's own kernel, unpatched: its image, and the few of its modules that guests need.
//!
//! Nothing is built and no script of the package runs. The modules are kept unpacked, in the order
//! in which they have to be loaded, which they tell themselves.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use goblin::elf::Elf;
use serde::{Deserialize, Serialize};

use crate::paths::{Cache, Key, files_under, remove_tree};
use crate::toolbox::{Recipe, STOCK, Toolbox, publish};

/// Raised when what is kept changes.
const LAYOUT: &str = "1";

/// Modules that guests may need. What is built into the kernel, or is not there at all, is left out;
/// what is missed then says so itself when it is used.
const WANTED: [&str; 6] = [
    "virtio_blk",
    "virtio_iommu",
    "vfio_iommu_type1",
    "iommufd",
    "vfio_pci",
    "zram",
];

/// A longer module is none.
const LONGEST: u64 = 64 << 20;

const INDEX: &str = "modules.json";

/// A kernel as it was packaged.
#[derive(Clone, Debug)]
pub struct Stock {
    /// The image.
    pub image: PathBuf,
    /// Its release, as in `uname -r`.
    pub release: String,
    /// The modules, each after those that it depends on.
    pub modules: Vec<Module>,
    /// Where it is unpacked.
    toolbox: PathBuf,
}

/// What modules are built against: the configuration and what was made from it in one folder, the
/// headers that all configurations share in another.
#[derive(Clone, Debug)]
pub struct Headers {
    /// Key of the packages.
    pub key: String,
    /// Where they are unpacked.
    pub root: PathBuf,
    /// Where `make` has to run, from there.
    pub folder: String,
    /// The makefile, from that folder. The one in the folder itself names it by an absolute path.
    pub makefile: String,
}

/// An unpacked module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// Names of those that have to be loaded before.
    pub depends: Vec<String>,
    /// Where it is.
    #[serde(skip)]
    pub path: PathBuf,
}

/// The kernel; fetched and unpacked if need be.
pub fn get(cache: &Cache) -> Result<Stock> {
    let toolbox = Toolbox::get(cache, &STOCK)?;
    let key = Key::new(LAYOUT)
        .with(&toolbox.key)
        .with(WANTED.join(" "))
        .finish();
    let kept = cache.path(format!("stock/{key}"))?;
    if !kept.is_dir() {
        let _lock = cache.lock("stock-modules")?;
        if !kept.is_dir() {
            let work = cache.scratch("stock-modules")?;
            unpack(&toolbox.root, &work).context("cannot unpack the modules of Debian's kernel")?;
            remove_tree(&kept)?;
            fs::rename(&work, &kept)?;
        }
    }
    let (image, release) = find_image(&toolbox.root)?;
    let index = fs::read(kept.join(INDEX))?;
    let mut modules: Vec<Module> = serde_json::from_slice(&index)?;
    for module in &mut modules {
        module.path = kept.join(format!("{}.ko", module.name));
    }
    Ok(Stock {
        image,
        release,
        modules,
        toolbox: toolbox.root,
    })
}

impl Stock {
    /// What modules for it are built against; fetched if need be.
    ///
    /// # Errors
    /// When the mirror has another release by now, among others.
    pub fn headers(&self, cache: &Cache) -> Result<Headers> {
        let release = &self.release;
        let (version, _) = release
            .split_once("-cloud")
            .with_context(|| format!("{release:?} is not a release as Debian names them"))?;
        let common = format!("linux-headers-{version}-common");
        let own = format!("linux-headers-{release}");
        let names = [own.as_str(), &common, &format!("linux-kbuild-{version}")];
        let toolbox = Toolbox::get(cache, &Recipe::headers(&names)).with_context(|| {
            format!(
                "no headers for {release}: if the mirror has a newer kernel, remove {} to get that",
                self.toolbox.display()
            )
        })?;
        Ok(Headers {
            key: toolbox.key,
            root: toolbox.root,
            folder: format!("usr/src/{own}"),
            makefile: format!("../{common}/Makefile"),
        })
    }

    /// Modules by these names with all that they depend on, in the order of loading.
    pub fn modules_for(&self, names: &[&str]) -> Vec<&Module> {
        let mut needed: Vec<&str> = names.to_vec();
        // Dependencies come before their users, so one way back through the list finds all.
        for module in self.modules.iter().rev() {
            if needed.contains(&module.name.as_str()) {
                needed.extend(module.depends.iter().map(String::as_str));
            }
        }
        let is_needed = |module: &&Module| needed.contains(&module.name.as_str());
        self.modules.iter().filter(is_needed).collect()
    }

    /// `modules.dep` for a folder that has all modules in it, for modprobe.
    pub fn modules_dep(&self) -> String {
        let line = |module: &Module| {
            // The order is that of depmod: the next to be loaded is the last.
            let needed = self.modules_for(&[&module.name]);
            let needed = needed.iter().rev().skip(1);
            let needed = needed.map(|module| format!(" {}.ko", module.name));
            format!("{}.ko:{}\n", module.name, needed.collect::<String>())
        };
        self.modules.iter().map(line).collect()
    }
}

fn find_image(root: &Path) -> Result<(PathBuf, String)> {
    let boot = root.join("boot");
    let names = fs::read_dir(&boot).with_context(|| format!("no {}", boot.display()))?;
    for entry in names.flatten() {
        let name = entry.file_name();
        if let Some(release) = name.to_str().and_then(|name| name.strip_prefix("vmlinuz-")) {
            return Ok((entry.path(), release.to_owned()));
        }
    }
    bail!("no kernel image in {}", boot.display())
}

/// Unpacks the modules wanted and writes the index.
fn unpack(root: &Path, to: &Path) -> Result<()> {
    let folder = root.join("usr/lib/modules");
    let files = files_under(&folder)?;
    let by_name: BTreeMap<String, &PathBuf> = files
        .iter()
        .filter_map(|file| Some((module_name(file)?, file)))
        .collect();
    let mut read: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut waiting: Vec<String> = WANTED.map(str::to_owned).into();
    while let Some(name) = waiting.pop() {
        let Some(file) = by_name.get(&name).filter(|_| !read.contains_key(&name)) else {
            continue;
        };
        let content = decompressed(&folder.join(file))
            .with_context(|| format!("cannot read {}", file.display()))?;
        let depends = dependencies(&content).with_context(|| file.display().to_string())?;
        fs::write(to.join(format!("{name}.ko")), content)?;
        waiting.extend(depends.iter().cloned());
        read.insert(name, depends);
    }
    let index: Vec<Module> = in_order(&read)?
        .into_iter()
        .map(|name| Module {
            depends: read.get(&name).cloned().unwrap_or_default(),
            name,
            path: PathBuf::new(),
        })
        .collect();
    publish(&to.join(INDEX), &serde_json::to_vec_pretty(&index)?)
}

/// `vfio_pci` for `…/vfio-pci.ko.xz`.
fn module_name(file: &Path) -> Option<String> {
    let (name, _) = file.file_name()?.to_str()?.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

fn decompressed(file: &Path) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    let packed = fs::File::open(file)?;
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => packed.take(LONGEST).read_to_end(&mut content)?,
        Some("xz") => lzma_rust2::XzReader::new(std::io::BufReader::new(packed), false)
            .take(LONGEST)
            .read_to_end(&mut content)?,
        _ => bail!("its compression is unknown to this program"),
    };
    Ok(content)
}

/// What the module says that it depends on.
fn dependencies(module: &[u8]) -> Result<Vec<String>> {
    let elf = Elf::parse(module).context("it is no ELF file")?;
    let info = elf
        .section_headers
        .iter()
        .find(|section| elf.shdr_strtab.get_at(section.sh_name) == Some(".modinfo"));
    let range = info.and_then(|section| section.file_range());
    let info = range
        .and_then(|range| module.get(range))
        .context("it has no .modinfo")?;
    let words = info
        .split(|byte| *byte == 0)
        .filter_map(|word| str::from_utf8(word).ok());
    let depends = words.filter_map(|word| word.strip_prefix("depends="));
    Ok(depends
        .flat_map(|names| names.split(','))
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect())
}

/// Names in an order in which each comes after those that it depends on; what is depended on and not
/// there is built in.
fn in_order(depends: &BTreeMap<String, Vec<String>>) -> Result<Vec<String>> {
    let mut order: Vec<String> = Vec::new();
    while order.len() < depends.len() {
        let before = order.len();
        for (name, needed) in depends {
            let ready = |needed: &String| !depends.contains_key(needed) || order.contains(needed);
            if !order.contains(name) && needed.iter().all(ready) {
                order.push(name.clone());
            }
        }
        if order.len() == before {
            bail!("modules depend on each other in a circle");
        }
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn depends(rows: &[(&str, &[&str])]) -> BTreeMap<String, Vec<String>> {
        let strings = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
        rows.iter()
            .map(|(name, needed)| (name.to_string(), strings(needed)))
            .collect()
    }

    fn stock() -> Stock {
        let rows = depends(&[
            ("vfio_pci", &["vfio_pci_core", "vfio"]),
            ("vfio_pci_core", &["vfio", "irqbypass"]),
            ("vfio", &[]),
            ("irqbypass", &[]),
            ("a_first", &["vfio_pci", "built_in"]),
            ("zram", &[]),
        ]);
        let modules = in_order(&rows).unwrap().into_iter().map(|name| Module {
            depends: rows[&name].clone(),
            path: format!("{name}.ko").into(),
            name,
        });
        Stock {
            image: PathBuf::new(),
            release: "6.12".into(),
            modules: modules.collect(),
            toolbox: PathBuf::new(),
        }
    }

    #[test]
    fn modules_come_after_what_they_need() {
        let stock = stock();
        let at = |name: &str| {
            stock
                .modules
                .iter()
                .position(|module| module.name == name)
                .unwrap()
        };
        for module in &stock.modules {
            for needed in module.depends.iter().filter(|needed| *needed != "built_in") {
                assert!(
                    at(needed) < at(&module.name),
                    "{needed} before {}",
                    module.name
                );
            }
        }
        assert!(in_order(&depends(&[("a", &["b"]), ("b", &["a"])])).is_err());
    }

    #[test]
    fn only_what_is_needed_is_chosen() {
        let stock = stock();
        let names = |wanted: &[&str]| -> Vec<String> {
            let chosen = stock.modules_for(wanted);
            chosen.iter().map(|module| module.name.clone()).collect()
        };
        assert_eq!(names(&["zram"]), ["zram"]);
        let vfio = names(&["vfio_pci", "no_such"]);
        assert_eq!(vfio.len(), 4);
        assert_eq!(vfio.last().unwrap(), "vfio_pci");
        let dep = stock.modules_dep();
        assert!(
            dep.contains("\nvfio_pci.ko: vfio_pci_core.ko ")
                || dep.starts_with("vfio_pci.ko: vfio_pci_core.ko "),
            "{dep}"
        );
        assert!(dep.contains("zram.ko:\n"));
    }

    #[test]
    fn names_are_the_kernels() {
        assert_eq!(
            module_name(Path::new("a/vfio-pci.ko.xz")).unwrap(),
            "vfio_pci"
        );
        assert_eq!(module_name(Path::new("zram.ko")).unwrap(), "zram");
        assert_eq!(module_name(Path::new("modules.order")), None);
    }
}
