//! Random lives of a whole device, each access of which is judged by a reference model.

mod common;
mod lives;
mod model;

use std::sync::Arc;

use extlb_spec::work::{Descriptor, Opcode, flags};
use lives::{Action, Manner, Place, Shoot, Work, action};
use model::world::{BATCHES, Change, LARGE, LISTS, SMALL, SMALL_PAGES, World};
use model::{Command, Scope};
use proptest::prelude::*;

use common::PAGE;

/// Sources and destinations apart, so that copies do not overlap.
fn address(place: Place, target: bool) -> u64 {
    let half = SMALL_PAGES / 2;
    match place {
        Place::Small(n) => SMALL + (n % half + if target { half } else { 0 }) * PAGE,
        Place::Large(n) => LARGE + (n % 4 + if target { 508 } else { 0 }) * PAGE,
        Place::Ring | Place::Records | Place::Lists | Place::Batches => SMALL,
    }
}

fn page(world: &World, context: u32, place: Place, target: bool) -> u64 {
    let process = &world.processes[context as usize];
    match place {
        Place::Ring => process.ring.0,
        Place::Records => process.records.0,
        Place::Lists => LISTS,
        Place::Batches => BATCHES,
        _ => address(place, target),
    }
}

fn shoot(world: &World, scope: Scope, shoot: Shoot) {
    if shoot.invalidate
        && world.post(Command::Invalidate(scope))
        && let Some(level) = shoot.wait
    {
        world.wait(level, level == 1);
    }
    (0..shoot.steps).for_each(|_| world.queue_step());
}

fn submit(
    world: &World,
    context: u32,
    work: Work,
    descriptor: Descriptor,
    manner: Manner,
    kick: bool,
) {
    let takes = match work {
        Work::Copy | Work::Compare => [true, true],
        Work::Fill => [false, true],
        Work::Crc => [true, false],
        _ => [false, false],
    };
    let list = |i: usize, addr| {
        let cut = manner.lists[i].filter(|_| takes[i])?;
        Some(cut.list(addr, descriptor.len))
    };
    let lists = [list(0, descriptor.src), list(1, descriptor.dst)];
    let flags = if manner.quiet { flags::QUIET } else { 0 };
    let descriptor = Descriptor {
        flags,
        ..descriptor
    };
    world.submit(context, descriptor, lists, kick);
}

fn act(world: &Arc<World>, action: &Action) -> Result<(), String> {
    match action {
        Action::Submit {
            context,
            work,
            src,
            dst,
            offset,
            len,
            manner,
            kick,
        } => {
            let descriptor = descriptor(*work, *src, *dst, *offset, *len);
            submit(world, *context, *work, descriptor, *manner, *kick);
        }
        Action::Batch {
            context,
            all,
            quiet,
            kick,
        } => {
            let all: Vec<_> = all
                .iter()
                .map(|(work, src, dst, offset, len)| descriptor(*work, *src, *dst, *offset, *len))
                .collect();
            let flags = if *quiet { flags::QUIET } else { 0 };
            world.submit_batch(*context, &all, flags, *kick);
        }
        Action::Ring(context) => world.ring(*context),
        Action::Engine(steps) => (0..*steps).for_each(|_| world.engine_step()),
        Action::Start(context) => world.start(*context),
        Action::Stop(context) => world.stop(*context),
        Action::Credits(context, credits) => world.change(*context, *credits),
        Action::BusMaster(on) => world.set_bus_master(*on),
        Action::Reset(disable) => world.reset(*disable),
        Action::Take => drop(world.take()),
        Action::Within(after, actions) => {
            let actions = actions.clone();
            let act = move |world: &World| actions.iter().for_each(|a| kernel(world, a));
            *world.within.lock().unwrap() = Some((*after, Box::new(act)));
        }
        Action::Again {
            context,
            work,
            place,
            change,
            manner,
            restart,
            drained,
        } => {
            let again = || {
                let descriptor = descriptor(*work, *place, *place, 8, 64);
                submit(world, *context, *work, descriptor, *manner, true);
                (0..6).for_each(|_| world.engine_step());
            };
            again();
            if *restart {
                world.stop(*context);
            }
            for target in [false, true] {
                world.change_leaf(*context, address(*place, target), *change);
            }
            if *restart {
                world.start(*context);
            } else {
                let (from, to) = (address(*place, false), address(*place, true) + PAGE);
                world.post(Command::Invalidate(Scope::Range(*context, from, to)));
                world.wait(if *drained { 2 } else { 1 }, false);
                (0..4).for_each(|_| world.queue_step());
            }
            again();
        }
        Action::Refuse {
            context,
            place,
            work,
            manner,
            response,
        } => {
            for target in [false, true] {
                let page = page(world, *context, *place, target);
                world.change_leaf(*context, page, Change::Unmap);
                world.post(Command::Invalidate(Scope::Range(
                    *context,
                    page,
                    page + PAGE,
                )));
            }
            let operand = match place {
                Place::Small(_) | Place::Large(_) => *place,
                _ => Place::Small(0),
            };
            let descriptor = descriptor(*work, operand, operand, 8, 64);
            match place {
                Place::Batches => world.submit_batch(*context, &[descriptor; 2], 0, true),
                _ => submit(world, *context, *work, descriptor, *manner, true),
            }
            for _ in 0..3 {
                (0..4).for_each(|_| world.queue_step());
                (0..6).for_each(|_| world.engine_step());
                kernel(world, &Action::Answer(0, *response, false));
            }
        }
        Action::Settle => world.settle()?,
        other => kernel(world, other),
    }
    world.check()
}

/// What the kernel can do at any time, also in the middle of an access.
fn kernel(world: &World, action: &Action) {
    match action {
        Action::Queue(steps) => (0..*steps).for_each(|_| world.queue_step()),
        Action::Change {
            context,
            place,
            change,
            shoot: how,
        } => {
            for target in [false, true] {
                let page = page(world, *context, *place, target);
                world.change_leaf(*context, page, *change);
                shoot(world, Scope::Range(*context, page, page + PAGE), *how);
                if !matches!(place, Place::Small(_) | Place::Large(_)) {
                    break;
                }
            }
        }
        Action::Large {
            context,
            map,
            shoot: how,
        } => {
            world.map_large(*context, *map);
            shoot(
                world,
                Scope::Range(*context, LARGE, LARGE + (2 << 20)),
                *how,
            );
        }
        Action::Split(context) => world.split(*context),
        Action::Invalidate(context, range) => {
            let scope = match range {
                Some((place, pages)) => {
                    let start = page(world, *context, *place, false);
                    Scope::Range(*context, start, start + pages * PAGE)
                }
                None => Scope::Context(*context),
            };
            world.post(Command::Invalidate(scope));
        }
        Action::All => drop(world.post(Command::Invalidate(Scope::All))),
        Action::Wait(level, interrupt) => world.wait(*level, *interrupt),
        Action::Answer(back, response, map) => {
            let requests = world.model().requests.clone();
            let at = requests.len().checked_sub(1 + back % requests.len().max(1));
            let Some(&(context, group)) = at.and_then(|at| requests.get(at)) else {
                return;
            };
            let open = world.model().open_groups();
            let open = open.iter().find(|o| (o.0, o.1) == (context, group));
            if let (Some(&(_, _, page, write)), true) = (open, *map) {
                world.map_for(context, page, write);
            }
            world.respond(context, group, *response);
        }
        _ => {}
    }
}

fn descriptor(work: Work, src: Place, dst: Place, offset: u64, len: u64) -> Descriptor {
    let (mut src, mut dst) = (address(src, false) + offset, address(dst, true) + offset);
    let (mut len, mut arg) = (len, 0x0123_4567_89ab_cdef);
    let opcode = match work {
        Work::Nop | Work::Fence => {
            (src, dst, len, arg) = (0, 0, 0, 0);
            match work {
                Work::Nop => Opcode::Nop as u8,
                _ => Opcode::Fence as u8,
            }
        }
        Work::Bad => 200,
        Work::Copy => Opcode::Copy as u8,
        Work::Fill => Opcode::Fill as u8,
        Work::Crc => {
            arg = 7;
            Opcode::Crc32c as u8
        }
        Work::Compare => Opcode::Compare as u8,
        Work::FetchAdd | Work::CompareSwap => {
            (dst, len) = (dst & !7, 8);
            match work {
                Work::FetchAdd => {
                    src = 0;
                    Opcode::FetchAdd as u8
                }
                _ => Opcode::CompareSwap as u8,
            }
        }
    };
    if matches!(work, Work::Fill) {
        src = 0;
    }
    if matches!(work, Work::Crc) {
        dst = 0;
    }
    if matches!(work, Work::Copy | Work::Compare) {
        arg = 0;
    }
    Descriptor {
        opcode,
        src,
        dst,
        len,
        arg,
        ..Default::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("EXTLB_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(150),
        failure_persistence: None,
        ..Default::default()
    })]

    #[test]
    fn a_device_does_nothing_that_the_model_does_not_allow(
        polls in any::<bool>(),
        tlb in prop_oneof![Just((1, 1)), Just((2, 2)), Just((16, 4))],
        chunk in prop_oneof![Just(4096u32), Just(32768)],
        // A kernel that does not read the ring of page requests until it must.
        lazy in prop::bool::weighted(0.2),
        actions in prop::collection::vec(action(), 1..120),
    ) {
        let world = World::new(if polls { 100 } else { 0 }, |config| {
            (config.tlb.sets, config.tlb.ways) = tlb;
            config.schedule.chunk = chunk;
        });
        for (n, action) in actions.iter().enumerate() {
            if lazy && matches!(action, Action::Take) {
                continue;
            }
            if let Err(why) = act(&world, action) {
                return Err(TestCaseError::fail(format!("action {n}, {action:?}: {why}")));
            }
        }
        if let Err(why) = world.settle() {
            return Err(TestCaseError::fail(format!("at the end: {why}")));
        }
    }
}
