//! States that a device is seldom in, saved and restored: each test ends as it would without.

mod common;

use std::io::Cursor;
use std::sync::Arc;
use std::time::Duration;

use common::*;
use extlb_device::config::Config;
use extlb_device::ports::{Event, Ports};
use extlb_device::state::{Saved, SlotState, StateError};
use extlb_device::{Device, pci};
use extlb_spec::page_request::RequestKind;
use extlb_spec::regs::{self, FatalError, StaleKind};
use extlb_spec::work::{Opcode, Status};
use extlb_spec::{BAR_REGS, Iova, Vector};

const SRC: u64 = 0x5000_0000;

/// A guest whose device is made anew from its state, now and then.
struct Fresh {
    guest: Guest,
    ports: Ports,
    device: Arc<Device>,
}

impl Fresh {
    fn new() -> Self {
        let mut made = None;
        let guest = Guest::around(|ports| {
            let device = Arc::new(Device::new(config(), ports.clone()).expect("made"));
            made = Some((ports, device.clone()));
            device
        });
        let (ports, device) = made.expect("made");
        Self {
            guest,
            ports,
            device,
        }
    }

    fn running() -> Self {
        let fresh = Self::new();
        fresh.guest.device.set_bus_master(true);
        fresh.guest.enable();
        fresh
    }

    /// By way of a file.
    fn replace(&mut self) {
        let saved = Saved {
            interface: regs::VERSION_VALUE,
            config: config(),
            device: self.device.save().expect("saved"),
            slot: None,
        };
        let mut file = Vec::new();
        saved.write(&mut file).expect("written");
        let saved = Saved::read(Cursor::new(file)).expect("read");
        let device = Device::restore(saved.config, self.ports.clone(), &saved.device);
        self.device = Arc::new(device.expect("restored"));
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
    process.set_device(Iova(SRC), extlb_spec::pte::Pte::EMPTY);
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
