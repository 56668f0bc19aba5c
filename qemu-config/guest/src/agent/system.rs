//! The guest around the programs: mounts, driver, disks, power.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::pci;
use extlb_guest_protocol::{MODULES_FILE, Mount, Setup};

/// Where the rig puts the driver.
const DRIVER: &str = "/extlb.ko";
const DEVICE_NODE: &str = "/dev/extlb0";
/// Probing a disk, or the driver a device, takes milliseconds; this is for emulation on a busy host,
/// and for kernels that check all that they do.
const PROBE_WAIT: Duration = Duration::from_secs(60);
/// Where kmemleak is told to scan.
const LEAKS: &str = "/sys/kernel/debug/kmemleak";
/// Younger memory does not count as leaked; kmemleak's own limit is 5 s.
const LEAK_AGE: Duration = Duration::from_millis(5500);

/// Mounts the kernel's own file systems.
pub fn mount_all() -> Result<()> {
    let mounts = [
        ("proc", "/proc", "proc", ""),
        ("sysfs", "/sys", "sysfs", ""),
        ("devtmpfs", "/dev", "devtmpfs", ""),
        ("devpts", "/dev/pts", "devpts", "ptmxmode=0666"),
        ("tmpfs", "/dev/shm", "tmpfs", "mode=1777"),
        ("debugfs", "/sys/kernel/debug", "debugfs", ""),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", ""),
    ];
    for (source, target, kind, options) in mounts {
        fs::create_dir_all(target).with_context(|| format!("cannot make {target}"))?;
        mount(
            Some(source),
            target,
            Some(kind),
            MsFlags::empty(),
            Some(options),
        )
        .with_context(|| format!("cannot mount {kind} on {target}"))?;
    }
    for directory in ["/tmp", "/var/tmp"] {
        fs::create_dir_all(directory)?;
        fs::set_permissions(directory, fs::Permissions::from_mode(0o1777))?;
    }
    for directory in ["/root", "/run", "/mnt", "/etc"] {
        fs::create_dir_all(directory)?;
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
        ("/dev/ptmx", "pts/ptmx"),
    ] {
        let _ = fs::remove_file(link);
        let _ = std::os::unix::fs::symlink(target, link);
    }
    Ok(())
}

/// A loopback interface, a host name: conveniences that may be absent.
pub fn prepare_console() {
    let _ = nix::unistd::sethostname("extlb");
    let _ = busybox(&["ip", "link", "set", "lo", "up"]);
}

/// The running kernel's release, as in `uname -r`.
pub fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map(|release| release.trim_end().to_owned())
        .unwrap_or_default()
}

/// Loads the modules that the rig has listed; among them may be those without which the channel to
/// the rig does not come up.
pub fn load_modules() -> Result<()> {
    let list = match fs::read_to_string(MODULES_FILE) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        list => list.context(MODULES_FILE)?,
    };
    list.lines().try_for_each(|module| load(Path::new(module)))
}

/// Loads the driver and brings the disks into place.
pub fn set_up(setup: &Setup) -> Result<()> {
    // Before the device's own driver is there to take it.
    if let Some(driver) = &setup.bind {
        pci::bind(driver)?;
    }
    if Path::new(DRIVER).exists() {
        load(Path::new(DRIVER))?;
    }
    if setup.expect_device {
        wait_for(Path::new(DEVICE_NODE)).with_context(|| {
            format!("the driver was loaded and did not offer {DEVICE_NODE}; see the kernel's log")
        })?;
    }
    if let Some(input) = &setup.input {
        mount_disk(input)?;
    }
    if let Some(serial) = &setup.swap {
        let disk = find_disk(serial)?;
        let disk = disk.to_string_lossy();
        busybox(&["mkswap", &disk])?;
        busybox(&["swapon", &disk])?;
    }
    Ok(())
}

/// Loads a module, with its parameters from the kernel's command line.
fn load(module: &Path) -> Result<()> {
    let file = File::open(module).with_context(|| module.display().to_string())?;
    let name = module.file_stem().unwrap_or_default().to_string_lossy();
    let command_line = fs::read_to_string("/proc/cmdline").context("/proc/cmdline")?;
    let parameters = module_parameters(&command_line, &format!("{name}."));
    let parameters = std::ffi::CString::new(parameters)?;
    match finit_module(file, &parameters, ModuleInitFlags::empty()) {
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot load {}", module.display())),
    }
}

/// The parameters for a module in a kernel command line: `prefix` is taken off.
fn module_parameters(command_line: &str, prefix: &str) -> String {
    let parameters: Vec<&str> = command_line
        .split_whitespace()
        .filter_map(|word| word.strip_prefix(prefix))
        .collect();
    parameters.join(" ")
}

fn mount_disk(input: &Mount) -> Result<()> {
    let disk = find_disk(&input.serial)?;
    fs::create_dir_all(&input.path).with_context(|| format!("cannot make {}", input.path))?;
    mount(
        Some(&disk),
        input.path.as_str(),
        Some("ext4"),
        MsFlags::MS_RDONLY,
        Some("noload"),
    )
    .with_context(|| format!("cannot mount {} on {}", disk.display(), input.path))
}

fn find_disk(serial: &str) -> Result<PathBuf> {
    let start = Instant::now();
    loop {
        for entry in fs::read_dir("/sys/block").context("/sys/block")?.flatten() {
            let found = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
            let device = Path::new("/dev").join(entry.file_name());
            if found.trim_end() == serial && device.exists() {
                return Ok(device);
            }
        }
        if start.elapsed() > PROBE_WAIT {
            bail!("no disk with serial number {serial:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn wait_for(path: &Path) -> Result<()> {
    let start = Instant::now();
    while !path.exists() {
        if start.elapsed() > PROBE_WAIT {
            bail!("{} did not appear", path.display());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Runs an applet; what it printed is part of the error. Its status is read from its output, because
/// only the reaper may wait for children.
fn busybox(arguments: &[&str]) -> Result<()> {
    const MARK: &str = "extlb-status:";
    let script = format!("busybox \"$@\" 2>&1; echo {MARK}$?");
    let output = Command::new("/bin/busybox")
        .args(["sh", "-c", &script, "sh"])
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .and_then(|mut child| {
            let mut text = String::new();
            if let Some(mut stdout) = child.stdout.take() {
                std::io::Read::read_to_string(&mut stdout, &mut text)?;
            }
            Ok(text)
        })
        .with_context(|| format!("busybox {}", arguments.join(" ")))?;
    match output.rsplit_once(MARK) {
        Some((_, status)) if status.trim() == "0" => Ok(()),
        Some((said, status)) => {
            bail!(
                "{} failed ({}): {}",
                arguments.join(" "),
                status.trim(),
                said.trim()
            )
        }
        None => bail!("{} was cut short: {}", arguments.join(" "), output.trim()),
    }
}

/// Ends every program, unloads the driver (its own ending must be sound too, and a report from it
/// must reach the console), and switches the machine off.
pub fn power_off() -> ! {
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    let start = Instant::now();
    while programs_left() && start.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(1));
    }
    if Path::new(DRIVER).exists() {
        let name = c"extlb";
        if let Err(error) = nix::kmod::delete_module(name, nix::kmod::DeleteModuleFlags::O_NONBLOCK)
            && error != nix::errno::Errno::ENOENT
        {
            // A kernel log line: the rig shows it when the run is judged.
            let _ = fs::write(
                "/dev/kmsg",
                format!("extlb-agent: driver not unloaded: {error}\n"),
            );
        }
    }
    look_for_leaks();
    nix::unistd::sync();
    let error = reboot(RebootMode::RB_POWER_OFF).unwrap_err();
    eprintln!("extlb-agent: cannot switch off: {error}");
    std::process::exit(1);
}

/// Has a kernel with kmemleak look for memory that nobody points to any more; it names it on the
/// console. To be called when all that was allocated for programs and by the driver must be gone.
fn look_for_leaks() {
    let file = Path::new(LEAKS);
    if !file.exists() {
        return;
    }
    let scan = || {
        if let Err(error) = fs::write(file, "scan") {
            let _ = fs::write(
                "/dev/kmsg",
                format!("extlb-agent: no search for leaks: {error}\n"),
            );
        }
    };
    // The first scan takes the sum of what is in the memory; memory that still has the same content
    // at the second, and is old enough not to be just on its way somewhere, has leaked.
    let start = Instant::now();
    scan();
    std::thread::sleep(LEAK_AGE.saturating_sub(start.elapsed()));
    scan();
}

/// Whether a process other than this one and the kernel's threads exists.
fn programs_left() -> bool {
    let Ok(processes) = fs::read_dir("/proc") else {
        return false;
    };
    processes.flatten().any(|entry| {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            return false;
        };
        // Kernel threads have an empty command line and no memory; zombies have none either.
        pid != 1
            && fs::read_to_string(entry.path().join("status"))
                .is_ok_and(|status| status.contains("VmSize:"))
    })
}

#[cfg(test)]
mod tests {
    use super::module_parameters;

    #[test]
    fn the_drivers_parameters_are_taken_from_the_command_line() {
        let line = "console=ttyS0 extlb.mode=pte extlbx.a=1 quiet extlb.notify=0\n";
        assert_eq!(module_parameters(line, "extlb."), "mode=pte notify=0");
        assert_eq!(module_parameters("", "extlb."), "");
    }
}
