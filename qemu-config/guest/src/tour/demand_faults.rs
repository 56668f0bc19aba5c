//! A file is copied and summed by the device, by virtual addresses that nothing has touched.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use extlb_driver::{
    Context, Copy, Crc32c, Device, Kernel, Options, Pending, Sharing, Slice, SliceMut,
};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::figures::Figures;
use super::memory_unsafe::resident;
use super::{Arguments, DEFAULT_INPUT, procfs};

/// Bytes of one operation.
const PIECE: usize = 1 << 20;
/// Copies under way, and pairs of checksums.
const DEPTH: usize = 12;
const SMALL: u64 = 64 << 20;

/// The step.
pub fn run(
    arguments: &Arguments,
    device: &Device<Kernel>,
    figures: &mut Figures,
) -> Result<String> {
    let path = arguments
        .input
        .clone()
        .unwrap_or_else(|| PathBuf::from(DEFAULT_INPUT));
    let file = File::open(&path).with_context(|| path.display().to_string())?;
    let len = file.metadata()?.len();
    ensure!(len > 0, "{} is empty", path.display());
    if len < SMALL {
        println!(
            "  {} has only {len} bytes; 64 MiB or more show more",
            path.display()
        );
        ensure!(
            arguments.input.is_some(),
            "the input is too small: give a file with --input"
        );
    }
    let len = usize::try_from(len)?;
    make_cold(&file)?;

    let context = device.context(Options {
        ring_log2: 7,
        ..Options::default()
    })?;
    let mapping = device.map_file(&file, 0..len as u64, Sharing::Shared)?;
    let src = context.register_source(mapping)?;
    let dst = context.allocate(len)?;
    let (src_addr, dst_addr) = (src.addr(), dst.addr());
    let resident_kib = || -> Result<u64> {
        Ok((resident(src_addr, len)? + resident(dst_addr, len)?) as u64 >> 10)
    };
    let before = context.stats()?;
    let resident_before = resident_kib()?;
    figures.resident_before_kib = Some(resident_before);
    figures.rss_before_kib = Some(procfs::status_kib("VmRSS")?);
    println!(
        "  {}: {} MiB; {} KiB of file and destination are resident",
        path.display(),
        len >> 20,
        resident_before
    );

    let begun = Instant::now();
    let device_result = copy_and_sum(&context, &src, dst, figures)?;
    let elapsed = begun.elapsed();
    figures.take_stats(&before, &context.stats()?);
    figures.seconds = Some(super::figures::seconds(elapsed));
    figures.bytes = Some(3 * len as u64);
    figures.resident_after_kib = Some(resident_kib()?);
    figures.rss_after_kib = Some(procfs::status_kib("VmRSS")?);

    let cpu_src = sum_by_reading(&path)?;
    let cpu_dst = device_result
        .dst
        .iter()
        .fold(0, |crc, piece| crc32c::crc32c_append(crc, piece));
    figures.crc32c = Some(format!("{cpu_src:08x}"));
    println!(
        "  CRC32C: {:08x} of the source and {:08x} of the copy by the device, {cpu_src:08x} and \
         {cpu_dst:08x} by the CPU",
        device_result.src_crc, device_result.dst_crc
    );
    let [lck, pin] = [
        figures.vm_lck_kib.unwrap_or(1),
        figures.vm_pin_kib.unwrap_or(1),
    ];
    let requests = figures.page_requests.unwrap_or(0);
    println!(
        "  {requests} page requests for {} pages; VmLck {lck} KiB, VmPin {pin} KiB; resident {} \
         KiB before and {} KiB after",
        figures.pages_filled.unwrap_or(0),
        resident_before,
        figures.resident_after_kib.unwrap_or(0)
    );
    let crcs = [device_result.src_crc, device_result.dst_crc, cpu_dst];
    ensure!(
        crcs.iter().all(|crc| *crc == cpu_src),
        "the checksums differ"
    );
    ensure!(lck == 0 && pin == 0, "memory was locked");
    ensure!(
        requests > 0,
        "no page was requested: the memory was not cold"
    );
    ensure!(
        resident_before <= len as u64 >> 10 >> 5,
        "{resident_before} KiB were resident before: the memory was not cold"
    );
    let stale = figures.stale_accesses.unwrap_or(u64::MAX);
    ensure!(stale == 0, "{stale} stale accesses");
    let rate = super::small_copies::per_second(&context)?;
    figures.small_copies_per_second = Some(rate.round());
    println!("  {rate:.0} copies of 4 KiB a second");
    Ok(format!(
        "{} MiB copied and summed by address in {:.1} s, {requests} page requests, nothing locked",
        len >> 20,
        elapsed.as_secs_f64()
    ))
}

/// Drops the file from the page cache.
fn make_cold(file: &File) -> Result<()> {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).context("posix_fadvise")?;
    procfs::drop_caches()
}

struct Summed {
    src_crc: u32,
    dst_crc: u32,
    dst: Vec<SliceMut<Kernel>>,
}

/// A piece on its way: copied first, then summed on both sides while its pages are there.
type Copying = Pending<Kernel, Copy, (Slice<Kernel>, SliceMut<Kernel>)>;
type Summing = (
    Pending<Kernel, Crc32c, Slice<Kernel>>,
    Pending<Kernel, Crc32c, SliceMut<Kernel>>,
);

fn copy_and_sum(
    context: &Context<Kernel>,
    src: &Slice<Kernel>,
    dst: SliceMut<Kernel>,
    figures: &mut Figures,
) -> Result<Summed> {
    let queue = context.queue();
    let mut copying: VecDeque<Copying> = VecDeque::new();
    let mut summing: VecDeque<Summing> = VecDeque::new();
    let mut done = Summed {
        src_crc: 0,
        dst_crc: 0,
        dst: Vec::new(),
    };
    let (mut lck, mut pin) = (0, 0);

    let mut pieces = dst.chunks(PIECE);
    let mut at = 0;
    loop {
        let piece = pieces.next();
        let more = piece.is_some();
        if let Some(piece) = piece {
            let end = at + piece.len();
            copying.push_back(queue.copy(src.slice(at..end), piece)?);
            at = end;
        }
        if (copying.len() == DEPTH || !more)
            && let Some(copy) = copying.pop_front()
        {
            let ((), (src, dst)) = copy.finish()?;
            summing.push_back((queue.crc32c(src, 0)?, queue.crc32c(dst, 0)?));
        }
        if summing.len() == DEPTH || copying.is_empty() && !more {
            let Some((src, dst)) = summing.pop_front() else {
                break;
            };
            let (src_crc, src) = src.finish()?;
            let (dst_crc, dst) = dst.finish()?;
            done.src_crc = crc32c::crc32c_combine(done.src_crc, src_crc, src.len());
            done.dst_crc = crc32c::crc32c_combine(done.dst_crc, dst_crc, dst.len());
            done.dst.push(dst);
            // At any moment of the work, not only when it is over.
            lck = lck.max(procfs::status_kib("VmLck")?);
            pin = pin.max(procfs::status_kib("VmPin")?);
        }
    }
    figures.vm_lck_kib = Some(lck);
    figures.vm_pin_kib = Some(pin);
    Ok(done)
}

fn sum_by_reading(path: &Path) -> Result<u32> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; PIECE];
    let mut crc = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(crc),
            n => crc = crc32c::crc32c_append(crc, &buffer[..n]),
        }
    }
}
