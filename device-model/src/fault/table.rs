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

/// The kinds, who notices and the tests that show it, in Markdown: `FAULTS.md`.
pub fn document() -> String {
    let mut text = String::from(
        "<!-- Printed from src/fault/table.rs; do not edit. To print it again:\n     cargo run -q -p \
         extlb-device --example faults > device-model/FAULTS.md -->\n\n\
         # What can go wrong on purpose, and who notices\n\n\
         `extlb-device --fault KIND,parameter=value,…`, or a plan in the configuration \
         (`[[fault]]`); seeded by `fault_seed`. Every kind but `skip-drain` takes `after`, `every`, \
         `times` and `probability` as well. The device itself knows nothing of this: it is done by \
         a card between the device and its slot (`src/fault/`).\n\n\
         | Fault | What the device then does | Who notices | Shown by |\n|---|---|---|---|\n",
    );
    for entry in TABLE {
        let needs = entry.needs.iter().map(|name| format!(" `{name}`"));
        let takes = entry.takes.iter().map(|name| format!(" [`{name}`]"));
        let parameters: String = needs.chain(takes).collect();
        let tests = entry.tests.iter().map(|test| format!("`{test}`"));
        let tests: Vec<String> = tests.collect();
        text += &format!(
            "| `{}`{parameters} | {} | {} | {} |\n",
            entry.name,
            entry.does,
            entry.noticed_by,
            tests.join("<br>")
        );
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
        noticed_by: "Who waits for it: the kernel's driver, and the one in user space, give up \
                       when their patience is over, and fence the device. Nothing in the device \
                       notices.",
        tests: &[
            "device-model/tests/fault_shootdown.rs::a_skipped_acknowledgement_never_comes",
            "driver/tests/faults_unsafe.rs::an_acknowledgement_that_does_not_come_is_a_time_out_and_a_fence",
            "tests/tests/vm_faults.rs::an_acknowledgement_that_does_not_come_fences_the_device",
        ],
    },
    FaultKind {
        kind: Kind::DelayAck,
        name: "delay-ack",
        needs: &["delay_us"],
        takes: &[],
        does: "An acknowledgement is written so much later. Those behind it are not held up.",
        noticed_by: "Nobody, if a driver's patience is longer; else as if it never came. Nothing \
                       is written after the reset.",
        tests: &[
            "device-model/tests/fault_shootdown.rs::a_delayed_acknowledgement_comes_late_and_holds_up_no_other",
            "device-model/tests/fault_shootdown.rs::what_was_delayed_is_not_written_after_a_reset",
            "driver/tests/faults_unsafe.rs::an_acknowledgement_that_is_late_is_noticed_beyond_the_drivers_patience_only",
        ],
    },
    FaultKind {
        kind: Kind::DuplicateAck,
        name: "duplicate-ack",
        needs: &[],
        takes: &["delay_us"],
        does: "An acknowledgement is written, and once more: after the one that follows it, or \
               so much later.",
        noticed_by: "Who waits for the one that was overwritten: a time-out. Nobody, if no word \
                       is shared, or a later number follows.",
        tests: &[
            "device-model/tests/fault_shootdown.rs::a_repeated_acknowledgement_overwrites_the_one_that_followed",
            "driver/tests/faults_unsafe.rs::acknowledgements_that_go_back_are_a_time_out",
        ],
    },
    FaultKind {
        kind: Kind::ReorderAck,
        name: "reorder-ack",
        needs: &[],
        takes: &["delay_us"],
        does: "An acknowledgement is written only after the one that follows it; with a delay, so \
               much later if none follows.",
        noticed_by: "Who waits for the first before asking for the second: a time-out.",
        tests: &[
            "device-model/tests/fault_shootdown.rs::two_acknowledgements_change_places",
            "driver/tests/faults_unsafe.rs::an_acknowledgement_behind_one_that_does_not_come_is_a_time_out",
        ],
    },
    FaultKind {
        kind: Kind::EarlyAck,
        name: "early-ack",
        needs: &[],
        takes: &[],
        does: "An acknowledgement is written as soon as its command is read, before anything is \
               drained; and once more when it is due.",
        noticed_by: "The bus, if the memory is unmapped from it: a bus error. Nobody without an \
                       IOMMU: what is written late is lost in somebody else's page. The device's \
                       oracle does not, as the device did drain.",
        tests: &[
            "device-model/tests/fault_shootdown.rs::an_early_acknowledgement_is_noticed_by_nobody_inside_the_device",
            "driver/tests/faults_unsafe.rs::an_acknowledgement_that_comes_early_is_caught_on_the_bus",
        ],
    },
    FaultKind {
        kind: Kind::SkipDrain,
        name: "skip-drain",
        needs: &[],
        takes: &[],
        does: "No wait command drains, ever: `debug.skip_drain` by another name.",
        noticed_by: "The device's oracle (`OutlivedDrain`), and the bus, as with early-ack.",
        tests: &[
            "device-model/tests/fault_shootdown.rs::a_drain_that_is_skipped_is_a_stale_access",
            "device-model/tests/debug.rs::an_access_that_a_skipped_drain_left_under_way_is_a_bus_error_and_a_stale_access",
            "driver/tests/faults_unsafe.rs::an_acknowledgement_that_comes_early_is_caught_on_the_bus",
        ],
    },
    FaultKind {
        kind: Kind::SkipTlbEntry,
        name: "skip-tlb-entry",
        needs: &[],
        takes: &["context"],
        does: "A range invalidation leaves out one page, the first or the last by the seed: its \
               translation stays in the TLB. Invalidations of a context, or of all, are obeyed.",
        noticed_by: "The device's oracle, when the translation is used (`NotInvalidated`), and \
                       an audit; the bus, if the memory is unmapped from it; whoever finds \
                       foreign data in a page, as the tour does. A driver alone does not.",
        tests: &[
            "device-model/tests/fault_shootdown.rs::a_tlb_entry_that_is_left_out_is_found_by_the_oracle",
            "device-model/tests/fault_shootdown.rs::a_tlb_entry_that_is_left_out_is_found_by_an_audit",
            "driver/tests/faults_unsafe.rs::a_translation_that_was_left_out_is_found_by_the_oracle",
            "driver/tests/faults_unsafe.rs::a_translation_that_was_left_out_is_caught_on_the_bus",
            "tests/tests/vm_faults.rs::a_translation_that_was_left_out_is_found_by_the_tour",
        ],
    },
    FaultKind {
        kind: Kind::LoseInterrupt,
        name: "lose-interrupt",
        needs: &[],
        takes: &["vector"],
        does: "An MSI-X message is not sent.",
        noticed_by: "Who looks without being asked: the library and the kernel's driver do once \
                       a second. It costs time and nothing else.",
        tests: &[
            "device-model/tests/fault_requests.rs::a_lost_interrupt_is_noticed_only_by_who_looks_at_the_ring",
            "driver/tests/faults_unsafe.rs::lost_and_repeated_interrupts_cost_time_and_nothing_else",
            "tests/tests/vm_faults.rs::lost_interrupts_cost_time_and_nothing_else",
        ],
    },
    FaultKind {
        kind: Kind::RepeatInterrupt,
        name: "repeat-interrupt",
        needs: &[],
        takes: &["vector"],
        does: "An MSI-X message is sent twice.",
        noticed_by: "Nobody: the second finds nothing new.",
        tests: &[
            "device-model/tests/fault_requests.rs::a_repeated_interrupt_finds_nothing_new",
            "driver/tests/faults_unsafe.rs::lost_and_repeated_interrupts_cost_time_and_nothing_else",
        ],
    },
    FaultKind {
        kind: Kind::LoseRequest,
        name: "lose-request",
        needs: &[],
        takes: &["context"],
        does: "A page request is not written; the next takes its slot. The operation waits for an \
               answer all the same.",
        noticed_by: "The program, if it limits how long it waits for the operation: neither \
                       device nor driver can tell it from one that is served slowly. Other \
                       contexts go on; the context can be closed.",
        tests: &[
            "device-model/tests/fault_requests.rs::a_lost_request_is_noticed_only_by_who_waits_for_the_operation",
            "device-model/tests/fault_requests.rs::a_ring_that_loses_requests_is_as_long_as_any_other",
            "driver/tests/faults_unsafe.rs::lost_requests_and_responses_are_noticed_by_the_programs_own_patience_only",
            "tests/tests/vm_faults.rs::lost_requests_and_responses_are_noticed_by_the_program_only",
        ],
    },
    FaultKind {
        kind: Kind::LoseResponse,
        name: "lose-response",
        needs: &[],
        takes: &["context"],
        does: "A page response is read as a command that does nothing.",
        noticed_by: "As with lose-request.",
        tests: &[
            "device-model/tests/fault_requests.rs::a_lost_response_leaves_the_operation_waiting_for_another",
            "driver/tests/faults_unsafe.rs::lost_requests_and_responses_are_noticed_by_the_programs_own_patience_only",
            "tests/tests/vm_faults.rs::lost_requests_and_responses_are_noticed_by_the_program_only",
        ],
    },
    FaultKind {
        kind: Kind::FlipPermission,
        name: "flip-permission",
        needs: &[],
        takes: &["context", "to"],
        does: "A leaf reads as writable if it is not, or the other way round. What is in RAM is \
               not changed, but for the accessed and dirty bits.",
        noticed_by: "Writable: the device's oracle, when the page is written. Read-only: nobody, \
                       it costs a page request.",
        tests: &[
            "device-model/tests/fault_requests.rs::a_leaf_that_seems_writable_is_found_by_the_oracle",
            "device-model/tests/fault_requests.rs::a_leaf_that_seems_read_only_costs_a_request",
            "driver/tests/faults_unsafe.rs::a_leaf_that_seems_writable_is_found_by_the_oracle",
            "driver/tests/faults_unsafe.rs::a_leaf_that_seems_read_only_is_noticed_by_nobody",
        ],
    },
    FaultKind {
        kind: Kind::PoisonData,
        name: "poison-data",
        needs: &[],
        takes: &[],
        does: "One bit of the data that an access moves is flipped, by the seed. Data is what is \
               copied, and what is read or written 65 bytes or more at a time.",
        noticed_by: "Who looks at the data: a checksum or a comparison. Nobody else; the \
                       operation is a success.",
        tests: &[
            "device-model/tests/fault_data.rs::poisoned_data_is_noticed_by_a_checksum_or_a_comparison_and_by_nobody_else",
            "driver/tests/faults_unsafe.rs::poisoned_data_is_noticed_by_who_looks_at_the_data",
            "tests/tests/vm_faults.rs::poisoned_data_is_noticed_by_the_program_only",
        ],
    },
    FaultKind {
        kind: Kind::SlowMemory,
        name: "slow-memory",
        needs: &["delay_us"],
        takes: &[],
        does: "A data access is under way for so long, at most 2 s: `debug.bus_delay_us`, if it \
               is each access.",
        noticed_by: "Nobody: drains wait for it, and all is slower. Stops that wait for more \
                       than a second are told in the report.",
        tests: &[
            "device-model/tests/fault_data.rs::a_drain_waits_for_memory_that_is_slow_or_hangs",
            "device-model/tests/debug.rs::a_drain_waits_for_the_slow_bus",
        ],
    },
    FaultKind {
        kind: Kind::StallContext,
        name: "stall-context",
        needs: &[],
        takes: &["context", "delay_us"],
        does: "A context's tail is not seen any more: for so long, or for ever.",
        noticed_by: "The program, if it limits how long it waits. Other contexts go on; the \
                       context can be closed.",
        tests: &[
            "device-model/tests/fault_requests.rs::a_stalled_context_sees_no_work_and_stops_no_other",
            "device-model/tests/fault_requests.rs::a_context_that_is_stalled_for_ever_can_be_stopped",
            "driver/tests/faults_unsafe.rs::a_stalled_context_is_noticed_by_the_programs_own_patience_only",
        ],
    },
    FaultKind {
        kind: Kind::HangBus,
        name: "hang-bus",
        needs: &["delay_us"],
        takes: &[],
        does: "A data access does not end for so long, at most 60 s: no drain ends, and no reset.",
        noticed_by: "Who waits for a drain meanwhile: the kernel's driver, and the one in user \
                       space, give up when their patience is over, and fence the device, which \
                       takes until the access ends.",
        tests: &[
            "device-model/tests/fault_data.rs::a_drain_waits_for_memory_that_is_slow_or_hangs",
            "driver/tests/faults_unsafe.rs::a_bus_that_hangs_is_a_time_out_and_a_fence_that_waits_for_its_end",
            "tests/tests/vm_faults.rs::a_bus_that_hangs_fences_the_device",
        ],
    },
    FaultKind {
        kind: Kind::ResetMidDma,
        name: "reset-mid-dma",
        needs: &[],
        takes: &[],
        does: "The device resets itself, as by FLR, while a data access is under way.",
        noticed_by: "The drivers, which look at STATUS once a second; the one in user space also \
                       whenever an acknowledgement takes long. All programs that wait get an error.",
        tests: &[
            "device-model/tests/fault_data.rs::a_reset_in_the_middle_of_an_access_waits_for_it_and_leaves_silence",
            "driver/tests/faults_unsafe.rs::a_reset_in_the_middle_of_an_access_is_seen_when_the_driver_looks",
            "tests/tests/vm_faults.rs::a_device_that_resets_itself_is_fenced_by_the_watchdog",
        ],
    },
    FaultKind {
        kind: Kind::DisconnectMidDma,
        name: "disconnect-mid-dma",
        needs: &[],
        takes: &[],
        does: "The server ends the client's connection while a data access is under way. A device \
               without a server has no such occasion.",
        noticed_by: "The client: its connection ends. The server stops the device before it serves the next client.",
        tests: &[
            "device-model/tests/fault_server.rs::a_server_that_hangs_up_in_the_middle_of_an_access_leaves_silence",
            "device-model/tests/fault_data.rs::a_device_without_a_server_has_nobody_to_disconnect",
            "driver/tests/faults_unsafe.rs::a_connection_that_ends_in_the_middle_of_an_access_is_a_dead_device",
        ],
    },
];
