//! What a device is in only while threads meet: a drain that has not ended.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use extlb_spec::invalidation::{Command, CommandKind, KernelShadow, wait};
use extlb_spec::{BAR_REGS, Gpa, MAX_CONTEXTS, regs};

use crate::ports::{Dma as _, Ignore, Ports};
use crate::{Config, Device, GuestRam, Step};

const IQ: Gpa = Gpa(0x2000);
const SHADOW: Gpa = Gpa(0x4000);
const ACK: Gpa = Gpa(SHADOW.0 + 0x180);

fn device() -> (GuestRam, Device) {
    let ram = GuestRam::anonymous(&[(Gpa(0), 1 << 20)]).expect("maps");
    let ports = Ports::stepped(Arc::new(ram.clone()), Arc::new(Ignore));
    let device = Device::new(Config::default(), ports).expect("made");
    device.set_bus_master(true);
    for (register, value) in [
        (regs::CTX_TABLE, 0x1000),
        (regs::CTX_COUNT, 16),
        (regs::IQ_BASE, IQ.0),
        (regs::IQ_LOG2, 4),
        (regs::PRQ_BASE, 0x3000),
        (regs::PRQ_LOG2, 4),
        (regs::SHADOW, SHADOW.0),
        (regs::CTRL, regs::ctrl::ENABLE.into()),
    ] {
        let bytes = u64::to_le_bytes(value);
        device.mmio_write(BAR_REGS, register.offset, &bytes[..register.width as usize]);
    }
    (ram, device)
}

fn restored(ram: &GuestRam, state: &super::DeviceState) -> Result<Device, super::StateError> {
    let ports = Ports::stepped(Arc::new(ram.clone()), Arc::new(Ignore));
    Device::restore(Config::default(), ports, state)
}

fn ack(ram: &GuestRam) -> u64 {
    ram.load_u64(ACK, Ordering::SeqCst).expect("in RAM")
}

#[test]
fn a_wait_that_drains_is_acknowledged_by_the_device_that_goes_on_and_accuses_nobody() {
    let (ram, device) = device();
    let command = Command {
        kind: CommandKind::Wait as u32,
        flags: wait::WRITE | wait::DRAINED,
        addr: ACK.0,
        value: 7,
        ..Default::default()
    };
    ram.write(IQ, &command.to_bytes()).expect("in RAM");
    let tail = Gpa(SHADOW.0 + std::mem::offset_of!(KernelShadow, iq_tail) as u64);
    ram.store_u32(tail, 1, Ordering::SeqCst).expect("in RAM");
    {
        // An access of another thread is under way.
        let mut lane = device.guards.lane().expect("a lane");
        let _guard = lane.enter();
        assert_eq!(device.invalidation_step(), Step::Waiting);
        assert_eq!(device.invalidation_step(), Step::Waiting);
    }
    // It has ended, and nobody has looked yet.
    let state = device.save().expect("saved");
    assert_eq!(ack(&ram), 0);
    assert_eq!(device.totals().drains, 0);
    drop(device);
    let device = restored(&ram, &state).expect("restored");
    assert_eq!(ack(&ram), 0, "nothing is written before the first step");
    let mut lane = device.guards.lane().expect("a lane");
    let guard = lane.enter();
    assert_eq!(
        device.invalidation_step(),
        Step::Busy,
        "that guard is younger"
    );
    assert_eq!(ack(&ram), 7);
    assert_eq!(device.totals().drains, 1);
    assert!(!guard.is_outlived(), "and so not accused");
    assert_eq!(device.invalidation_step(), Step::Idle, "acknowledged once");
}

#[test]
fn a_wait_that_no_command_makes_is_refused() {
    let (ram, device) = device();
    let mut state: serde_json::Value =
        serde_json::from_str(device.save().expect("saved").0.get()).expect("JSON");
    for (waiting, good) in [
        (
            serde_json::json!({"flags": 0x21, "addr": 0x4180, "value": 1}),
            true,
        ),
        (
            serde_json::json!({"flags": 0x21, "addr": 0x4181, "value": 1}),
            false,
        ),
        (
            serde_json::json!({"flags": 4, "addr": 0x4180, "value": 1}),
            false,
        ),
    ] {
        state["commands"]["waiting"] = waiting.clone();
        let json = serde_json::value::to_raw_value(&state).expect("written");
        let device = restored(&ram, &super::DeviceState(json));
        assert_eq!(device.is_ok(), good, "{waiting}");
    }
}

#[test]
fn a_page_request_ring_that_no_device_had_is_refused() {
    let (ram, device) = device();
    let state: serde_json::Value =
        serde_json::from_str(device.save().expect("saved").0.get()).expect("JSON");
    for (field, value, good) in [
        ("waiters", serde_json::json!([5, 0, MAX_CONTEXTS - 1]), true),
        ("waiters", serde_json::json!([5, 5]), false),
        ("waiters", serde_json::json!([MAX_CONTEXTS]), false),
        ("waiters", serde_json::json!([u32::MAX]), false),
        ("base", serde_json::json!(0x2000), false),
        ("entries", serde_json::json!(32), false),
    ] {
        let mut state = state.clone();
        assert!(state["requests"].get(field).is_some(), "{field}");
        state["requests"][field] = value.clone();
        let json = serde_json::value::to_raw_value(&state).expect("written");
        let device = restored(&ram, &super::DeviceState(json));
        assert_eq!(device.is_ok(), good, "{field}: {value}");
    }
}
