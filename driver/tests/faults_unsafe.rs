//! A device that is broken by a plan: what the driver, its program, or an emulated kernel notices of
//! it. Where nobody does, the test shows that.
#![allow(unsafe_code)]

use std::ops::Range;
use std::time::{Duration, Instant};

use extlb_device::Config as DeviceConfig;
use extlb_driver::hardware::{LocalDevice, Socket};
use extlb_driver::inprocess::{InProcess, MachineConfig};
use extlb_driver::spec::work::{Completion, Descriptor, Opcode, Status};
use extlb_driver::spec::{Iova, PAGE_SIZE};
use extlb_driver::userspace::{Config, Userspace};
use extlb_driver::{Backing, Context, Device, Error, Options, Result};
use nix::errno::Errno;

type Local = Userspace<LocalDevice>;

const SERVER: &str = env!("CARGO_BIN_EXE_extlb-device-under-test");
const PATIENCE: Duration = Duration::from_millis(300);
/// Longer than any operation here takes, if it ends at all.
const LONG: Duration = Duration::from_millis(1500);

fn plan(faults: &[&str]) -> DeviceConfig {
    DeviceConfig {
        fault: faults.iter().map(|fault| fault.parse().unwrap()).collect(),
        ..DeviceConfig::default()
    }
}

fn open(faults: &[&str]) -> Device<Local> {
    let hardware = LocalDevice::new(plan(faults)).unwrap();
    let driver = Userspace::new(hardware, Config::default().patience(PATIENCE)).unwrap();
    Device::open(driver).unwrap()
}

fn injected(device: &Device<Local>) -> u64 {
    device.backing().hardware().faults_injected()
}

/// A context, an operation, memory taken back.
fn work<B: Backing>(device: &Device<B>) -> Result<()> {
    let context = device.context(Options::default())?;
    let slice = context.allocate(10_000)?;
    let ((), slice) = context.queue().fill(slice, u64::MAX)?.finish()?;
    assert!(slice.iter().all(|byte| *byte == 0xff));
    slice.unregister()?.expect("a whole one");
    Ok(())
}

/// Works until the device is given up; what for. Then it is restarted, and works, if the plan is at
/// its end.
fn given_up(faults: &[&str], recovers: bool) -> Error {
    let device = open(faults);
    let error = (0..1000).find_map(|_| work(&device).err());
    let error = error.expect("it is noticed");
    assert!(injected(&device) > 0);
    if recovers {
        device.backing().restart().unwrap();
        for _ in 0..3 {
            work(&device).unwrap();
        }
    }
    error
}

fn dead(errno: Errno) -> Error {
    Error::Dead { errno }
}

/// Does all this without an error; how many faults there were.
fn unnoticed(faults: &[&str]) -> u64 {
    let device = open(faults);
    for _ in 0..4 {
        work(&device).unwrap();
    }
    injected(&device)
}

#[test]
fn an_acknowledgement_that_does_not_come_is_a_time_out_and_a_fence() {
    assert_eq!(
        given_up(&["skip-ack,after=2,times=1"], true),
        dead(Errno::ETIMEDOUT)
    );
}

#[test]
fn an_acknowledgement_that_is_late_is_noticed_beyond_the_drivers_patience_only() {
    assert!(unnoticed(&["delay-ack,delay_us=20000"]) >= 4);
    // It is not written after the reset either, where it would be one that nobody asked for.
    let late = given_up(&["delay-ack,times=1,delay_us=600000"], true);
    assert_eq!(late, dead(Errno::ETIMEDOUT));
}

#[test]
fn acknowledgements_that_go_back_are_a_time_out() {
    assert_eq!(given_up(&["duplicate-ack"], false), dead(Errno::ETIMEDOUT));
    // Once, and nobody is waiting: nothing is wrong with it.
    assert_eq!(unnoticed(&["duplicate-ack,times=1,delay_us=1"]), 1);
}

#[test]
fn an_acknowledgement_behind_one_that_does_not_come_is_a_time_out() {
    assert_eq!(
        given_up(&["reorder-ack,times=1"], true),
        dead(Errno::ETIMEDOUT)
    );
}

/// Takes memory back while a slow device works on it, until that is noticed; operations that ended
/// with a bus error, and faults on the bus.
fn unmap_under_work(fault: &str) -> (u32, u64) {
    const PAGES: u64 = 6;
    let mut config = plan(&[fault, "slow-memory,delay_us=10000"]);
    // One works while the other serves commands, so that these meet an access under way.
    config.engines = 2;
    let hardware = LocalDevice::new(config).unwrap();
    let driver = Userspace::new(hardware, Config::default()).unwrap();
    let device = Device::open(driver).unwrap();
    let context = device.context(Options::default()).unwrap();
    let mut bus_errors = 0;
    for _ in 0..60 {
        let mapping = device.map_anonymous((PAGES * PAGE_SIZE) as usize).unwrap();
        let range = mapping.addr()..Iova(mapping.addr().0 + PAGES * PAGE_SIZE);
        let registration = context.register_addresses(range.clone()).unwrap();
        let before = injected(&device);
        let fill = fill(range);
        // SAFETY: a mapping has no Rust objects. When it is dropped, below, the device has either
        // no way to it any more, or none but a mapping of its own.
        let pending = unsafe { context.queue().submit_raw(fill) }.unwrap();
        // Each access is told at its beginning, and takes 10 ms: this is in the midst of one.
        while injected(&device) == before {
            std::thread::yield_now();
        }
        registration.unregister().unwrap();
        drop(mapping);
        let completion = pending.finish().unwrap().0;
        bus_errors += u32::from(status(&completion) == Status::BusError);
        if bus_errors > 0 {
            break;
        }
    }
    (bus_errors, device.backing().hardware().bus_faults())
}

fn fill(range: Range<Iova>) -> Descriptor {
    Descriptor {
        opcode: Opcode::Fill as u8,
        dst: range.start.0,
        len: range.end.0 - range.start.0,
        arg: u64::MAX,
        ..Descriptor::default()
    }
}

fn status(completion: &Completion) -> Status {
    Status::from_raw(completion.status).unwrap()
}

#[test]
fn an_acknowledgement_that_comes_early_is_caught_on_the_bus() {
    for fault in ["early-ack", "skip-drain"] {
        let (errors, faults) = unmap_under_work(fault);
        assert!(errors > 0 && faults > 0, "{fault}: {errors}, {faults}");
    }
}

#[test]
fn a_translation_that_was_left_out_is_caught_on_the_bus() {
    let device = open(&["skip-tlb-entry,times=1"]);
    let context = device.context(Options::default()).unwrap();
    let mapping = device.map_anonymous(PAGE_SIZE as usize).unwrap();
    let range = mapping.addr()..Iova(mapping.addr().0 + PAGE_SIZE);
    let registration = context.register_addresses(range.clone()).unwrap();
    // SAFETY: a mapping has no Rust objects; it is dropped at the end.
    let go = || unsafe { context.queue().submit_raw(fill(range.clone())) }.unwrap();
    assert_eq!(status(&go().finish().unwrap().0), Status::Success);
    registration.unregister().unwrap();
    // Without the fault there is no such page; with it, there is, but not on the bus.
    assert_eq!(status(&go().finish().unwrap().0), Status::BusError);
    assert_eq!(device.backing().hardware().bus_faults(), 1);
    drop(mapping);
}

#[test]
fn lost_and_repeated_interrupts_cost_time_and_nothing_else() {
    // Slow, so that the program goes to sleep.
    let slow = "slow-memory,delay_us=20000";
    let device = open(&["lose-interrupt", slow]);
    let context = device.context(Options::default()).unwrap();
    let slice = context.allocate(4096).unwrap();
    // The look once a second finds it.
    context.queue().fill(slice, 1).unwrap().finish().unwrap();
    assert!(injected(&device) > 1);
    // And this, that there is a page request, which it refuses.
    // SAFETY: it only reads, where nothing is.
    let pending = unsafe { context.queue().submit_raw(ask_for_nothing()) }.unwrap();
    let refused = pending.finish().unwrap().0;
    assert_eq!(status(&refused), Status::PageFault);
    assert!(unnoticed(&["repeat-interrupt", slow]) > 0);
}

/// An operation on memory that nobody has registered: the driver refuses its page request.
fn ask_for_nothing() -> Descriptor {
    Descriptor {
        opcode: Opcode::Crc32c as u8,
        src: PAGE_SIZE,
        len: 8,
        ..Descriptor::default()
    }
}

#[test]
fn lost_requests_and_responses_are_noticed_by_the_programs_own_patience_only() {
    for fault in ["lose-request,times=1", "lose-response,times=1"] {
        let device = open(&[fault]);
        let context = device.context(Options::default()).unwrap();
        let other = device.context(Options::default()).unwrap();
        // SAFETY: it only reads, where nothing is.
        let submit =
            |context: &Context<Local>| unsafe { context.queue().submit_raw(ask_for_nothing()) };
        let pending = submit(&context).unwrap();
        assert!(!pending.wait_for(LONG).unwrap(), "{fault}");
        assert_eq!(injected(&device), 1);
        // The driver sees nothing wrong, and others go on.
        context.stats().unwrap();
        let refused = submit(&other).unwrap().finish().unwrap().0;
        assert_eq!(status(&refused), Status::PageFault);
        // The context can be given up, with what it waits for.
        drop((pending, context));
        work(&device).unwrap();
    }
}

#[test]
fn a_stalled_context_is_noticed_by_the_programs_own_patience_only() {
    let device = open(&["stall-context,times=1"]);
    let context = device.context(Options::default()).unwrap();
    let pending = context.queue().nop().unwrap();
    assert!(!pending.wait_for(LONG).unwrap());
    work(&device).unwrap();
    drop((pending, context));
    work(&device).unwrap();
    // For a time: it goes on by itself.
    assert!(unnoticed(&["stall-context,times=2,delay_us=100000"]) > 0);
}

#[test]
fn a_leaf_that_seems_read_only_is_noticed_by_nobody() {
    let device = open(&["flip-permission,times=3,to=read-only"]);
    work(&device).unwrap();
    assert_eq!(injected(&device), 3);
}

#[test]
fn poisoned_data_is_noticed_by_who_looks_at_the_data() {
    let device = open(&["poison-data,times=1"]);
    let context = device.context(Options::default()).unwrap();
    let queue = context.queue();
    let src = context.allocate(8192).unwrap();
    let dst = context.allocate(8192).unwrap();
    // No error, no counter: a success.
    let ((), (src, dst)) = queue.copy(src, dst).unwrap().finish().unwrap();
    let flipped: u32 = src
        .iter()
        .zip(&dst[..])
        .map(|(a, b)| (a ^ b).count_ones())
        .sum();
    assert_eq!(flipped, 1);
    let (found, (src, dst)) = queue.compare(src, dst).unwrap().finish().unwrap();
    assert!(found.is_some());
    let (one, src) = queue.crc32c(src, 0).unwrap().finish().unwrap();
    let (other, _dst) = queue.crc32c(dst, 0).unwrap().finish().unwrap();
    assert_eq!(one, crc32c::crc32c(&src));
    assert_ne!(one, other);
}

#[test]
fn a_bus_that_hangs_is_a_time_out_and_a_fence_that_waits_for_its_end() {
    let device = open(&["hang-bus,times=1,delay_us=1000000"]);
    let context = device.context(Options::default()).unwrap();
    let mapping = device.map_anonymous(8192).unwrap();
    let slice = context.allocate(4096).unwrap();
    let begun = Instant::now();
    let pending = context.queue().fill(slice, 1).unwrap();
    while injected(&device) == 0 {
        std::thread::yield_now();
    }
    // Nothing to do with what hangs; but no drain ends.
    let refused = context.register(mapping).map(|slice| slice.unregister());
    let error = match refused {
        Err(refused) => refused.error,
        Ok(taken_back) => {
            // It was reset, so the memory is free. What is said of it is said to the context.
            taken_back.unwrap().unwrap();
            pending.finish().map(drop).unwrap_err()
        }
    };
    assert_eq!(error, dead(Errno::ETIMEDOUT));
    assert!(begun.elapsed() >= Duration::from_secs(1), "before its end");
    device.backing().restart().unwrap();
    work(&device).unwrap();
}

#[test]
fn a_reset_in_the_middle_of_an_access_is_seen_when_the_driver_looks() {
    assert_eq!(
        given_up(&["reset-mid-dma,times=1"], true),
        dead(Errno::ECONNRESET)
    );
}

#[test]
fn a_connection_that_ends_in_the_middle_of_an_access_is_a_dead_device() {
    let fault = "[[fault]]\nkind = \"disconnect-mid-dma\"\nafter = 3\n";
    let hardware = Socket::spawn(SERVER, fault).unwrap();
    let device = Device::open(Userspace::new(hardware, Config::default()).unwrap()).unwrap();
    let error = (0..100).find_map(|_| work(&device).err());
    assert_eq!(error, Some(dead(Errno::ENODEV)));
}

/// Addresses far from where the process has anything of its own.
const BASE: u64 = 0x10_0000_0000;

fn range(pages: u64) -> Range<Iova> {
    Iova(BASE)..Iova(BASE + pages * PAGE_SIZE)
}

/// An emulated kernel with pte notifiers, whose process the device's oracle watches.
fn notified(fault: &str) -> (Device<InProcess>, Context<InProcess>) {
    let mut device = plan(&[fault]);
    device.oracle.bound_ms = 50;
    let config = MachineConfig {
        device,
        ..MachineConfig::default()
    };
    let device = Device::open(InProcess::new(config).unwrap()).unwrap();
    let context = device.context(Options::default()).unwrap();
    (device, context)
}

/// Fills the page at `BASE`, which no Rust object is in.
fn touch(context: &Context<InProcess>) -> Status {
    // SAFETY: as above.
    let pending = unsafe { context.queue().submit_raw(fill(range(1))) }.unwrap();
    status(&pending.finish().unwrap().0)
}

fn is_stale(device: &Device<InProcess>) -> bool {
    let end = Instant::now() + Duration::from_secs(2);
    while device.backing().stale_accesses() == 0 {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

#[test]
fn a_translation_that_was_left_out_is_found_by_the_oracle() {
    for (fault, found) in [
        ("skip-tlb-entry,times=1", true),
        ("skip-ack,after=1000", false),
    ] {
        let (device, context) = notified(fault);
        device.backing().map(range(1)).unwrap();
        let _registration = context.register_addresses(range(1)).unwrap();
        assert_eq!(touch(&context), Status::Success);
        let old = device.backing().replace(range(1)).unwrap();
        assert_eq!(touch(&context), Status::Success);
        // With the fault, that went to the frame that the process has no more.
        let mut byte = [0];
        device.backing().peek(old[0], &mut byte).unwrap();
        assert_eq!(is_stale(&device), found, "{fault}");
    }
}

#[test]
fn a_leaf_that_seems_writable_is_found_by_the_oracle() {
    let (device, context) = notified("flip-permission,to=writable");
    device.backing().map(range(1)).unwrap();
    let _registration = context.register_addresses(range(1)).unwrap();
    device.backing().protect(range(1), false).unwrap();
    // Read first, so that there is a leaf, and one that may not be written.
    let read = Descriptor {
        opcode: Opcode::Crc32c as u8,
        src: BASE,
        len: PAGE_SIZE,
        ..Descriptor::default()
    };
    // SAFETY: it only reads.
    let pending = unsafe { context.queue().submit_raw(read) }.unwrap();
    assert_eq!(status(&pending.finish().unwrap().0), Status::Success);
    assert_eq!(touch(&context), Status::Success, "written all the same");
    assert!(is_stale(&device));
}
