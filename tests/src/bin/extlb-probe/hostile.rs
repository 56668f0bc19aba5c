//! Random calls on the device node: each must give an answer, and none may hurt the driver.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};

use anyhow::{Context, Result, ensure};
use extlb_spec::uapi::{self, Create, IOC_TYPE, IOCTLS, Register};
use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};
use rand::{Rng, RngExt, SeedableRng};
use rand_pcg::Pcg64;

use crate::sys_unsafe::{Pages, ioctl, ioctl_bad_pointer};

/// Bytes of memory that the calls may name.
const ARENA: usize = 1 << 20;

fn open() -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(uapi::DEVICE_NODE)
        .with_context(|| format!("open {}", uapi::DEVICE_NODE))
}

/// Number of an `_IOWR` ioctl.
fn request(number: u8, size: usize) -> u64 {
    3 << 30 | (size as u64 & 0x3fff) << 16 | u64::from(IOC_TYPE) << 8 | u64::from(number)
}

/// A number that is likely to sit on an edge.
fn interesting(rng: &mut Pcg64, arena: u64) -> u64 {
    match rng.random_range(0..10) {
        0 => 0,
        1 => 1,
        2 => u64::MAX,
        3 => arena,
        4 => arena + (rng.random_range(0..ARENA as u64) & !0xfff),
        5 => arena + rng.random_range(0..2 * ARENA as u64),
        6 => 4096 << rng.random_range(0..12),
        7 => 1 << rng.random_range(0..64),
        8 => u64::MAX - rng.random_range(0..8192),
        _ => rng.next_u64(),
    }
}

fn random_argument(rng: &mut Pcg64, arena: u64, buffer: &mut [u8; 4096]) {
    buffer.fill(0);
    // Most calls get past the check of the reserved fields: few words are set.
    for _ in 0..rng.random_range(0..4) {
        let at = rng.random_range(0..8) * 8;
        let value = interesting(rng, arena);
        if rng.random() {
            buffer[at..at + 8].copy_from_slice(&value.to_le_bytes());
        } else {
            let half = at + if rng.random() { 4 } else { 0 };
            buffer[half..half + 4].copy_from_slice(&(value as u32).to_le_bytes());
        }
    }
}

fn plausible_argument(rng: &mut Pcg64, arena: u64, number: u8, buffer: &mut [u8; 4096]) {
    let pages = ARENA as u64 / 4096;
    let start = rng.random_range(0..pages);
    if number == uapi::CREATE.number {
        let create = Create {
            ring: arena + start * 4096,
            ring_log2: rng.random_range(0..14),
            flags: rng.random_range(0..4),
            ..Create::default()
        };
        buffer[..Create::SIZE].copy_from_slice(&create.to_bytes());
    } else if number == uapi::REGISTER.number {
        let register = Register {
            addr: arena + start * 4096,
            len: rng.random_range(1..=pages - start) * 4096,
            ..Register::default()
        };
        buffer[..Register::SIZE].copy_from_slice(&register.to_bytes());
    } else {
        random_argument(rng, arena, buffer);
    }
}

/// Makes `calls` calls, then checks that a well-behaved user still gets what it asks for.
pub fn run(calls: u32, seed: u64) -> Result<()> {
    let mut rng = Pcg64::seed_from_u64(seed);
    let arena = Pages::anonymous(ARENA)?;
    // Pinning all it asks for would be allowed to root; the limit keeps the guest alive.
    setrlimit(Resource::RLIMIT_MEMLOCK, 1 << 24, 1 << 24)?;

    let mut files: Vec<File> = Vec::new();
    let mut maps: Vec<Pages> = Vec::new();
    let mut answers: BTreeMap<String, u32> = BTreeMap::new();
    let mut buffer = [0u8; 4096];
    for _ in 0..calls {
        if files.is_empty() || (files.len() < 300 && rng.random_ratio(1, 20)) {
            files.push(open()?);
        }
        let index = rng.random_range(0..files.len());
        let answer = match rng.random_range(0..20) {
            0 => {
                files.swap_remove(index);
                Ok(0)
            }
            1 => {
                let offset = (interesting(&mut rng, 0) & !0xfff) as i64;
                let offset = if rng.random() {
                    rng.random_range(0..3) * 4096
                } else {
                    offset
                };
                let len = 4096 << rng.random_range(0..3);
                Pages::of(&files[index], len, offset, rng.random()).map(|pages| {
                    maps.push(pages);
                    maps.truncate(64);
                    0
                })
            }
            2 => {
                let ioctl = &IOCTLS[rng.random_range(0..IOCTLS.len())];
                let bad = if rng.random() { 8 } else { u64::MAX << 47 };
                ioctl_bad_pointer(&files[index], request(ioctl.number, ioctl.size), bad)
            }
            3 => {
                let number = rng.random();
                random_argument(&mut rng, arena.addr(), &mut buffer);
                let size = rng.random_range(0..4096);
                ioctl(&files[index], request(number, size), &mut buffer)
            }
            kind => {
                let ioctl_ = &IOCTLS[rng.random_range(0..IOCTLS.len())];
                if kind < 12 {
                    plausible_argument(&mut rng, arena.addr(), ioctl_.number, &mut buffer);
                } else {
                    random_argument(&mut rng, arena.addr(), &mut buffer);
                }
                ioctl(
                    &files[index],
                    request(ioctl_.number, ioctl_.size),
                    &mut buffer,
                )
            }
        };
        let key = match answer {
            Ok(_) => "ok".to_owned(),
            Err(errno) => errno.to_string(),
        };
        *answers.entry(key).or_default() += 1;
    }
    drop(maps);
    drop(files);

    for (answer, count) in &answers {
        println!("{count:>8}  {answer}");
    }
    // A fuzzer that is refused at the door tests nothing.
    ensure!(
        answers.get("ok").copied().unwrap_or(0) > calls / 20,
        "too few calls got through"
    );
    ensure!(answers.len() > 3, "too few kinds of answers");
    let io_error = Errno::EIO.to_string();
    ensure!(
        !answers.contains_key(&io_error),
        "the driver gave the device up"
    );
    well_behaved()
}

/// A context can still be made, and its ring registered.
fn well_behaved() -> Result<()> {
    let file = open()?;
    let ring = Pages::anonymous(4096)?;
    let mut buffer = [0u8; 4096];
    let create = Create {
        ring: ring.addr(),
        ring_log2: 4,
        ..Create::default()
    };
    buffer[..Create::SIZE].copy_from_slice(&create.to_bytes());
    ioctl(
        &file,
        request(uapi::CREATE.number, Create::SIZE),
        &mut buffer,
    )
    .context("CREATE after the hostile calls")?;
    let register = Register {
        addr: ring.addr(),
        len: 4096,
        ..Register::default()
    };
    buffer.fill(0);
    buffer[..Register::SIZE].copy_from_slice(&register.to_bytes());
    ioctl(
        &file,
        request(uapi::REGISTER.number, Register::SIZE),
        &mut buffer,
    )
    .context("REGISTER after the hostile calls")?;
    println!("a context works after the hostile calls");
    Ok(())
}
