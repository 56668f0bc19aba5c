//! The checks that every backing has to pass, over those that need neither a VM nor a process.

use extlb_driver::conformance::{Abilities, run};
use extlb_driver::hardware::LocalDevice;
use extlb_driver::inprocess::{InProcess, MachineConfig};
use extlb_driver::userspace::{Config, Userspace};
use extlb_driver::{Backing, Device};

fn conforms<B: Backing>(subject: &str, backing: B, abilities: &Abilities) {
    let device = Device::open(backing).unwrap();
    let report = run(subject, &device, abilities, None);
    println!("{report}");
    assert!(report.is_good(), "{report}");
}

#[test]
fn a_notified_kernel_in_this_process() {
    let config = MachineConfig {
        ram: 256 << 20,
        ..MachineConfig::default()
    };
    let machine = InProcess::new(config).unwrap();
    conforms(
        "kernel in this process",
        machine.clone(),
        &Abilities::IN_PROCESS,
    );
    assert_eq!(machine.stale_accesses(), 0);
}

#[test]
fn a_driver_in_user_space_over_a_device_in_this_process() {
    let hardware = LocalDevice::new(extlb_device::Config::default()).unwrap();
    let driver = Userspace::new(hardware, Config::default()).unwrap();
    conforms(
        "user space, device in this process",
        driver.clone(),
        &Abilities::LOCAL,
    );
    assert_eq!(driver.hardware().bus_faults(), 0);
}
