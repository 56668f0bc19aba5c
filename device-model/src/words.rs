//! Events in words, for people: what happened, where, and what to do next.
//!
//! What a value of the interface means is said by its line in the spec crate's tables, and here
//! only repeated; what to do about it is said here.

use std::fmt::{Display, Formatter, Result};

use extlb_spec::context::ContextError;
use extlb_spec::regs::{FatalError, StaleKind};

use crate::oracle::StaleAccess;
use crate::ports::{Event, Stop};

impl Display for Event {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Event::Stale(access) => stale(access, f),
            Event::OracleOverflow => f.write_str(
                "The oracle had no room for one more difference between the device's translation \
                 and the process's: it could not be followed, and may have been a stale access. \
                 Give it more room by oracle.suspects, or look why so many are open.",
            ),
            Event::ContextError {
                context,
                error,
                addr,
            } => {
                let (about, advice) = context_error(*error);
                let name = error.name();
                write!(
                    f,
                    "Context {context} stopped, {name}: {error} {about}: {addr:#x}. The others go \
                     on. {advice}"
                )
            }
            Event::BusError {
                context,
                iova,
                error,
            } => write!(
                f,
                "Context {context}: {iova} translates to where {error}. The operation ends with \
                 a bus error. Look at the leaf for {iova}, the tables on the way to it, and \
                 whether that RAM was taken out of the machine."
            ),
            Event::Fatal { error, info } => {
                let (about, advice) = fatal(*error);
                let name = error.name();
                write!(
                    f,
                    "The device stopped for good, {name}: {error} {about}: {info:#x}. {advice} \
                     Only a reset helps: write RESET to CTRL, or reset the function; then \
                     configure, enable and start the contexts again."
                )
            }
            Event::Injected(fault) => {
                write!(f, "Fault {}, as planned: {}.", fault.kind.name(), fault.to)
            }
            Event::Stopped(stop) => f.write_str(stopped(*stop)),
            Event::SlowStop { waited } => write!(
                f,
                "A stop (reset, disable, bus master off, or memory taken away) has waited {} ms \
                 for an access to memory that began before it; it is not answered until the \
                 access has ended. Look at what holds the memory up: its file, its host, a client \
                 that does not answer.",
                waited.as_millis()
            ),
        }
    }
}

fn stale(access: &StaleAccess, f: &mut Formatter<'_>) -> Result {
    let (name, kind) = (access.kind.name(), access.kind);
    let did = if access.write { "wrote" } else { "read" };
    write!(
        f,
        "Stale access, {name}: {kind} Context {} {did} {} at guest address {}, ",
        access.context, access.iova, access.device_gpa
    )?;
    match access.cpu_gpa {
        Some(gpa) => write!(f, "where the process has {gpa}")?,
        None => f.write_str("where the process has nothing that allows it")?,
    }
    let advice = match access.kind {
        StaleKind::NotInvalidated => {
            "Look which change of the process's page table was not followed by an invalidation."
        }
        StaleKind::SurvivedInvalidation => {
            "Look whether the leaf was cleared before the invalidation was posted; if it was, the \
             device is broken."
        }
        StaleKind::OutlivedDrain => {
            "The device is broken, or debug.skip_drain is on: what the kernel did with the page \
             since may be lost."
        }
        StaleKind::Audit => {
            "Look which change of the process's page table was not carried over to the device's."
        }
    };
    write!(
        f,
        "; fill {}, last invalidation {}. {advice}",
        access.fill, access.invalidation
    )
}

/// What the address of a context's error is, and what to do.
fn context_error(error: ContextError) -> (&'static str, &'static str) {
    match error {
        ContextError::BadEntry => (
            "About",
            "Correct the entry of the context table, and post a ContextSync.",
        ),
        ContextError::RingOverrun => (
            "Tail",
            "The program must not submit more than the ring holds beyond head; stop and start \
             the context.",
        ),
        ContextError::RingFault => (
            "Address",
            "Map (register) all of the work ring, then stop and start the context.",
        ),
        ContextError::CompletionFault => (
            "Address",
            "Completion records must be aligned to their size and lie in writable memory that is \
             mapped (registered); stop and start the context.",
        ),
        ContextError::Shadow => (
            "Guest address",
            "Put the context's shadow page into RAM that the device can reach; stop and start \
             the context.",
        ),
        ContextError::PageRequestFailed => (
            "Address",
            "Look why software could not serve the page request (memory?); stop and start the \
             context.",
        ),
    }
}

/// What the info of a fatal error is, and what to do.
fn fatal(error: FatalError) -> (&'static str, &'static str) {
    match error {
        FatalError::BadConfig => (
            "Register at offset",
            "Write what the register's description allows.",
        ),
        FatalError::IqFetch => (
            "Guest address",
            "IQ_BASE must name RAM that the device can reach, all the length of the queue.",
        ),
        FatalError::BadCommand => (
            "Index of the command",
            "Look at this entry of the invalidation queue: its kind, flags, context, alignment \
             and the fields that must be zero.",
        ),
        FatalError::IqOverrun => (
            "Tail",
            "Do not post more commands than the queue holds beyond iq_head.",
        ),
        FatalError::ContextTable => (
            "Guest address",
            "CTX_TABLE must name RAM that the device can reach, for CTX_COUNT entries.",
        ),
        FatalError::PrqWrite => (
            "Guest address",
            "PRQ_BASE must name RAM that the device can reach and write, all the length of the \
             ring.",
        ),
        FatalError::WaitWrite => (
            "Guest address",
            "Wait and audit commands must name RAM that the device can reach and write.",
        ),
        FatalError::Shadow => (
            "Guest address",
            "SHADOW must name RAM that the device can reach and write.",
        ),
    }
}

fn stopped(stop: Stop) -> &'static str {
    match stop {
        Stop::Disabled => {
            "The device was disabled while it ran (CTRL.ENABLE cleared): all contexts are \
             forgotten, and what they had under way ends without a completion. Enable it and \
             start the contexts again to go on."
        }
        Stop::Reset => {
            "The device was reset while it ran or after a fatal error: registers are as after \
             power-on, all contexts are forgotten, and what they had under way ends without a \
             completion. Configure it, enable it and start the contexts again to go on."
        }
        Stop::BusMasterOff => {
            "Bus mastering was switched off (or the power, D3hot) while the device ran: nothing is \
             accessed and no interrupt is raised. Switch it on again and everything goes on \
             where it was."
        }
    }
}
