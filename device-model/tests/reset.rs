//! Stops of every kind, in the middle of an operation: no access to memory afterwards.

mod common;
use common::*;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use extlb_device::Step;
use extlb_spec::work::{Descriptor, Status};
use extlb_spec::{Gpa, Iova, Vector, regs};

const SRC: u64 = 0x5555_0000_0000;
const DST: u64 = 0x5555_1000_0000;

/// A guest whose device has done the first quantum of a long copy.
fn busy() -> (Guest, Process, u64) {
    let mut config = config();
    config.schedule.quantum = 4096;
    let guest = Guest::with(config);
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 16);
    process.map_fresh(Iova(DST), 16);
    let n = process.submit(copy(SRC, DST, 16 * 4096));
    process.ring(&guest);
    for _ in 0..4 {
        assert_eq!(guest.device.engine_step(), Step::Busy);
    }
    (guest, process, n)
}

fn silent(guest: &Guest, process: &Process) {
    let before = guest.memory.accesses.load(Ordering::SeqCst);
    process.ring(guest);
    guest.set(regs::KICK, 1);
    for _ in 0..100 {
        guest.device.engine_step();
        guest.device.invalidation_step();
    }
    assert_eq!(guest.device.engine_step(), Step::Idle);
    let after = guest.memory.accesses.load(Ordering::SeqCst);
    assert_eq!(before, after, "an access after the stop");
}

#[test]
fn reset_and_disable_stop_everything() {
    for stop in [
        (|g: &Guest| g.set(regs::CTRL, regs::ctrl::RESET.into())) as fn(&Guest),
        |g| g.device.reset(),
        |g| g.set(regs::CTRL, 0),
    ] {
        let (guest, process, n) = busy();
        stop(&guest);
        silent(&guest, &process);
        assert_eq!(process.status(n), Some(Status::Pending));
        assert_eq!(guest.get(regs::STATUS), 0);
        // Contexts are forgotten: the old one does not come back by itself.
        guest.enable();
        process.ring(&guest);
        guest.run();
        assert_eq!(process.status(n), Some(Status::Pending));
        let fresh = guest.process(2).go(&guest, Descriptor::default());
        assert_eq!(fresh.status, Status::Success as u32);
    }
}

#[test]
fn a_reset_clears_registers_and_keeps_the_totals() {
    let (guest, _, _) = busy();
    let bytes = guest.get(regs::BYTES);
    assert!(bytes > 0);
    guest.set(regs::CTRL, regs::ctrl::RESET.into());
    for register in regs::ALL {
        assert_eq!(guest.get(*register), register.reset, "{}", register.name);
    }
    assert_eq!(guest.device.totals().bytes, bytes);
}

#[test]
fn bus_master_off_pauses_and_on_goes_on() {
    let (guest, process, n) = busy();
    guest.device.set_bus_master(false);
    silent(&guest, &process);
    let ack = guest.shoot(1, 0x1000, 0x2000);
    silent(&guest, &process);
    guest.device.set_bus_master(true);
    guest.run();
    assert_eq!(process.status(n), Some(Status::Success));
    assert_eq!(guest.ack(), ack);
}

#[test]
fn interrupts_wait_for_the_bus_master() {
    let guest = Guest::new();
    guest.device.set_bus_master(false);
    let break_it = || {
        guest.set(regs::CTRL, 0);
        guest.set(regs::CTX_COUNT, 0);
        guest.set(regs::CTRL, regs::ctrl::ENABLE.into());
        assert_eq!(guest.get(regs::STATUS), u64::from(regs::status::FATAL));
    };
    break_it();
    assert_eq!(guest.vectors.count(Vector::Error), 0);
    guest.device.set_bus_master(true);
    assert_eq!(guest.vectors.count(Vector::Error), 1);
    // A reset forgets it.
    guest.device.reset();
    guest.device.set_bus_master(false);
    break_it();
    guest.device.reset();
    guest.device.set_bus_master(true);
    assert_eq!(guest.vectors.count(Vector::Error), 1);
}

#[test]
fn stops_wait_for_the_access_under_way() {
    type Stop = fn(&dyn Core);
    let stops: [Stop; 3] = [|d| d.reset(), |d| d.set_bus_master(false), |d| d.quiesce()];
    for stop in stops {
        let guest = Guest::new();
        let process = guest.process(1);
        let src = process.map_fresh(Iova(SRC), 1)[0];
        let dst = process.map_fresh(Iova(DST), 1)[0];
        // The engine's thread is held in the middle of a copy.
        let held = guest.memory.hold(Access::Copy(src, dst));
        process.submit(copy(SRC, DST, 64));
        process.ring(&guest);
        let device: Arc<_> = guest.device.clone();
        std::thread::scope(|scope| {
            scope.spawn(|| guest.device.engine_step());
            held.wait();
            let stopped = scope.spawn(move || stop(&*device));
            // It cannot have ended: the copy has not. (If it wrongly did, this would be seen
            // at some run, not at each; that it must not is what the drain tests show.)
            for _ in 0..100 {
                assert!(!stopped.is_finished());
                std::thread::yield_now();
            }
            held.release();
            stopped.join().unwrap();
        });
        assert!(guest.memory.is_done());
    }
}

#[test]
fn memory_that_goes_away_is_a_bus_error() {
    let guest = Guest::new();
    let process = guest.process(1);
    process.map_fresh(Iova(SRC), 1);
    process.map(Iova(DST), Gpa(RAM as u64), true);
    let done = process.go(&guest, copy(SRC, DST, 64));
    assert_eq!(done.status, Status::BusError as u32);
    assert_eq!(done.fault_addr, DST);
}

/// The interrupt of a completion is part of the access that wrote the record: none comes late.
#[test]
fn stops_wait_for_the_interrupt_of_a_completion() {
    type Stop = fn(&dyn extlb_device::Core);
    let stops: [Stop; 2] = [|d| d.reset(), |d| d.set_bus_master(false)];
    for stop in stops {
        let guest = Guest::new();
        let process = guest.process(1);
        let (send, stopping) = std::sync::mpsc::channel();
        let device = guest.device.clone();
        guest.vectors.look(move |vector| {
            assert_eq!(vector, Vector::Completion);
            let device = device.clone();
            let stopped = std::thread::spawn(move || stop(&*device));
            for _ in 0..100 {
                assert!(!stopped.is_finished());
                std::thread::yield_now();
            }
            send.send(stopped).unwrap();
        });
        let asked = Descriptor {
            flags: extlb_spec::work::flags::INTERRUPT,
            ..Default::default()
        };
        let n = process.submit(asked);
        process.ring(&guest);
        guest.device.engine_step();
        stopping.recv().unwrap().join().unwrap();
        assert_eq!(process.status(n), Some(Status::Success));
        assert_eq!(guest.vectors.count(Vector::Completion), 1);
    }
}

/// What a stop is told as, once each, and only if there was something to stop.
#[test]
fn stops_are_told() {
    use extlb_device::ports::{Event, Stop};
    let guest = Guest::new();
    guest.device.set_bus_master(false);
    guest.device.set_bus_master(false);
    guest.device.set_bus_master(true);
    guest.set(regs::CTRL, 0);
    guest.set(regs::CTRL, 0);
    guest.device.reset();
    guest.enable();
    guest.device.reset();
    guest.device.reset();
    let events = guest.events.0.lock().unwrap();
    let stops: Vec<_> = events
        .iter()
        .map(|e| match e {
            Event::Stopped(stop) => *stop,
            other => panic!("{other}"),
        })
        .collect();
    assert_eq!(stops, [Stop::BusMasterOff, Stop::Disabled, Stop::Reset]);
}
