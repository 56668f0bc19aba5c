//! A device that lies to the driver in user space: each lie, and what comes of it.
//!
//! What is noticed has an error with a name. What cannot be noticed does no harm to memory.

#[path = "mutated/rig.rs"]
mod rig;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use extlb_driver::conformance::{Abilities, run};
use extlb_driver::hardware::{Faults, Lie, LocalDevice, Mutated};
use extlb_driver::userspace::Userspace;
use extlb_driver::{Context, Device, Error, Nonsense, Result};
use nix::errno::Errno;
use rig::{Liar, basics, context, innocent, recover, start};

/// Longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(10);

fn is_register(error: &Error, want: &str) -> bool {
    matches!(error, Error::Protocol(Nonsense::Register { name, .. }) if *name == want)
}

fn is_call(error: &Error, want: &str) -> bool {
    matches!(error, Error::Call { call, .. } if *call == want)
}

fn is_dead(error: &Error, want: Errno) -> bool {
    matches!(error, Error::Dead { errno } if *errno == want)
}

type Check = fn(&Error) -> bool;

#[test]
fn a_device_that_lies_from_the_start_is_not_taken() {
    let table: &[(Lie, Check)] = &[
        (Lie::Removed, |e| is_dead(e, Errno::ENODEV)),
        (Lie::Identity, |e| {
            matches!(e, Error::Identity { .. }) || is_dead(e, Errno::ENODEV)
        }),
        (Lie::Status, |e| is_register(e, "STATUS")),
        (Lie::FatalError, |e| is_register(e, "ERROR")),
        (Lie::StatusReset, |e| is_dead(e, Errno::ECONNRESET)),
        (Lie::WriteLost, |e| is_dead(e, Errno::ECONNRESET)),
        (Lie::ResetFails, |e| is_call(e, "reset")),
        (Lie::BusMasterFails, |e| is_call(e, "bus master")),
        (Lie::MapRefused, |e| is_call(e, "map")),
    ];
    for (lie, check) in table {
        for seed in 0..8 {
            let faults = Faults::new(seed);
            faults.always(*lie);
            let error = start(&faults).unwrap_err();
            assert!(check(&error), "{lie:?}, seed {seed}: {error:?}");
        }
    }
}

#[test]
fn versions_and_capabilities_are_looked_at() {
    for (lie, check) in [
        (
            Lie::Version,
            (|e| matches!(e, Error::Interface { .. })) as Check,
        ),
        (Lie::Capabilities, |e| is_register(e, "CAP")),
    ] {
        let mut refused = 0;
        for seed in 0..64 {
            let faults = Faults::new(seed);
            faults.always(lie);
            // Some differ in what does not matter: a later minor version, fewer contexts.
            match start(&faults) {
                Ok(device) => basics(&device).unwrap(),
                Err(error) => {
                    assert!(check(&error), "{lie:?}, seed {seed}: {error:?}");
                    refused += 1;
                }
            }
        }
        assert!(refused > 20, "{lie:?}: {refused} were refused");
    }
}

/// Asks until there is an answer.
fn until<T>(what: &str, limit: Duration, mut answer: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(answer) = answer() {
            return answer;
        }
        assert!(begun.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What is done with a device, and what comes of it.
type Act = fn(&Device<Liar>, &Context<Liar>) -> Result<()>;

/// An operation on half a megabyte.
fn fill(_: &Device<Liar>, context: &Context<Liar>) -> Result<()> {
    let dst = context.allocate(500_000)?;
    context.queue().fill(dst, 1)?.finish().map(drop)
}

fn crc(_: &Device<Liar>, context: &Context<Liar>) -> Result<()> {
    let src = context.allocate(5000)?;
    context.queue().crc32c(src, 0)?.finish().map(drop)
}

/// More operations, one after the other, than the ring holds.
fn nops(_: &Device<Liar>, context: &Context<Liar>) -> Result<()> {
    (0..40).try_for_each(|_| context.queue().nop()?.finish().map(drop))
}

/// Registers memory and takes it back, more often than the invalidation queue is long.
fn unregister(_: &Device<Liar>, context: &Context<Liar>) -> Result<()> {
    for _ in 0..150 {
        let slice = context.allocate(4096)?;
        slice.unregister()?.expect("a whole one");
    }
    Ok(())
}

/// Asks the driver how its device is.
fn ask(_: &Device<Liar>, context: &Context<Liar>) -> Result<()> {
    context.stats().map(drop)
}

/// The same, until it is not well.
fn ask_on(_: &Device<Liar>, context: &Context<Liar>) -> Result<()> {
    until("bad news", LIMIT, || {
        let one = || {
            context.queue().nop()?.finish()?;
            context.stats()
        };
        one().err()
    });
    context.stats().map(drop)
}

/// Tells a lie while something is done, and judges what comes of it.
fn lie(lie: Lie, seed: u64, act: Act, check: impl Fn(&Result<()>) -> bool) {
    let faults = Faults::new(seed);
    let device = start(&faults).unwrap();
    let at_work = context(&device).unwrap();
    fill(&device, &at_work).unwrap();
    faults.always(lie);
    let begun = Instant::now();
    let result = act(&device, &at_work);
    let took = begun.elapsed();
    assert!(took < LIMIT, "{lie:?}, seed {seed}: {took:?}");
    assert!(check(&result), "{lie:?}, seed {seed}: {result:?}");
    assert!(faults.told(lie) > 0, "{lie:?}, seed {seed}: never told");
    drop(at_work);
    recover(&device, &faults).unwrap_or_else(|error| panic!("{lie:?}, seed {seed}: {error}"));
    innocent(&device);
}

/// Some at a time: they wait a lot.
fn each(
    table: &[(Lie, Act, Check)],
    seeds: usize,
    judge: impl Fn(&Result<()>, Check) -> bool + Copy + Send + Sync,
) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let Some((what, act, check)) = table.get(n / seeds) else {
                        return;
                    };
                    let seed = (n % seeds) as u64;
                    lie(*what, seed, *act, |result| judge(result, *check));
                }
            });
        }
    });
}

#[test]
fn lies_that_are_noticed_have_an_error_with_a_name() {
    let table: &[(Lie, Act, Check)] = &[
        (Lie::Removed, ask, |e| is_dead(e, Errno::ENODEV)),
        (Lie::Status, ask, |e| is_register(e, "STATUS")),
        (Lie::FatalError, ask, |e| is_register(e, "ERROR")),
        (Lie::StatusReset, ask, |e| is_dead(e, Errno::ECONNRESET)),
        (Lie::MapRefused, fill, |e| is_call(e, "map")),
        (Lie::UnmapRefused, unregister, |e| is_call(e, "unmap")),
        (Lie::RecordStatus, fill, |e| {
            matches!(e, Error::Protocol(Nonsense::Status(8..)))
        }),
        (Lie::RecordMismatch, fill, |e| {
            matches!(e, Error::Protocol(Nonsense::Status(7)))
        }),
        (Lie::RecordBytes, fill, |e| {
            matches!(e, Error::Protocol(Nonsense::Bytes { .. }))
        }),
        (Lie::RecordFault, fill, |e| {
            matches!(e, Error::Protocol(Nonsense::FaultAddress(_)))
        }),
        (Lie::RecordResult, crc, |e| {
            matches!(e, Error::Protocol(Nonsense::Result(_)))
        }),
        // The head says that it was carried out.
        (Lie::RecordNever, fill, |e| {
            matches!(e, Error::Protocol(Nonsense::Status(0)))
        }),
        (Lie::HeadBack, nops, |e| {
            matches!(e, Error::Protocol(Nonsense::Head { .. }))
        }),
        (Lie::ContextError, nops, |e| {
            matches!(e, Error::Protocol(Nonsense::ContextError(7..)))
        }),
        (Lie::CommandHeadNever, unregister, |e| {
            is_dead(e, Errno::ETIMEDOUT)
        }),
        (Lie::WaitAhead, unregister, |e| {
            matches!(e, Error::Protocol(Nonsense::Acknowledged { .. }))
        }),
        (Lie::WaitBehind, unregister, |e| {
            is_dead(e, Errno::ETIMEDOUT)
        }),
        (Lie::WaitNever, unregister, |e| is_dead(e, Errno::ETIMEDOUT)),
        (Lie::RequestTail, ask_on, |e| {
            matches!(e, Error::Protocol(Nonsense::RequestTail { .. }))
                || is_register(e, "kind of a page request")
        }),
        (Lie::RequestMissing, ask_on, |e| {
            is_register(e, "kind of a page request")
        }),
        (Lie::RequestKind, unregister_on, |e| {
            is_register(e, "kind of a page request")
        }),
        (Lie::RequestContext, unregister_on, |e| {
            is_register(e, "context of a page request")
        }),
    ];
    each(table, 2, |result, check| {
        result.as_ref().err().is_some_and(check)
    });
}

/// Takes memory back from a device that sleeps.
fn kicked(_: &Device<Liar>, context: &Context<Liar>) -> Result<()> {
    // On a busy machine it may take a few.
    for _ in 0..100 {
        std::thread::sleep(Duration::from_millis(3));
        let slice = context.allocate(4096)?;
        slice.unregister()?.expect("a whole one");
    }
    Ok(())
}

/// Lets the device go to sleep before each, until one of them fails.
fn rested(device: &Device<Liar>, context: &Context<Liar>) -> Result<()> {
    for _ in 0..100 {
        // Awake, then asleep: how long the device polls, and a while. On a busy machine it may
        // take a few.
        context.queue().nop()?.finish()?;
        std::thread::sleep(Duration::from_millis(3));
        let slice = context.allocate(4096)?;
        slice.unregister()?.expect("a whole one");
    }
    unregister(device, context)
}

/// Registers and takes back until the device is dead.
fn unregister_on(device: &Device<Liar>, context: &Context<Liar>) -> Result<()> {
    until("bad news", LIMIT, || unregister(device, context).err());
    ask(device, context)
}

#[test]
fn lies_that_may_be_noticed_do_no_harm() {
    let table: &[(Lie, Act, Check)] = &[
        (Lie::Head, nops, |e| {
            matches!(e, Error::Protocol(Nonsense::Head { .. }))
        }),
        (Lie::CommandHead, unregister, |e| {
            matches!(e, Error::Protocol(Nonsense::CommandHead { .. }))
                || is_dead(e, Errno::ETIMEDOUT)
        }),
        // It sleeps and says that it does not.
        (Lie::CommandKick, rested, |e| is_dead(e, Errno::ETIMEDOUT)),
        (Lie::WriteLost, kicked, |e| is_dead(e, Errno::ETIMEDOUT)),
        (Lie::Leaf, copies, |e| {
            matches!(e, Error::Fault { .. } | Error::Bus { .. }) || is_register(e, PTE)
        }),
        (Lie::Table, copies, |e| {
            matches!(e, Error::Fault { .. } | Error::Bus { .. }) || is_register(e, PTE)
        }),
        (Lie::WaitEarly, unregister, |_| false),
        // The second may hit the next operation of the same slot.
        (Lie::RecordTwice, nops, |e| {
            matches!(e, Error::Protocol(Nonsense::Status(8..)))
        }),
        (Lie::RecordNext, nops, |_| false),
        (Lie::EventJump, nop, |_| false),
        (Lie::EventNever, nop, |_| false),
        (Lie::InterruptLost, nop, |_| false),
        (Lie::InterruptTwice, nops, |_| false),
        (Lie::RequestAddress, unregister, |_| false),
        (Lie::RequestAgain, unregister, |_| false),
        (Lie::RequestStopped, unregister, |_| false),
        (Lie::RequestFlood, unregister, |_| false),
    ];
    each(table, 2, |result, check| {
        result.as_ref().err().is_none_or(check)
    });
}

const PTE: &str = "an entry of a page table";

/// One operation: without an event its waiter looks for itself, once a second.
fn nop(_: &Device<Liar>, context: &Context<Liar>) -> Result<()> {
    context.queue().nop()?.finish().map(drop)
}

/// Copies between new places, which are taken back; until one fails.
fn copies(_: &Device<Liar>, context: &Context<Liar>) -> Result<()> {
    for _ in 0..8 {
        let (mut src, dst) = (context.allocate(50_000)?, context.allocate(50_000)?);
        src.fill(7);
        let ((), (src, dst)) = context.queue().copy(src, dst)?.finish()?;
        assert!(src[..] == dst[..]);
        src.unregister()?.expect("a whole one");
        dst.unregister()?.expect("a whole one");
    }
    Ok(())
}

#[test]
fn a_head_that_stands_still_is_no_hang() {
    lie(Lie::HeadNever, 0, nops, |result| {
        matches!(
            result,
            Err(Error::Protocol(Nonsense::Head { .. })) | Err(Error::Dead { .. })
        )
    });
}

#[test]
fn what_is_silent_ends_with_a_restart() {
    for what in [Lie::WriteLost, Lie::KickGarbage] {
        for seed in 0..4 {
            let faults = Faults::new(seed);
            let device = start(&faults).unwrap();
            let at_work = context(&device).unwrap();
            faults.always(what);
            // The device goes to sleep, and is not woken.
            std::thread::sleep(Duration::from_millis(2));
            let pending = at_work.queue().nop().unwrap();
            let done = pending.wait_for(Duration::from_millis(20)).unwrap();
            faults.stop();
            device.backing().restart().unwrap();
            let begun = Instant::now();
            match pending.wait() {
                Ok(_) => assert!(done),
                Err(error) => assert!(is_dead(&error, Errno::ESHUTDOWN), "{error:?}"),
            }
            assert!(begun.elapsed() < LIMIT);
            basics(&device).unwrap();
        }
    }
}

#[test]
fn after_lies_of_all_kinds_the_whole_suite_passes() {
    let faults = Faults::new(3);
    let device = start(&faults).unwrap();
    let mut dead = Vec::new();
    for lie in [Lie::RecordBytes, Lie::WaitAhead, Lie::Table, Lie::Removed] {
        let at_work = context(&device).unwrap();
        faults.always(lie);
        let _ = copies(&device, &at_work);
        dead.push(at_work);
        recover(&device, &faults).unwrap();
    }
    let report = run(
        "a device that was mutated",
        &device,
        &Abilities::LOCAL,
        None,
    );
    assert!(report.is_good(), "{report}");
    drop(dead);
    innocent(&device);
}

#[test]
fn memory_comes_back_from_a_device_that_was_removed() {
    let faults = Faults::new(1);
    let device = start(&faults).unwrap();
    let at_work = context(&device).unwrap();
    let slices = [
        at_work.allocate(3 << 20).unwrap(),
        at_work.allocate(4096).unwrap(),
    ];
    faults.always(Lie::Removed);
    for slice in slices {
        // The hardware itself says that the device does not reach it any more.
        slice.unregister().unwrap().expect("a whole one");
    }
    let error = at_work.queue().nop().and_then(|nop| nop.finish());
    assert!(is_dead(&error.unwrap_err(), Errno::ENODEV));
    assert!(is_dead(
        &device.backing().restart().unwrap_err(),
        Errno::ENODEV
    ));
    drop(at_work);
    recover(&device, &faults).unwrap();
    innocent(&device);
}

#[test]
fn memory_of_which_nothing_is_known_is_lost() {
    let faults = Faults::new(1);
    let device = start(&faults).unwrap();
    let at_work = context(&device).unwrap();
    let slice = at_work.allocate(3 << 20).unwrap();
    for lie in [
        Lie::WaitNever,
        Lie::ResetFails,
        Lie::BusMasterFails,
        Lie::UnmapRefused,
    ] {
        faults.always(lie);
    }
    let error = slice.unregister().unwrap_err();
    assert!(is_dead(&error, Errno::ETIMEDOUT), "{error:?}");
    drop(at_work);
    recover(&device, &faults).unwrap();
    innocent(&device);
}

#[test]
fn bus_addresses_of_which_nothing_is_known_are_not_reused() {
    let faults = Faults::new(1);
    let device = start(&faults).unwrap();
    let at_work = context(&device).unwrap();
    let slice = at_work.allocate(3 << 20).unwrap();
    for lie in [Lie::WaitNever, Lie::ResetFails] {
        faults.always(lie);
    }
    slice.unregister().unwrap().expect("a whole one");
    drop(at_work);
    recover(&device, &faults).unwrap();
    let again = context(&device).unwrap();
    let _slice = again.allocate(3 << 20).unwrap();
    innocent(&device);
}

#[test]
fn memory_that_stays_mapped_is_not_given_back() {
    let faults = Faults::new(1);
    let device = start(&faults).unwrap();
    let at_work = context(&device).unwrap();
    let mut kept = Vec::new();
    // Each needs a table of its own. At last there is no memory for one left, when the range
    // itself is mapped already, and can neither be mapped nor unmapped.
    loop {
        faults.after(Lie::MapRefused, 1);
        faults.always(Lie::UnmapRefused);
        let registered = at_work.allocate((2 << 20) + 4096);
        let refused = faults.told(Lie::MapRefused) > 0;
        faults.stop();
        kept.push(registered);
        if refused {
            break;
        }
    }
    assert!(kept.len() > 100, "{}", kept.len());
    drop(kept.pop());
    innocent(&device);
    drop((kept, at_work));
    recover(&device, &faults).unwrap();
    innocent(&device);
}

#[test]
fn other_hardware_can_be_wrapped_as_well() {
    let faults = Faults::new(1);
    let hardware = LocalDevice::new(extlb_device::Config::default()).unwrap();
    let hardware = Mutated::new(hardware, &faults);
    let device = Device::open(Userspace::new(hardware, Default::default()).unwrap()).unwrap();
    let at_work = context(&device).unwrap();
    at_work.stats().unwrap();
    faults.always(Lie::Removed);
    assert!(is_dead(&at_work.stats().unwrap_err(), Errno::ENODEV));
    assert_eq!(device.backing().hardware().honest().bus_faults(), 0);
}
