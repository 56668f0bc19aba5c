//! The driver in user space, over a device in this process.

use extlb_device::Config as DeviceConfig;
use extlb_driver::hardware::LocalDevice;
use extlb_driver::userspace::{Config, Userspace};
use extlb_driver::{Device, Options};

fn open(device: DeviceConfig) -> Device<Userspace<LocalDevice>> {
    let hardware = LocalDevice::new(device).unwrap();
    Device::open(Userspace::new(hardware, Config::default()).unwrap()).unwrap()
}

#[test]
fn a_copy_is_done() {
    let device = open(DeviceConfig::default());
    let context = device.context(Options::default()).unwrap();
    let mut src = context.allocate(5 << 20).unwrap();
    let dst = context.allocate(5 << 20).unwrap();
    src.fill(7);
    let ((), (src, dst)) = context.queue().copy(src, dst).unwrap().finish().unwrap();
    assert!(src[..] == dst[..]);
    let stats = context.stats().unwrap();
    // Rings and records, and of each buffer two leaves of 2 MiB and 1 MiB in small ones.
    assert_eq!(stats.mapped_pages, 4 + 2 + 2 * (2 + 256));
    assert_eq!(stats.pinned_pages, 4 + 2 + 2 * 5 * 256);
    drop((src, dst));
    let stats = context.stats().unwrap();
    assert_eq!(stats.pinned_pages, 4 + 2);
    assert_eq!(stats.shootdowns, 2);
    assert_eq!(device.backing().hardware().bus_faults(), 0);
}
