//! States that a device is seldom in, saved and restored: each test ends as it would without.

mod common;

use std::mem::offset_of;
use std::sync::Arc;
use std::time::Duration;

use common::saved::{body, device_of, file_of, file_saying, whole_device_of};
use common::*;
use extlb_device::config::Config;
use extlb_device::ports::{Dma as _, Event, Ports};
use extlb_device::state::{SlotState, StateError};
use extlb_device::{Device, Step, pci};
use extlb_spec::context::ContextShadow;
use extlb_spec::invalidation::KernelShadow;
use extlb_spec::page_request::{RequestKind, Response};
use extlb_spec::pte::Pte;
use extlb_spec::regs::{self, FatalError, StaleKind};
use extlb_spec::work::{Descriptor, Opcode, Status, flags as work_flags};
use extlb_spec::{BAR_REGS, Gpa, Iova, Vector};

const SRC: u64 = 0x5000_0000;

/// A guest whose device is made anew from its state, now and then.
struct Fresh {
    config: Config,
    guest: Guest,
    ports: Ports,
    device: Arc<Device>,
}

impl Fresh {
    fn new() -> Self {
        Self::with(config())
    }

    fn with(config: Config) -> Self {
        let mut made = None;
        let guest = Guest::around(|ports| {
            let device = Arc::new(Device::new(config.clone(), ports.clone()).expect("made"));
            made = Some((ports, device.clone()));
            device
        });
        let (ports, device) = made.expect("made");
        Self {
            config,
            guest,
            ports,
            device,
        }
    }

    fn running() -> Self {
        Self::running_with(config())
    }

    fn running_with(config: Config) -> Self {
        let fresh = Self::with(config);
        fresh.guest.device.set_bus_master(true);
        fresh.guest.enable();
        fresh
    }

    /// One that looks for work so long before it sleeps, at a time that is not 0.
    fn polling() -> Self {
        let poll_us = 100;
        let fresh = Self::running_with(Config {
            poll_us,
            ..config()
        });
        fresh.pass(1_000_000);
        fresh.guest.run();
        fresh
    }

    fn pass(&self, microseconds: u64) {
        self.guest
            .clock
            .advance(Duration::from_micros(microseconds));
    }

    /// By way of a file.
    fn replace(&mut self) {
        let file = file_of(&self.device, &self.config);
        self.device = Arc::new(whole_device_of(&file, &self.ports));
        self.guest.device = self.device.clone();
    }
}

#[test]
fn who_waits_for_room_in_the_page_request_ring_gets_it() {
    let mut fresh = Fresh::running();
    let count = (1 << PRQ_LOG2) + 5;
    let processes: Vec<_> = (0..count).map(|c| fresh.guest.process(c)).collect();
    for process in &processes {
        process.submit(op(Opcode::Crc32c, SRC, 0, 8));
        // The last is one that stops on an error: that too must be told, once there is room.
        if process.context == count - 1 {
            process.set_tail(1000);
        }
        process.ring(&fresh.guest);
    }
    fresh.guest.run();
    let need_kick = offset_of!(KernelShadow, prq_need_kick);
    assert_eq!(fresh.guest.kernel_word(need_kick), 1);
    let mut seen = Vec::new();
    for _ in 0..count {
        fresh.replace();
        let record = fresh.guest.take_request().expect("a record");
        let error = record.context == count - 1;
        assert_eq!(record.kind == RequestKind::ContextError as u32, error);
        seen.push(record.context);
        fresh.replace();
        fresh.guest.run();
    }
    assert!(fresh.guest.take_request().is_none(), "none twice");
    assert_eq!(fresh.guest.kernel_word(need_kick), 0, "nobody waits");
    seen.sort_unstable();
    assert_eq!(seen, (0..count).collect::<Vec<_>>());
}

#[test]
fn a_fatal_error_and_the_interrupt_that_is_held_stay() {
    let mut fresh = Fresh::new();
    fresh.guest.set(regs::CTRL, regs::ctrl::ENABLE.into());
    assert_eq!(fresh.guest.fatal(), FatalError::BadConfig as u64);
    fresh.replace();
    assert_eq!(fresh.guest.fatal(), FatalError::BadConfig as u64);
    assert_ne!(fresh.guest.get(regs::ERROR_INFO), 0);
    assert_eq!(
        fresh.guest.vectors.count(Vector::Error),
        0,
        "not bus master"
    );
    fresh.guest.device.set_bus_master(true);
    assert_eq!(fresh.guest.vectors.count(Vector::Error), 1);
    fresh.replace();
    assert_eq!(fresh.guest.vectors.count(Vector::Error), 1, "not again");
    fresh.guest.device.reset();
    fresh.guest.enable();
    assert_eq!(fresh.guest.fatal(), 0);
}

/// A device that uses a page that its process has no more, at the moment of the access.
fn suspect(fresh: &Fresh) -> Process {
    let process = fresh.guest.process(1);
    process.map_fresh(Iova(SRC), 1);
    process.set_cpu(Iova(SRC), None);
    let record = process.go(&fresh.guest, op(Opcode::Crc32c, SRC, 0, 8));
    assert_eq!(record.status, Status::Success as u32);
    assert_eq!(fresh.guest.get(regs::ORACLE_SUSPECTS), 1);
    process
}

fn bound() -> Duration {
    Duration::from_millis(config().oracle.bound_ms)
}

#[test]
fn a_suspect_is_convicted_at_its_time_and_its_record_kept() {
    let mut fresh = Fresh::running();
    suspect(&fresh);
    fresh.guest.clock.advance(bound() / 2);
    fresh.replace();
    fresh
        .guest
        .clock
        .advance(bound() / 2 - Duration::from_nanos(1));
    fresh.guest.run();
    assert_eq!(fresh.guest.get(regs::ORACLE_STALE), 0, "not yet");
    fresh.guest.clock.advance(Duration::from_nanos(1));
    fresh.replace();
    fresh.guest.run();
    assert_eq!(fresh.guest.get(regs::ORACLE_STALE), 1);
    fresh.replace();
    let kind = fresh.guest.get(regs::ORACLE_KIND);
    assert_eq!(kind, StaleKind::NotInvalidated as u64);
    assert_eq!(fresh.guest.get(regs::ORACLE_IOVA), SRC);
    let events = fresh.guest.events.0.lock().unwrap();
    let stale = |event: &&Event| matches!(event, Event::Stale(_));
    assert_eq!(events.iter().filter(stale).count(), 1, "told once");
}

#[test]
fn a_suspect_is_cleared_by_an_invalidation_from_before() {
    let mut fresh = Fresh::running();
    let process = suspect(&fresh);
    process.set_device(Iova(SRC), Pte::EMPTY);
    fresh.guest.post(range(1, SRC, SRC + PAGE));
    fresh.guest.run();
    // Carried out, and not yet acknowledged by a drained wait.
    fresh.replace();
    fresh
        .guest
        .post_wait(extlb_spec::invalidation::wait::DRAINED);
    fresh.guest.run();
    fresh.replace();
    fresh.guest.clock.advance(bound() * 2);
    fresh.guest.run();
    assert_eq!(fresh.guest.get(regs::ORACLE_STALE), 0);
}

#[test]
fn the_upper_half_belongs_to_the_lower_one_read_before() {
    let mut fresh = Fresh::new();
    fresh.guest.set(regs::CTX_TABLE, 0x1_0000_1000);
    let half = |fresh: &Fresh, at: u64| {
        let mut bytes = [0; 4];
        let offset = regs::CTX_TABLE.offset + at;
        fresh.guest.device.mmio_read(BAR_REGS, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    assert_eq!(half(&fresh, 0), 0x1000);
    fresh.guest.set(regs::CTX_TABLE, 0x2_0000_2000);
    fresh.replace();
    assert_eq!(half(&fresh, 4), 1);
    assert_eq!(half(&fresh, 4), 2);
}

/// The new clock begins at zero: what was a moment ago is a moment ago, or now.
#[test]
fn another_clock_may_be_at_any_time() {
    let mut fresh = Fresh::running();
    fresh.guest.clock.advance(Duration::from_secs(1000));
    suspect(&fresh);
    let state = fresh.device.save().expect("saved");
    let clock = Arc::new(HandClock::default());
    fresh.ports.clock = clock.clone();
    let device = Device::restore(config(), fresh.ports.clone(), &state).expect("restored");
    assert_eq!(device.next_deadline(), Some(bound()));
    clock.advance(bound());
    device.invalidation_step();
    assert_eq!(device.totals().oracle_stale, 1);
}

#[test]
fn a_device_of_another_size_is_refused() {
    let fresh = Fresh::running();
    let state = fresh.device.save().expect("saved");
    let restore = |change: fn(&mut Config)| {
        let mut config = config();
        change(&mut config);
        Device::restore(config, fresh.ports.clone(), &state)
    };
    for change in [
        (|c| c.tlb.sets *= 2) as fn(&mut Config),
        |c| c.tlb.ways *= 2,
        |c| c.tlb.walk_cache = 0,
        |c| c.oracle.suspects = 1,
        |c| c.oracle.bound_ms += 1,
    ] {
        let refused = restore(change);
        assert!(
            matches!(refused, Err(StateError::Value { .. })),
            "{refused:?}"
        );
    }
    assert!(restore(|c| c.poll_us = 77).is_ok());
    assert!(restore(|c| c.engines = 3).is_ok());
    let bad = restore(|c| c.tlb.sets = 3);
    assert!(matches!(bad, Err(StateError::BadConfig(_))));
}

#[test]
fn the_slot_keeps_its_configuration_space_and_what_is_pending() {
    let mut space = pci::ConfigSpace::new();
    space.write(4, &[6, 0]);
    space.write(0x10, &0xfebf_0000u32.to_le_bytes());
    let slot = SlotState {
        config_space: space.save(),
        pending: 0b100,
    };
    let json = serde_json::to_vec(&slot).expect("written");
    let read: SlotState = serde_json::from_slice(&json).expect("read");
    assert_eq!(read, slot);
    let restored = pci::ConfigSpace::restore(&read.config_space).expect("restored");
    assert!(restored.bus_master());
    let (mut a, mut b) = ([0; 4096], [1; 4096]);
    space.read(0, &mut a);
    restored.read(0, &mut b);
    assert_eq!(a, b);
    // The vendor cannot be written, nor a power state that there is not.
    for (at, byte) in [(0, 0x35), (0x44, 2), (0x44, 1)] {
        let mut bytes = slot.config_space.clone();
        bytes[at] = byte;
        assert!(pci::ConfigSpace::restore(&bytes).is_err(), "{at:#x}");
    }
    assert!(pci::ConfigSpace::restore(&[0; 5000]).is_err());
}

#[test]
fn what_has_failed_is_counted_on() {
    let mut fresh = Fresh::running();
    let process = fresh.guest.process(1);
    let page = process.map_fresh(Iova(SRC), 1)[0];
    let missing = SRC + 16 * PAGE;
    // One that finds a difference, and one that waits for its page.
    let batch = [
        op(Opcode::Compare, SRC, SRC + 2048, 8),
        op(Opcode::Crc32c, missing, 0, 8),
    ];
    for (n, mut descriptor) in (0..).zip(batch) {
        descriptor.completion = process.record(100 + n).0;
        let at = Gpa(page.0 + n * Descriptor::SIZE as u64);
        let written = fresh.guest.ram.write(at, &descriptor.to_bytes());
        written.expect("in RAM");
    }
    let batch = process.submit(op(Opcode::Batch, SRC, 0, 2));
    process.ring(&fresh.guest);
    fresh.guest.run();
    let request = fresh.guest.expect_request();
    fresh.replace();
    process.map_fresh(Iova(missing), 1);
    fresh.guest.respond(&request, Response::Success);
    fresh.guest.run();
    let record = process.completion(batch);
    assert_eq!(record.status, Status::Success as u32);
    assert_eq!((record.bytes, record.result), (2, 1));
    fresh.replace();
    let record = process.go(&fresh.guest, op(Opcode::Fence, 0, 0, 0));
    assert_eq!(record.status, Status::EarlierFailed as u32);
    assert_eq!(record.result, 1);
}

#[test]
fn what_was_told_is_not_told_again() {
    let mut fresh = Fresh::running();
    let process = fresh.guest.process(1);
    let mut nop = op(Opcode::Nop, 0, 0, 0);
    nop.flags = work_flags::INTERRUPT;
    process.go(&fresh.guest, nop);
    let interrupts = |fresh: &Fresh| fresh.guest.vectors.count(Vector::Completion);
    assert_eq!(interrupts(&fresh), 1);
    fresh.replace();
    process.go(&fresh.guest, op(Opcode::Nop, 0, 0, 0));
    assert_eq!(interrupts(&fresh), 1);
    fresh.replace();
    process.go(&fresh.guest, nop);
    assert_eq!(interrupts(&fresh), 2);
}

#[test]
fn who_asked_for_a_kick_says_so_when_it_needs_none_any_more() {
    let mut fresh = Fresh::polling();
    let process = fresh.guest.process(1);
    let queue = offset_of!(KernelShadow, iq_need_kick);
    let context = offset_of!(ContextShadow, need_kick);
    for _ in 0..2 {
        assert_eq!(process.word(context), 1);
        fresh.replace();
        process.submit(op(Opcode::Nop, 0, 0, 0));
        process.ring(&fresh.guest);
        while process.ahead() > 0 {
            assert_eq!(fresh.device.engine_step(), Step::Busy);
        }
        assert_eq!(process.word(context), 0);
        // Asleep again.
        fresh.replace();
        fresh.guest.run();
        assert_eq!(fresh.guest.kernel_word(queue), 1);
        fresh.replace();
        fresh.guest.post_wait(0);
        assert_eq!(fresh.device.engine_step(), Step::Busy);
        assert_eq!(fresh.guest.kernel_word(queue), 0);
        fresh.guest.run();
    }
}

#[test]
fn a_device_sleeps_as_long_after_its_last_work_as_it_would_have() {
    let mut fresh = Fresh::polling();
    fresh.guest.post_wait(0);
    assert_eq!(fresh.device.engine_step(), Step::Busy);
    for (passed, step) in [(60, Step::Waiting), (39, Step::Waiting), (1, Step::Idle)] {
        fresh.pass(passed);
        fresh.replace();
        assert_eq!(fresh.device.engine_step(), step);
    }
    // And so does each context, of which the queue knows nothing.
    let process = fresh.guest.process(1);
    process.submit(op(Opcode::Nop, 0, 0, 0));
    process.ring(&fresh.guest);
    while process.ahead() > 0 {
        assert_eq!(fresh.device.engine_step(), Step::Busy);
    }
    for (passed, asleep) in [(60, 0), (39, 0), (1, 1)] {
        fresh.pass(passed);
        fresh.replace();
        for _ in 0..4 {
            fresh.device.engine_step();
        }
        let need_kick = process.word(offset_of!(ContextShadow, need_kick));
        assert_eq!(need_kick, asleep);
    }
}

/// A translation that survives its invalidation, which no device has: the oracle is for those.
#[test]
fn invalidations_that_are_done_are_remembered() {
    let mut fresh = Fresh::running();
    let process = fresh.guest.process(1);
    process.map_fresh(Iova(SRC), 1);
    let read = op(Opcode::Crc32c, SRC, 0, 8);
    process.go(&fresh.guest, read);
    let before = body(&file_of(&fresh.device, &fresh.config));
    process.set_cpu(Iova(SRC), None);
    process.set_device(Iova(SRC), Pte::EMPTY);
    fresh.guest.shoot(1, SRC, SRC + PAGE);
    fresh.guest.run();
    fresh.replace();
    let mut after = body(&file_of(&fresh.device, &fresh.config));
    after["device"]["tlb"]["arrays"] = before["device"]["tlb"]["arrays"].clone();
    let device = device_of(&file_saying(&after), &fresh.ports);
    fresh.device = Arc::new(device.expect("restored"));
    fresh.guest.device = fresh.device.clone();
    let record = process.go(&fresh.guest, read);
    assert_eq!(record.status, Status::Success as u32, "found in the TLB");
    assert_eq!(fresh.guest.get(regs::ORACLE_STALE), 1, "at once");
    let kind = fresh.guest.get(regs::ORACLE_KIND);
    assert_eq!(kind, StaleKind::SurvivedInvalidation as u64);
}
