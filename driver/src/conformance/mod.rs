//! The checks that every backing has to pass: one suite over any [`Device`].
//!
//! What a backing cannot do is declared ([`Abilities`]), and held against what it does: a call that
//! is refused although it was declared fails its check, and so does one that works although it was
//! not. So "unsupported" in a [`Report`] always means that the backing said so itself.
//!
//! Checks need the device for themselves: they count its operations, use up its contexts and
//! restart it.

mod device;
mod memory;
mod operations;
mod queue;
mod raw_unsafe;
mod report;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

pub use report::{Check, Outcome, Report};

use crate::error::{Error, Refused};
use crate::memory_unsafe::Backing;
use crate::operation::Operation;
use crate::submit::{Completed, Pending};
use crate::{Context, Device, Follow, Options};

/// What a backing says it can do.
#[derive(Clone, Copy, Debug)]
pub struct Abilities {
    /// How its contexts can follow the process.
    pub follow: Follow,
    /// Whether one context can register memory twice.
    pub overlap: bool,
    /// Whether the device reaches memory that the process has by itself, without the library.
    pub any_memory: bool,
    /// Whether files can be mapped with changes by others seen.
    pub shared_files: bool,
    /// Whether the device's translations can be compared with the process's page table.
    pub audit: bool,
    /// Whether the device can be restarted ([`Backing::restart`]).
    pub restart: bool,
}

impl Abilities {
    /// [`crate::Kernel`] in its notified way, with the oracle.
    pub const KERNEL: Self = Self {
        follow: Follow::all(),
        overlap: false,
        any_memory: true,
        shared_files: true,
        audit: true,
        restart: false,
    };

    /// [`crate::userspace::Userspace`] over hardware that maps any memory of the process, as VFIO
    /// does. Hardware with memory of its own can do less.
    pub const USERSPACE: Self = Self {
        follow: Follow::PINNED,
        overlap: false,
        any_memory: true,
        shared_files: true,
        audit: false,
        restart: true,
    };

    /// The in-process kernel, [`crate::inprocess::InProcess`].
    #[cfg(feature = "inprocess")]
    pub const IN_PROCESS: Self = Self {
        follow: Follow::PTE,
        overlap: true,
        any_memory: false,
        shared_files: false,
        audit: true,
        restart: false,
    };

    /// [`crate::userspace::Userspace`] over [`crate::hardware::LocalDevice`].
    #[cfg(feature = "inprocess")]
    pub const LOCAL: Self = Self {
        any_memory: false,
        shared_files: false,
        ..Self::USERSPACE
    };
}

/// Why a check did not pass.
#[derive(Debug)]
enum Failure {
    Unsupported(String),
    Failed(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Failed(error.to_string())
    }
}

impl<T> From<Refused<T>> for Failure {
    fn from(refused: Refused<T>) -> Self {
        refused.error.into()
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::Failed(format!("the check's own file: {error}"))
    }
}

type Verdict<T = ()> = Result<T, Failure>;

/// Fails a check unless a condition holds.
macro_rules! ensure {
    ($condition:expr, $($why:tt)+) => {
        if !$condition {
            return Err(crate::conformance::Failure::Failed(format!($($why)+)));
        }
    };
}
use ensure;

/// How long any operation of a check may take. Far longer than it does, even if it is emulated.
const PATIENCE: Duration = Duration::from_secs(30);

/// What checks work with.
struct Suite<'a, B: Backing> {
    device: &'a Device<B>,
    abilities: &'a Abilities,
}

impl<B: Backing> Suite<'_, B> {
    fn context(&self, ring_log2: u32) -> Verdict<Context<B>> {
        Ok(self.device.context(Options {
            ring_log2,
            ..Options::default()
        })?)
    }

    /// Holds what a call did against what was declared of it.
    fn ability<T>(&self, declared: bool, what: &str, result: Result<T, Error>) -> Verdict<T> {
        match (declared, result) {
            (true, Ok(value)) => Ok(value),
            (true, Err(error)) => Err(Failure::Failed(format!("{what} is declared, but: {error}"))),
            (false, Err(error @ (Error::Unsupported(_) | Error::Overlap { .. }))) => {
                Err(Failure::Unsupported(error.to_string()))
            }
            (false, Err(error)) => Err(Failure::Failed(format!(
                "{what} is not declared, and the error does not say so: {error}"
            ))),
            (false, Ok(_)) => Err(Failure::Failed(format!(
                "{what} works, but is not declared"
            ))),
        }
    }
}

/// Waits, but not for ever; the operation may have failed.
fn end<B: Backing, O: Operation, T>(pending: Pending<B, O, T>) -> Verdict<Completed<O::Output, T>> {
    ensure!(pending.wait_for(PATIENCE)?, "an operation does not end");
    Ok(pending.wait()?)
}

/// Waits, but not for ever, for an operation that has to succeed.
fn finish<B: Backing, O: Operation, T>(pending: Pending<B, O, T>) -> Verdict<(O::Output, T)> {
    Ok(end(pending)?.into_result()?)
}

/// Bytes that differ from place to place and from seed to seed.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    (0..len).map(|_| next()).collect()
}

type Function<B> = fn(&Suite<'_, B>) -> Verdict;

/// All checks, in the order in which they run.
fn checks<B: Backing>() -> Vec<(&'static str, Function<B>)> {
    [
        operations::checks(),
        queue::checks(),
        memory::checks(),
        raw_unsafe::checks(),
        device::checks(),
    ]
    .concat()
}

/// Names of all checks.
pub fn names<B: Backing>() -> Vec<&'static str> {
    checks::<B>().into_iter().map(|(name, _)| name).collect()
}

/// Runs the checks whose name contains `filter`. `subject` names the backing in the report.
pub fn run<B: Backing>(
    subject: &str,
    device: &Device<B>,
    abilities: &Abilities,
    filter: Option<&str>,
) -> Report {
    let suite = Suite { device, abilities };
    let wanted = |name: &str| filter.is_none_or(|filter| name.contains(filter));
    let run = |(name, check): (&'static str, Function<B>)| {
        let begun = Instant::now();
        // A check that panics has found something, too; the others go on.
        let outcome = match catch_unwind(AssertUnwindSafe(|| check(&suite))) {
            Ok(Ok(())) => Outcome::Passed,
            Ok(Err(Failure::Unsupported(why))) => Outcome::Unsupported(why),
            Ok(Err(Failure::Failed(why))) => Outcome::Failed(why),
            Err(panic) => Outcome::Failed(said(&*panic)),
        };
        Check {
            name,
            outcome,
            took: begun.elapsed(),
        }
    };
    let checks = checks::<B>().into_iter();
    Report {
        subject: subject.to_owned(),
        checks: checks.filter(|(name, _)| wanted(name)).map(run).collect(),
    }
}

fn said(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or(panic.downcast_ref::<&str>().copied());
    format!("panicked: {}", text.unwrap_or("without a word"))
}

#[cfg(all(test, feature = "inprocess"))]
mod tests {
    use super::*;
    use crate::hardware::LocalDevice;
    use crate::userspace::{Config, Userspace};

    #[test]
    fn what_was_declared_is_held_against_what_happens() {
        let hardware = LocalDevice::new(extlb_device::Config::default()).unwrap();
        let backing = Userspace::new(hardware, Config::default()).unwrap();
        let device = Device::open(backing).unwrap();
        let outcome = |abilities: &Abilities, name| {
            let report = run("", &device, abilities, Some(name));
            assert_eq!(report.checks.len(), 1, "{name}");
            report.checks[0].outcome.clone()
        };
        let (honest, name) = (Abilities::LOCAL, "translations agree");
        assert!(matches!(outcome(&honest, name), Outcome::Unsupported(_)));
        let boast = Abilities {
            audit: true,
            ..honest
        };
        assert!(matches!(outcome(&boast, name), Outcome::Failed(_)));
        let name = "a restart begins afresh";
        let modest = Abilities {
            restart: false,
            ..honest
        };
        assert!(matches!(outcome(&modest, name), Outcome::Failed(_)));
        assert_eq!(outcome(&honest, name), Outcome::Passed);
    }
}
