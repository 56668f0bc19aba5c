//! Hostile calls on the device node, by a program without any privilege: each must get an answer,
//! and none may hurt the driver or anybody else.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};

use crate::bystander;
use crate::fuzz_calls::{Answers, COUNTED, Caller};
use crate::proc_fs::counter;
use crate::sys_unsafe::{ARGUMENT_BYTES, ARGUMENTS, memory_file, reserve};
use crate::{Figures, Order, role};

/// The user and group `nobody`.
pub const NOBODY: u32 = 65534;
/// Calls that are made twice, to see that the seed decides.
const REPEATED: u64 = 1000;
/// Calls between two signs of life.
const SIGN: u64 = 500;

/// Makes `count` calls, and sees that the driver answers and works as before.
pub fn run(order: &Order) -> Result<Figures> {
    let repeated = order.count.min(REPEATED);
    let first = calls(order, order.seed, repeated, 1)?;
    let again = calls(order, order.seed, repeated, 1)?;
    ensure!(
        first["digest"] == again["digest"],
        "the seed does not decide which calls are made"
    );
    let other = calls(order, order.seed + 1, repeated, 1)?;
    ensure!(
        first["digest"] != other["digest"],
        "the seed does not change the calls"
    );

    // The bystander's operations all succeed: these are the fuzzer's.
    let faulted = counter("ops_faulted")?;
    let mut figures = calls(order, order.seed, order.count, 1)?;
    let faulted = counter("ops_faulted")? - faulted;
    figures.insert("operations_faulted".to_owned(), faulted);
    ensure!(
        order.count < 10_000 || faulted > 0,
        "the device did not work for the fuzzer"
    );
    if order.threads > 1 {
        let more = calls(order, order.seed, order.count, order.threads)?;
        figures.extend(
            more.into_iter()
                .map(|(name, value)| (format!("{name}_threads"), value)),
        );
    }
    // A fuzzer that is refused at the door tests nothing.
    for name in COUNTED {
        let done = figures[&format!("{name}_done")];
        let enough = order.count < 10_000 || name == "wrong" || done > 0;
        ensure!(enough, "no call of kind {name} got through");
    }
    ensure!(figures["dead"] == 0, "the driver gave the device up");
    bystander::round(&bystander::open(false)?, order.seed).context("after the hostile calls")?;
    Ok(figures)
}

/// Lets a process without privileges make them.
fn calls(order: &Order, seed: u64, count: u64, threads: u32) -> Result<Figures> {
    let words = [seed.to_string(), count.to_string(), threads.to_string()];
    let mut command = role::command(&["fuzz", &words[0], &words[1], &words[2]]);
    let mut child = command
        .uid(NOBODY)
        .gid(NOBODY)
        .spawn()
        .context("start the fuzzer")?;
    let stdout = BufReader::new(child.stdout.take().context("a pipe")?);
    let mut figures = None;
    for line in stdout.lines() {
        let line = line?;
        order.watch.alive();
        if line.starts_with('{') {
            figures = Some(serde_json::from_str(&line)?);
        }
    }
    let status = child.wait()?;
    ensure!(
        status.success(),
        "the fuzzer ended with {status}: seed {seed}, {threads} threads"
    );
    figures.context("the fuzzer ended without a word")
}

/// Makes the calls; what they were answered, as JSON.
pub fn play(seed: u64, count: u64, threads: u64) -> Result<()> {
    let (_, most) = nix::sys::resource::getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most.min(1024), most)?;
    reserve()?;
    let mut callers = Vec::new();
    for thread in 0..=threads {
        let mut caller = Caller::new(seed, thread, memory_file()?);
        caller.map_arguments(ARGUMENTS + thread * ARGUMENT_BYTES);
        callers.push(caller);
    }
    let mut changer = callers.pop().context("a caller")?;
    callers[0].map_arena();
    let (over, made) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        if threads > 1 {
            let over = &over;
            scope.spawn(move || {
                while !over.load(Ordering::Acquire) {
                    changer.change_arguments(threads);
                    std::thread::yield_now();
                }
            });
        }
        let callers: Vec<_> = callers
            .iter_mut()
            .map(|caller| scope.spawn(|| make(caller, count / threads, &made)))
            .collect();
        let ended: Result<Vec<()>> = callers
            .into_iter()
            .map(|caller| match caller.join() {
                Ok(()) => Ok(()),
                Err(_) => bail!("a thread panicked"),
            })
            .collect();
        over.store(true, Ordering::Release);
        ended
    })?;
    let mut figures = Figures::new();
    for caller in &callers {
        add(&mut figures, &caller.answers);
    }
    println!("{}", serde_json::to_string(&figures)?);
    Ok(())
}

fn make(caller: &mut Caller, count: u64, made: &AtomicU64) {
    for _ in 0..count {
        caller.step();
        let made = made.fetch_add(1, Ordering::Relaxed);
        if made.is_multiple_of(SIGN) {
            println!("{made}");
        }
    }
}

fn add(figures: &mut Figures, answers: &Answers) {
    let mut more = |name: String, value: u64| *figures.entry(name).or_default() += value;
    for (kind, name) in COUNTED.iter().enumerate() {
        more(format!("{name}_done"), answers.done[kind]);
        more(format!("{name}_refused"), answers.refused[kind]);
    }
    for (errno, count) in answers
        .errnos
        .iter()
        .enumerate()
        .filter(|(_, count)| **count > 0)
    {
        more(format!("{:?}", Errno::from_raw(errno as i32)), *count);
    }
    more("dead".to_owned(), answers.dead);
    let digest = figures.entry("digest".to_owned()).or_default();
    *digest = digest.wrapping_add(answers.digest);
}
