//! A private apt: the machine's mirror and keyring, lists and downloads of our own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::child;
use crate::paths::{Cache, remove_tree};
use crate::progress::Step;

/// The Debian release the packages come from, whatever the machine itself runs.
pub const SUITE: &str = "trixie";

const KEYRINGS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
];

/// A package that resolving has chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// Where it is fetched from.
    pub uri: String,
    /// File name of the download.
    pub file: String,
    /// Size in bytes.
    pub size: u64,
    /// Checksum as apt prints it (kind and value).
    pub hash: String,
}

/// What is asked of apt.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Names of packages.
    pub packages: &'a [String],
    /// Whether they may come from backports.
    pub backports: bool,
    /// Whether what they depend on comes along.
    pub dependencies: bool,
}

/// apt with a folder of its own; needs no privilege and changes nothing of the machine's.
pub struct Apt {
    folder: PathBuf,
    archives: PathBuf,
    config: PathBuf,
}

impl Apt {
    /// Finds the mirror and writes the configuration.
    pub fn prepare(cache: &Cache, name: &str) -> Result<Self> {
        let keyring = KEYRINGS.iter().find(|path| Path::new(path).exists()).context(
            "no Debian keyring in /usr/share/keyrings: install the package debian-archive-keyring, \
             or give the pieces by hand (--qemu, --kernel)",
        )?;
        let site = find_site()?;
        let folder = cache.path(format!("apt-{name}/x"))?.with_file_name("");
        let archives = folder.join("archives");
        for below in ["state", "lists/partial", "archives/partial"] {
            fs::create_dir_all(folder.join(below))?;
        }
        fs::write(folder.join("status"), "")?;
        let sources = folder.join("extlb.sources");
        fs::write(
            &sources,
            format!(
                "Types: deb\nURIs: {site}\nSuites: {SUITE} {SUITE}-backports\nComponents: main\n\
                 Architectures: amd64\nSigned-By: {keyring}\n"
            ),
        )?;
        let config = folder.join("apt.conf");
        fs::write(&config, configuration(&folder, &sources)?)?;
        Ok(Self {
            folder,
            archives,
            config,
        })
    }

    /// Fetches the package lists.
    pub fn update(&self, logs: &Path, step: &mut Step) -> Result<()> {
        let log = logs.join("apt-update.log");
        child::run(self.command().arg("update"), &log, step, String::new).context(
            "cannot read the mirror's package lists; is the network up, and does `apt-get update` \
             work on this machine?",
        )
    }

    /// The packages that (empty) packages depend on, alternatives left out.
    pub fn depends_of(&self, packages: &[&str]) -> Result<Vec<String>> {
        let mut command = Command::new("apt-cache");
        command.env("APT_CONFIG", &self.config).env("LC_ALL", "C");
        // Of the release itself: it has the higher priority (backports are taken only if asked for).
        command.args(["depends", "--important", "--no-pre-depends"]);
        let text = child::output(command.args(packages))
            .context("the mirror does not have the packages needed")?;
        parse_depends(&text).with_context(|| format!("{} names nothing", packages.join(" ")))
    }

    /// Asks apt which packages are needed, their dependencies among them.
    pub fn resolve(&self, request: &Request<'_>) -> Result<Vec<Package>> {
        let mut command = self.request(request);
        // apt leaves out what it has downloaded already: asked with nothing downloaded, it names all.
        let nothing = self.folder.join("nothing");
        fs::create_dir_all(nothing.join("partial"))?;
        let archives = format!("Dir::Cache::archives={}", nothing.display());
        command.args(["--print-uris", "-o", &archives]);
        let text = child::output(command.args(request.packages))
            .context("the mirror does not have the packages needed")?;
        let mut found = parse_uris(&text)?;
        if found.is_empty() {
            bail!(
                "apt resolved no packages for {}",
                request.packages.join(" ")
            );
        }
        // base-files has the links of the root folder, which the others are unpacked through.
        found.sort_by_key(|package| {
            (
                !package.file.starts_with("base-files_"),
                package.file.clone(),
            )
        });
        Ok(found)
    }

    /// Downloads what was resolved (going on where an earlier attempt stopped).
    pub fn download(
        &self,
        wanted: &[Package],
        request: &Request<'_>,
        log: &Path,
        step: &mut Step,
    ) -> Result<Vec<PathBuf>> {
        let total: u64 = wanted.iter().map(|package| package.size).sum();
        let mut command = self.request(request);
        command.args(request.packages).current_dir(&self.archives);
        if request.dependencies {
            command.arg("--download-only");
        }
        child::run(&mut command, log, step, || {
            let mega = |bytes: u64| bytes.div_ceil(1 << 20);
            format!("{} of {} MiB", mega(size_of(&self.archives)), mega(total))
        })?;
        wanted
            .iter()
            .map(|package| {
                let path = self.archives.join(&package.file);
                match fs::metadata(&path) {
                    Ok(file) if file.len() == package.size => Ok(path),
                    _ => bail!("{} was not downloaded whole; try again", package.file),
                }
            })
            .collect()
    }

    /// Removes lists and packages; what they held is unpacked.
    pub fn forget_downloads(&self) {
        let _ = remove_tree(&self.folder);
    }

    fn command(&self) -> Command {
        let mut command = Command::new("apt-get");
        command
            .env("APT_CONFIG", &self.config)
            .env("LC_ALL", "C")
            .arg("--quiet=1");
        command
    }

    fn request(&self, request: &Request<'_>) -> Command {
        let mut command = self.command();
        command.args(["--yes", "--no-install-recommends"]);
        let release = if request.backports {
            format!("{SUITE}-backports")
        } else {
            SUITE.to_owned()
        };
        command.arg(format!("--target-release={release}"));
        command.arg(if request.dependencies {
            "install"
        } else {
            "download"
        });
        command
    }
}

/// The configuration file: the machine's way to the network, everything else our own (a machine's
/// hooks are for its own packages).
fn configuration(folder: &Path, sources: &Path) -> Result<String> {
    let dump = child::output(Command::new("apt-config").arg("dump"))
        .context("this machine has no working apt; give the pieces by hand (--qemu, --kernel)")?;
    let mut text = String::new();
    // What a machine fetches beside the lists of packages (translations, descriptions of desktop
    // programs) is not needed here.
    let ours =
        |line: &&str| line.starts_with("Acquire::") && !line.starts_with("Acquire::IndexTargets::");
    for line in dump.lines().filter(ours) {
        text.push_str(line);
        text.push('\n');
    }
    let at = |below: &str| folder.join(below).display().to_string();
    let none = "/dev/null".to_owned();
    for (name, value) in [
        ("APT::Architecture", "amd64".to_owned()),
        ("APT::Sandbox::User", "".to_owned()),
        ("APT::Get::List-Cleanup", "false".to_owned()),
        ("Acquire::GzipIndexes", "false".to_owned()),
        ("Acquire::Languages", "none".to_owned()),
        ("Acquire::Retries", "3".to_owned()),
        ("Debug::NoLocking", "true".to_owned()),
        ("Dir::Etc::SourceList", sources.display().to_string()),
        ("Dir::Etc::SourceParts", none.clone()),
        ("Dir::Etc::Parts", none.clone()),
        ("Dir::Etc::Main", none.clone()),
        ("Dir::Etc::Preferences", none.clone()),
        ("Dir::Etc::PreferencesParts", none),
        ("Dir::State", at("state")),
        ("Dir::State::Lists", at("lists")),
        ("Dir::State::status", at("status")),
        ("Dir::Cache", at("")),
        ("Dir::Cache::archives", at("archives")),
    ] {
        text.push_str(&format!("{name} \"{value}\";\n"));
    }
    Ok(text)
}

/// The archive site in the machine's own apt sources.
pub fn find_site() -> Result<String> {
    let format = "$(SITE)|$(LABEL)|$(COMPONENT)|$(SUITE)";
    let text = child::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        format,
        "Created-By: Packages",
    ]))
    .context("this machine has no working apt; give the pieces by hand (--qemu, --kernel)")?;
    choose_site(&text).context(
        "no Debian archive among this machine's apt sources (see `apt-get indextargets`): add one \
         to /etc/apt/sources.list, or give the pieces by hand (--qemu, --kernel)",
    )
}

/// Chooses from lines of site, label, component and suite. The label is known only where the
/// machine has read the lists; otherwise the site's name has to tell.
fn choose_site(targets: &str) -> Option<String> {
    let rows: Vec<Vec<&str>> = targets
        .lines()
        .map(|line| line.split('|').collect())
        .collect();
    let site_of = |row: &Vec<&str>| {
        row.first()
            .map(|site| site.trim_end_matches('/').to_owned())
    };
    let main = |row: &&Vec<&str>| row.get(2) == Some(&"main");
    rows.iter()
        .filter(main)
        .find(|row| row.get(1) == Some(&"Debian"))
        .or_else(|| {
            rows.iter()
                .filter(main)
                .find(|row| site_of(row).is_some_and(|site| site.ends_with("/debian")))
        })
        .and_then(site_of)
}

/// Reads lines `'URI' file size hash`; other lines are apt's talk.
fn parse_uris(text: &str) -> Result<Vec<Package>> {
    let mut found = Vec::new();
    for line in text.lines().filter(|line| line.starts_with('\'')) {
        let mut words = line.split_whitespace();
        let package = (|| {
            let uri = words.next()?.trim_matches('\'').to_owned();
            let file = words.next()?.to_owned();
            let size = words.next()?.parse().ok()?;
            let hash = words.next().unwrap_or_default().to_owned();
            Some(Package {
                uri,
                file,
                size,
                hash,
            })
        })();
        let package = package.with_context(|| format!("apt said something unknown: {line}"))?;
        if package.file.contains('/') {
            bail!("apt named a file outside its folder: {}", package.file);
        }
        found.push(package);
    }
    Ok(found)
}

/// Reads apt-cache's list of dependencies. The first of several alternatives is marked by a bar.
fn parse_depends(text: &str) -> Option<Vec<String>> {
    let named = text.lines().filter_map(|line| {
        let name = line.trim_start().strip_prefix("Depends: ")?;
        // A virtual package, or one of another architecture, is nothing that can be unpacked.
        (!name.starts_with('<') && !name.contains(':')).then(|| name.trim().to_owned())
    });
    let named: Vec<String> = named.collect();
    (!named.is_empty()).then_some(named)
}

fn size_of(folder: &Path) -> u64 {
    let files = crate::paths::files_under(folder).unwrap_or_default();
    files
        .iter()
        .filter_map(|file| fs::metadata(folder.join(file)).ok())
        .map(|m| m.len())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_chosen_and_not_security_or_strangers() {
        let targets = "https://x.example/node|Node|main|nodistro\n\
                       http://m.example/debian-security|Debian-Security|main|oldstable-security\n\
                       http://m.example/debian|Debian|contrib|oldstable\n\
                       http://m.example/debian|Debian|main|oldstable\n";
        assert_eq!(choose_site(targets).unwrap(), "http://m.example/debian");
    }

    #[test]
    fn without_lists_the_sites_name_tells() {
        let targets = "https://x.example/node||main|\n\
                       http://m.example/debian-security||main|\n\
                       http://m.example/debian/||main|\n";
        assert_eq!(choose_site(targets).unwrap(), "http://m.example/debian");
        assert_eq!(choose_site("https://x.example/node||main|\n"), None);
        assert_eq!(choose_site(""), None);
    }

    #[test]
    fn what_an_empty_package_stands_for_is_read() {
        let text = "linux-image-cloud-amd64\n  Depends: linux-image-6.12.1+deb13-cloud-amd64\n\
                    \x20|Depends: one\n  Depends: <virtual>\n  Recommends: other\n";
        assert_eq!(
            parse_depends(text).unwrap(),
            ["linux-image-6.12.1+deb13-cloud-amd64"]
        );
        assert_eq!(parse_depends("base\n"), None);
    }

    #[test]
    fn resolved_packages_are_read_and_oddities_refused() {
        let text = "Reading package lists...\n\
                    'http://m/pool/a_1%3a2_amd64.deb' a_1%3a2_amd64.deb 123 SHA256:ab\n";
        let package = &parse_uris(text).unwrap()[0];
        assert_eq!(
            (package.size, package.file.as_str()),
            (123, "a_1%3a2_amd64.deb")
        );
        assert_eq!(package.hash, "SHA256:ab");
        assert!(parse_uris("'http://m/a.deb' a.deb many SHA256:ab\n").is_err());
        assert!(parse_uris("'http://m/a.deb' ../a.deb 1 SHA256:ab\n").is_err());
    }
}
