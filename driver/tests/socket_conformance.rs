//! The driver in user space over a device in another process: the checks that every backing has to
//! pass, and a server that dies under it.

use std::time::{Duration, Instant};

use extlb_driver::conformance::{Abilities, run};
use extlb_driver::hardware::Socket;
use extlb_driver::userspace::{Config, Userspace};
use extlb_driver::{Device, Options};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SERVER: &str = env!("CARGO_BIN_EXE_extlb-device-under-test");

fn device(config: &str) -> Device<Userspace<Socket>> {
    let hardware = Socket::spawn(SERVER, config).expect("a device");
    let driver = Userspace::new(hardware, Config::default()).expect("a driver");
    Device::open(driver).expect("opened")
}

fn conforms(config: &str) {
    let device = device(config);
    let report = run(
        "user space, over a socket",
        &device,
        &Abilities::LOCAL,
        None,
    );
    println!("{report}");
    assert!(report.is_good(), "{report}");
}

#[test]
fn a_driver_over_a_socket_conforms() {
    conforms("");
}

#[test]
fn it_does_so_with_a_tiny_tlb_and_more_engines() {
    conforms("engines = 4\n[tlb]\nsets = 2\nways = 1\n");
}

#[test]
fn a_server_that_dies_under_load_ends_operations_and_waits_with_errors() {
    for moment in 0..6 {
        let device = device("");
        let server = device.backing().hardware().server().expect("a server");
        let pid = Pid::from_raw(server.pid() as i32);
        let context = device.context(Options::default()).expect("a context");
        let mut buffers = (
            context.allocate(1 << 20).expect("memory"),
            context.allocate(1 << 20).expect("memory"),
        );
        for _ in 0..moment * 3 {
            let pending = context.queue().copy(buffers.0, buffers.1).expect("taken");
            ((), buffers) = pending.finish().expect("done");
        }
        // With one under way, or just done.
        let pending = context.queue().copy(buffers.0, buffers.1).expect("taken");
        kill(pid, Signal::SIGKILL).expect("killed");
        let begun = Instant::now();
        let mut result = pending.finish().map(drop);
        while result.is_ok() {
            result = context
                .queue()
                .nop()
                .and_then(|pending| pending.finish().map(drop));
        }
        assert!(begun.elapsed() < Duration::from_secs(15), "{result:?}");
        // Registering fails as well, and nothing panics when all is dropped.
        assert!(context.allocate(4096).is_err());
    }
}
