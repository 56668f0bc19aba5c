//! The server for any user of VFIO, whatever it does first: interrupts, power, reset, clients
//! that die, memory in many pieces. Nothing of our own drivers is in here.

mod wire;

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileExt;

use extlb_device::config::{Config, DebugConfig};
use extlb_spec::pte::Pte;
use extlb_spec::regs::{self, FatalError, status};
use extlb_spec::work::{Descriptor, Opcode, Status, flags};
use extlb_spec::{BAR_DOORBELLS, BAR_MSIX, BAR_REGS, Gpa, MSIX_PBA_OFFSET, Vector};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use wire::*;

const MSIX: u32 = 2;
const COMPLETION: u32 = Vector::Completion as u32;
/// What SET_IRQS is given, and what is to be done with it.
const NONE: u32 = 1 << 0;
const EVENTFD: u32 = 1 << 2;
const MASK: u32 = 1 << 3;
const UNMASK: u32 = 1 << 4;
const TRIGGER: u32 = 1 << 5;
/// Control register of power management.
const PM_CONTROL: u64 = 0x44;

fn eventfd() -> EventFd {
    EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).expect("an event fd")
}

/// How often it was signalled since the last look.
fn take(fd: &EventFd) -> u64 {
    fd.read().unwrap_or(0)
}

fn nop(interrupt: bool) -> Descriptor {
    Descriptor {
        opcode: Opcode::Nop as u8,
        flags: if interrupt { flags::INTERRUPT } else { 0 },
        ..Default::default()
    }
}

impl Wire {
    fn irqs(&mut self, flags: u32, start: u32, count: u32, fds: &[RawFd]) {
        self.client
            .set_irqs(MSIX, flags, start, count, fds)
            .expect("answered");
    }

    fn assign(&mut self, start: u32, fds: &[&EventFd]) {
        let fds: Vec<RawFd> = fds.iter().map(|fd| fd.as_fd().as_raw_fd()).collect();
        self.irqs(EVENTFD | TRIGGER, start, fds.len() as u32, &fds);
    }

    fn pending(&mut self) -> u64 {
        let mut bytes = [0; 8];
        let at = u64::from(MSIX_PBA_OFFSET);
        let read = self.client.region_read(BAR_MSIX.into(), at, &mut bytes);
        read.expect("read");
        u64::from_le_bytes(bytes)
    }

    /// Lets an operation end with an interrupt. When this returns it was raised.
    fn interrupt(&mut self) {
        let n = self.submit(nop(true));
        assert_eq!(self.wait(n).status, Status::Success as u32);
        // The record comes before the interrupt; the drain is served after the operation's turn.
        self.drain();
    }
}

#[test]
fn no_interrupt_is_lost_in_whatever_order_vectors_are_set_up() {
    let served = Served::new(Config::default(), true);
    let mut wire = Wire::connect(&served.socket);
    wire.start();
    // Nobody listens yet.
    wire.interrupt();
    eventually("it is pending", || wire.pending() == 1 << COMPLETION);
    let (a, b) = (eventfd(), eventfd());
    wire.assign(COMPLETION, &[&a]);
    assert_eq!((take(&a), wire.pending()), (1, 0));
    wire.interrupt();
    eventually("it is signalled", || take(&a) == 1);
    // All of them, in two pieces, the last first; the vector moves to another event fd.
    let others = [eventfd(), eventfd(), eventfd()];
    wire.assign(2, &[&others[2], &b]);
    wire.assign(0, &[&others[0], &others[1]]);
    wire.interrupt();
    eventually("the new one is signalled", || take(&b) == 1);
    assert_eq!(take(&a), 0);
    // Masked and let go again.
    wire.irqs(NONE | MASK, 0, 4, &[]);
    wire.interrupt();
    eventually("it is pending", || wire.pending() == 1 << COMPLETION);
    assert_eq!(take(&b), 0);
    wire.irqs(NONE | UNMASK, COMPLETION, 1, &[]);
    assert_eq!((take(&b), wire.pending()), (1, 0));
    wire.irqs(NONE | UNMASK, 0, 4, &[]);
    // Some of a range.
    wire.client
        .set_irqs_of(MASK, 2, &[false, true])
        .expect("masked");
    wire.client
        .set_irqs_of(TRIGGER, 0, &[true, false, true, false])
        .expect("raised");
    assert_eq!(others.each_ref().map(take), [1, 0, 1]);
    wire.interrupt();
    eventually("it is pending", || wire.pending() == 1 << COMPLETION);
    wire.client
        .set_irqs_of(UNMASK, 3, &[true])
        .expect("unmasked");
    assert_eq!((take(&b), wire.pending()), (1, 0));
    // By hand, all four.
    wire.irqs(NONE | TRIGGER, 0, 4, &[]);
    assert_eq!(others.each_ref().map(take), [1; 3]);
    assert_eq!(take(&b), 1);
    // Some taken back, then all; an interrupt in between waits for the next.
    wire.irqs(EVENTFD | TRIGGER, 1, 2, &[]);
    wire.irqs(NONE | TRIGGER, 0, 4, &[]);
    assert_eq!(others.each_ref().map(take), [1, 0, 0]);
    wire.irqs(NONE | TRIGGER, 0, 0, &[]);
    assert_eq!(take(&b), 1);
    wire.interrupt();
    eventually("it is pending", || wire.pending() == 1 << COMPLETION);
    assert_eq!(take(&b), 0);
    wire.assign(0, &[&others[0], &others[1], &others[2], &b]);
    assert_eq!(take(&b), 1);
    // What makes no sense changes nothing.
    let bad = a.as_fd().as_raw_fd();
    for (index, flags, start, count, fds) in [
        (MSIX, EVENTFD | TRIGGER, 3, 2, &[bad, bad][..]),
        (MSIX, EVENTFD | TRIGGER, 0, 2, &[bad]),
        (MSIX, EVENTFD | NONE | TRIGGER, 3, 1, &[bad]),
        (MSIX, NONE | TRIGGER, 3, 1, &[bad]),
        (MSIX, NONE | MASK, u32::MAX, 2, &[]),
        (0, EVENTFD | TRIGGER, 0, 1, &[bad]),
        (1, EVENTFD | TRIGGER, 0, 1, &[bad]),
        (3, EVENTFD | TRIGGER, 0, 1, &[bad]),
        (4, EVENTFD | TRIGGER, 0, 1, &[bad]),
        (5, EVENTFD | TRIGGER, 0, 1, &[bad]),
    ] {
        let set = wire.client.set_irqs(index, flags, start, count, fds);
        assert_eq!(
            set,
            Err(Errno::EINVAL),
            "{index} {flags:#x} {start} {count}"
        );
    }
    let set = wire.client.set_irqs(MSIX, EVENTFD | MASK, 3, 1, &[bad]);
    assert_eq!(set, Err(Errno::EOPNOTSUPP));
    wire.interrupt();
    eventually("it goes where it went", || take(&b) == 1);
    assert_eq!(take(&a), 0);
}

#[test]
fn a_reset_keeps_event_fds_and_forgets_what_is_pending() {
    let served = Served::new(Config::default(), true);
    let mut wire = Wire::connect(&served.socket);
    let fd = eventfd();
    // Before anything else.
    wire.assign(COMPLETION, &[&fd]);
    wire.client.reset().expect("reset");
    wire.start();
    wire.interrupt();
    eventually("it is signalled", || take(&fd) == 1);
    for how in 0..3 {
        wire.irqs(NONE | MASK, COMPLETION, 1, &[]);
        wire.interrupt();
        eventually("it is pending", || wire.pending() == 1 << COMPLETION);
        match how {
            0 => wire.client.reset().expect("reset"),
            // Function-level reset: bit 15 of the PCIe capability's device control.
            1 => wire.set_config(0x58, &[0, 0x80]),
            _ => wire.set_config(0x59, &[0x80]),
        }
        assert_eq!(wire.pending(), 0);
        assert_eq!(wire.get(regs::STATUS), 0);
        assert_eq!(wire.get(regs::IQ_BASE), 0);
        assert_eq!(wire.config(4, 2), 0, "the command register");
        wire.irqs(NONE | UNMASK, COMPLETION, 1, &[]);
        assert_eq!(take(&fd), 0);
        wire.start_bus();
        wire.configure();
        wire.enable();
        wire.start_context();
        wire.interrupt();
        eventually("it is signalled", || take(&fd) == 1);
    }
}

#[test]
fn in_d3hot_the_device_is_silent_and_wakes_as_it_was() {
    // It polls all the while, so that it would see a descriptor without being told.
    let poll = Config {
        poll_us: 1_000_000,
        ..Config::default()
    };
    let served = Served::new(poll, true);
    let mut wire = Wire::connect(&served.socket);
    wire.start();
    wire.set_config(PM_CONTROL, &[3]);
    assert_eq!(wire.get(regs::STATUS), u64::from(u32::MAX));
    assert_eq!(wire.get(regs::IQ_BASE), u64::MAX);
    assert_eq!(wire.config(0, 4), 0xe71b_1234);
    assert_eq!(wire.config(PM_CONTROL, 2) & 3, 3);
    let n = wire.submit(nop(false));
    wire.set(regs::CTRL, regs::ctrl::RESET.into());
    for _ in 0..500 {
        wire.config(PM_CONTROL, 2);
        assert_eq!(wire.record(n).status, 0);
    }
    wire.set_config(PM_CONTROL, &[0]);
    assert_eq!(
        wire.get(regs::STATUS),
        u64::from(status::ENABLED),
        "no reset"
    );
    // The doorbell was lost; the tail was not.
    assert_eq!(wire.wait(n).status, Status::Success as u32);
}

#[test]
fn nothing_depends_on_the_order_in_which_things_are_done() {
    let served = Served::new(Config::default(), true);
    let mut wire = Wire::connect(&served.socket);
    // Doorbells and kicks of a device that has nothing, at any width, in and out of range.
    for at in [0, 3, 255 << 12, (1 << 20) - 1] {
        let rung = wire.client.region_write(BAR_DOORBELLS.into(), at, &[1]);
        rung.expect("answered");
    }
    wire.set(regs::KICK, 1);
    assert_eq!(wire.get(regs::STATUS), 0);
    // Enabled before it may access memory, and before there is any.
    for register in [regs::SHADOW, regs::PRQ_LOG2, regs::IQ_LOG2] {
        wire.set(register, 4);
    }
    wire.configure();
    wire.enable();
    wire.set(regs::KICK, 1);
    assert_eq!(wire.get(regs::STATUS), u64::from(status::ENABLED));
    assert_eq!(wire.read(SHADOW), [0; 4096]);
    wire.map_ram();
    wire.set(regs::KICK, 1);
    assert_eq!(wire.get(regs::STATUS), u64::from(status::ENABLED));
    assert_eq!(wire.read(SHADOW), [0; 4096], "bus mastering is off");
    wire.start_bus();
    wire.start_context();
    let n = wire.submit(nop(false));
    assert_eq!(wire.wait(n).status, Status::Success as u32);
    // A context table where there is no memory: fatal, and told; a reset mends it.
    wire.set(regs::CTRL, 0);
    wire.set(regs::CTX_TABLE, RAM);
    wire.enable();
    wire.post(extlb_spec::invalidation::Command {
        kind: extlb_spec::invalidation::CommandKind::ContextSync as u32,
        ..Default::default()
    });
    wire.set(regs::KICK, 1);
    eventually("the device stops", || {
        wire.get(regs::STATUS) == u64::from(status::FATAL)
    });
    assert_eq!(wire.get(regs::ERROR), FatalError::ContextTable as u64);
    wire.set(regs::CTRL, regs::ctrl::RESET.into());
    // Enabled first, configured after: the configuration is not open, and not good.
    wire.set(regs::CTRL, 1);
    wire.configure();
    assert_eq!(wire.get(regs::STATUS), u64::from(status::FATAL));
    assert_eq!(wire.get(regs::ERROR), FatalError::BadConfig as u64);
    wire.set(regs::CTRL, regs::ctrl::RESET.into());
    wire.configure();
    wire.enable();
    wire.start_context();
    let n = wire.submit(nop(false));
    assert_eq!(wire.wait(n).status, Status::Success as u32);
}

#[test]
fn a_client_that_dies_leaves_a_silent_device_and_the_next_gets_a_fresh_one() {
    let served = Served::new(
        Config {
            debug: DebugConfig {
                bus_delay_us: 200_000,
                ..Default::default()
            },
            ..Config::default()
        },
        false,
    );
    let mut wire = Wire::connect(&served.socket);
    wire.start();
    wire.leaf(0x10_000, Pte::leaf(Gpa(0x80_000), true));
    let misses = wire.get(regs::TLB_MISSES);
    wire.submit(Descriptor {
        opcode: Opcode::Fill as u8,
        dst: 0x10_000,
        len: 4096,
        arg: u64::MAX,
        ..Default::default()
    });
    eventually("it is under way", || {
        wire.get(regs::TLB_MISSES) == misses + 2
    });
    let ram = wire.ram.try_clone().expect("cloned");
    // The next client is in the queue already: connected, and not yet answered.
    let socket = served.socket.clone();
    let next = std::thread::spawn(move || Wire::connect(&socket));
    assert!(!next.is_finished());
    drop(wire);
    // Served: so the session before has ended, and with it every access.
    let mut next = next.join().expect("is served");
    let mut all = vec![0; RAM as usize];
    ram.read_exact_at(&mut all, 0).expect("read");
    assert_eq!(next.get(regs::STATUS), 0);
    assert_eq!(next.get(regs::IQ_BASE), 0);
    assert_eq!(next.get(regs::TLB_MISSES), 0);
    assert_eq!(next.config(4, 2), 0);
    next.start();
    let n = next.submit(nop(false));
    assert_eq!(next.wait(n).status, Status::Success as u32);
    let mut later = vec![0; RAM as usize];
    ram.read_exact_at(&mut later, 0).expect("read");
    assert!(all == later, "written after its client was gone");
}

/// As a guest's IOMMU maps it: page by page, all over the file, and unmapped at once.
#[test]
fn memory_in_thousands_of_pieces_is_found_and_goes_at_once() {
    const PIECES: u64 = 4096;
    const BASE: u64 = 1 << 32;
    let served = Served::new(Config::default(), true);
    let mut wire = Wire::connect(&served.socket);
    wire.start();
    let file = memory(PIECES << 12);
    let place = |page: u64| (page * 2731) % PIECES;
    for page in 0..PIECES {
        wire.map(BASE + (page << 12), &file, place(page) << 12, 4096);
    }
    for page in (0..PIECES).step_by(97) {
        wire.leaf(0x10_000, Pte::leaf(Gpa(BASE + (page << 12)), true));
        let n = wire.submit(Descriptor {
            opcode: Opcode::Fill as u8,
            dst: 0x10_000,
            len: 4096,
            arg: page,
            ..Default::default()
        });
        assert_eq!(wire.wait(n).status, Status::Success as u32);
        let mut word = [0; 8];
        file.read_exact_at(&mut word, (place(page) << 12) + 8)
            .expect("read");
        assert_eq!(u64::from_le_bytes(word), page);
        wire.shoot_down(0x10_000);
    }
    wire.client.dma_unmap(BASE, PIECES << 12).expect("unmapped");
    wire.client.dma_unmap(BASE, PIECES << 12).expect("nothing");
    for page in [0, PIECES / 2, PIECES - 1] {
        wire.leaf(0x10_000, Pte::leaf(Gpa(BASE + (page << 12)), true));
        let n = wire.submit(Descriptor {
            opcode: Opcode::Fill as u8,
            dst: 0x10_000,
            len: 4096,
            ..Default::default()
        });
        assert_eq!(wire.wait(n).status, Status::BusError as u32);
        wire.shoot_down(0x10_000);
    }
    assert_eq!(wire.get(regs::BUS_ERRORS), 3);
}

#[test]
fn bars_and_configuration_space_answer_at_any_width() {
    let served = Served::new(Config::default(), true);
    let mut wire = Wire::connect(&served.socket);
    assert_eq!(wire.config(0, 1), 0x34);
    assert_eq!(wire.config(1, 2), 0x1b12);
    assert_eq!(wire.config(3, 1), 0xe7);
    assert_eq!(wire.config(0x100, 4), 0, "no extended capability");
    assert_eq!(wire.config(0xffc, 4), 0);
    // Sizing as every system does it, and the registers answer all the while.
    for (bar, size) in [(0, 4096u64), (2, 1 << 20), (4, 8192)] {
        let at = 0x10 + 4 * bar;
        wire.set_config(at, &[0xff; 4]);
        wire.set_config(at + 4, &[0xff; 4]);
        let low = u64::from(wire.config(at, 4));
        let high = u64::from(wire.config(at + 4, 4));
        assert_eq!(low & 0xf, 0b100, "64 bits, not prefetchable");
        assert_eq!(!(high << 32 | low & !0xf) + 1, size);
        let region = wire.client.region(bar as u32).expect("a region");
        assert_eq!(region.size, size);
    }
    assert_eq!(wire.get(regs::ID), u64::from(regs::ID_VALUE));
    let mut byte = [0xaa];
    let read = wire.client.region_read(BAR_REGS.into(), 1, &mut byte);
    read.expect("answered");
    assert_eq!(byte, [0], "registers are words");
}
