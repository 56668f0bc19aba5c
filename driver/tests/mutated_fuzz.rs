//! The driver in user space at work, over a device whose answers are mutated at random.
//!
//! Whatever the device says: every call ends, with a value or an error with a name, nobody panics,
//! no memory is touched that is none of the operation's, none is freed while the device has it, and
//! an honest device works again after a restart.
//!
//! A failed case says its seed; `EXTLB_FUZZ_SEED=… cargo test -p extlb-driver --test mutated_fuzz`
//! runs it alone. `EXTLB_FUZZ_CASES=…` runs as many, from `EXTLB_FUZZ_FROM` on.

#[path = "mutated/rig.rs"]
mod rig;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use extlb_driver::hardware::{Faults, Lie, mix};
use extlb_driver::{Context, Device, Error, Operation, Pending, Result, SliceMut};
use rig::{Liar, basics, context, recover, start};

const CASES: u64 = 100;
/// Cases that run at once: most of the time they wait.
const THREADS: u64 = 4;
/// Longer than any case takes.
const LIMIT: Duration = Duration::from_secs(30);
/// How long an operation may take before the program restarts the device.
const SLICE: Duration = Duration::from_millis(15);

/// Reproducible choices.
struct Choices(u64);

impl Choices {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = mix(self.0);
        self.0 % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What a case has found.
#[derive(Default)]
struct Found {
    /// By name.
    errors: BTreeMap<String, u64>,
    values: u64,
    restarts: u64,
}

impl Found {
    /// An error that is the device's doing has its name; one that is the program's does not come.
    fn error(&mut self, error: &Error) {
        let own = matches!(
            error,
            Error::Open { .. }
                | Error::Version { .. }
                | Error::Argument(_)
                | Error::Unsupported(_)
                | Error::Lengths { .. }
                | Error::TooLong { .. }
                | Error::Foreign { .. }
                | Error::Overlap { .. }
        );
        assert!(
            !own,
            "an error that names no fault of the device: {error:?}"
        );
        let text = format!("{error:?}");
        let words = text.split(|c: char| !c.is_alphabetic()).take(2);
        let names = words.filter(|word| word.starts_with(char::is_uppercase));
        let name = names.collect::<Vec<_>>().join(" ");
        *self.errors.entry(name).or_default() += 1;
    }

    fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => {
                self.values += 1;
                Some(value)
            }
            Err(error) => {
                self.error(&error);
                None
            }
        }
    }
}

/// Buffers whose edges the device has no business with.
struct Framed {
    before: SliceMut<Liar>,
    after: SliceMut<Liar>,
}

const EDGE: usize = 4096 + 64;
const CANARY: u8 = 0xa5;

fn framed(context: &Context<Liar>, len: usize) -> Result<(Framed, SliceMut<Liar>)> {
    let mut all = context.allocate(len + 2 * EDGE)?;
    all.fill(CANARY);
    let (before, rest) = all.split_at(EDGE);
    let (middle, after) = rest.split_at(len);
    Ok((Framed { before, after }, middle))
}

impl Framed {
    fn check(&self) {
        for edge in [&self.before, &self.after] {
            assert!(
                edge.iter().all(|byte| *byte == CANARY),
                "memory beside an operand was written to"
            );
        }
    }
}

struct Case {
    device: Device<Liar>,
    faults: Arc<Faults>,
    choices: Choices,
    found: Found,
}

impl Case {
    /// Waits as a program does that has no time: what does not end is ended by a restart.
    fn end<O: Operation, T>(&mut self, pending: Pending<Liar, O, T>) -> Option<(O::Output, T)> {
        for _ in 0..4 {
            match pending.wait_for(SLICE) {
                Ok(false) => {}
                Ok(true) => {
                    let finished = pending.finish();
                    return self.found.note(finished);
                }
                Err(error) => {
                    self.found.error(&error);
                    return None;
                }
            }
        }
        self.restart();
        // Done meanwhile, or dead.
        let finished = pending.finish();
        self.found.note(finished)
    }

    fn restart(&mut self) {
        self.found.restarts += 1;
        let restarted = self.device.backing().restart();
        self.found.note(restarted);
    }

    /// A lie after which a completion may come before its data.
    fn is_early(&self) -> bool {
        [Lie::RecordNext, Lie::RecordTwice]
            .iter()
            .any(|lie| self.faults.told(*lie) > 0)
    }

    fn operate(&mut self, context: &Context<Liar>) -> Result<()> {
        let queue = context.queue();
        let len = 1 + self.choices.below(40_000) as usize;
        let (frames, dst) = framed(context, len)?;
        let (source_frames, mut src) = framed(context, len)?;
        let seed = self.choices.below(251);
        src.iter_mut()
            .zip(seed..)
            .for_each(|(byte, n)| *byte = n as u8);
        match self.choices.below(6) {
            0 | 1 => {
                let pending = queue.try_submit().copy(src, dst)?;
                if let Some(((), (src, dst))) = self.end(pending) {
                    assert!(self.is_early() || src[..] == dst[..], "a copy that is none");
                }
            }
            2 => {
                let pending = queue.try_submit().fill(dst, 0x0202_0202_0202_0202)?;
                if let Some(((), dst)) = self.end(pending) {
                    let filled = dst.iter().all(|byte| *byte == 2);
                    assert!(self.is_early() || filled, "a fill that is none");
                }
            }
            3 => {
                // What it finds out may be a lie.
                let pending = queue.try_submit().crc32c(src, 0)?;
                self.end(pending);
            }
            4 => {
                let pending = queue.try_submit().compare(src, dst)?;
                self.end(pending);
            }
            _ => {
                // Nobody waits for this one.
                drop(queue.try_submit().copy(src, dst)?);
            }
        }
        frames.check();
        source_frames.check();
        Ok(())
    }

    fn batch(&mut self, context: &Context<Liar>) -> Result<()> {
        let batch = context.queue().try_submit();
        let mut pending = Vec::new();
        for _ in 0..self.choices.below(20) {
            match batch.nop() {
                Ok(nop) => pending.push(nop),
                Err(Error::RingFull) => break,
                Err(error) => return Err(error),
            }
        }
        for nop in pending {
            self.end(nop);
        }
        Ok(())
    }

    fn take_back(&mut self, context: &Context<Liar>) -> Result<()> {
        let len = [4096, 100_000, 3 << 20][self.choices.below(3) as usize];
        let mut slice = context.allocate(len)?;
        slice[len - 1] = CANARY;
        if let Ok(mapping) = slice.unregister()? {
            let slice = context.register(mapping)?;
            assert_eq!(slice[len - 1], CANARY, "memory that came back is as it was");
        }
        Ok(())
    }

    fn step(&mut self, contexts: &mut Vec<Context<Liar>>) {
        let which = self.choices.below(contexts.len().max(1) as u64) as usize;
        let what = self.choices.below(20);
        let Some(at_work) = contexts.get(which) else {
            let made = context(&self.device);
            contexts.extend(self.found.note(made));
            return;
        };
        let result = match what {
            0..8 => self.operate(at_work),
            8..11 => self.batch(at_work),
            11..15 => self.take_back(at_work),
            15 => at_work.stats().map(drop),
            16 => context(&self.device).map(|context| contexts.push(context)),
            17 => {
                drop(contexts.swap_remove(which));
                Ok(())
            }
            18 if self.choices.one_in(3) => {
                self.restart();
                Ok(())
            }
            _ => Ok(()),
        };
        self.found.note(result);
        // Who has a dead context makes another.
        contexts.retain(|context| context.stats().is_ok() || self.choices.one_in(4));
    }
}

fn tell(faults: &Faults, choices: &mut Choices) {
    // Few kinds at a time: with all, nothing gets anywhere.
    for _ in 0..1 + choices.below(3) {
        let lie = Lie::ALL[choices.below(Lie::ALL.len() as u64) as usize];
        let one_in = [1, 2, 5, 20, 100][choices.below(5) as usize];
        let times = [1, 3, u64::MAX][choices.below(3) as usize];
        faults.tell(lie, one_in, times);
    }
}

fn case(seed: u64) -> (Found, Vec<(Lie, u64)>) {
    let mut choices = Choices(mix(seed));
    let faults = Faults::new(seed);
    let mut found = Found::default();
    if choices.one_in(4) {
        tell(&faults, &mut choices);
    }
    let device = loop {
        match start(&faults) {
            Ok(device) => break device,
            Err(error) => {
                found.error(&error);
                faults.stop();
            }
        }
    };
    let mut case = Case {
        device,
        faults: faults.clone(),
        choices,
        found,
    };
    let mut contexts = Vec::new();
    case.step(&mut contexts);
    tell(&faults, &mut case.choices);
    for _ in 0..4 + case.choices.below(12) {
        case.step(&mut contexts);
    }
    if case.choices.one_in(2) {
        contexts.clear();
    }
    recover(&case.device, &faults).expect("an honest device works after a restart");
    // The contexts of before are dead, and end without harm beside those of now.
    drop(contexts);
    basics(&case.device).expect("an honest device goes on");
    // Whether bus addresses are free is known to the driver only, if a reset fails between an
    // acknowledgement and what follows from it: that has a test without such a race.
    let violations = case.device.backing().hardware().violations();
    let freed = violations.iter().find(|text| text.contains("freed"));
    assert!(freed.is_none(), "{violations:?}");
    (case.found, faults.summary())
}

/// Runs a case on a thread of its own, which may be given up.
fn limited(seed: u64) -> Result<(Found, Vec<(Lie, u64)>), String> {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::Builder::new().name(format!("seed {seed}"));
    let thread = thread
        .spawn(move || sender.send(case(seed)))
        .expect("a thread");
    match receiver.recv_timeout(LIMIT) {
        Ok(found) => {
            // The device and the driver end within the case; what they say then counts, too.
            let _ = thread.join();
            Ok(found)
        }
        Err(mpsc::RecvTimeoutError::Timeout) => Err(format!("no end within {LIMIT:?}")),
        Err(mpsc::RecvTimeoutError::Disconnected) => Err("panicked".into()),
    }
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}: a number")))
}

#[test]
fn whatever_the_device_says_every_call_ends_and_memory_is_safe() {
    // Threads of the driver and of the device must not panic, either.
    let panics = Arc::new(Mutex::new(Vec::new()));
    let hook = std::panic::take_hook();
    let said = panics.clone();
    std::panic::set_hook(Box::new(move |info| {
        said.lock().unwrap().push(info.to_string());
        hook(info);
    }));
    let seeds = match number("EXTLB_FUZZ_SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            let from = number("EXTLB_FUZZ_FROM").unwrap_or(0);
            from..from + number("EXTLB_FUZZ_CASES").unwrap_or(CASES)
        }
    };
    let next = AtomicU64::new(seeds.start);
    let total = Mutex::new((Found::default(), BTreeMap::<Lie, u64>::new()));
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || !failed.lock().unwrap().is_empty() {
                        return;
                    }
                    match limited(seed) {
                        Ok((found, told)) => {
                            let mut total = total.lock().unwrap();
                            total.0.values += found.values;
                            total.0.restarts += found.restarts;
                            for (name, n) in found.errors {
                                *total.0.errors.entry(name).or_default() += n;
                            }
                            for (lie, n) in told {
                                *total.1.entry(lie).or_default() += n;
                            }
                        }
                        Err(why) => failed.lock().unwrap().push((seed, why)),
                    }
                }
            });
        }
    });
    let (found, told) = total.into_inner().unwrap();
    let cases = seeds.end - seeds.start;
    println!(
        "{cases} cases: {} values, {} restarts, errors {:?}, lies {told:?}",
        found.values, found.restarts, found.errors
    );
    let (failed, panics) = (failed.into_inner().unwrap(), panics.lock().unwrap());
    assert!(
        failed.is_empty() && panics.is_empty(),
        "run again with EXTLB_FUZZ_SEED=…: {failed:?}; {panics:?}"
    );
    if cases >= CASES {
        assert!(told.len() > Lie::ALL.len() / 2, "few lies: {told:?}");
    }
}
