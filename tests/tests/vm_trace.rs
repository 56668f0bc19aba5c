//! What the kernel and the driver tell by tracepoints, on the way of a page to the device and back.

use std::collections::BTreeMap;

use extlb_tests::{output, sections, transcript};

const RIG: &str = env!("CARGO_BIN_EXE_extlb-under-test");
const CHANGES: &str = env!("CARGO_BIN_EXE_extlb-changes");

/// Records all of both while the device is given pages that are unmapped then.
const SCRIPT: &str = "set -e; cd /sys/kernel/debug/tracing; \
    echo 1 > events/pte_notifier/enable; echo 1 > events/extlb/enable; \
    CHANGES munmap; \
    echo 0 > events/enable; echo == trace; cat trace";
/// Pages of the row.
const PAGES: u64 = 16;

/// One line of the trace: `name: key=value …`.
#[derive(Debug)]
struct Event<'a> {
    name: &'a str,
    fields: BTreeMap<&'a str, &'a str>,
}

impl<'a> Event<'a> {
    /// `None` for lines that are none of ours.
    fn parse(line: &'a str) -> Option<Self> {
        let names = ["pte_notifier_", "extlb_"];
        let at = names
            .iter()
            .find_map(|name| line.find(&format!(": {name}")))?;
        let (name, fields) = line[at + 2..].split_once(": ")?;
        let fields = fields.split(' ').filter_map(|field| field.split_once('='));
        Some(Self {
            name,
            fields: fields.collect(),
        })
    }

    fn number(&self, key: &str) -> u64 {
        let value = self.fields.get(key).copied().unwrap_or_default();
        let parsed = match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => value.parse(),
        };
        parsed.unwrap_or_else(|_| panic!("{key}: {self:?}"))
    }
}

#[test]
fn a_page_is_traced_on_its_way_to_the_device_and_back() {
    let script = SCRIPT.replace("CHANGES", CHANGES);
    let got = output(RIG, &["run", "--add", CHANGES, "--", "sh", "-c", &script]).unwrap();
    assert_eq!(got.status.code(), Some(0), "{}", transcript(&got));
    let said = String::from_utf8_lossy(&got.stdout);
    let parts = sections(&said);
    let trace = parts["trace"];
    let events: Vec<_> = trace.lines().filter_map(Event::parse).collect();
    let find = |from: usize, name: &str, wanted: &dyn Fn(&Event<'_>) -> bool| {
        let found = events[from..]
            .iter()
            .position(|e| e.name == name && wanted(e));
        from + found.unwrap_or_else(|| panic!("no {name} from event {from} on:\n{trace}"))
    };

    // What was unmapped: the only piece of a registration that is closed while there is a context.
    let close = find(0, "pte_notifier_close", &|e| {
        e.number("end") - e.number("start") == PAGES << 12
    });
    let (start, end) = (events[close].number("start"), events[close].number("end"));

    // Asked for, installed, answered.
    let covers = |e: &Event<'_>| e.number("iova") == start;
    let request = find(0, "extlb_page_request", &covers);
    assert_eq!(events[request].number("write"), 1, "{trace}");
    let fill = find(request, "pte_notifier_fill", &|e| e.number("addr") == start);
    assert_eq!(events[fill].number("writable"), 1, "{trace}");
    assert_eq!(events[fill].number("error"), 0, "{trace}");
    assert_ne!(events[fill].number("pfn"), 0, "{trace}");
    let response = find(fill, "extlb_page_response", &|e| {
        e.fields["group"] == events[request].fields["group"]
    });
    assert_eq!(events[response].fields["response"], "success", "{trace}");
    let context = events[request].fields["context"];
    assert_eq!(events[response].fields["context"], context, "{trace}");

    // Taken back: told, acknowledged, and only then closed. By then each page had been filled.
    let clear = find(response, "pte_notifier_clear", &|e| {
        e.number("start") == start
    });
    assert_eq!(events[clear].number("end"), end, "{trace}");
    let shootdown = find(clear, "extlb_shootdown", &|e| e.number("start") == start);
    assert_eq!(events[shootdown].number("end"), end, "{trace}");
    assert_eq!(events[shootdown].number("pages"), PAGES, "{trace}");
    assert_eq!(events[shootdown].fields["context"], context, "{trace}");
    let ns = events[shootdown].number("ns");
    assert!(0 < ns && ns < 60_000_000_000, "{trace}");
    assert!(shootdown < close, "{trace}");
    for page in 0..PAGES {
        let filled = find(0, "pte_notifier_fill", &|e| {
            e.number("addr") == start + (page << 12)
        });
        assert!(filled < clear, "{trace}");
    }
    for event in [&events[fill], &events[clear], &events[close]] {
        assert_eq!(event.fields["pn"], events[fill].fields["pn"], "{trace}");
    }
}
