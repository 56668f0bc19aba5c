//! The log: one JSON object a line in the report, each flushed, so that it holds what happened
//! even if the process is killed; and the same in words on standard error.

use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use extlb_spec::Gpa;
use serde_json::{Value, json};

use crate::counters::Totals;
use crate::oracle::StaleAccess;
use crate::ports::{Event, Trace};
use crate::sync::lock;

/// Lines of events that are written; the rest is counted.
const MAX_LINES: u64 = 1000;
/// Of these, lines of bus errors: a program can make any number of them, and must not crowd out
/// what the report is for. The same goes for stops.
const MAX_BUS_LINES: u64 = 100;
/// Of these, lines of injected faults, likewise.
const MAX_FAULT_LINES: u64 = 400;
/// Sentences on standard error that may come in a row, and how long until one more may.
const BURST: u32 = 20;
const PACE: Duration = Duration::from_secs(1);

/// Says what may be said now, so that a guest cannot flood its host's log.
struct Pace {
    left: u32,
    since: Instant,
    silent: u64,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self {
            left: BURST,
            since: now,
            silent: 0,
        }
    }

    /// Whether one more may be said, and if so how many were not since the last.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let passed = now.saturating_duration_since(self.since).as_millis() / PACE.as_millis();
        if passed > 0 {
            self.left = BURST.min(self.left.saturating_add(passed.try_into().unwrap_or(BURST)));
            self.since = now;
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Some(std::mem::take(&mut self.silent))
            }
            None => {
                self.silent += 1;
                None
            }
        }
    }
}

/// Where all devices' lines go.
#[derive(Clone)]
pub(super) struct Sink(Arc<Mutex<Box<dyn Write + Send>>>);

impl Sink {
    pub(super) fn new(out: Box<dyn Write + Send>) -> Self {
        Self(Arc::new(Mutex::new(out)))
    }
}

struct Inner {
    lines: u64,
    bus_lines: u64,
    faults: u64,
    left_out: u64,
    pace: Pace,
}

/// Writes the events of one device, which each line names.
pub(super) struct Report {
    sink: Sink,
    device: String,
    inner: Mutex<Inner>,
}

impl Report {
    pub(super) fn new(sink: Sink, device: &str) -> Self {
        Self {
            sink,
            device: device.to_owned(),
            inner: Mutex::new(Inner {
                lines: 0,
                bus_lines: 0,
                faults: 0,
                left_out: 0,
                pace: Pace::new(Instant::now()),
            }),
        }
    }

    fn write(&self, mut line: Value) {
        if let Value::Object(fields) = &mut line {
            fields.insert("device".into(), self.device.as_str().into());
        }
        let mut out = lock(&self.sink.0);
        // A report that cannot be written must not stop the device; the registers have it too.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }

    /// The client has not answered a question about its memory.
    pub(super) fn no_answer(&self, question: &str, at: u64, len: usize) {
        let mut inner = lock(&self.inner);
        if inner.lines >= MAX_LINES {
            inner.left_out += 1;
            return;
        }
        inner.lines += 1;
        self.write(json!({
            "event": "no_answer",
            "question": question,
            "gpa": hex(at),
            "len": len,
        }));
    }

    /// The end of a session.
    pub(super) fn summary(&self, totals: Totals) {
        let mut inner = lock(&self.inner);
        let mut line = serde_json::to_value(totals).unwrap_or_default();
        if let Value::Object(fields) = &mut line {
            fields.insert("event".into(), "summary".into());
            fields.insert("faults_injected".into(), inner.faults.into());
            fields.insert("events_left_out".into(), inner.left_out.into());
        }
        self.write(line);
        inner.lines = 0;
        inner.bus_lines = 0;
        inner.faults = 0;
        inner.left_out = 0;
    }
}

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Report")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl Trace for Report {
    fn event(&self, event: Event) {
        let mut inner = lock(&self.inner);
        if let Some(silent) = inner.pace.take(Instant::now()) {
            say(&self.device, &event, silent);
        }
        let bus = u64::from(matches!(event, Event::BusError { .. } | Event::Stopped(_)));
        let fault = u64::from(matches!(event, Event::Injected(_)));
        inner.faults += fault;
        let crowds =
            inner.bus_lines + bus > MAX_BUS_LINES || fault > 0 && inner.faults > MAX_FAULT_LINES;
        if inner.lines >= MAX_LINES || crowds {
            inner.left_out += 1;
            return;
        }
        inner.lines += 1;
        inner.bus_lines += bus;
        self.write(line(&event));
    }
}

/// Standard error may be closed; that is no reason to stop.
fn say(device: &str, event: &Event, silent: u64) {
    let mut err = std::io::stderr().lock();
    if silent > 0 {
        let _ = writeln!(err, "extlb-device: {device}: {silent} events are not shown");
    }
    let _ = writeln!(err, "extlb-device: {device}: {event}");
}

fn line(event: &Event) -> Value {
    let mut line = fields(event);
    if let Value::Object(fields) = &mut line {
        fields.insert("message".into(), event.to_string().into());
    }
    line
}

fn fields(event: &Event) -> Value {
    match event {
        Event::Stale(access) => stale(access),
        Event::OracleOverflow => json!({ "event": "oracle_overflow" }),
        Event::ContextError {
            context,
            error,
            addr,
        } => json!({
            "event": "context_error",
            "context": context,
            "error": error.name(),
            "addr": hex(*addr),
        }),
        Event::BusError {
            context,
            iova,
            error,
        } => json!({
            "event": "bus_error",
            "context": context,
            "iova": hex(iova.0),
            "gpa": hex(error.addr.0),
            "len": error.len,
        }),
        Event::Injected(fault) => json!({
            "event": "fault",
            "kind": fault.kind.name(),
            "number": fault.number,
            "at_us": fault.at.as_micros() as u64,
            "to": fault.to,
        }),
        Event::Fatal { error, info } => json!({
            "event": "fatal",
            "error": error.name(),
            "info": hex(*info),
        }),
        Event::Stopped(stop) => json!({ "event": "stopped", "by": format!("{stop:?}") }),
        Event::SlowStop { waited } => json!({
            "event": "slow_stop",
            "waited_ms": u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
        }),
    }
}

fn stale(access: &StaleAccess) -> Value {
    json!({
        "event": "stale_access",
        "kind": access.kind.name(),
        "context": access.context,
        "iova": hex(access.iova.0),
        "device_gpa": hex(access.device_gpa.0),
        "cpu_gpa": access.cpu_gpa.map(|Gpa(gpa)| hex(gpa)),
        "write": access.write,
        "fill": access.fill,
        "invalidation": access.invalidation,
    })
}

fn hex(value: u64) -> String {
    format!("{value:#x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ports::{BusError, Stop};
    use extlb_spec::Iova;
    use extlb_spec::context::ContextError;
    use extlb_spec::regs::{FatalError, StaleKind};

    fn access(kind: StaleKind) -> StaleAccess {
        StaleAccess {
            kind,
            context: 1,
            iova: Iova(0x7000),
            device_gpa: Gpa(0x2000),
            cpu_gpa: None,
            write: true,
            fill: 5,
            invalidation: 6,
        }
    }

    #[test]
    fn a_stale_access_is_one_line_with_its_numbers() {
        let value = line(&Event::Stale(access(StaleKind::NotInvalidated)));
        assert_eq!(value["event"], "stale_access");
        assert_eq!(value["kind"], "NotInvalidated");
        assert_eq!(value["iova"], "0x7000");
        assert!(value["cpu_gpa"].is_null());
        let message = value["message"].as_str().expect("in words");
        for part in [
            "Context 1 wrote 0x7000",
            "0x2000",
            "fill 5",
            "invalidation 6",
        ] {
            assert!(message.contains(part), "{message}");
        }
    }

    /// Every event, with every value of the enums in it.
    fn events() -> Vec<Event> {
        let mut events = vec![
            Event::OracleOverflow,
            Event::BusError {
                context: 3,
                iova: Iova(0x1234),
                error: BusError {
                    addr: Gpa(0x5678),
                    len: 9,
                },
            },
            Event::SlowStop {
                waited: Duration::from_secs(2),
            },
        ];
        let raw = |values: &[extlb_spec::table::Value]| -> Vec<u32> {
            values.iter().map(|v| v.value as u32).collect()
        };
        for error in raw(FatalError::TABLE.values) {
            let error = FatalError::from_raw(error).expect("in the table");
            events.push(Event::Fatal { error, info: 0x42 });
        }
        for error in raw(ContextError::TABLE.values) {
            let error = ContextError::from_raw(error).expect("in the table");
            events.push(Event::ContextError {
                context: 7,
                error,
                addr: 0x42,
            });
        }
        for kind in raw(StaleKind::TABLE.values) {
            let kind = StaleKind::from_raw(kind).expect("in the table");
            events.push(Event::Stale(access(kind)));
        }
        events.extend([Stop::Disabled, Stop::Reset, Stop::BusMasterOff].map(Event::Stopped));
        events
    }

    #[test]
    fn every_event_is_told_in_sentences_of_its_own() {
        let mut seen = std::collections::HashSet::new();
        for event in events() {
            let value = line(&event);
            let message = value["message"].as_str().expect("in words").to_owned();
            assert!(message.len() > 60 && message.ends_with('.'), "{message}");
            assert!(
                !message.contains("  ") && !message.contains('\n'),
                "{message}"
            );
            assert!(!message.contains(".."), "{message}");
            // The words of the table, and the numbers.
            match &event {
                Event::Fatal { error, .. } => {
                    assert!(message.contains(&error.to_string()) && message.contains("0x42"));
                    assert_eq!(value["error"], error.name());
                }
                Event::ContextError { error, .. } => {
                    assert!(message.contains(&error.to_string()) && message.contains("0x42"));
                    assert!(message.contains("Context 7"));
                }
                Event::Stale(access) => assert!(message.contains(&access.kind.to_string())),
                Event::BusError { .. } => {
                    assert!(message.contains("0x1234") && message.contains("0x5678"));
                }
                _ => {}
            }
            assert!(seen.insert(message.clone()), "said twice: {message}");
        }
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        let begun = Instant::now();
        let mut pace = Pace::new(begun);
        let said = |pace: &mut Pace, now| (0..100).filter(|_| pace.take(now).is_some()).count();
        assert_eq!(said(&mut pace, begun), BURST as usize);
        assert_eq!(pace.take(begun + PACE), Some(100 - u64::from(BURST)));
        assert_eq!(pace.take(begun + PACE), None);
        assert_eq!(said(&mut pace, begun + PACE * 1000), BURST as usize);
    }
}
