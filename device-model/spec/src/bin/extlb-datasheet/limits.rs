//! The table of limits.

use std::fmt::Write;

use extlb_spec::table::Enumeration;
use extlb_spec::{MAX_CONTEXTS, VECTORS, addr, context, page_request, pte, regs, work};

use crate::constants::size;
use crate::tables::STRING;

/// What is limited, to what, and what happens beyond or why it is enough.
pub(crate) fn print() -> String {
    let ring = |low: u32, high: u32| format!("{} to {}, a power of two", 1 << low, 1 << high);
    let leaves: Vec<String> = (1..pte::LEVELS).map(|l| size(pte::leaf_size(l))).collect();
    let rows: Vec<(&str, String, &str)> = vec![
        (
            "Contexts",
            format!("1 to {MAX_CONTEXTS}"),
            "`CTX_COUNT`; a command that names another is `BadCommand`, fatal",
        ),
        (
            "I/O virtual address",
            format!("{} bits", addr::IOVA_BITS),
            "an operand that leaves the space completes with `BadAddress`",
        ),
        (
            "Guest-physical address",
            format!("{} bits", addr::GPA_BITS),
            "registers and entries hold no more; where no RAM answers is a bus error",
        ),
        (
            "Invalidation queue, page request ring",
            ring(regs::MIN_RING_LOG2, regs::MAX_RING_LOG2),
            "`IQ_LOG2`, `PRQ_LOG2`; else `BadConfig`, fatal",
        ),
        (
            "Outstanding commands",
            format!("{}", 1 << regs::MAX_RING_LOG2),
            "the ring; a tail further ahead is `IqOverrun`, fatal",
        ),
        (
            "Work ring",
            ring(context::MIN_WORK_RING_LOG2, context::MAX_WORK_RING_LOG2),
            "`ring_log2`; else `BadEntry`. A tail further ahead is `RingOverrun`",
        ),
        (
            "Operations under way",
            "1 in each context".into(),
            "a context's descriptors run in order",
        ),
        (
            "Length of an operand",
            format!("0 to {}", size(work::MAX_LEN)),
            "`BadLength`",
        ),
        (
            "Descriptors of a batch",
            format!("0 to {}", work::MAX_BATCH),
            "`BadLength`; a batch in a batch is `NestedBatch`",
        ),
        (
            "Segments of a list",
            format!("0 to {}", work::MAX_SEGMENTS),
            "`BadSegments`",
        ),
        (
            "Weight of a context",
            format!("1 to {}", context::MAX_WEIGHT),
            "`weight` of its entry, 0 is 1; else `BadEntry`",
        ),
        (
            "Leaves",
            leaves.join(", "),
            "by level; an address that is no multiple of the leaf's size is a bus error",
        ),
        (
            "Page requests that wait",
            "1 to 2^32 - 1 in a context".into(),
            "`credits` of its entry; an operation has at most two at once",
        ),
        (
            "Pages of a request",
            format!("1 to {}", page_request::MAX_REQUEST_PAGES),
            "a hint: only the first is waited for",
        ),
        (
            "Interrupt vectors",
            VECTORS.to_string(),
            "raised again while pending: one message",
        ),
        (
            "Oracle records kept",
            regs::ORACLE_RECORDS.to_string(),
            "the first since reset; all are counted in `ORACLE_STALE`",
        ),
        (
            "Time of a drained wait",
            "that of one step".into(),
            "a step moves at most a chunk (configured, 64 KiB by default) and makes the walks for it; no operation as a whole, no page request, no other context's queue is waited for",
        ),
    ];
    let mut out = String::from("| | Limit | By what, and what is beyond |\n|---|---|---|\n");
    for (what, limit, why) in rows {
        writeln!(out, "| {what} | {limit} | {why} |").expect(STRING);
    }
    // The table speaks of errors by name: they must exist.
    let named = |table: &Enumeration, names: &[&str]| {
        for name in names {
            assert!(table.values.iter().any(|v| v.name == *name), "{name}");
        }
    };
    named(
        &work::Status::TABLE,
        &["BadAddress", "BadLength", "BadSegments", "NestedBatch"],
    );
    named(&context::ContextError::TABLE, &["BadEntry", "RingOverrun"]);
    named(
        &regs::FatalError::TABLE,
        &["BadCommand", "BadConfig", "IqOverrun"],
    );
    out
}
