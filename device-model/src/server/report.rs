//! The report: one JSON object a line, each flushed, so that it holds what happened even if the
//! process is killed.

use std::io::Write;
use std::sync::Mutex;

use extlb_spec::Gpa;
use serde_json::{Value, json};

use crate::counters::Totals;
use crate::oracle::StaleAccess;
use crate::ports::{Event, Trace};
use crate::sync::lock;

/// Lines of events that are written; the rest is counted.
const MAX_LINES: u64 = 1000;
/// Of these, lines of bus errors: a program can make any number of them, and must not crowd out
/// what the report is for.
const MAX_BUS_LINES: u64 = 100;

struct Inner {
    out: Box<dyn Write + Send>,
    lines: u64,
    bus_lines: u64,
    left_out: u64,
}

/// Writes events.
pub(super) struct Report(Mutex<Inner>);

impl Report {
    pub(super) fn new(out: Box<dyn Write + Send>) -> Self {
        Self(Mutex::new(Inner {
            out,
            lines: 0,
            bus_lines: 0,
            left_out: 0,
        }))
    }

    /// The end of a session.
    pub(super) fn summary(&self, totals: Totals) {
        let mut inner = lock(&self.0);
        let mut line = serde_json::to_value(totals).unwrap_or_default();
        if let Value::Object(fields) = &mut line {
            fields.insert("event".into(), "summary".into());
            fields.insert("events_left_out".into(), inner.left_out.into());
        }
        inner.write(&line);
        inner.lines = 0;
        inner.bus_lines = 0;
        inner.left_out = 0;
    }
}

impl Inner {
    fn write(&mut self, line: &Value) {
        // A report that cannot be written must not stop the device; the registers have it too.
        let _ = writeln!(self.out, "{line}").and_then(|()| self.out.flush());
    }
}

impl Trace for Report {
    fn event(&self, event: Event) {
        let mut inner = lock(&self.0);
        let bus = u64::from(matches!(event, Event::BusError { .. }));
        if inner.lines >= MAX_LINES || inner.bus_lines + bus > MAX_BUS_LINES {
            inner.left_out += 1;
            return;
        }
        inner.lines += 1;
        inner.bus_lines += bus;
        inner.write(&line(&event));
    }
}

fn line(event: &Event) -> Value {
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
            "error": format!("{error:?}"),
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
        Event::Fatal { error, info } => json!({
            "event": "fatal",
            "error": format!("{error:?}"),
            "info": hex(*info),
        }),
    }
}

fn stale(access: &StaleAccess) -> Value {
    json!({
        "event": "stale_access",
        "kind": format!("{:?}", access.kind),
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
    use extlb_spec::Iova;
    use extlb_spec::regs::StaleKind;

    #[test]
    fn a_stale_access_is_one_line_with_its_numbers() {
        let value = stale(&StaleAccess {
            kind: StaleKind::NotInvalidated,
            context: 1,
            iova: Iova(0x7000),
            device_gpa: Gpa(0x2000),
            cpu_gpa: None,
            write: true,
            fill: 5,
            invalidation: 6,
        });
        assert_eq!(value["event"], "stale_access");
        assert_eq!(value["kind"], "NotInvalidated");
        assert_eq!(value["iova"], "0x7000");
        assert!(value["cpu_gpa"].is_null());
    }
}
