//! Stops of every kind at every moment of every operation: at each single access to memory that
//! the device makes for a script of work, the work is stopped there. Then nothing is accessed and
//! no interrupt comes; no completion is half, doubled or (where work goes on) lost; and the same
//! work runs to its end afterwards.

mod common;
use common::*;

mod script;
use script::Script;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use extlb_device::Step;
use extlb_device::pci::ConfigSpace;
use extlb_spec::regs;

/// Ways to stop a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    RegisterReset,
    FunctionReset,
    Disable,
    BusMasterOff,
    Sleep,
}

impl Stop {
    const ALL: [Self; 5] = [
        Self::RegisterReset,
        Self::FunctionReset,
        Self::Disable,
        Self::BusMasterOff,
        Self::Sleep,
    ];

    /// Whether work goes on where it was.
    fn is_pause(self) -> bool {
        matches!(self, Stop::BusMasterOff | Stop::Sleep)
    }

    fn resets(self) -> bool {
        matches!(self, Stop::RegisterReset | Stop::FunctionReset)
    }
}

/// Where the registers of the configuration space are.
const COMMAND: u64 = 0x04;
const PM_CONTROL: u64 = 0x44;
const DEVICE_CONTROL: u64 = 0x58;
const BUS_MASTER: u16 = 1 << 2;

/// Writes to the configuration space, as the server passes them on.
fn config_write(guest: &Guest, pci: &mut ConfigSpace, offset: u64, value: u16) {
    let effect = pci.write(offset, &value.to_le_bytes());
    if let Some(on) = effect.bus_master {
        guest.device.set_bus_master(on);
    }
    if effect.reset {
        guest.device.reset();
    }
}

fn powered() -> ConfigSpace {
    let mut pci = ConfigSpace::new();
    pci.write(COMMAND, &BUS_MASTER.to_le_bytes());
    pci
}

fn stop(guest: &Guest, pci: &mut ConfigSpace, stop: Stop) {
    match stop {
        Stop::RegisterReset => guest.set(regs::CTRL, regs::ctrl::RESET.into()),
        Stop::FunctionReset => config_write(guest, pci, DEVICE_CONTROL, 1 << 15),
        Stop::Disable => guest.set(regs::CTRL, 0),
        Stop::BusMasterOff => config_write(guest, pci, COMMAND, 0),
        Stop::Sleep => config_write(guest, pci, PM_CONTROL, 3),
    }
}

fn resume(guest: &Guest, pci: &mut ConfigSpace) {
    config_write(guest, pci, PM_CONTROL, 0);
    config_write(guest, pci, COMMAND, BUS_MASTER);
}

/// What must not change any more once a stop has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Traffic {
    accesses: u64,
    interrupts: u64,
}

fn traffic(guest: &Guest) -> Traffic {
    Traffic {
        accesses: guest.memory.accesses.load(Ordering::SeqCst),
        interrupts: guest.vectors.total(),
    }
}

/// A stop on a thread of its own: it returns only when the access under way has ended.
fn stop_beside(guest: &Arc<Guest>, how: Stop) -> JoinHandle<(Traffic, ConfigSpace)> {
    let begun = Arc::new(AtomicBool::new(false));
    let (inner, told) = (guest.clone(), begun.clone());
    let thread = std::thread::spawn(move || {
        let mut pci = powered();
        told.store(true, Ordering::SeqCst);
        stop(&inner, &mut pci, how);
        (traffic(&inner), pci)
    });
    while !begun.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    // Let it close the gate, most of the time; whether it has is no matter for what must hold.
    (0..8).for_each(|_| std::thread::yield_now());
    thread
}

/// Whoever may, asks the device to go on: it does not. Every other time nobody asks: what goes on
/// afterwards does so by itself.
fn silent(guest: &Guest, script: &Script, after: Traffic, what: &str) {
    if after.accesses.is_multiple_of(2) {
        script.ring_all(guest);
        guest.set(regs::KICK, 1);
    }
    for _ in 0..50 {
        guest.device.engine_step();
        guest.device.invalidation_step();
    }
    assert_eq!(traffic(guest), after, "{what}");
}

/// Stops at the `k`-th access. False: the work has ended before.
fn stop_at(make: Make, k: u64, how: Stop) -> bool {
    let guest = Arc::new(Guest::with(script::config()));
    let mut script = make(&guest);
    let what = format!("{how:?} at access {k}");
    let (send, stopping) = std::sync::mpsc::channel();
    let (inner, mut left) = (guest.clone(), k);
    guest.memory.hook(move |access| {
        if matches!(access, Access::Loaded(_)) {
            return false;
        }
        left -= 1;
        if left > 0 {
            return false;
        }
        send.send(stop_beside(&inner, how)).unwrap();
        true
    });
    script.start(&guest);
    let stopping = loop {
        let more = script.step(&guest);
        if let Ok(stopping) = stopping.try_recv() {
            break stopping;
        }
        if !more {
            script.check(&guest, &what);
            return false;
        }
    };
    let (after, mut pci) = stopping.join().unwrap();
    silent(&guest, &script, after, &what);
    let ended = script.check_told(&guest, &what);
    if how.is_pause() {
        resume(&guest, &mut pci);
        script.finish(&guest);
        script.check(&guest, &what);
        return true;
    }
    let totals = guest.device.totals();
    let counted = totals.ops_completed + totals.ops_faulted;
    assert!(ended.contains(&counted), "{what}: {counted}, not {ended:?}");
    for register in regs::ALL.iter().filter(|_| how.resets()) {
        assert_eq!(guest.get(*register), register.reset, "{what}: {register:?}");
    }
    // A clean start, and what the device did before comes to nobody.
    let interrupts = guest.vectors.total();
    if how == Stop::FunctionReset {
        resume(&guest, &mut pci);
    }
    guest.enable();
    guest.run();
    assert_eq!(guest.vectors.total(), interrupts, "{what}");
    script.check_half(&guest, &what);
    let mut again = make(&guest);
    again.start(&guest);
    again.finish(&guest);
    again.check(&guest, &what);
    true
}

type Make = fn(&Guest) -> Script;

/// The scripts that are stopped anywhere, and at every how manieth access: of the long one each way
/// to stop has others.
const SCRIPTS: [(Make, u64); 2] = [(Script::operations, 1), (Script::batches, 3)];

fn stop_anywhere(how: Stop) {
    for (make, stride) in SCRIPTS {
        let mut k = 1 + how as u64 % stride;
        while stop_at(make, k, how) {
            k += stride;
            assert!(k < 5000, "the script is short");
        }
        println!("{how:?}: at 1 in {stride} of {} accesses", k - 1);
        assert!(k > 100, "the script is not that short");
    }
}

#[test]
fn register_reset_at_any_access() {
    stop_anywhere(Stop::RegisterReset);
}

#[test]
fn function_reset_at_any_access() {
    stop_anywhere(Stop::FunctionReset);
}

#[test]
fn disable_at_any_access() {
    stop_anywhere(Stop::Disable);
}

#[test]
fn bus_master_off_and_on_at_any_access() {
    stop_anywhere(Stop::BusMasterOff);
}

#[test]
fn d3hot_and_back_at_any_access() {
    stop_anywhere(Stop::Sleep);
}

#[test]
fn any_stop_while_the_request_ring_is_full() {
    for how in Stop::ALL {
        // Every third access, each stop at others: this script is long.
        let mut k = 1 + how as u64 % 3;
        while stop_at(Script::crowd, k, how) {
            k += 3;
        }
    }
}

/// The client is gone, and its memory with it; or the memory alone. False: the work has ended
/// before.
fn remove_at(make: Make, k: u64) -> bool {
    let guest = Arc::new(Guest::with(script::config()));
    let mut script = make(&guest);
    let (inner, mut left) = (guest.clone(), k);
    guest.memory.hook(move |access| {
        if matches!(access, Access::Loaded(_)) {
            return false;
        }
        left -= 1;
        if left == 0 {
            inner.memory.gone.store(true, Ordering::SeqCst);
        }
        left == 0
    });
    script.start(&guest);
    while script.step(&guest) && !guest.memory.is_done() {}
    if !guest.memory.is_done() {
        script.check(&guest, "to the end");
        return false;
    }
    // Nobody panics, and it comes to rest: stopped for good, or with nothing left to do.
    script.ring_all(&guest);
    guest.run();
    script.check_half(&guest, "removed");
    guest.device.set_bus_master(false);
    guest.device.reset();
    let after = traffic(&guest);
    silent(&guest, &script, after, "removed");
    // Plugged in again.
    guest.memory.gone.store(false, Ordering::SeqCst);
    guest.device.set_bus_master(true);
    guest.enable();
    let mut again = make(&guest);
    again.start(&guest);
    again.finish(&guest);
    again.check(&guest, "plugged in again");
    true
}

#[test]
fn surprise_removal_at_any_access() {
    for (make, stride) in SCRIPTS {
        let mut k = 1;
        while remove_at(make, k) {
            k += stride;
        }
        assert!(k > 100);
    }
}

/// The same with the device on threads of its own, and stops at any time of theirs.
#[test]
fn stops_under_threads() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    for round in 0..60 {
        let guest = Arc::new(Guest::with(script::config()));
        let make = [Script::operations, Script::batches, Script::crowd][round % 3];
        let mut script = make(&guest);
        let done = AtomicBool::new(false);
        let device = &guest.device;
        std::thread::scope(|scope| {
            let ends = Ends(&done);
            for _ in 0..2 {
                scope.spawn(|| run_until(&done, || device.engine_step()));
            }
            scope.spawn(|| run_until(&done, || device.invalidation_step()));
            let mut pci = powered();
            script.start(&guest);
            // Pauses any number of times, then a stop for good.
            loop {
                let at = guest.memory.accesses.load(Ordering::SeqCst) + random(300);
                let here = |g: &Guest| g.memory.accesses.load(Ordering::SeqCst) >= at;
                while !here(&guest) && script.serve(&guest) {
                    std::thread::yield_now();
                }
                let how = Stop::ALL[random(5) as usize];
                let what = format!("{how:?} under threads, round {round}");
                stop(&guest, &mut pci, how);
                let after = traffic(&guest);
                for _ in 0..50 {
                    std::thread::yield_now();
                    assert_eq!(traffic(&guest), after, "{what}");
                }
                let ended = script.check_told(&guest, &what);
                if !how.is_pause() {
                    let totals = guest.device.totals();
                    let counted = totals.ops_completed + totals.ops_faulted;
                    assert!(ended.contains(&counted), "{what}: {counted}, not {ended:?}");
                    break;
                }
                resume(&guest, &mut pci);
                if script.is_done(&guest) {
                    script.check(&guest, &what);
                    break;
                }
            }
            guest.device.reset();
            guest.device.set_bus_master(true);
            guest.enable();
            let mut again = make(&guest);
            again.start(&guest);
            while again.serve(&guest) {
                std::thread::yield_now();
            }
            again.check(&guest, "after the stops");
            drop(ends);
        });
    }
}

/// Ends the threads, also when a check fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn run_until(done: &AtomicBool, step: impl Fn() -> Step) {
    while !done.load(Ordering::SeqCst) {
        step();
        std::thread::yield_now();
    }
}
