//! `extlb run` and `extlb shell`: one program in a guest of its own.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use extlb_guest_protocol::{Exec, Setup, Window};

use crate::disks;
use crate::initramfs::{Archive, PATH};
use crate::outcome::{End, Outcome};
use crate::profile::Profile;
use crate::rig::{Booted, Guest, Rig};
use crate::toolbox::{Recipe, Toolbox};
use crate::vm::{Input, Sinks};

/// A file or folder of the machine to be put into the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addition {
    /// On the machine.
    pub host: PathBuf,
    /// In the guest; an absolute path.
    pub guest: PathBuf,
}

impl Addition {
    /// Reads `HOST_PATH[:GUEST_PATH]`; without the second, the guest has it at the machine's path.
    pub fn parse(text: &str) -> Result<Self> {
        let (host, guest) = match text.rsplit_once(':') {
            Some((host, guest)) if guest.starts_with('/') && !host.is_empty() => {
                (host, Some(guest))
            }
            Some((_, guest)) if !Path::new(text).exists() => {
                bail!("{guest:?} is no absolute path in the guest")
            }
            _ => (text, None),
        };
        let host = std::path::absolute(host).with_context(|| format!("{host:?} is no path"))?;
        let guest = guest.map_or_else(|| host.clone(), PathBuf::from);
        Ok(Self { host, guest })
    }
}

/// A program to run in a guest of its own.
#[derive(Clone, Debug)]
pub struct Request {
    /// Name and arguments.
    pub command: Vec<OsString>,
    /// What else the guest gets.
    pub add: Vec<Addition>,
    /// Debian packages that the guest gets, with all that they depend on.
    pub packages: Vec<String>,
    /// The machine.
    pub profile: Profile,
    /// Environment beyond the usual.
    pub env: Vec<(String, String)>,
    /// How long it may take, boot included.
    pub timeout: Option<Duration>,
    /// Runs on a terminal of this size.
    pub tty: Option<Window>,
}

impl Request {
    /// A program in the default machine.
    pub fn new(command: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        Self {
            command: command.into_iter().map(Into::into).collect(),
            add: Vec::new(),
            packages: Vec::new(),
            profile: Profile::default(),
            env: Vec::new(),
            timeout: None,
            tty: None,
        }
    }
}

/// Boots a guest and runs the program in it.
///
/// # Errors
/// When there is no guest to speak of: something cannot be put into it, or the rig cannot run.
pub fn run_command(
    rig: &Rig,
    request: &Request,
    input: Input,
    make_sinks: &dyn Fn() -> Sinks,
) -> Result<Outcome> {
    let deadline = request.timeout.map(|timeout| Instant::now() + timeout);
    let mut archive = rig.archive()?;
    if !request.packages.is_empty() {
        let mut names: Vec<&str> = request.packages.iter().map(String::as_str).collect();
        names.sort_unstable();
        let packages = Toolbox::get(&rig.cache, &Recipe::for_guest(&names))?;
        archive.packages(&packages.root)?;
    }
    for addition in &request.add {
        archive.tree(&addition.guest, &addition.host)?;
    }
    let argv = place(&request.command, &mut archive)?;
    let cwd = std::env::current_dir().context("the working directory is gone")?;
    let swap = request
        .profile
        .swap
        .map(|size| disks::swap(rig, size))
        .transpose()?;
    let guest = Guest {
        memory: request.profile.memory.0,
        smp: request.profile.smp,
        append: request.profile.append.clone(),
        device: request.profile.device.clone(),
        disks: swap.iter().map(disks::TemporaryDisk::disk).collect(),
        setup: Setup {
            swap: swap.is_some().then(|| disks::SWAP.to_owned()),
            ..Setup::default()
        },
        archive,
    };
    let exec = Exec {
        argv,
        env: environment(&request.env),
        cwd: cwd.to_str().unwrap_or("/").to_owned(),
        tty: request.tty,
    };
    let mut vm = match rig.boot(guest, deadline, make_sinks)? {
        Booted::Up(vm, _) => vm,
        Booted::Dead(outcome) => return Ok(outcome),
    };
    let end = match vm.run(exec, input, deadline) {
        Ok(exit) => End::Exited(exit),
        Err(stop) => stop.into(),
    };
    Ok(vm.finish(end))
}

/// The environment of a program in the guest.
pub fn environment(more: &[(String, String)]) -> Vec<(String, String)> {
    let terminal = std::env::var("TERM").unwrap_or_else(|_| "dumb".to_owned());
    let usual = [
        ("PATH", PATH),
        ("HOME", "/root"),
        ("USER", "root"),
        ("TERM", &terminal),
    ];
    let usual = usual.map(|(name, value)| (name.to_owned(), value.to_owned()));
    usual.into_iter().chain(more.iter().cloned()).collect()
}

/// Decides whether the program is the guest's or the machine's; the machine's is put into the guest
/// at its own path. Returns name and arguments for the guest.
fn place(command: &[OsString], archive: &mut Archive) -> Result<Vec<String>> {
    let mut argv = command
        .iter()
        .map(|word| word.to_str().map(str::to_owned))
        .collect::<Option<Vec<String>>>()
        .context("the command's words must be UTF-8")?;
    let name = argv.first_mut().context("no command given")?;
    if let Some(host) = on_machine(name, archive)? {
        archive
            .program(&host, &host)
            .with_context(|| format!("cannot take {name} along"))?;
        *name = host
            .to_str()
            .context("the command's path must be UTF-8")?
            .to_owned();
    }
    Ok(argv)
}

/// The machine's file for a command, unless the guest has one (or nobody has).
fn on_machine(name: &str, archive: &Archive) -> Result<Option<PathBuf>> {
    if name.contains('/') {
        let path = std::path::absolute(name).with_context(|| format!("{name:?} is no path"))?;
        let guests = archive.contains(&path);
        return Ok((!guests && path.is_file()).then_some(path));
    }
    if archive.find_program(name).is_some() {
        return Ok(None);
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&folders)
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(name))
        .find(|path| {
            path.is_file() && nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok()
        });
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn additions_name_one_path_or_two() {
        let both = Addition::parse("/a/b:/c").unwrap();
        assert_eq!((both.host, both.guest), ("/a/b".into(), "/c".into()));
        let one = Addition::parse("/a/b").unwrap();
        assert_eq!((one.host, one.guest), ("/a/b".into(), "/a/b".into()));
        let relative = Addition::parse("x").unwrap();
        assert_eq!(relative.host, std::env::current_dir().unwrap().join("x"));
        assert_eq!(relative.guest, relative.host);
        assert!(Addition::parse("/a:b").is_err());
    }

    #[test]
    fn the_guests_programs_come_first_then_the_machines() {
        let mut archive = Archive::new();
        archive
            .link(Path::new("/bin/cat"), Path::new("/bin/busybox"))
            .unwrap();
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        assert_eq!(
            place(&words(&["cat", "x"]), &mut archive).unwrap(),
            ["cat", "x"]
        );
        assert_eq!(
            place(&words(&["/bin/cat"]), &mut archive).unwrap(),
            ["/bin/cat"]
        );

        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("own");
        fs::copy(std::env::current_exe().unwrap(), &own).unwrap();
        let own = own.to_str().unwrap();
        assert_eq!(
            place(&words(&[own, "-x"]), &mut archive).unwrap(),
            [own, "-x"]
        );
        assert!(archive.contains(Path::new(own)));

        let sh = place(&words(&["dpkg"]), &mut archive).unwrap();
        assert!(
            sh[0].ends_with("/bin/dpkg") && archive.contains(Path::new(&sh[0])),
            "{sh:?}"
        );
        // Nobody has it: the guest will say so.
        let nowhere = place(&words(&["no-such-program"]), &mut archive).unwrap();
        assert_eq!(nowhere, ["no-such-program"]);
    }
}
