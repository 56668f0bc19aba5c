//! How much a program gets beside others: `cargo run --release -p extlb-device --example fairness`.
//!
//! One engine, stepped by this thread; the program makes 64-byte copies without end, and what is
//! counted is how many of them are done in a second of the engine's time.

#[path = "../benches/rig/mod.rs"]
mod rig;

use std::time::Duration;

use extlb_spec::pte::{Pte, bit};
use extlb_spec::work::{Descriptor, Opcode, Segment, flags};
use extlb_spec::{Gpa, Iova, PAGE_SIZE};
use rig::{Program, RING, Rig, config, timed};

const SRC: u64 = 0x1000_0000_0000;
const DST: u64 = 0x2000_0000_0000;
const ARRAY: u64 = 0x3000_0000_0000;
const PAGES: u64 = 64;
const MEASURE: Duration = Duration::from_millis(500);

type Next = Box<dyn Fn(u32) -> Descriptor>;

fn op(opcode: Opcode, src: u64, dst: u64, len: u64) -> Descriptor {
    Descriptor {
        opcode: opcode as u8,
        src,
        dst,
        len,
        ..Default::default()
    }
}

fn quiet(flags: u8, descriptor: Descriptor) -> Descriptor {
    Descriptor {
        flags: flags | extlb_spec::work::flags::QUIET,
        ..descriptor
    }
}

fn map(rig: &mut Rig, program: &Program, iova: u64, pages: u64) -> Gpa {
    let at = rig.pages(pages * PAGE_SIZE, PAGE_SIZE);
    for offset in (0..pages).map(|i| i * PAGE_SIZE) {
        rig.map(program, iova + offset, Gpa(at.0 + offset), 1);
    }
    at
}

/// A program of small copies.
fn copier(rig: &mut Rig, number: u32) -> (Program, Next) {
    let program = rig.program(number);
    map(rig, &program, SRC, PAGES);
    map(rig, &program, DST, PAGES);
    let at = |i: u32| u64::from(i) * 4032 % (PAGES * PAGE_SIZE - 64);
    let next = move |i| op(Opcode::Copy, SRC + at(i), DST + at(i) / 64 * 64, 64);
    (program, Box::new(next))
}

fn hostile(rig: &mut Rig, name: &str) -> (Program, Next) {
    let program = rig.program(1);
    let array = |rig: &mut Rig, bytes: &[u8]| {
        let pages = (bytes.len() as u64).div_ceil(PAGE_SIZE);
        let at = map(rig, &program, ARRAY, pages);
        extlb_device::ports::Dma::write(&rig.ram, at, bytes).expect("RAM");
    };
    let list = |segment: Segment| segment.to_bytes().repeat(4096);
    let next: Next = match name {
        "an endless fault" => Box::new(|_| op(Opcode::Copy, SRC, DST, 1 << 31)),
        "a broken page table" => {
            let page = rig.page();
            rig.map(&program, SRC, page, 1);
            rig.spoil(&program, Iova(SRC), Pte(1 << 60 | bit::PRESENT));
            Box::new(|_| op(Opcode::Copy, SRC, SRC, 4096))
        }
        "garbage" => Box::new(|i| Descriptor {
            opcode: (i % 251) as u8 | 128,
            src: u64::from(i).wrapping_mul(0x9e37_79b9_7f4a_7c15),
            ..Default::default()
        }),
        "batches of nothing" => {
            let nop = quiet(
                0,
                Descriptor {
                    completion: ARRAY,
                    ..Default::default()
                },
            );
            array(rig, &nop.to_bytes().repeat(4096));
            Box::new(|_| quiet(0, op(Opcode::Batch, ARRAY, 0, 4096)))
        }
        "lists of single bytes" => {
            map(rig, &program, SRC, 1);
            map(rig, &program, DST, 1);
            array(rig, &list(Segment { addr: SRC, len: 1 }));
            Box::new(|_| Descriptor {
                src_segments: 4096,
                ..quiet(flags::SRC_LIST, op(Opcode::Copy, ARRAY, DST, 4096))
            })
        }
        "lists of nothing" => {
            array(rig, &list(Segment::default()));
            Box::new(|_| Descriptor {
                src_segments: 4096,
                ..quiet(flags::SRC_LIST, op(Opcode::Crc32c, ARRAY, 0, 0))
            })
        }
        "words all over the place" => {
            map(rig, &program, DST, 8192);
            Box::new(|i| {
                let page = u64::from(i.wrapping_mul(4099) % 8192);
                quiet(0, op(Opcode::FetchAdd, 0, DST + page * PAGE_SIZE, 8))
            })
        }
        "copies of 32 MiB" => {
            map(rig, &program, SRC, 8192);
            map(rig, &program, DST, 8192);
            Box::new(|_| op(Opcode::Copy, SRC, DST, 32 << 20))
        }
        other => unreachable!("{other}"),
    };
    (program, next)
}

/// A program of copies of 2 MiB, by large leaves.
fn mover(rig: &mut Rig, number: u32) -> (Program, Next) {
    const SIZE: u64 = 2 << 20;
    let program = rig.program(number);
    for start in [SRC, DST] {
        let at = rig.pages(16 * SIZE, SIZE);
        for offset in (0..16).map(|i| i * SIZE) {
            rig.map(&program, start + offset, Gpa(at.0 + offset), 2);
        }
    }
    let next = |i| {
        let offset = u64::from(i) % 16 * SIZE;
        op(Opcode::Copy, SRC + offset, DST + offset, SIZE)
    };
    (program, Box::new(next))
}

/// Operations a second of a program beside others.
fn rate(
    first: impl FnOnce(&mut Rig, u32) -> (Program, Next),
    others: impl FnOnce(&mut Rig) -> Vec<(Program, Next)>,
) -> f64 {
    let mut config = config();
    // Room for the pages of all, so that it is time that they compete for.
    config.tlb.sets = 1024;
    let mut rig = Rig::new(config, 512 << 20);
    let mut programs = vec![first(&mut rig, 0)];
    programs.extend(others(&mut rig));
    let mut time = Duration::ZERO;
    while time < MEASURE {
        for (program, next) in &mut programs {
            if program.submitted.wrapping_sub(rig.head(program)) < RING / 2 {
                rig.refill(program, &*next);
            }
        }
        time += timed(|| {
            for _ in 0..programs.len() * 4 {
                rig.device.engine_step();
            }
        });
    }
    f64::from(rig.head(&programs[0].0)) / time.as_secs_f64()
}

fn main() {
    let alone = rate(copier, |_| Vec::new());
    println!("alone                              {alone:>10.0} /s");
    let show = |name: &str, rate: f64| {
        println!("beside {name:<27} {rate:>10.0} /s  {:.3}", rate / alone);
    };
    let idle = rate(copier, |rig| {
        let idle = |number| {
            let mut program = rig.program(number);
            rig.submit(&mut program, 1, |_| Descriptor::default());
            program
        };
        let programs: Vec<_> = (1..256).map(idle).collect();
        for program in &programs {
            rig.finish(program);
        }
        Vec::new()
    });
    show("255 idle ones", idle);
    let busy = rate(copier, |rig| {
        (1..16).map(|number| copier(rig, number)).collect()
    });
    show("15 like it", busy);
    for name in [
        "an endless fault",
        "a broken page table",
        "garbage",
        "batches of nothing",
        "lists of single bytes",
        "lists of nothing",
        "words all over the place",
        "copies of 32 MiB",
    ] {
        show(name, rate(copier, |rig| vec![hostile(rig, name)]));
    }
    let alone = rate(mover, |_| Vec::new());
    println!("2 MiB at once, alone               {alone:>10.0} /s");
    for (name, beside) in [
        ("small copies", copier as fn(&mut Rig, u32) -> _),
        ("words all over the place", |rig: &mut Rig, _| {
            hostile(rig, "words all over the place")
        }),
    ] {
        let rate = rate(mover, |rig| vec![beside(rig, 1)]);
        println!("beside {name:<27} {rate:>10.0} /s  {:.3}", rate / alone);
    }
}
