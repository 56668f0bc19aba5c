//! The device is taken away from under programs that use it, in each way that there is, and comes
//! back: they get an error, none hangs, and all go on when they open it again.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::libc;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use crate::proc_fs::{contexts, eventually};
use crate::raw_context::Contexts;
use crate::role::Crew;
use crate::sys_unsafe::{ARENA, call, load_module, unload_module};
use crate::{Figures, Order};

const DRIVER: &str = "/sys/bus/pci/drivers/extlb";
/// Programs at work.
const WORKERS: usize = 3;
/// All who have a context: one that sleeps, and the bystander, too.
const USERS: usize = WORKERS + 2;

type Way = fn() -> Result<()>;
/// How it is taken away.
const WAYS: [(&str, Way); 4] = [
    ("unbind", unbind_and_bind),
    ("reset", reset),
    ("remove", remove_and_rescan),
    ("reload", reload),
];

/// Takes the device away `count` times.
pub fn run(order: &Order) -> Result<Figures> {
    let mut crew = Crew::new();
    for _ in 0..WORKERS {
        crew.start(&["endure"])?;
    }
    crew.start(&["sleep"])?;
    let mut rng = Pcg64::seed_from_u64(order.seed);
    let mut figures = Figures::new();
    for round in 0..order.count {
        all_work(&mut crew)?;
        std::thread::sleep(Duration::from_micros(rng.random_range(0..30_000)));
        let (name, way) = WAYS[round as usize % WAYS.len()];
        order.watch.step(name);
        let begin = Instant::now();
        way().context(name)?;
        let ms = begin.elapsed().as_millis() as u64;
        *figures.entry(name.to_owned()).or_default() += 1;
        let longest = figures.entry(format!("{name}_longest_ms")).or_default();
        *longest = ms.max(*longest);
    }
    order.watch.step("all work again");
    all_work(&mut crew)?;
    ensure!(
        unload_module(c"extlb") == Err(Errno::EAGAIN),
        "a driver in use can be unloaded"
    );
    Ok(figures)
}

/// Each has noticed that its context is gone, and has another.
fn all_work(crew: &mut Crew) -> Result<()> {
    eventually("all use the device again", || {
        crew.check()?;
        Ok(contexts().unwrap_or(0) == USERS)
    })
}

/// The device's place in sysfs.
fn device() -> Result<PathBuf> {
    for entry in fs::read_dir("/sys/bus/pci/devices")?.flatten() {
        let id = fs::read_to_string(entry.path().join("device")).unwrap_or_default();
        if id.trim() == format!("{:#06x}", extlb_spec::PCI_DEVICE_ID) {
            return Ok(entry.path());
        }
    }
    bail!("no device on the bus")
}

fn put(path: impl Into<PathBuf>, text: &str) -> Result<()> {
    let path = path.into();
    fs::write(&path, text).with_context(|| format!("write {text:?} to {}", path.display()))
}

/// Takes the driver from the device, and gives it back.
pub fn unbind_and_bind() -> Result<()> {
    let device = device()?;
    let name = device.file_name().context("a name")?.to_string_lossy();
    put(format!("{DRIVER}/unbind"), &name)?;
    put(format!("{DRIVER}/bind"), &name)
}

/// Somebody resets the function; the driver has to be bound again.
fn reset() -> Result<()> {
    put(device()?.join("reset"), "1")?;
    unbind_and_bind()
}

fn remove_and_rescan() -> Result<()> {
    put(device()?.join("remove"), "1")?;
    put("/sys/bus/pci/rescan", "1")
}

/// The module goes as well, when the last program has noticed that the device has gone.
fn reload() -> Result<()> {
    let device = device()?;
    let name = device.file_name().context("a name")?.to_string_lossy();
    let parameters = parameters()?;
    put(format!("{DRIVER}/unbind"), &name)?;
    eventually("the module can be unloaded", || {
        match unload_module(c"extlb") {
            Ok(()) => Ok(true),
            Err(Errno::EAGAIN) => Ok(false),
            Err(errno) => Err(errno).context("delete_module"),
        }
    })?;
    load_module("/extlb.ko", &parameters)
}

/// The module's parameters as they are, to load it again.
fn parameters() -> Result<String> {
    let mut words = Vec::new();
    for entry in fs::read_dir("/sys/module/extlb/parameters")?.flatten() {
        let value = fs::read_to_string(entry.path())?;
        let name = entry.file_name();
        // What was not given has no value.
        if value.trim() != "(null)" {
            words.push(format!("{}={}", name.to_string_lossy(), value.trim()));
        }
    }
    Ok(words.join(" "))
}

/// Sleeps for events that never come, until the device goes; and again. Both who reads and who
/// polls has to be woken.
pub fn sleep() -> Result<()> {
    let contexts = Contexts::new()?;
    loop {
        let Ok(file) = contexts.open(0, 0) else {
            std::thread::sleep(Duration::from_millis(2));
            continue;
        };
        if let Err(errno) = contexts.create(file) {
            ensure!(errno == Errno::EIO, "CREATE: {errno}");
            contexts.close(file)?;
            std::thread::sleep(Duration::from_millis(2));
            continue;
        }
        let (doorbell, shadow) = match contexts.map(file) {
            Err(Errno::EIO) => {
                contexts.close(file)?;
                continue;
            }
            mapped => mapped.context("mmap")?,
        };
        let (for_reader, for_poller) = (ARENA + 4096, ARENA + 8192);
        let reader =
            std::thread::spawn(move || call(libc::SYS_read, [file, for_reader, 8, 0, 0, 0]));
        let entry = file | (libc::POLLIN as u64) << 32;
        contexts.poke(for_poller, &entry.to_le_bytes())?;
        call(libc::SYS_poll, [for_poller, 1, u64::MAX, 0, 0, 0]).context("poll")?;
        let read = reader.join().ok().context("the reader panicked")?;
        ensure!(read == Err(Errno::EIO), "read: {read:?}");
        // What was mapped is still there, and means nothing.
        contexts
            .poke(doorbell, &[1, 0, 0, 0])
            .context("the doorbell")?;
        contexts
            .poke(shadow, &[1, 0, 0, 0])
            .context("the shadow page")?;
        contexts.close(file)?;
    }
}
