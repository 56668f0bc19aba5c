//! A recorded run, replayed: the same, or the first difference is named.

mod common;
mod workload;

use std::collections::BTreeMap;
use std::io::{self, Cursor, Write};
use std::sync::{Arc, Mutex, OnceLock};

use common::{Guest, op};
use extlb_device::Config;
use extlb_device::config::Policy;
use extlb_device::record::{
    Answer, Difference, Ended, Entry, LogError, Options, Recorder, ReplayError, Replayed, Request,
    Return, replay,
};
use extlb_spec::Iova;
use extlb_spec::work::{Opcode, Status};
use proptest::prelude::*;
use serde_json::Value;
use workload::{Random, Workload};

/// A file in memory that the test keeps.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Records a random run; the log, and what came of it.
fn record(seed: u64, steps: u32) -> (Vec<u8>, workload::Outcome) {
    let log = Shared::default();
    let out = Box::new(log.clone());
    let config = workload::config(seed);
    let mut recorder = None;
    let mut workload = Workload::new(seed, |ports| {
        let made = Arc::new(Recorder::new(config, ports, out).expect("recorded"));
        recorder = Some(made.clone());
        made
    });
    for _ in 0..steps {
        workload.step();
    }
    let outcome = workload.finish();
    recorder.unwrap().finish().expect("written");
    let log = log.0.lock().unwrap().clone();
    (log, outcome)
}

fn replayed(log: Vec<u8>, config: Option<Config>) -> Result<Replayed, ReplayError> {
    let options = Options {
        config,
        ..Default::default()
    };
    replay(Box::new(Cursor::new(log)), options)
}

/// A log in pieces: its header, and the entries.
struct Parts {
    header: Vec<u8>,
    entries: Vec<Entry>,
}

fn word(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn take_apart(log: &[u8]) -> Parts {
    let mut at = 16 + word(log, 12) + 4;
    let header = log[..at].to_vec();
    let mut entries = Vec::new();
    while at < log.len() {
        let len = word(log, at);
        let mut block = &log[at + 8..at + 8 + len];
        while !block.is_empty() {
            let (entry, rest) = postcard::take_from_bytes(block).expect("an entry");
            entries.push(entry);
            block = rest;
        }
        at += 8 + len;
    }
    Parts { header, entries }
}

/// A log with good checksums, whatever is in it; blocks of other sizes than before.
fn assemble(parts: &Parts) -> Vec<u8> {
    let mut log = parts.header.clone();
    for (number, entries) in parts.entries.chunks(1000).enumerate() {
        let block: Vec<u8> = entries
            .iter()
            .flat_map(|entry| postcard::to_stdvec(entry).expect("encoded"))
            .collect();
        let number = (number as u64).to_le_bytes();
        log.extend((block.len() as u32).to_le_bytes());
        log.extend(crc32c::crc32c_append(crc32c::crc32c(&number), &block).to_le_bytes());
        log.extend(block);
    }
    log
}

fn difference(result: Result<Replayed, ReplayError>) -> Difference {
    match result {
        Err(ReplayError::Differs(difference)) => *difference,
        other => panic!("not noticed: {other:?}"),
    }
}

#[test]
fn another_configuration_differs_at_the_first_call_where_it_matters() {
    let (log, _) = record(4, 2000);
    let mut config = workload::config(4);
    assert_eq!(config.tlb.policy, Policy::Lru);
    config.tlb.policy = Policy::Fifo;
    let difference = difference(replayed(log.clone(), Some(config)));
    let entries = take_apart(&log).entries;
    assert!(difference.entry > 100, "not before a set is full");
    // The prefix is the same for both: what comes before does not depend on the policy.
    let until = Options {
        until: Some(difference.entry),
        ..Default::default()
    };
    let replayed = replay(Box::new(Cursor::new(log)), until).expect("the same");
    assert_eq!(
        (replayed.ended, replayed.entries),
        (Ended::Until, difference.entry)
    );
    assert!(difference.entry < entries.len() as u64);
    // An access walks, or an audit finds what the other has no longer.
    let call = difference.call.as_deref().expect("a call");
    assert!(call.ends_with("step"), "{call}");
    assert_ne!(difference.logged, difference.replayed);
}

#[test]
fn a_bit_of_what_was_read_is_noticed_where_it_has_its_effect() {
    let log = Shared::default();
    let out = Box::new(log.clone());
    let guest = Guest::around(|ports| {
        Arc::new(Recorder::new(common::config(), ports, out).expect("recorded"))
    });
    guest.device.set_bus_master(true);
    guest.enable();
    let process = guest.process(1);
    process.map_fresh(Iova(0x5000_0000), 2);
    let record = process.go(&guest, op(Opcode::Crc32c, 0x5000_0000, 0, 8192));
    assert_eq!(record.status, Status::Success as u32);
    drop(guest);
    let log = log.0.lock().unwrap().clone();
    assert_eq!(
        replayed(log.clone(), None).expect("the same").ended,
        Ended::Complete
    );
    let mut parts = take_apart(&log);
    // The data of a CRC: the result is in the completion record.
    let read = parts
        .entries
        .iter_mut()
        .rev()
        .find_map(|entry| match entry {
            Entry::Port(Request::Read { len: 1000.., .. }, Answer::Bytes(bytes)) => Some(bytes),
            _ => None,
        });
    read.expect("data was read")[500] ^= 4;
    let difference = difference(replayed(assemble(&parts), None));
    // The completion record, without its status.
    for write in [&difference.logged, &difference.replayed] {
        assert!(write.contains(", 28 bytes: "), "{difference}");
    }
}

/// What a call returned, by name, and what it did not return.
fn otherwise(returned: &Return) -> (&'static str, Vec<Return>) {
    match returned {
        Return::Nothing => ("nothing", vec![Return::Idle, Return::Data(vec![])]),
        Return::Data(data) => {
            let (mut bit, longer) = (data.clone(), [&data[..], &[0]].concat());
            bit[data.len() - 1] ^= 0x80;
            let others = [bit, longer].map(Return::Data);
            ("data", [&others[..], &[Return::Nothing]].concat())
        }
        Return::Busy => ("busy", vec![Return::Waiting]),
        Return::Waiting => ("waiting", vec![Return::Idle]),
        Return::Idle => ("idle", vec![Return::Busy]),
    }
}

/// Replays a log with another entry in the place of one.
fn with_entry(parts: &Parts, at: usize, entry: Entry) -> Difference {
    let (header, mut entries) = (parts.header.clone(), parts.entries.clone());
    entries[at] = entry;
    difference(replayed(assemble(&Parts { header, entries }), None))
}

#[test]
fn what_a_call_returns_is_compared() {
    let (log, _) = record(11, 800);
    let parts = take_apart(&log);
    let mut tried = BTreeMap::new();
    for (at, entry) in parts.entries.iter().enumerate() {
        let Entry::Return(returned) = entry else {
            continue;
        };
        let (kind, others) = otherwise(returned);
        let tried = tried.entry(kind).or_insert(0);
        // Some of each kind: the rest is like them.
        *tried += 1;
        for other in others.into_iter().filter(|_| *tried <= 4) {
            let difference = with_entry(&parts, at, Entry::Return(other.clone()));
            assert_eq!(difference.entry, at as u64, "{returned:?}, not {other:?}");
            assert!(difference.call.is_some(), "{difference}");
            assert_ne!(difference.logged, difference.replayed);
        }
    }
    let kinds: Vec<_> = tried.into_keys().collect();
    assert_eq!(kinds, ["busy", "data", "idle", "nothing", "waiting"]);
}

#[test]
fn the_totals_at_the_end_are_compared() {
    let (log, outcome) = record(12, 800);
    let parts = take_apart(&log);
    let end = parts.entries.len() - 1;
    let good = serde_json::to_value(outcome.totals).expect("JSON");
    let said = match &parts.entries[end] {
        Entry::End(said) => said,
        other => panic!("{other:?}"),
    };
    assert_eq!(serde_json::from_str::<Value>(said).expect("JSON"), good);
    for (field, value) in good.as_object().expect("counters") {
        // As it is written, so that nothing else differs than this.
        let (right, wrong) = [0, 1]
            .map(|more| format!("\"{field}\":{}", value.as_u64().expect("a number") + more))
            .into();
        let wrong = said.replacen(&right, &wrong, 1);
        assert_ne!(&wrong, said, "{field}");
        let difference = with_entry(&parts, end, Entry::End(wrong.clone()));
        assert_eq!(difference.entry, end as u64, "{field}");
        assert_eq!((&difference.logged, &difference.replayed), (&wrong, said));
    }
}

#[test]
fn what_is_missing_or_too_much_is_noticed() {
    let (log, _) = record(5, 1500);
    let parts = take_apart(&log);
    assert!(parts.entries.len() > 3000);
    let mut random = Random(6);
    for _ in 0..200 {
        let at = random.below(parts.entries.len() as u64) as usize;
        let mut entries = parts.entries.clone();
        let entry = entries.remove(at);
        if random.below(2) == 0 {
            entries.insert(at, entry.clone());
            entries.insert(at, entry.clone());
        }
        let header = parts.header.clone();
        // Some entries are like the next one, or ask what is asked more often anyway: then it is
        // the end that differs.
        match replayed(assemble(&Parts { header, entries }), None) {
            Err(ReplayError::Differs(_) | ReplayError::Log(LogError::Entry { .. })) => {}
            Ok(replayed) if replayed.ended == Ended::Cut => {
                assert!(matches!(entry, Entry::End(_)));
            }
            other => panic!("{at} {entry:?}: {other:?}"),
        }
    }
}

#[test]
fn a_log_that_is_cut_off_is_replayed_as_far_as_it_goes() {
    let (log, _) = record(7, 4000);
    let whole = replayed(log.clone(), None).expect("the same");
    let mut before = 0;
    for end in [5, 12, 40, 200, 60_000, 70_000, 200_000, log.len() - 1] {
        let end = end.min(log.len() - 1);
        match replayed(log[..end].to_vec(), None) {
            Ok(cut) => {
                assert_eq!(cut.ended, Ended::Cut);
                assert!(cut.entries >= before && cut.entries < whole.entries);
                before = cut.entries;
            }
            Err(ReplayError::Log(LogError::NotALog)) => assert!(end < 16),
            Err(ReplayError::Log(LogError::Header(_))) => assert!(end < 1000),
            Err(other) => panic!("{end}: {other}"),
        }
    }
    assert!(before > 1000, "most of it");
}

#[test]
fn the_listing_names_registers_commands_and_places() {
    let (log, _) = record(8, 1500);
    let lines = Arc::new(Mutex::new(String::new()));
    let shown = lines.clone();
    let options = Options {
        seen: Some(Box::new(move |number, line| {
            *shown.lock().unwrap() += &format!("{number} {line}\n");
        })),
        ..Default::default()
    };
    replay(Box::new(Cursor::new(log)), options).expect("the same");
    let lines = lines.lock().unwrap();
    for part in [
        "mmio write CTX_TABLE = 0x1000",
        "mmio write doorbell 2 = 0x1",
        "read invalidation queue[0], 32 bytes: ContextSync kind=0x3",
        "read context table[1], 64 bytes: entry flags=",
        "load u32 kernel shadow iq_tail: 0x",
        "load u32 context 3 shadow tail: 0x",
        "store u64 kernel shadow wait[0] = 0x",
        "write page request ring[0], 32 bytes: Page",
        "interrupt Completion",
        "= idle",
        "end {",
    ] {
        assert!(lines.contains(part), "{part} is not in\n{}", &lines[..8000]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..Default::default() })]

    #[test]
    fn a_recorded_run_is_replayed_to_the_same_end(seed: u64) {
        let (log, outcome) = record(seed, 2000);
        let replayed = replayed(log, None).expect("the same");
        prop_assert_eq!(replayed.ended, Ended::Complete);
        prop_assert_eq!(replayed.totals, outcome.totals);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..Default::default() })]

    #[test]
    fn damage_is_a_named_error(at: prop::sample::Index, bit in 0..8u32) {
        static LOG: OnceLock<Vec<u8>> = OnceLock::new();
        let mut log = LOG.get_or_init(|| record(9, 300).0).clone();
        let at = at.index(log.len());
        log[at] ^= 1 << bit;
        match replayed(log, None) {
            Err(ReplayError::Log(_)) => {}
            // The length of a block: it says that it ends after the file.
            Ok(Replayed { ended: Ended::Cut, .. }) => {}
            other => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn senseless_entries_are_named_errors(bytes in prop::collection::vec(any::<u8>(), 1..3000)) {
        let mut log = take_apart(&record(10, 1).0).header;
        log.extend((bytes.len() as u32).to_le_bytes());
        let number = crc32c::crc32c(&0u64.to_le_bytes());
        log.extend(crc32c::crc32c_append(number, &bytes).to_le_bytes());
        log.extend(&bytes);
        match replayed(log, None) {
            Err(_) => {}
            // Some bytes are calls, such as a reset.
            Ok(replayed) => prop_assert_eq!(replayed.ended, Ended::Cut),
        }
    }
}
