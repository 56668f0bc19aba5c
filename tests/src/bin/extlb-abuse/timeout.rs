//! A device that does not acknowledge: it is fenced off when the administrator's limit is over,
//! everybody who uses it gets an error, and the machine goes on.
//!
//! Needs a device that is broken by a plan, which skips some acknowledgements and then works again,
//! once for each limit. How long the memory manager was held up is measured three times: by the driver
//! (`longest_wait_ns`), by the programs whose calls were held up, and by a process that has nothing
//! to do with the device.

use std::fs;
use std::io::Read;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::proc_fs::counter;
use crate::sys_unsafe::discard;
use crate::unload::unbind_and_bind;
use crate::{Figures, Order, bystander, role};

const PARAMETER: &str = "/sys/module/extlb/parameters/ack_timeout_ms";
/// Limits that an administrator might set, in turn.
const LIMITS_MS: [u64; 3] = [200, 1000, 3000];
/// For the fence, on a machine that is slow, emulated and busy; far below the next limit but one.
const SLACK_MS: u64 = 1500;
/// Programs that use the device.
const VICTIMS: usize = 3;
const BYTES: usize = 256 << 10;

/// Lets the device fail `count` times, with one limit after another.
pub fn run(order: &Order) -> Result<Figures> {
    let before = fs::read_to_string(PARAMETER).context(PARAMETER)?;
    let mut figures = Figures::new();
    for round in 0..order.count {
        let limit = LIMITS_MS[round as usize % LIMITS_MS.len()];
        order.watch.step(&format!("a limit of {limit} ms"));
        set_limit(limit)?;
        let pulse = Pulse::start();
        let called = let_fail()?;
        let stalled = pulse.end();
        ensure!(
            counter("dead")? == 1,
            "an error, but the device is not dead"
        );
        let waited = counter("longest_wait_ns")? / 1_000_000;
        ensure!(
            (limit..limit + SLACK_MS).contains(&waited),
            "somebody waited for the device for {waited} ms; the limit is {limit} ms"
        );
        // Who is not the first to wait waits for less.
        ensure!(
            (limit / 2..limit + SLACK_MS).contains(&called),
            "the longest call took {called} ms; the limit is {limit} ms"
        );
        ensure!(
            stalled < limit + SLACK_MS,
            "the machine stood still for {stalled} ms; the limit is {limit} ms"
        );
        for (name, value) in [("driver", waited), ("call", called), ("machine", stalled)] {
            figures.insert(format!("{name}_ms_of_{limit}"), value);
        }
        order.watch.step("unbind and bind the dead device");
        unbind_and_bind()?;
        let more = recover(order)?;
        *figures.entry("bound_again".to_owned()).or_default() += 1 + more;
    }
    fs::write(PARAMETER, before.trim()).context(PARAMETER)?;
    Ok(figures)
}

fn set_limit(ms: u64) -> Result<()> {
    fs::write(PARAMETER, ms.to_string()).context(PARAMETER)
}

/// Lets programs work until the device fails for all of them; the longest time, in ms, for which a
/// call of theirs was held up.
fn let_fail() -> Result<u64> {
    let victims: Result<Vec<Child>> = (0..VICTIMS).map(|_| role::start(&["victim"])).collect();
    let mut victims = victims?;
    // The device may fail as soon as one of them begins.
    for victim in &mut victims {
        let ready = victim.stdout.as_mut().context("a pipe")?;
        ensure!(ready.read(&mut [0])? == 1, "a victim does not start");
    }
    for victim in &mut victims {
        drop(victim.stdin.take());
    }
    let mut longest = 0;
    for victim in victims {
        let output = victim.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "a victim: {}", output.status);
        longest = longest.max(said.trim().parse().context("a victim's figure")?);
    }
    Ok(longest)
}

/// Binds the driver anew until the device works; how often.
fn recover(order: &Order) -> Result<u64> {
    order.watch.step("the device recovers");
    set_limit(20)?;
    for times in 0..1000 {
        order.watch.alive();
        // To make a context, too, waits for an acknowledgement.
        let worked = bystander::open(false).and_then(|context| bystander::round(&context, times));
        if worked.is_ok() && counter("dead")? == 0 {
            return Ok(times);
        }
        unbind_and_bind()?;
    }
    bail!("the device does not work again")
}

/// Works until the device fails, from when standard input ends; prints the longest time, in ms, for which a call was held up that
/// took memory away.
pub fn victim() -> Result<()> {
    let context = bystander::open(false)?;
    let mut memory = context.allocate(BYTES)?;
    println!();
    std::io::stdin().read_to_end(&mut Vec::new())?;
    let mut longest = Duration::ZERO;
    let work = || -> Result<()> {
        for byte in (1u8..=255).cycle() {
            let filled = context
                .queue()
                .fill(memory, u64::from_ne_bytes([byte; 8]))?;
            ((), memory) = filled.finish()?;
            ensure!(memory.iter().all(|b| *b == byte), "the fill differs");
            let begin = Instant::now();
            discard(&mut memory)?;
            longest = begin.elapsed().max(longest);
            ensure!(memory.iter().all(|b| *b == 0), "not a fresh page");
        }
        Ok(())
    };
    let error = work().err().context("no error")?;
    ensure!(bystander::is_loss(&error), error);
    // What it has besides is its own as ever.
    let mut memory = vec![7u8; BYTES];
    memory.iter_mut().for_each(|b| *b += 1);
    ensure!(memory.iter().all(|b| *b == 8), "memory changes");
    println!("{}", longest.as_millis());
    Ok(())
}

/// A thread that wants a processor now and then, and notes how long it does not get one.
struct Pulse {
    over: Arc<AtomicBool>,
    longest_ms: Arc<AtomicU64>,
}

impl Pulse {
    fn start() -> Self {
        let pulse = Self {
            over: Arc::default(),
            longest_ms: Arc::default(),
        };
        let (over, longest) = (pulse.over.clone(), pulse.longest_ms.clone());
        std::thread::spawn(move || {
            let mut last = Instant::now();
            while !over.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(2));
                let ms = last.elapsed().as_millis() as u64;
                longest.fetch_max(ms, Ordering::AcqRel);
                last = Instant::now();
            }
        });
        pulse
    }

    fn end(self) -> u64 {
        self.over.store(true, Ordering::Release);
        self.longest_ms.load(Ordering::Acquire)
    }
}
