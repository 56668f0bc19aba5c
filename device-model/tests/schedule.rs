//! Contexts share the engine by the work that they make it do: nobody slows another by more than
//! a fair share. Counted in operations and in accesses to memory, which is what time is made of.

mod common;
use common::*;

use std::mem::offset_of;
use std::sync::atomic::Ordering;

use extlb_device::Config;
use extlb_device::config::SchedulePolicy;
use extlb_spec::context::{ContextError, ContextShadow};
use extlb_spec::page_request::{RequestKind, Response};
use extlb_spec::pte::{Pte, bit};
use extlb_spec::work::{Descriptor, Opcode, Segment, Status, flags};
use extlb_spec::{Gpa, Iova, MAX_CONTEXTS, regs};

const SRC: u64 = 0x5555_0000_0000;
const DST: u64 = 0x5555_1000_0000;
const ARRAY: u64 = 0x5555_2000_0000;
const PAGES: u64 = 16;
const RING: u32 = 1 << RING_LOG2;

/// A process that submits without end.
struct Program {
    process: Process,
    submitted: u32,
    next: Box<dyn FnMut(u32) -> Descriptor>,
}

impl Program {
    fn new(process: Process, next: impl FnMut(u32) -> Descriptor + 'static) -> Self {
        Self {
            process,
            submitted: 0,
            next: Box::new(next),
        }
    }

    fn head(&self) -> u32 {
        self.process.word(offset_of!(ContextShadow, head))
    }

    /// Keeps the ring full.
    fn refill(&mut self, guest: &Guest) {
        let mut any = false;
        while self.submitted.wrapping_sub(self.head()) < RING {
            self.process.submit((self.next)(self.submitted));
            self.submitted += 1;
            any = true;
        }
        if any && self.process.word(offset_of!(ContextShadow, need_kick)) != 0 {
            self.process.ring(guest);
        }
    }
}

fn with(policy: SchedulePolicy) -> Config {
    let mut config = config();
    config.schedule.policy = policy;
    config.schedule.quantum = 16 << 10;
    config.schedule.chunk = 16 << 10;
    // The request ring is not emptied by those who never answer.
    config.oracle.enabled = false;
    config
}

fn copier(guest: &Guest, context: u32, len: u64) -> Program {
    let process = guest.process(context);
    process.map_fresh(Iova(SRC), PAGES);
    process.map_fresh(Iova(DST), PAGES);
    Program::new(process, move |_| copy(SRC, DST, len))
}

/// Steps the engine until the first program has had so many operations carried out.
fn until(guest: &Guest, programs: &mut [Program], operations: u32) {
    for _ in 0..100_000 {
        for program in programs.iter_mut() {
            program.refill(guest);
        }
        if programs[0].head() >= operations {
            return;
        }
        guest.device.engine_step();
    }
    panic!("it does not get on: {} operations", programs[0].head());
}

#[test]
fn shares_are_measured_by_work_and_not_by_operations() {
    for (policy, low, high) in [
        // A copy of 64 KiB costs as much as 43 of 64 bytes, each of which is three steps.
        (SchedulePolicy::Fair, 30, 60),
        // Three steps each.
        (SchedulePolicy::RoundRobin, 1, 2),
    ] {
        let guest = Guest::with(with(policy));
        let mut programs = [copier(&guest, 1, 64 << 10), copier(&guest, 2, 64)];
        until(&guest, &mut programs, 100);
        let ratio = programs[1].head() / programs[0].head();
        assert!((low..=high).contains(&ratio), "{policy:?}: {ratio}");
    }
}

#[test]
fn weights_are_shares() {
    let guest = Guest::with(with(SchedulePolicy::Fair));
    let mut programs: Vec<_> = (1..=3).map(|c| copier(&guest, c, 4096)).collect();
    for (program, weight) in programs.iter().zip([0, 4, 64]) {
        program.process.write_entry(&guest, |e| e.weight = weight);
        guest.sync(program.process.context);
    }
    guest.run();
    until(&guest, &mut programs, 200);
    let done: Vec<_> = programs.iter().map(Program::head).collect();
    // 0 is 1. A ring of 16 runs dry in the turn of one who could do more, and it saves nothing up.
    let four = f64::from(done[1]) / f64::from(done[0]);
    assert!((3.0..5.0).contains(&four), "{done:?}");
    assert!(done[2] > done[1], "{done:?}");
}

#[test]
fn all_contexts_at_once_get_the_same() {
    let guest = Guest::with(with(SchedulePolicy::Fair));
    let count = 60;
    let mut programs: Vec<_> = (0..count)
        .map(|c| Program::new(guest.process(c), |_| Descriptor::default()))
        .collect();
    until(&guest, &mut programs, 200);
    let done: Vec<_> = programs.iter().map(Program::head).collect();
    let (least, most) = (done.iter().min().unwrap(), done.iter().max().unwrap());
    assert!(most - least <= 2 * RING, "{done:?}");
}

/// Accesses until a program has had 1000 small copies, beside others.
fn accesses(others: impl Fn(&Guest) -> Vec<Program>) -> u64 {
    let guest = Guest::with(with(SchedulePolicy::Fair));
    let mut programs = vec![copier(&guest, 1, 64)];
    programs.extend(others(&guest));
    let before = guest.memory.accesses.load(Ordering::SeqCst);
    until(&guest, &mut programs, 1000);
    assert_eq!(guest.fatal(), 0);
    guest.memory.accesses.load(Ordering::SeqCst) - before
}

fn array(process: &Process, bytes: &[u8]) {
    let pages = (bytes.len() as u64).div_ceil(PAGE);
    process.map_fresh(Iova(ARRAY), pages);
    for (i, page) in bytes.chunks(PAGE as usize).enumerate() {
        process.poke(Iova(ARRAY + i as u64 * PAGE), page);
    }
}

fn list(segments: Vec<Segment>) -> Vec<u8> {
    segments.iter().flat_map(Segment::to_bytes).collect()
}

/// Programs that mean harm, by name.
fn hostile(name: &str, guest: &Guest, context: u32) -> Program {
    let process = guest.process(context);
    let quiet = |descriptor| Descriptor {
        flags: flags::QUIET,
        ..descriptor
    };
    let (src, dst) = (Iova(SRC), Iova(DST));
    match name {
        "an endless fault" => Program::new(process, |_| copy(SRC, DST, 1 << 30)),
        "a broken page table" => {
            process.set_device(src, Pte(1 << 60 | bit::PRESENT));
            Program::new(process, |_| copy(SRC, SRC, 4096))
        }
        "leaves outside RAM" => {
            process.set_device(src, Pte::leaf(Gpa(1 << 45), true));
            Program::new(process, |_| op(Opcode::Fill, 0, SRC, 1 << 31))
        }
        "an overrun tail" => {
            process.set_tail(1 << 30);
            process.ring(guest);
            guest.run();
            assert_eq!(process.error(), ContextError::RingOverrun as u32);
            Program::new(process, |_| Descriptor::default())
        }
        "garbage" => {
            let mut x = 0x1234_5678_9abc_def1_u64;
            let record = process.record(0).0;
            Program::new(process, move |_| {
                let mut bytes = [0; Descriptor::SIZE];
                for byte in &mut bytes {
                    x ^= x << 13;
                    x ^= x >> 7;
                    x ^= x << 17;
                    *byte = x as u8;
                }
                Descriptor {
                    completion: record,
                    ..Descriptor::from_bytes(&bytes)
                }
            })
        }
        "batches of nothing" => {
            let nop = quiet(Descriptor {
                completion: process.record(0).0,
                ..Default::default()
            });
            array(&process, &nop.to_bytes().repeat(4096));
            Program::new(process, move |_| quiet(op(Opcode::Batch, ARRAY, 0, 4096)))
        }
        "lists of single bytes" => {
            process.map_fresh(src, 1);
            process.map_fresh(dst, 1);
            array(&process, &list(vec![Segment { addr: SRC, len: 1 }; 4096]));
            let both = Descriptor {
                flags: flags::QUIET | flags::SRC_LIST,
                src_segments: 4096,
                ..copy(ARRAY, DST, 4096)
            };
            Program::new(process, move |_| both)
        }
        "lists of nothing" => {
            array(&process, &list(vec![Segment::default(); 4096]));
            let crc = Descriptor {
                flags: flags::QUIET | flags::SRC_LIST,
                src_segments: 4096,
                ..op(Opcode::Crc32c, ARRAY, 0, 0)
            };
            Program::new(process, move |_| crc)
        }
        "words all over the place" => {
            // More pages than the TLB has entries.
            process.map_fresh(dst, 128);
            let add = move |i: u32| Descriptor {
                completion: 0,
                ..op(Opcode::FetchAdd, 0, DST + u64::from(i * 37 % 128) * PAGE, 8)
            };
            Program::new(process, move |i| quiet(add(i)))
        }
        "one long copy backwards" => {
            process.map_fresh(src, 64);
            Program::new(process, |_| copy(SRC, SRC + 8, 63 * PAGE))
        }
        other => unreachable!("{other}"),
    }
}

#[test]
fn a_hostile_program_takes_no_more_than_its_share() {
    let alone = accesses(|_| Vec::new());
    for name in [
        "an endless fault",
        "a broken page table",
        "leaves outside RAM",
        "an overrun tail",
        "garbage",
        "batches of nothing",
        "lists of single bytes",
        "lists of nothing",
        "words all over the place",
        "one long copy backwards",
    ] {
        let beside = accesses(|guest| vec![hostile(name, guest, 2)]);
        // Half of the engine, give or take what accesses differ in price.
        assert!(beside <= alone * 3, "{name}: {beside}, alone {alone}");
        let stops = ["an endless fault", "an overrun tail"].contains(&name);
        assert!(
            !stops || beside < alone * 11 / 10,
            "{name}: {beside}, alone {alone}"
        );
    }
}

/// Bytes of each operation of those who mean no harm.
const BYTES: u32 = 1024;

/// Steps the engine, with a kernel that answers each request and maps nothing.
fn step_and_answer(guest: &Guest) {
    guest.device.engine_step();
    while let Some(request) = guest.take_request() {
        if request.kind == RequestKind::Page as u32 {
            guest.respond(&request, Response::Success);
        }
    }
    while guest.commands_ahead() > 0 {
        guest.device.invalidation_step();
    }
}

/// Accesses that an operation takes when nobody else is there.
fn price(config: &Config) -> f64 {
    let guest = Guest::with(config.clone());
    let mut programs = [copier(&guest, 1, BYTES.into())];
    until(&guest, &mut programs, 16);
    let (accesses, from) = (&guest.memory.accesses, programs[0].head());
    let before = accesses.load(Ordering::SeqCst);
    until(&guest, &mut programs, 1000);
    let made = accesses.load(Ordering::SeqCst) - before;
    made as f64 / f64::from(programs[0].head() - from)
}

/// All contexts that there can be, of several weights, with three among them that mean harm: the
/// others get their shares, counted in what they could have done alone, and finish.
#[test]
fn all_contexts_at_once_beside_hostile_ones_get_their_shares() {
    let mut config = with(SchedulePolicy::Fair);
    // Room for the pages of all, so that it is turns that they compete for.
    config.tlb.sets = 1024;
    let price = price(&config);
    let guest = Guest::with(config);
    guest.set(regs::CTRL, 0);
    guest.set(regs::CTX_COUNT, MAX_CONTEXTS.into());
    guest.enable_as_is();
    let weight = |context: u32| [1, 1, 2, 3][context as usize % 4];
    let bad = [
        (0, "an endless fault"),
        (100, "a broken page table"),
        (255, "garbage"),
    ];
    let is_bad = |context: u32| bad.iter().any(|(c, _)| *c == context);
    let mut hostile: Vec<_> = bad.map(|(c, name)| hostile(name, &guest, c)).into();
    let good = (0..MAX_CONTEXTS).filter(|c| !is_bad(*c));
    let mut programs: Vec<_> = good
        .map(|context| {
            let process = guest.process(context);
            process.map_fresh(Iova(SRC), 1);
            process.map_fresh(Iova(DST), 1);
            Program::new(process, |_| copy(SRC, DST, BYTES.into()))
        })
        .collect();
    for program in programs.iter().chain(&hostile) {
        let context = program.process.context;
        program
            .process
            .write_entry(&guest, |e| e.weight = weight(context));
        guest.sync(context);
        guest.run();
    }
    let mut rounds = |programs: &mut [Program], steps: u32| {
        for _ in 0..steps {
            let all = programs.iter_mut().chain(&mut hostile);
            all.for_each(|program| program.refill(&guest));
            step_and_answer(&guest);
        }
    };
    // Until all that is used has been used once.
    rounds(&mut programs, 2 * MAX_CONTEXTS);
    let heads = |programs: &[Program]| programs.iter().map(Program::head).collect::<Vec<_>>();
    let (from, before) = (
        heads(&programs),
        guest.memory.accesses.load(Ordering::SeqCst),
    );
    rounds(&mut programs, 20 * MAX_CONTEXTS);
    let time = guest.memory.accesses.load(Ordering::SeqCst) - before;
    // As many operations one context could have had in this time, with the engine to itself.
    let alone = time as f64 / price;
    let all: u32 = (0..MAX_CONTEXTS).map(weight).sum();
    for ((program, from), head) in programs.iter().zip(from).zip(heads(&programs)) {
        let context = program.process.context;
        let share = f64::from(weight(context)) / f64::from(all);
        let part = f64::from(head - from) / alone / share;
        assert!(part > 0.95, "context {context}: {part} of its share");
    }
    // What is submitted gets done, while those who mean harm go on.
    let harm = |guest: &Guest| [regs::PAGE_REQUESTS, regs::OPS_FAULTED].map(|r| guest.get(r));
    let harm_before = harm(&guest);
    let submitted: Vec<_> = programs.iter().map(|p| p.submitted).collect();
    rounds(&mut [], 20 * MAX_CONTEXTS);
    assert_eq!(heads(&programs), submitted);
    let more = harm(&guest).into_iter().zip(harm_before);
    assert!(more.into_iter().all(|(after, before)| after > before + 20));
    for program in &programs {
        let last = program.process.status(u64::from(program.submitted) - 1);
        assert_eq!(last, Some(Status::Success));
    }
    assert_eq!(guest.fatal(), 0);
}

#[test]
fn a_doorbell_rung_without_end_costs_a_turn_each_time() {
    let alone = accesses(|_| Vec::new());
    let guest = Guest::with(with(SchedulePolicy::Fair));
    let mut programs = [copier(&guest, 1, 64)];
    let noisy = guest.process(2);
    let before = guest.memory.accesses.load(Ordering::SeqCst);
    for _ in 0..100_000 {
        programs[0].refill(&guest);
        for _ in 0..10 {
            noisy.ring(&guest);
        }
        if programs[0].head() >= 1000 {
            break;
        }
        guest.device.engine_step();
    }
    let beside = guest.memory.accesses.load(Ordering::SeqCst) - before;
    assert!(beside <= alone * 3 / 2, "{beside}, alone {alone}");
    assert_eq!(guest.get(regs::OPS_FAULTED), 0);
}

#[test]
fn a_context_that_pauses_saves_nothing_up_and_owes_what_it_overdrew() {
    // The short one submits one operation now and then; when it does, it does not get more at
    // once than a turn.
    let guest = Guest::with(with(SchedulePolicy::Fair));
    let mut programs = vec![copier(&guest, 1, 4096)];
    let rare = copier(&guest, 2, 64 << 10);
    until(&guest, &mut programs, 500);
    for _ in 0..8 {
        rare.process.submit(copy(SRC, DST, 64 << 10));
    }
    rare.process.ring(&guest);
    let before = programs[0].head();
    let mut waited = 0;
    for _ in 0..1000 {
        programs[0].refill(&guest);
        if rare.head() > 0 {
            break;
        }
        guest.device.engine_step();
        waited = programs[0].head() - before;
    }
    // The first 64 KiB take some 4 turns, in which the other has had as many.
    assert!((8..=40).contains(&waited), "{waited}");
}
