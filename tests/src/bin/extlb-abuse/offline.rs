//! Memory is taken out of the machine while the device works on it: blocks that can be moved are
//! set offline, which moves every page of theirs elsewhere, and online again.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::proc_fs::{PATIENCE, counter, vmstat};
use crate::role::Crew;
use crate::{Figures, Order, bystander};

const BLOCKS: &str = "/sys/devices/system/memory";
/// Memory that each of the processes has at a time, in MiB.
const HELD_MIB: usize = 40;
const HOLDERS: usize = 2;
const CHUNK: usize = 1 << 20;

/// Takes a block away `count` times.
pub fn run(order: &Order) -> Result<Figures> {
    let blocks = movable_blocks()?;
    ensure!(
        !blocks.is_empty(),
        "no memory can be moved as a block: start the kernel with movablecore="
    );
    let mut crew = Crew::new();
    for _ in 0..HOLDERS {
        crew.start(&["hold"])?;
    }
    let mut figures = Figures::new();
    let shootdowns = counter("shootdowns")?;
    for round in 0..order.count {
        let block = &blocks[round as usize % blocks.len()];
        order.watch.step("a block of memory is in use");
        let requests = counter("page_requests")?;
        wait_for(&mut crew, || Ok(counter("page_requests")? > requests + 20))?;
        order.watch.step("a block of memory goes offline");
        let moved = vmstat("pgmigrate_success")?;
        let begin = Instant::now();
        // A page may be in use by somebody in the kernel for a moment.
        let state = block.join("state");
        wait_for(&mut crew, || {
            order.watch.alive();
            Ok(fs::write(&state, "offline").is_ok())
        })?;
        let took = begin.elapsed().as_millis() as u64;
        let moved = vmstat("pgmigrate_success")? - moved;
        order.watch.step("the others go on without the block");
        let requests = counter("page_requests")?;
        wait_for(&mut crew, || Ok(counter("page_requests")? > requests + 20))?;
        fs::write(&state, "online_movable").context("online")?;
        *figures.entry("pages_moved".to_owned()).or_default() += moved;
        let longest = figures.entry("offline_longest_ms".to_owned()).or_default();
        *longest = took.max(*longest);
    }
    crew.check()?;
    let moved = figures.get("pages_moved").copied().unwrap_or(0);
    ensure!(moved > 1000, "only {moved} pages were moved");
    // Migration waits once for up to 512 pages.
    let shot = counter("shootdowns")? - shootdowns;
    ensure!(shot > 10, "only {shot} shootdowns");
    figures.insert("shootdowns".to_owned(), shot);
    Ok(figures)
}

fn wait_for(crew: &mut Crew, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !condition()? {
        crew.check()?;
        if Instant::now() > end {
            bail!("not within {} s", PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Blocks of memory that hold nothing but what can be moved.
fn movable_blocks() -> Result<Vec<PathBuf>> {
    let mut blocks = Vec::new();
    for entry in fs::read_dir(BLOCKS).context(BLOCKS)?.flatten() {
        let read = |name| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        if read("state").trim() == "online" && read("valid_zones").trim() == "Movable" {
            blocks.push(entry.path());
        }
    }
    blocks.sort();
    Ok(blocks)
}

/// Holds much memory that the device has written, looks at the oldest part of it, and writes that
/// anew, until killed.
pub fn hold() -> Result<()> {
    let context = bystander::open(false)?;
    let mut held = std::collections::VecDeque::new();
    for pattern in 1u64.. {
        if held.len() == HELD_MIB {
            let (chunk, pattern): (extlb_driver::SliceMut<_>, u64) =
                held.pop_front().context("a chunk")?;
            let pattern = pattern.to_ne_bytes();
            let same = chunk.chunks_exact(8).all(|word| word == pattern);
            ensure!(same, "memory that was moved is not what the device wrote");
            let sum = crc32c::crc32c(&chunk);
            let (found, _) = context.queue().crc32c(chunk, 0)?.finish()?;
            ensure!(
                found == sum,
                "the device finds CRC32C {found:08x}, not {sum:08x}"
            );
        }
        let memory = context.allocate(CHUNK)?;
        let ((), memory) = context.queue().fill(memory, pattern)?.finish()?;
        held.push_back((memory, pattern));
    }
    Ok(())
}
