//! Memory that two processes share: the device writes it for the one and reads it for the other,
//! and when its pages go, they go for both.

use std::fs::{File, OpenOptions, remove_file};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::Child;

use anyhow::{Context as _, Result, bail, ensure};
use extlb_driver::{Context, Iova, Kernel};
use extlb_spec::work::{Completion, Descriptor, Opcode, Status};
use nix::libc;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use crate::raw_context::READ_WRITE;
use crate::sys_unsafe::{ARENA, FILES, call, open_at, reserve, submit};
use crate::{Figures, Order, bystander, role};

const PATH: &str = "/dev/shm/extlb-abuse";
const BYTES: u64 = 256 << 10;
/// Operations of each process while the file is cut and grows.
const CHURN: u64 = 60;

/// Changes the memory `count` times, in each way, and lets both processes look.
pub fn run(order: &Order) -> Result<Figures> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(PATH);
    let file = file.context(PATH)?;
    file.set_len(BYTES)?;
    let outcome = share(order, &file);
    remove_file(PATH)?;
    outcome
}

fn share(order: &Order, file: &File) -> Result<Figures> {
    let mut rng = Pcg64::seed_from_u64(order.seed);
    let mut sharers = [Sharer::start()?, Sharer::start()?];
    let mut bytes = vec![0; BYTES as usize];
    let (mut sums, mut faults) = (0u64, 0u64);
    for round in 0..order.count {
        order.watch.step("both see what was written");
        let pattern: u64 = rng.random();
        let words = bytes.chunks_exact_mut(8);
        match round % 4 {
            // By the device, for the one or for the other.
            by @ (0 | 1) => {
                words.for_each(|word| word.copy_from_slice(&pattern.to_ne_bytes()));
                sharers[by as usize].ask(&format!("fill {pattern}"))?;
                ensure!(sharers[by as usize].answer()? == 0, "a fill faults");
            }
            // By a processor, in the same pages.
            2 => {
                rng.fill(&mut bytes[..]);
                file.write_all_at(&bytes, 0)?;
            }
            // Other pages, that are zero.
            _ => {
                words.for_each(|word| word.fill(0));
                file.set_len(0)?;
                file.set_len(BYTES)?;
            }
        }
        let wanted = u64::from(crc32c::crc32c(&bytes));
        for sharer in &mut sharers {
            sharer.ask("sum")?;
        }
        for sharer in &mut sharers {
            let found = sharer.answer()?;
            ensure!(
                found == wanted,
                "the device finds CRC32C {found:08x}, not {wanted:08x}, in way {}",
                round % 4
            );
            sums += 1;
        }
        let mut found = vec![0; bytes.len()];
        file.read_exact_at(&mut found, 0)?;
        ensure!(found == bytes, "the file has something else");
        if round % 8 == 7 {
            order.watch.step("the file is cut while both use it");
            faults += churn(&mut rng, file, &mut sharers)?;
        }
    }
    for sharer in sharers {
        sharer.end()?;
    }
    Ok(Figures::from([
        ("sums".to_owned(), sums),
        ("faults".to_owned(), faults),
    ]))
}

/// Cuts and extends the file while both work on it; how many operations faulted.
fn churn(rng: &mut Pcg64, file: &File, sharers: &mut [Sharer; 2]) -> Result<u64> {
    for sharer in &mut *sharers {
        sharer.ask("churn")?;
    }
    for _ in 0..100 {
        file.set_len(rng.random_range(0..BYTES))?;
        std::thread::yield_now();
        file.set_len(BYTES)?;
    }
    let mut faults = 0;
    for sharer in &mut *sharers {
        faults += sharer.answer()?;
    }
    // Whether the device came to an end of the file meanwhile is chance; here there is nothing else.
    file.set_len(0)?;
    for sharer in &mut *sharers {
        sharer.ask("fault")?;
        faults += sharer.answer()?;
    }
    file.set_len(BYTES)?;
    Ok(faults)
}

/// A process that shares the memory and does as it is told.
struct Sharer {
    child: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Sharer {
    fn start() -> Result<Self> {
        let mut child = role::start(&["share"])?;
        let answers = BufReader::new(child.stdout.take().context("a pipe")?);
        Ok(Self { child, answers })
    }

    fn ask(&mut self, what: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("a pipe")?;
        Ok(writeln!(stdin, "{what}")?)
    }

    fn answer(&mut self) -> Result<u64> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        line.trim()
            .parse()
            .context("a sharer does not answer any more")
    }

    fn end(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait()?;
        ensure!(status.success(), "a sharer: {status}");
        Ok(())
    }
}

/// Shares the memory, and does as it is told until standard input ends.
pub fn play() -> Result<()> {
    reserve()?;
    let path = std::ffi::CString::new(PATH)?;
    let file = open_at(&path, libc::O_RDWR, FILES)?;
    let flags = (libc::MAP_FIXED | libc::MAP_SHARED) as u64;
    call(libc::SYS_mmap, [ARENA, BYTES, READ_WRITE, flags, file, 0]).context("mmap")?;
    let context = bystander::open(false)?;
    let _registration = context.register_addresses(Iova(ARENA)..Iova(ARENA + BYTES))?;
    for line in std::io::stdin().lines() {
        let line = line?;
        let answer = match *line.split(' ').collect::<Vec<_>>() {
            ["sum"] => success(&sum(&context)?)?.result,
            ["fill", pattern] => {
                success(&fill(&context, pattern.parse()?)?)?;
                0
            }
            ["fault"] => {
                let done = sum(&context)?;
                let fault = done.status == Status::PageFault as u32;
                ensure!(fault, "beyond the end of the file: {done:?}");
                1
            }
            ["churn"] => {
                let mut faults = 0;
                for i in 0..CHURN {
                    let done = match i % 3 {
                        0 => fill(&context, i)?,
                        _ => sum(&context)?,
                    };
                    let fault = done.status == Status::PageFault as u32;
                    ensure!(fault || success(&done).is_ok(), "{done:?}");
                    faults += u64::from(fault);
                }
                faults
            }
            _ => bail!("asked for {line:?}"),
        };
        println!("{answer}");
    }
    Ok(())
}

fn sum(context: &Context<Kernel>) -> Result<Completion> {
    let descriptor = Descriptor {
        opcode: Opcode::Crc32c as u8,
        src: ARENA,
        len: BYTES,
        ..Descriptor::default()
    };
    Ok(submit(context.queue(), descriptor)?.finish()?.0)
}

fn fill(context: &Context<Kernel>, pattern: u64) -> Result<Completion> {
    let descriptor = Descriptor {
        opcode: Opcode::Fill as u8,
        dst: ARENA,
        len: BYTES,
        arg: pattern,
        ..Descriptor::default()
    };
    Ok(submit(context.queue(), descriptor)?.finish()?.0)
}

fn success(done: &Completion) -> Result<&Completion> {
    ensure!(done.status == Status::Success as u32, "{done:?}");
    Ok(done)
}
