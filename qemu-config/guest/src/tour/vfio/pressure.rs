//! A working set of twice the guest's memory cannot be locked.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use extlb_driver::hardware::VfioGroup;
use extlb_driver::{Error, Options};

use crate::tour::figures::Figures;
use crate::tour::pinned;
use crate::tour::procfs;

/// The working set, in MiB: that of the tour with pte notifiers.
const TOTAL_MIB: u64 = crate::tour::WORKING_SET;
/// MiB registered at a time.
const PIECE_MIB: u64 = 8;

/// The step.
pub fn run(bdf: &str, figures: &mut Figures) -> Result<String> {
    let memory = procfs::meminfo_kib("MemTotal")? >> 10;
    let free = procfs::meminfo_kib("MemAvailable")? >> 10;
    ensure!(
        memory < TOTAL_MIB,
        "the guest has {memory} MiB, more than the working set: run it with --memory 256M"
    );
    let ended = pinned::run_child(&["vfio-child", &TOTAL_MIB.to_string()])?;
    let outcome = ended.must_have_failed(TOTAL_MIB)?;
    // Each piece that was registered and filled by the device was reported.
    let held = ended
        .said
        .lines()
        .filter_map(|line| line.parse().ok())
        .max();
    let held: u64 = held.unwrap_or(0);
    let swapped = procfs::vmstat("pswpout")? * 4;
    figures.working_set_mib = Some(held);
    figures.pinned_outcome = Some(outcome.clone());
    figures.swapped_out_kib = Some(swapped);
    figures.available_least_kib = Some(ended.available_kib);
    figures.vm_lck_kib = Some(ended.locked_kib);
    println!(
        "  {memory} MiB of memory, {free} MiB available; {TOTAL_MIB} MiB wanted, {PIECE_MIB} MiB at \
         a time"
    );
    println!("  the device worked on {held} MiB, all of it locked; then: {outcome}");
    println!(
        "  left for everybody else at the worst moment: {} MiB; {} MiB of theirs were swapped out",
        ended.available_kib >> 10,
        swapped >> 10
    );
    ensure!(held > 0, "nothing could be registered at all");
    ensure!(held < TOTAL_MIB, "the whole working set was locked");
    // Whoever comes next finds a device that works.
    let device = super::open(VfioGroup::open(bdf)?)?;
    let context = device.context(Options::default())?;
    let (crc, _) = context
        .queue()
        .crc32c(context.allocate(4096)?, 0)?
        .finish()?;
    ensure!(
        crc == crc32c::crc32c(&[0; 4096]),
        "the device does not work afterwards"
    );
    Ok(format!(
        "{held} of {TOTAL_MIB} MiB in a guest of {memory} MiB, then {outcome}; the device works \
         afterwards"
    ))
}

/// The child: registers piece after piece and has the device fill each; says how far it has come.
pub fn child(mib: u64) -> ExitCode {
    pinned::tell(lock(mib))
}

fn lock(mib: u64) -> Result<Option<String>> {
    pinned::be_the_one_to_go()?;
    let device = super::open(VfioGroup::open(&super::bdf()?)?)?;
    let context = device.context(Options::default())?;
    let mut locked = Vec::new();
    for done in (0..mib).step_by(PIECE_MIB as usize) {
        let piece = device.map_anonymous((PIECE_MIB as usize) << 20)?;
        match context.register(piece) {
            Ok(piece) => {
                let ((), piece) = context.queue().fill(piece, done)?.finish()?;
                locked.push(piece);
                println!("{}", done + PIECE_MIB);
            }
            Err(refused) => match refused.error {
                error @ (Error::Hardware(_) | Error::LockLimit { .. } | Error::Call { .. }) => {
                    return Ok(Some(format!("registering fails after {done} MiB: {error}")));
                }
                other => return Err(other.into()),
            },
        }
    }
    Ok(None)
}
