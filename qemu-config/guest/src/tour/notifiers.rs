//! What following a process costs: the same changes of memory by each way, and with no device.
//!
//! Prints a line of JSON for each way. Every change begins with a context of its own, in which the
//! device has every page of two areas: one that is changed, and a smaller one beside it that is not,
//! so that it shows what is taken away for nothing.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use extlb_driver::spec::histogram::{self, BUCKETS};
use extlb_driver::spec::uapi::Stats;
use extlb_driver::spec::work::{Descriptor, Opcode};
use extlb_driver::{Context, Device, Follow, Iova, Kernel, Options, Registration};
use extlb_guest_protocol::figures::{Change, Way};

use super::memory_unsafe::{Area, PAGE, in_child, submit};
use super::procfs::vmstat;

/// The ways, and no device as the first.
const WAYS: [(&str, Option<Follow>); 5] = [
    ("no device", None),
    ("pte", Some(Follow::PTE)),
    ("mmu", Some(Follow::MMU)),
    ("interval", Some(Follow::INTERVAL)),
    ("pinned", Some(Follow::PINNED)),
];
/// Pages that are left alone.
const BESIDE: usize = 4096;
/// Pages that change at a time in the changes of parts, and how often.
const PART: usize = 16;
const PARTS: usize = 500;
const STRIDE: usize = 7919;
/// The device works on so much of the area while parts of it change.
const BUSY: usize = 2048;
/// Bytes of an operation of the device.
const CHUNK: usize = 1 << 20;

type Work = fn(&Scene) -> Result<u64>;

const CHANGES: [(&str, Work); 6] = [
    ("munmap", unmap),
    ("mprotect", protect),
    ("fork", fork),
    ("reclaim", reclaim),
    ("parts", parts),
    ("parts, busy", busy_parts),
];

/// Memory that the device has, if there is one.
struct Scene {
    area: Area,
    beside: Area,
    context: Option<Context<Kernel>>,
    registrations: Vec<Registration<Kernel>>,
    pinned: bool,
}

/// All ways, each change of `mib` MiB.
pub fn run(mib: usize) -> Result<()> {
    ensure!(
        mib.is_power_of_two() && mib * 256 >= PARTS * PART,
        "a power of two, 32 at least"
    );
    set_up_swap()?;
    let device = Device::open(Kernel::new())?;
    let can = device.info().create_flags;
    for (way, follow) in WAYS {
        if follow.is_some_and(|follow| can & follow.bits() == 0) {
            continue;
        }
        let changes = CHANGES.iter().map(|(name, work)| {
            measure(&device, follow, mib * 256, name, *work)
                .with_context(|| format!("{way}, {name}"))
        });
        let changes = changes.collect::<Result<_>>()?;
        let way = way.to_owned();
        println!("{}", serde_json::to_string(&Way { way, changes })?);
    }
    Ok(())
}

/// Compressed memory to swap to, so that no disk is measured.
fn set_up_swap() -> Result<()> {
    let swaps = std::fs::read_to_string("/proc/swaps").context("/proc/swaps")?;
    if swaps.lines().count() >= 2 {
        return Ok(());
    }
    ensure!(Path::new("/sys/block/zram0").exists(), "no zram to swap to");
    std::fs::write("/sys/block/zram0/disksize", "1G").context("zram's size")?;
    for applet in ["mkswap", "swapon"] {
        let mut command = std::process::Command::new("/bin/busybox");
        command.args([applet, "/dev/zram0"]);
        let status = command.stdout(std::process::Stdio::null()).status();
        ensure!(status.context("busybox")?.success(), "{applet} failed");
    }
    Ok(())
}

fn measure(
    device: &Device<Kernel>,
    follow: Option<Follow>,
    pages: usize,
    name: &str,
    work: Work,
) -> Result<Change> {
    let scene = Scene::new(device, follow, pages)?;
    let before = scene.stats()?;
    let begun = Instant::now();
    let changed = work(&scene)?;
    let ns = begun.elapsed().as_nanos() as u64;
    let mut change = Change {
        name: name.to_owned(),
        ns,
        changed,
        ..Change::default()
    };
    if let (Some(before), Some(after)) = (before, scene.stats()?) {
        fill_in(&mut change, &before, &after);
        ensure!(after.oracle_stale == 0, "a stale access of the device");
        if change.name != "parts, busy" {
            change.beyond = change.shot.saturating_sub(changed);
        }
    }
    Ok(change)
}

fn fill_in(change: &mut Change, before: &Stats, after: &Stats) {
    let counts: [u64; BUCKETS] =
        std::array::from_fn(|i| after.shootdown_ns[i] - before.shootdown_ns[i]);
    change.callbacks = after.callbacks - before.callbacks;
    change.shot = after.shot_pages - before.shot_pages;
    change.shootdowns = after.shootdowns - before.shootdowns;
    change.p50_ns = histogram::percentile(&counts, 500);
    change.p99_ns = histogram::percentile(&counts, 990);
    change.retried = after.retried_fills - before.retried_fills;
    change.page_requests = after.page_requests - before.page_requests;
}

impl Scene {
    fn new(device: &Device<Kernel>, follow: Option<Follow>, pages: usize) -> Result<Self> {
        let (area, beside) = (Area::fresh(pages)?, Area::fresh(BESIDE)?);
        // The same content with a device and without: swap stores it at a cost that depends on it.
        let number = |area: &Area| {
            (0..area.pages()).for_each(|page| area.store(page * PAGE, page as u64 + 1));
        };
        let Some(follow) = follow else {
            number(&area);
            number(&beside);
            return Ok(Self {
                area,
                beside,
                context: None,
                registrations: Vec::new(),
                pinned: false,
            });
        };
        let context = device.context(Options {
            follow,
            ..Options::default()
        })?;
        let (all, others) = (area.addrs(&(0..pages)), beside.addrs(&(0..BESIDE)));
        let registrations = vec![
            context.register_addresses(all.clone())?,
            context.register_addresses(others.clone())?,
        ];
        for range in [others, all] {
            for at in (range.start.0..range.end.0).step_by(CHUNK) {
                write(&context, Iova(at), CHUNK.min((range.end.0 - at) as usize))?;
            }
        }
        number(&area);
        number(&beside);
        let mapped = context.stats()?.mapped_pages;
        ensure!(
            mapped >= (pages + BESIDE) as u64,
            "the device has {mapped} pages only"
        );
        Ok(Self {
            area,
            beside,
            context: Some(context),
            registrations,
            pinned: follow == Follow::PINNED,
        })
    }

    fn stats(&self) -> Result<Option<Stats>> {
        let stats = self.context.as_ref().map(Context::stats);
        Ok(stats.transpose()?)
    }

    fn all(&self) -> std::ops::Range<usize> {
        0..self.area.pages()
    }
}

impl Drop for Scene {
    /// What was unmapped is the next scene's to map: the device must be done with it before.
    fn drop(&mut self) {
        self.registrations.clear();
        self.context = None;
    }
}

/// The device writes zeros to a range, which succeeds.
fn write(context: &Context<Kernel>, start: Iova, len: usize) -> Result<()> {
    let descriptor = Descriptor {
        opcode: Opcode::Fill as u8,
        dst: start.0,
        len: len as u64,
        ..Descriptor::default()
    };
    let pending = submit(&context.queue().batch(), descriptor)?;
    pending.finish()?;
    Ok(())
}

/// All at once.
fn unmap(scene: &Scene) -> Result<u64> {
    scene.area.unmap(scene.all())?;
    Ok(scene.area.pages() as u64)
}

fn protect(scene: &Scene) -> Result<u64> {
    scene.area.protect(scene.all(), false)?;
    Ok(scene.area.pages() as u64)
}

/// Everything becomes read-only, in either process. The child ends at once; that is waited for.
fn fork(scene: &Scene) -> Result<u64> {
    in_child(|| true, || ())?;
    Ok((scene.area.pages() + scene.beside.pages()) as u64)
}

/// Swaps the area out, which reclaims in batches as the kernel does for itself.
fn reclaim(scene: &Scene) -> Result<u64> {
    let before = vmstat("pswpout")?;
    scene.area.page_out(scene.all())?;
    let out = vmstat("pswpout")? - before;
    let pages = scene.area.pages() as u64;
    ensure!(
        scene.pinned || out >= pages * 9 / 10,
        "only {out} of {pages} pages went out"
    );
    Ok(out.min(pages))
}

/// Gives a few pages up and touches them again, here and there.
fn give_up(area: &Area, among: usize) -> Result<()> {
    for n in 0..PARTS {
        // Odd, so that each part comes once before any comes again.
        let start = n * STRIDE % (among / PART) * PART;
        area.dont_need(start..start + PART)?;
        (start..start + PART).for_each(|page| area.store(page * PAGE, 1));
    }
    Ok(())
}

fn parts(scene: &Scene) -> Result<u64> {
    give_up(&scene.area, scene.area.pages())?;
    Ok((PARTS * PART) as u64)
}

/// The same while the device writes there.
fn busy_parts(scene: &Scene) -> Result<u64> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let device = scope.spawn(|| device_works(scene, &stop));
        // So that it is under way in any case.
        std::thread::sleep(Duration::from_millis(50));
        let done = give_up(&scene.area, BUSY);
        stop.store(true, Ordering::Relaxed);
        let worked = device.join();
        done.and(worked.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    Ok((PARTS * PART) as u64)
}

fn device_works(scene: &Scene, stop: &AtomicBool) -> Result<()> {
    let Some(context) = &scene.context else {
        return Ok(());
    };
    let mut at = 0;
    while !stop.load(Ordering::Relaxed) {
        write(context, scene.area.addr(at), CHUNK / 8)?;
        at = (at + CHUNK / 8) % (BUSY * PAGE);
    }
    Ok(())
}
