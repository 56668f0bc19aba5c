//! The driver in user space, over a device in this process: how memory is mapped, that it is left
//! alone once it was taken back, and what happens when the device fails.
#![allow(unsafe_code)]

#[path = "support/mangled_unsafe.rs"]
mod mangled;

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use extlb_device::Config as DeviceConfig;
use extlb_driver::hardware::{Hardware, LocalDevice};
use extlb_driver::spec::invalidation::KernelShadow;
use extlb_driver::spec::regs::{self, FatalError};
use extlb_driver::spec::work::{Descriptor, Opcode, Status};
use extlb_driver::spec::{BAR_REGS, Iova, PAGE_SIZE, Vector};
use extlb_driver::userspace::{Config, Userspace};
use extlb_driver::{Backing, Context, Device, Error, Nonsense, Options};
use mangled::{Faults, Mangled};
use nix::errno::Errno;

fn open(device: DeviceConfig) -> Device<Userspace<LocalDevice>> {
    let hardware = LocalDevice::new(device).unwrap();
    Device::open(Userspace::new(hardware, Config::default()).unwrap()).unwrap()
}

fn mangled(patience: Duration) -> (Device<Userspace<Mangled>>, Arc<Faults>) {
    let faults = Arc::new(Faults::default());
    let hardware = Mangled {
        device: LocalDevice::new(DeviceConfig::default()).unwrap(),
        faults: faults.clone(),
    };
    let driver = Userspace::new(hardware, Config::default().patience(patience)).unwrap();
    (Device::open(driver).unwrap(), faults)
}

fn works<B: Backing>(device: &Device<B>) {
    let context = device.context(Options::default()).unwrap();
    let slice = context.allocate(10_000).unwrap();
    let ((), slice) = context
        .queue()
        .fill(slice, u64::MAX)
        .unwrap()
        .finish()
        .unwrap();
    assert!(slice.iter().all(|byte| *byte == 0xff));
    slice.unregister().unwrap().unwrap();
}

/// What the context says from now on.
fn error_of<B: Backing>(context: &Context<B>) -> Error {
    let begun = Instant::now();
    loop {
        match context.queue().nop().and_then(|nop| nop.finish()) {
            Err(error) => return error,
            Ok(_) => assert!(begun.elapsed() < Duration::from_secs(10), "it goes on"),
        }
    }
}

#[test]
fn leaves_are_as_large_as_they_can_be() {
    let device = open(DeviceConfig::default());
    let context = device.context(Options::default()).unwrap();
    let mut src = context.allocate(5 << 20).unwrap();
    let dst = context.allocate(5 << 20).unwrap();
    src.fill(7);
    let ((), (src, dst)) = context.queue().copy(src, dst).unwrap().finish().unwrap();
    assert!(src[..] == dst[..]);
    let stats = context.stats().unwrap();
    // Ring and records, and of each buffer two leaves of 2 MiB and 1 MiB in small ones.
    assert_eq!(stats.mapped_pages, 4 + 2 + 2 * (2 + 256));
    assert_eq!(stats.pinned_pages, 4 + 2 + 2 * 5 * 256);
    drop((src, dst));
    let stats = context.stats().unwrap();
    assert_eq!(stats.pinned_pages, 4 + 2);
    assert_eq!(stats.shootdowns, 2);
    assert_eq!(device.backing().hardware().bus_faults(), 0);
}

/// Takes memory back while a slow device works on it; (rounds in which an operation was cut short,
/// operations that ended with a bus error, faults on the bus).
fn unmap_under_work(skip_drain: bool) -> (u32, u32, u64) {
    const PAGES: u64 = 6;
    let mut config = DeviceConfig {
        // One works while the other serves commands, so that these meet an access under way.
        engines: 2,
        ..DeviceConfig::default()
    };
    config.debug.bus_delay_us = 2000;
    config.debug.skip_drain = skip_drain;
    let device = open(config);
    let context = device.context(Options::default()).unwrap();
    let (mut cut, mut bus_errors) = (0, 0);
    for round in 0..12 {
        let mapping = device.map_anonymous((PAGES * PAGE_SIZE) as usize).unwrap();
        let range = mapping.addr()..Iova(mapping.addr().0 + PAGES * PAGE_SIZE);
        let registration = context.register_addresses(range.clone()).unwrap();
        let nop = context.queue().nop().unwrap();
        let fill = Descriptor {
            opcode: Opcode::Fill as u8,
            dst: range.start.0,
            len: PAGES * PAGE_SIZE,
            arg: u64::MAX,
            ..Descriptor::default()
        };
        // SAFETY: a mapping has no Rust objects. When it is dropped, below, the device has either
        // no way to it any more, or none but a mapping of its own (a skipped drain).
        let pending = unsafe { context.queue().submit_raw(fill) }.unwrap();
        nop.finish().unwrap();
        // Each page takes 2 ms: this is in the midst of one, whichever.
        std::thread::sleep(Duration::from_micros(700 * (round % 10)));
        registration.unregister().unwrap();
        drop(mapping);
        let completion = pending.finish().unwrap().0;
        match Status::from_raw(completion.status).unwrap() {
            Status::Success => {}
            Status::PageFault => cut += u32::from(completion.bytes > 0),
            Status::BusError => bus_errors += 1,
            other => panic!("{other:?}"),
        }
    }
    let faults = device.backing().hardware().bus_faults();
    (cut, bus_errors, faults)
}

#[test]
fn memory_is_unmapped_only_when_the_device_is_done_with_it() {
    let (cut, bus_errors, faults) = unmap_under_work(false);
    assert!(cut > 0, "nothing was under way: the test tests nothing");
    assert_eq!((bus_errors, faults), (0, 0));
}

#[test]
fn a_device_that_does_not_drain_is_caught_on_the_bus() {
    let (_, bus_errors, faults) = unmap_under_work(true);
    assert!(
        bus_errors > 0 && faults > 0,
        "{bus_errors} errors, {faults} faults"
    );
}

#[test]
fn other_devices_and_none_at_all_are_named() {
    let open = |lie, gone: bool| {
        let faults = Faults::default();
        *faults.lie.lock().unwrap() = lie;
        faults.gone.store(gone, Ordering::Relaxed);
        let device = LocalDevice::new(DeviceConfig::default()).unwrap();
        let faults = Arc::new(faults);
        Userspace::new(Mangled { device, faults }, Config::default()).unwrap_err()
    };
    let errno = Errno::ENODEV;
    assert_eq!(open(None, true), Error::Dead { errno });
    let found = 0x1234_5678;
    let other = open(Some((regs::ID, found.into())), false);
    assert_eq!(other, Error::Identity { found });
    let (found, wanted) = (0x0002_0000, regs::VERSION_VALUE);
    let newer = open(Some((regs::VERSION, found.into())), false);
    assert_eq!(newer, Error::Interface { found, wanted });
    let strange = open(Some((regs::CAP, 0xffff)), false);
    assert!(matches!(
        strange,
        Error::Protocol(Nonsense::Register { name: "CAP", .. })
    ));
    // One that does not start.
    let idle = open(Some((regs::STATUS, 0)), false);
    assert!(matches!(idle, Error::Dead { .. }), "{idle}");
}

#[test]
fn a_device_is_taken_over_in_whatever_state_it_is() {
    let hardware = LocalDevice::new(DeviceConfig::default()).unwrap();
    hardware.set_bus_master(true).unwrap();
    // Senseless rings: it stops at once.
    for (register, value) in [(regs::CTX_COUNT, 1), (regs::CTRL, regs::ctrl::ENABLE)] {
        // SAFETY: nothing is mapped.
        unsafe { hardware.write(BAR_REGS, register.offset, 4, value.into()) };
    }
    let status = hardware.read(BAR_REGS, regs::STATUS.offset, 4);
    assert_eq!(status, u64::from(regs::status::FATAL));
    let driver = Userspace::new(hardware, Config::default()).unwrap();
    works(&Device::open(driver).unwrap());
}

#[test]
fn a_device_that_does_not_acknowledge_is_fenced_and_can_be_restarted() {
    let (device, faults) = mangled(Duration::from_millis(200));
    let context = device.context(Options::default()).unwrap();
    let slice = context.allocate(8192).unwrap();
    let resets = faults.resets.load(Ordering::Relaxed);
    device.backing().hardware().freeze();
    // It does not answer, so it is reset; and then the memory is free.
    let mapping = slice.unregister().unwrap().unwrap();
    assert_eq!(faults.resets.load(Ordering::Relaxed), resets + 1);
    let errno = Errno::ETIMEDOUT;
    assert_eq!(error_of(&context), Error::Dead { errno });
    assert_eq!(
        context.register(mapping).unwrap_err().error,
        Error::Dead { errno }
    );
    assert_eq!(
        device.context(Options::default()).unwrap_err(),
        Error::Dead { errno }
    );
    device.backing().restart().unwrap();
    works(&device);
    assert_eq!(
        error_of(&context),
        Error::Dead { errno },
        "the first reason is kept"
    );
    drop(context);
    works(&device);
}

#[test]
fn a_device_that_is_unplugged_gives_errors_and_the_memory_back() {
    let (device, faults) = mangled(Duration::from_secs(10));
    let context = device.context(Options::default()).unwrap();
    let slice = context.allocate(8192).unwrap();
    device.backing().hardware().freeze();
    faults.gone.store(true, Ordering::Relaxed);
    // The doorbell is lost, and the look once a second finds out why.
    let begun = Instant::now();
    let errno = Errno::ENODEV;
    assert_eq!(error_of(&context), Error::Dead { errno });
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(
        device.backing().restart().unwrap_err(),
        Error::Dead { errno }
    );
    // No reset tells that it is silent; but the IOMMU does.
    let before = faults.unmapped.load(Ordering::Relaxed);
    slice.unregister().unwrap().unwrap();
    assert_eq!(faults.unmapped.load(Ordering::Relaxed), before + 1);
}

#[test]
fn memory_that_nobody_can_take_back_is_lost_on_purpose() {
    let (device, faults) = mangled(Duration::from_secs(10));
    let context = device.context(Options::default()).unwrap();
    let slice = context.allocate(8192).unwrap();
    let addr = slice.addr().0;
    device.backing().hardware().freeze();
    faults.gone.store(true, Ordering::Relaxed);
    faults.keeps.store(true, Ordering::Relaxed);
    let errno = Errno::ENODEV;
    assert_eq!(slice.unregister().unwrap_err(), Error::Dead { errno });
    // It is still mapped, for ever: nothing else comes to lie there.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let holds = |line: &str| {
        let (start, rest) = line.split_once('-').unwrap();
        let end = rest.split(' ').next().unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        (number(start)..number(end)).contains(&addr)
    };
    assert!(
        maps.lines()
            .any(|line| holds(line) && line.contains("extlb-memory"))
    );
    drop((context, device));
}

#[test]
fn nonsense_from_the_device_is_named_and_ends_with_a_restart() {
    let (device, faults) = mangled(Duration::from_secs(10));
    let acknowledge = offset_of!(KernelShadow, wait) + 4;
    let head = offset_of!(KernelShadow, iq_head);
    for (offset, value, want) in [
        (acknowledge, 1, "acknowledgement"),
        (head, 0x8000_0000, "command head"),
    ] {
        let context = device.context(Options::default()).unwrap();
        let slice = context.allocate(8192).unwrap();
        device.backing().hardware().freeze();
        faults.poke(offset, value);
        // Never taken for an acknowledgement: what frees the memory is the reset.
        let resets = faults.resets.load(Ordering::Relaxed);
        slice.unregister().unwrap().unwrap();
        assert_eq!(faults.resets.load(Ordering::Relaxed), resets + 1);
        let error = error_of(&context);
        assert!(matches!(error, Error::Protocol(_)), "{error}");
        assert!(error.to_string().contains(want), "{error}");
        device.backing().restart().unwrap();
        works(&device);
    }
}

#[test]
fn absurd_page_requests_are_named() {
    let (device, faults) = mangled(Duration::from_secs(10));
    let context = device.context(Options::default()).unwrap();
    faults.poke(offset_of!(KernelShadow, prq_tail), 0x4000_0000);
    let event = device.backing().hardware().interrupt(Vector::PageRequest);
    event.write(1).unwrap();
    let (tail, head) = (0x4000_0000, 0);
    let want = Error::Protocol(Nonsense::RequestTail { tail, head });
    assert_eq!(error_of(&context), want);
    device.backing().restart().unwrap();
    let context = device.context(Options::default()).unwrap();
    // A record of zeros, which is of no kind.
    faults.poke(offset_of!(KernelShadow, prq_tail), 1);
    event.write(1).unwrap();
    let error = error_of(&context);
    let kind = matches!(error, Error::Protocol(Nonsense::Register { value: 0, .. }));
    assert!(kind, "{error}");
    device.backing().restart().unwrap();
    works(&device);
}

#[test]
fn a_fatal_error_is_told_at_once() {
    let (device, faults) = mangled(Duration::from_secs(10));
    let context = device.context(Options::default()).unwrap();
    // A tail that is too far ahead, as if it were the driver's.
    faults.poke(offset_of!(KernelShadow, iq_tail), 0x4000_0000);
    let hardware = device.backing().hardware();
    // SAFETY: lets the device look at the driver's own structures.
    unsafe { hardware.write(BAR_REGS, regs::KICK.offset, 4, 1) };
    let begun = Instant::now();
    let (error, info) = (FatalError::IqOverrun, 0x4000_0000);
    assert_eq!(error_of(&context), Error::Fatal { error, info });
    assert!(
        begun.elapsed() < Duration::from_millis(900),
        "by its interrupt"
    );
    device.backing().restart().unwrap();
    works(&device);
}

/// Whatever a device writes where it may write: no hang, no panic, no memory that changes after it
/// was taken back.
#[test]
fn mutated_answers_give_errors_only() {
    let (device, faults) = mangled(Duration::from_millis(300));
    let words = [
        offset_of!(KernelShadow, iq_head),
        offset_of!(KernelShadow, iq_need_kick),
        offset_of!(KernelShadow, prq_tail),
        offset_of!(KernelShadow, prq_need_kick),
        offset_of!(KernelShadow, wait),
        offset_of!(KernelShadow, wait) + 4,
    ];
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random >> 16
    };
    let mut died = 0;
    for _ in 0..40 {
        let context = device.context(Options::default()).unwrap();
        let queue = context.queue();
        for _ in 0..6 {
            let word = words[next() as usize % words.len()];
            let value = match next() % 4 {
                0 => 0,
                1 => u32::MAX,
                2 => next() as u32 % 64,
                _ => next() as u32,
            };
            let Ok(slice) = context.allocate(20_000) else {
                break;
            };
            let Ok(pending) = queue.fill(slice, 0x0101_0101_0101_0101) else {
                break;
            };
            faults.poke(word, value);
            let Ok((_, slice)) = pending.finish() else {
                break;
            };
            let Ok(Ok(mapping)) = slice.unregister() else {
                break;
            };
            drop(mapping);
        }
        if context.stats().is_err() {
            died += 1;
            drop(context);
            device.backing().restart().unwrap();
        }
    }
    assert!(died > 5, "only {died} of 40 mutated devices were found out");
    assert_eq!(device.backing().hardware().device.bus_faults(), 0);
    works(&device);
}

/// A child has copies of the driver's values, and no thread of it. What it does with them must
/// neither hang nor reach the device.
#[test]
fn a_child_leaves_its_parents_device_alone() {
    let device = open(DeviceConfig::default());
    let context = device.context(Options::default()).unwrap();
    // SAFETY: the child calls the library, whose locks nobody else holds here, and ends.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            // A hang is ended by this, and then seen by the parent.
            nix::unistd::alarm::set(10);
            let refused = matches!(
                device.context(Options::default()).map(drop),
                Err(Error::Dead {
                    errno: Errno::ECHILD
                })
            );
            drop(context);
            drop(device);
            // SAFETY: ends the child without running anything else of the test.
            unsafe { nix::libc::_exit(i32::from(!refused)) }
        }
        nix::unistd::ForkResult::Parent { child } => {
            let status = nix::sys::wait::waitpid(child, None).unwrap();
            assert_eq!(status, nix::sys::wait::WaitStatus::Exited(child, 0));
        }
    }
    // The parent's device was not reset, its context goes on, and somebody serves page requests.
    let descriptor = Descriptor {
        opcode: Opcode::Crc32c as u8,
        src: PAGE_SIZE,
        len: 8,
        ..Descriptor::default()
    };
    // SAFETY: nothing is registered there; it only reads.
    let pending = unsafe { context.queue().submit_raw(descriptor) }.unwrap();
    assert!(pending.wait_for(Duration::from_secs(10)).unwrap());
    let (completion, ()) = pending.finish().unwrap();
    assert_eq!(completion.status, Status::PageFault as u32);
    works(&device);
}
