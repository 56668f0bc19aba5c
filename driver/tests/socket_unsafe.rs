//! A device in a process of its own, over the real socket, as [`Hardware`].
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::process::{Command as Process, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use extlb_driver::hardware::{Hardware, Socket, SocketMemory, SocketServer};
use extlb_driver::spec::invalidation::{Command, CommandKind, KernelShadow, wait};
use extlb_driver::spec::{BAR_DOORBELLS, BAR_DOORBELLS_SIZE, BAR_REGS, Gpa, Iova, Vector, regs};
use extlb_driver::{Access, Error, Fork, Memory, Sharing};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SERVER: &str = env!("CARGO_BIN_EXE_extlb-device-under-test");
const PAGE: u64 = 4096;
const LARGE: usize = 2 << 20;

fn socket() -> Socket {
    Socket::spawn(SERVER, "").expect("a device")
}

fn read(hardware: &impl Hardware, register: regs::Register) -> u64 {
    hardware.read(BAR_REGS, register.offset, register.width)
}

fn write(hardware: &impl Hardware, register: regs::Register, value: u64) {
    // SAFETY: all that these tests map is memory of `Hardware::allocate`, accessed as words.
    unsafe { hardware.write(BAR_REGS, register.offset, register.width, value) };
}

fn map(hardware: &Socket, addr: Iova, len: u64, bus: Gpa) -> Result<(), Error> {
    // SAFETY: as above.
    unsafe { hardware.map(addr, len, bus, true) }
}

fn addr(memory: &impl Memory) -> Iova {
    Iova(memory.addr().as_ptr() as u64)
}

/// A word of memory that the device may be working on.
fn word(memory: &SocketMemory, at: usize) -> &AtomicU64 {
    assert!(at.is_multiple_of(8) && at + 8 <= memory.len());
    // SAFETY: within the memory, aligned; only seen as atomics here, and volatile by the device.
    unsafe { memory.addr().add(at).cast().as_ref() }
}

/// Takes an interrupt, which has to come.
fn interrupted(hardware: &impl Hardware, vector: Vector) {
    let event = hardware.interrupt(vector);
    let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
    let ready = poll(&mut fds, PollTimeout::from(20_000u16)).expect("poll");
    assert_eq!(ready, 1, "{vector:?} did not come");
    assert!(event.read().expect("read") > 0);
}

fn eventually(mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "it did not happen");
        std::thread::yield_now();
    }
}

/// What a driver has in memory: four pages, by offset.
const CONTEXTS: usize = 0;
const QUEUE: usize = 0x1000;
const REQUESTS: usize = 0x2000;
const SHADOW: usize = 0x3000;
const WAIT: usize = SHADOW + 0x180;

/// The least of a driver: an invalidation queue.
struct Driver<'a> {
    hardware: &'a Socket,
    memory: SocketMemory,
    bus: Gpa,
    posted: u32,
}

impl<'a> Driver<'a> {
    fn new(hardware: &'a Socket, bus: Gpa) -> Self {
        let memory = hardware.allocate(4 * PAGE as usize, Fork::Nothing);
        let memory = memory.expect("memory");
        map(hardware, addr(&memory), 4 * PAGE, bus).expect("mapped");
        Self {
            hardware,
            memory,
            bus,
            posted: 0,
        }
    }

    fn enable(&mut self) {
        for word_at in (0..self.memory.len()).step_by(8) {
            word(&self.memory, word_at).store(0, Ordering::Relaxed);
        }
        self.posted = 0;
        let at = |offset: usize| self.bus.0 + offset as u64;
        for (register, value) in [
            (regs::CTX_TABLE, at(CONTEXTS)),
            (regs::CTX_COUNT, 16),
            (regs::IQ_BASE, at(QUEUE)),
            (regs::IQ_LOG2, 4),
            (regs::PRQ_BASE, at(REQUESTS)),
            (regs::PRQ_LOG2, 4),
            (regs::SHADOW, at(SHADOW)),
            (regs::CTRL, regs::ctrl::ENABLE.into()),
        ] {
            write(self.hardware, register, value);
        }
        let status = read(self.hardware, regs::STATUS);
        assert_eq!(status, u64::from(regs::status::ENABLED));
    }

    /// Asks for an acknowledgement with this value, and an interrupt.
    fn post_wait(&mut self, value: u64) {
        let command = Command {
            kind: CommandKind::Wait as u32,
            flags: wait::WRITE | wait::INTERRUPT | wait::DRAINED,
            addr: self.bus.0 + WAIT as u64,
            value,
            ..Default::default()
        };
        let slot = QUEUE + (self.posted as usize % 16) * Command::SIZE;
        for (i, bytes) in command.to_bytes().chunks_exact(8).enumerate() {
            let bytes = u64::from_le_bytes(bytes.try_into().expect("eight"));
            word(&self.memory, slot + 8 * i).store(bytes, Ordering::Relaxed);
        }
        self.posted += 1;
        let tail = SHADOW + std::mem::offset_of!(KernelShadow, iq_tail);
        word(&self.memory, tail).store(self.posted.into(), Ordering::Release);
        write(self.hardware, regs::KICK, 1);
    }

    fn acknowledged(&self) -> u64 {
        word(&self.memory, WAIT).load(Ordering::Acquire)
    }
}

#[test]
fn registers_and_doorbells_are_there_and_nothing_beside_them() {
    let hardware = socket();
    assert!(hardware.name().contains("socket"));
    assert_eq!(read(&hardware, regs::ID), u64::from(regs::ID_VALUE));
    assert_eq!(read(&hardware, regs::CAP), regs::CAP_VALUE);
    for (bar, offset, width) in [(1, 0, 4), (BAR_REGS, PAGE, 4), (BAR_REGS, u64::MAX, 4)] {
        assert_eq!(hardware.read(bar, offset, width), 0xffff_ffff);
        // SAFETY: there is nothing.
        unsafe { hardware.write(bar, offset, width, 1) };
    }
    assert_eq!(hardware.read(BAR_REGS, PAGE - 4, 8), u64::MAX);
    // SAFETY: nothing is mapped.
    unsafe { hardware.write(BAR_DOORBELLS, BAR_DOORBELLS_SIZE - PAGE, 4, 0) };
    assert_eq!(read(&hardware, regs::ID), u64::from(regs::ID_VALUE));
    let ranges = hardware.bus_ranges();
    let msi = Gpa(0xfee0_0000)..Gpa(0xfef0_0000);
    assert!(
        ranges
            .iter()
            .all(|r| r.end <= msi.start || r.start >= msi.end)
    );
}

#[test]
fn memory_interrupts_and_reset_work_and_stay_connected() {
    let hardware = socket();
    let mut driver = Driver::new(&hardware, Gpa(0x1_2345_6000));
    for round in 1..=3 {
        hardware.set_bus_master(true).expect("bus master");
        driver.enable();
        driver.post_wait(round);
        interrupted(&hardware, Vector::Invalidation);
        assert_eq!(driver.acknowledged(), round);
        hardware.reset().expect("reset");
        assert_eq!(read(&hardware, regs::STATUS), 0);
        // Bus mastering is off: nothing happens, though there is time, until it is on.
        driver.enable();
        driver.post_wait(99);
        for _ in 0..100 {
            assert_eq!(
                read(&hardware, regs::STATUS),
                u64::from(regs::status::ENABLED)
            );
        }
        assert_eq!(driver.acknowledged(), 0);
        hardware.set_bus_master(true).expect("bus master");
        interrupted(&hardware, Vector::Invalidation);
        assert_eq!(driver.acknowledged(), 99);
        hardware.reset().expect("reset");
    }
}

#[test]
fn what_is_unmapped_is_not_reached_any_more() {
    let hardware = socket();
    let mut driver = Driver::new(&hardware, Gpa(1 << 40));
    hardware.set_bus_master(true).expect("bus master");
    driver.enable();
    driver.post_wait(1);
    interrupted(&hardware, Vector::Invalidation);
    hardware.unmap(driver.bus, 4 * PAGE).expect("unmapped");
    driver.post_wait(2);
    interrupted(&hardware, Vector::Error);
    assert_eq!(
        read(&hardware, regs::STATUS),
        u64::from(regs::status::FATAL)
    );
    assert_eq!(driver.acknowledged(), 1);
    // The same memory somewhere else.
    hardware.reset().expect("reset");
    hardware.set_bus_master(true).expect("bus master");
    driver.bus = Gpa(0x2000);
    map(&hardware, addr(&driver.memory), 4 * PAGE, driver.bus).expect("mapped");
    driver.enable();
    driver.post_wait(3);
    interrupted(&hardware, Vector::Invalidation);
    assert_eq!(driver.acknowledged(), 3);
}

#[test]
fn only_what_it_allocated_is_mapped_and_refusals_are_errors() {
    let hardware = socket();
    let memory = hardware.allocate(LARGE, Fork::Copy).expect("memory");
    assert!(addr(&memory).0.is_multiple_of(LARGE as u64));
    let foreign = socket().allocate(4096, Fork::Copy).expect("memory");
    let start = addr(&memory);
    let end = Iova(start.0 + LARGE as u64);
    for (at, len) in [
        (addr(&foreign), PAGE),
        (start, LARGE as u64 + PAGE),
        (Iova(end.0 - PAGE), 2 * PAGE),
        (end, PAGE),
        (start, u64::MAX),
    ] {
        let refused = map(&hardware, at, len, Gpa(0x1000));
        assert!(matches!(refused, Err(Error::Unsupported(_))), "{refused:?}");
    }
    for (bus, len) in [(Gpa(1 << 52), PAGE), (Gpa(5), PAGE), (Gpa(0x1000), 5)] {
        match map(&hardware, start, len, bus) {
            Err(Error::Hardware(text)) => assert!(text.contains("DMA_MAP"), "{text}"),
            other => panic!("{other:?}"),
        }
    }
    // After refusals the conversation goes on.
    map(&hardware, start, PAGE, Gpa(0x1000)).expect("mapped");
    assert!(matches!(
        hardware.unmap(Gpa(0x1000), u64::MAX),
        Err(Error::Hardware(_))
    ));
    hardware.unmap(Gpa(0x1000), PAGE).expect("unmapped");
    hardware.unmap(Gpa(0x1000), PAGE).expect("nothing there");
    // Memory that is gone cannot be mapped, even if others are there now.
    let gone = addr(&memory);
    drop(memory);
    assert!(map(&hardware, gone, PAGE, Gpa(0x1000)).is_err());
    assert_eq!(read(&hardware, regs::ID), u64::from(regs::ID_VALUE));
}

#[test]
fn a_file_is_copied_and_its_later_changes_are_not_seen() {
    let hardware = socket();
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(&[7; 3 * PAGE as usize]).expect("written");
    let map = |file: &File, range, sharing| hardware.map_file(file, range, sharing);
    let memory = map(&file, PAGE..2 * PAGE + 5, Sharing::Private).expect("mapped");
    file.write_all(&[8; 10]).expect("written");
    assert_eq!((memory.access(), memory.len()), (Access::ReadOnly, 8192));
    assert_eq!(
        word(&memory, 0).load(Ordering::Relaxed),
        0x0707_0707_0707_0707
    );
    assert_eq!(word(&memory, 4096).load(Ordering::Relaxed), 0x07_0707_0707);
    assert!(matches!(
        map(&file, 0..PAGE, Sharing::Shared),
        Err(Error::Unsupported(_))
    ));
    assert!(map(&file, 0..100 * PAGE, Sharing::Private).is_err());
    let backwards = std::ops::Range { start: 5, end: 0 };
    assert!(map(&file, backwards, Sharing::Private).is_err());
}

#[test]
fn two_servers_have_nothing_in_common() {
    let (one, two) = (socket(), socket());
    let mut first = Driver::new(&one, Gpa(0x1000));
    let mut second = Driver::new(&two, Gpa(0x1000));
    for driver in [&mut first, &mut second] {
        driver.hardware.set_bus_master(true).expect("bus master");
        driver.enable();
    }
    one.reset().expect("reset");
    second.post_wait(5);
    interrupted(&two, Vector::Invalidation);
    assert_eq!((first.acknowledged(), second.acknowledged()), (0, 5));
    assert!(one.interrupt(Vector::Invalidation).read().is_err());
}

#[test]
fn a_server_that_is_killed_at_any_moment_gives_errors() {
    for moment in 0..12 {
        let hardware = socket();
        let pid = Pid::from_raw(hardware.server().expect("a server").pid() as i32);
        let memory = hardware.allocate(4096, Fork::Nothing).expect("memory");
        let calls = AtomicU64::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                eventually(|| calls.load(Ordering::Relaxed) >= moment * 5);
                kill(pid, Signal::SIGKILL).expect("killed");
            });
            // One of the calls under way fails, whichever; and from then on all.
            let error = loop {
                let round = || -> Result<(), Error> {
                    let step = || calls.fetch_add(1, Ordering::Relaxed);
                    map(&hardware, addr(&memory), PAGE, Gpa(0x1000))?;
                    step();
                    write(&hardware, regs::KICK, 1);
                    hardware.set_bus_master(true)?;
                    step();
                    read(&hardware, regs::STATUS);
                    hardware.reset()?;
                    step();
                    hardware.unmap(Gpa(0x1000), PAGE)
                };
                if let Err(error) = round() {
                    break error;
                }
            };
            assert!(matches!(error, Error::Dead { .. }), "{error}");
        });
        assert_eq!(read(&hardware, regs::ID), 0xffff_ffff);
        assert_eq!(read(&hardware, regs::CAP), u64::MAX);
        write(&hardware, regs::KICK, 1);
        for result in [
            hardware.reset(),
            hardware.set_bus_master(true),
            hardware.unmap(Gpa(0x1000), PAGE),
            map(&hardware, addr(&memory), PAGE, Gpa(0x1000)),
        ] {
            assert!(matches!(result, Err(Error::Dead { .. })), "{result:?}");
        }
        // Memory is the program's own, whatever became of the device.
        word(&memory, 0).store(1, Ordering::Relaxed);
    }
}

#[test]
fn a_server_ends_with_its_client_and_cleans_up() {
    let hardware = socket();
    let server = hardware.server().expect("a server");
    let (pid, path) = (Pid::from_raw(server.pid() as i32), server.path());
    assert!(path.exists());
    drop(hardware);
    assert!(kill(pid, None).is_err() && !path.exists());
    let mut server = SocketServer::spawn(SERVER, "").expect("a server");
    let hardware = Socket::connect(server.path()).expect("connects");
    server.kill();
    assert_eq!(read(&hardware, regs::ID), 0xffff_ffff);
}

#[test]
fn a_server_that_cannot_be_had_is_a_named_error() {
    let named = |result: Result<Socket, Error>, what: &str| match result {
        Err(Error::Hardware(text)) => assert!(text.contains(what), "{text}"),
        other => panic!("{other:?}"),
    };
    named(
        Socket::spawn("/nowhere/device", ""),
        "cargo build -p extlb-device",
    );
    named(Socket::spawn("/bin/true", ""), "ended before it listened");
    named(
        Socket::spawn(SERVER, "no such = 1"),
        "ended before it listened",
    );
    named(Socket::connect("/nowhere/device.sock"), "--socket-path");
}

/// Not a test: what `no_server_outlives_a_process_that_crashes` runs.
#[test]
#[ignore = "ends the test program on purpose"]
fn spawns_a_server_and_crashes() {
    let server = SocketServer::spawn(SERVER, "").expect("a server");
    println!("\nserver {} {}", server.pid(), server.path().display());
    std::process::abort();
}

#[test]
fn no_server_outlives_a_process_that_crashes() {
    let name = "spawns_a_server_and_crashes";
    let output = Process::new(std::env::current_exe().expect("this program"))
        .args(["--exact", name, "--ignored", "--nocapture"])
        .stderr(Stdio::null())
        .output()
        .expect("runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find_map(|line| line.strip_prefix("server "));
    let (pid, path) = line.and_then(|l| l.split_once(' ')).expect("a server");
    let pid = Pid::from_raw(pid.parse().expect("a number"));
    eventually(|| kill(pid, None).is_err());
    // Nobody was left to remove the folder.
    let folder = std::path::Path::new(path).parent().expect("a folder");
    std::fs::remove_dir_all(folder).expect("removed");
}
