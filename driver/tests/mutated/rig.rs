//! A driver over a device that lies, and what has to work when it does not.

use std::sync::Arc;
use std::time::Duration;

use extlb_device::Config as DeviceConfig;
use extlb_driver::hardware::{Faults, LocalDevice, Mutated};
use extlb_driver::userspace::{Config, Userspace};
use extlb_driver::{Context, Device, Error, Options, Result};

pub type Liar = Userspace<Mutated<LocalDevice>>;

/// How long a device may be silent. Long enough for a busy machine.
pub const PATIENCE: Duration = Duration::from_millis(400);

pub fn start(faults: &Arc<Faults>) -> Result<Device<Liar>> {
    let config = DeviceConfig {
        poll_us: 200,
        ..DeviceConfig::default()
    };
    let hardware = Mutated::local(config, faults)?;
    Device::open(Userspace::new(
        hardware,
        Config::default().patience(PATIENCE),
    )?)
}

pub fn context(device: &Device<Liar>) -> Result<Context<Liar>> {
    device.context(Options {
        ring_log2: 4,
        spins: 20,
        ..Options::default()
    })
}

/// Everything works: for a device that is honest.
pub fn basics(device: &Device<Liar>) -> Result<()> {
    let context = context(device)?;
    let queue = context.queue();
    let (mut src, dst) = (context.allocate(70_000)?, context.allocate(70_000)?);
    src.iter_mut()
        .zip(0..)
        .for_each(|(byte, n)| *byte = n as u8);
    let ((), (src, dst)) = queue.copy(src, dst)?.finish()?;
    assert!(src[..] == dst[..], "the copy is the source");
    let (difference, (src, mut dst)) = queue.compare(src, dst)?.finish()?;
    assert_eq!(difference, None);
    dst[69_999] ^= 1;
    let (difference, (src, dst)) = queue.compare(src, dst)?.finish()?;
    assert_eq!(difference, Some(69_999));
    let (crc, src) = queue.crc32c(src, 0)?.finish()?;
    assert_eq!(crc, crc32c::crc32c(&src));
    let ((), dst) = queue.fill(dst, 0x0101_0101_0101_0101)?.finish()?;
    assert!(dst.iter().all(|byte| *byte == 1));
    // More than the ring has.
    for _ in 0..3 {
        let batch = queue.batch();
        let pending: Result<Vec<_>> = (0..16).map(|_| batch.nop()).collect();
        batch.submit_all();
        for pending in pending? {
            pending.finish()?;
        }
    }
    let mapping = dst
        .unregister()?
        .map_err(|_| Error::Argument("a piece is left"))?;
    let again = context.register(mapping)?;
    assert!(again.iter().all(|byte| *byte == 1));
    context.stats().map(drop)
}

/// Honest from now on: the device is restarted, and works.
pub fn recover(device: &Device<Liar>, faults: &Faults) -> Result<()> {
    faults.stop();
    // A machine so busy that an honest device does not run for `PATIENCE` proves nothing.
    let mut tries = 0;
    loop {
        match device.backing().restart().and_then(|()| basics(device)) {
            Err(Error::Dead { errno }) if errno == nix::errno::Errno::ETIMEDOUT && tries < 3 => {
                tries += 1;
            }
            other => return other,
        }
    }
}

/// The driver has freed no memory that the device had, and reused no bus address.
#[allow(dead_code, reason = "not in all tests")]
pub fn innocent(device: &Device<Liar>) {
    let violations = device.backing().hardware().violations();
    assert!(violations.is_empty(), "{violations:?}");
}
