//! Every kind of fault: what it takes, what the device then does, and who notices.

use super::Kind;

/// A kind of fault.
///
/// Beside what is named here every kind but `skip-drain` takes `after`, `every`, `times` and
/// `probability`: see [`super::Rule`].
#[derive(Clone, Copy, Debug)]
pub struct FaultKind {
    /// The kind.
    pub kind: Kind,
    /// Its name in plans, on command lines and in reports.
    pub name: &'static str,
    /// Parameters that it must have.
    pub needs: &'static [&'static str],
    /// Parameters that it may have.
    pub takes: &'static [&'static str],
    /// What the device does.
    pub does: &'static str,
    /// Who notices, and how; "nobody" is an answer.
    pub noticed_by: &'static str,
    /// Tests that show it, as `file::function`, from the root of the repository.
    pub tests: &'static [&'static str],
}

/// The kinds and their parameters in words, for a program's help.
pub fn help() -> String {
    let mut text = String::from(
        "Faults:\n  Every kind takes after=N (so many occasions pass first), every=N (then one in so \
         many),\n  times=N (at most so often) and probability=P (of these, this share, by the \
         seed).\n",
    );
    for entry in TABLE {
        let needs = entry.needs.iter().map(|name| format!(",{name}=..."));
        let takes = entry.takes.iter().map(|name| format!("[,{name}=...]"));
        let parameters: String = needs.chain(takes).collect();
        text += &format!("\n  {}{parameters}\n      {}\n", entry.name, entry.does);
    }
    text
}

/// Every kind, in the order of [`Kind`].
pub const TABLE: &[FaultKind] = &[
    FaultKind {
        kind: Kind::SkipAck,
        name: "skip-ack",
        needs: &[],
        takes: &[],
        does: "An acknowledgement is never written. Its interrupt, if it has one, is raised.",
        noticed_by: "",
        tests: &[],
    },
    FaultKind {
        kind: Kind::DelayAck,
        name: "delay-ack",
        needs: &["delay_us"],
        takes: &[],
        does: "An acknowledgement is written so much later. Those behind it are not held up.",
        noticed_by: "",
        tests: &[],
    },
    FaultKind {
        kind: Kind::DuplicateAck,
        name: "duplicate-ack",
        needs: &[],
        takes: &["delay_us"],
        does: "An acknowledgement is written, and once more: after the one that follows it, or \
               so much later.",
        noticed_by: "",
        tests: &[],
    },
    FaultKind {
        kind: Kind::ReorderAck,
        name: "reorder-ack",
        needs: &[],
        takes: &["delay_us"],
        does: "An acknowledgement is written only after the one that follows it; with a delay, so \
               much later if none follows.",
        noticed_by: "",
        tests: &[],
    },
    FaultKind {
        kind: Kind::EarlyAck,
        name: "early-ack",
        needs: &[],
        takes: &[],
        does: "An acknowledgement is written as soon as its command is read, before anything is \
               drained; and once more when it is due.",
        noticed_by: "",
        tests: &[],
    },
    FaultKind {
        kind: Kind::SkipDrain,
        name: "skip-drain",
        needs: &[],
        takes: &[],
        does: "No wait command drains, ever: `debug.skip_drain` by another name.",
        noticed_by: "",
        tests: &[],
    },
    FaultKind {
        kind: Kind::SkipTlbEntry,
        name: "skip-tlb-entry",
        needs: &[],
        takes: &["context"],
        does: "A range invalidation leaves out one page, the first or the last by the seed: its \
               translation stays in the TLB. Invalidations of a context, or of all, are obeyed.",
        noticed_by: "",
        tests: &[],
    },
    FaultKind {
        kind: Kind::LoseInterrupt,
        name: "lose-interrupt",
        needs: &[],
        takes: &["vector"],
        does: "An MSI-X message is not sent.",
        noticed_by: "",
        tests: &[],
    },
    FaultKind {
        kind: Kind::RepeatInterrupt,
        name: "repeat-interrupt",
        needs: &[],
        takes: &["vector"],
        does: "An MSI-X message is sent twice.",
        noticed_by: "",
        tests: &[],
    },
    FaultKind {
        kind: Kind::LoseRequest,
        name: "lose-request",
        needs: &[],
        takes: &["context"],
        does: "A page request is not written; the next takes its slot. The operation waits for an \
               answer all the same.",
        noticed_by: "",
        tests: &[],
    },
    FaultKind {
        kind: Kind::LoseResponse,
        name: "lose-response",
        needs: &[],
        takes: &["context"],
        does: "A page response is read as a command that does nothing.",
        noticed_by: "",
        tests: &[],
    },
    FaultKind {
        kind: Kind::FlipPermission,
        name: "flip-permission",
        needs: &[],
        takes: &["context", "to"],
        does: "A leaf reads as writable if it is not, or the other way round. What is in RAM is \
               not changed, but for the accessed and dirty bits.",
        noticed_by: "",
        tests: &[],
    },
    FaultKind {
        kind: Kind::PoisonData,
        name: "poison-data",
        needs: &[],
        takes: &[],
        does: "One bit of the data that an access moves is flipped, by the seed. Data is what is \
               copied, and what is read or written 65 bytes or more at a time.",
        noticed_by: "",
        tests: &[],
    },
    FaultKind {
        kind: Kind::SlowMemory,
        name: "slow-memory",
        needs: &["delay_us"],
        takes: &[],
        does: "A data access is under way for so long, at most 2 s: `debug.bus_delay_us`, if it \
               is each access.",
        noticed_by: "",
        tests: &[],
    },
    FaultKind {
        kind: Kind::StallContext,
        name: "stall-context",
        needs: &[],
        takes: &["context", "delay_us"],
        does: "A context's tail is not seen any more: for so long, or for ever.",
        noticed_by: "",
        tests: &[],
    },
    FaultKind {
        kind: Kind::HangBus,
        name: "hang-bus",
        needs: &["delay_us"],
        takes: &[],
        does: "A data access does not end for so long, at most 60 s: no drain ends, and no reset.",
        noticed_by: "",
        tests: &[],
    },
    FaultKind {
        kind: Kind::ResetMidDma,
        name: "reset-mid-dma",
        needs: &[],
        takes: &[],
        does: "The device resets itself, as by FLR, while a data access is under way.",
        noticed_by: "",
        tests: &[],
    },
    FaultKind {
        kind: Kind::DisconnectMidDma,
        name: "disconnect-mid-dma",
        needs: &[],
        takes: &[],
        does: "The server ends the client's connection while a data access is under way. A device \
               without a server has no such occasion.",
        noticed_by: "",
        tests: &[],
    },
];
