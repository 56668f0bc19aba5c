//! The guest's console, watched for reports of the kernel.
//!
//! Only the kernel's own lines count (they begin with a time stamp); what a program prints on the
//! console decides nothing.

use std::collections::VecDeque;

/// Lines kept for context when a guest dies without a report.
const KEPT_LINES: usize = 60;
/// A report longer than this is cut.
const REPORT_LINES: usize = 120;
/// Reports kept; the first ones matter most.
const REPORTS: usize = 20;
/// A longer line is cut; a guest must not be able to fill the rig's memory.
const LINE_BYTES: usize = 4096;

/// Texts that begin a report, anywhere in a kernel line.
const SIGNS: &[&str] = &[
    "Kernel panic",
    "Oops:",
    "BUG:",
    "WARNING:",
    "kernel BUG at",
    "general protection fault",
    "double fault",
    "possible circular locking",
    "possible recursive locking",
    "INFO: possible",
    "inconsistent lock state",
    "suspicious RCU usage",
    "sleeping function called",
    "bad unlock balance",
    "held lock freed",
    "Invalid wait context",
    "KASAN:",
    "KCSAN:",
    "KFENCE:",
    "UBSAN:",
    "blocked for more than",
    "soft lockup",
    "hard LOCKUP",
    "detected stall",
    "self-detected stall",
    "list_add corruption",
    "list_del corruption",
    "ODEBUG:",
    "INFO: trying to register non-static key",
    "DEBUG_LOCKS_WARN_ON",
    "kmemleak: unreferenced object",
    // A free page, or an object, was written to.
    "pagealloc: memory corruption",
    "pagealloc: single bit error",
    "refcount_t:",
    // The kernel's own tests.
    ": EXPECTATION FAILED at",
    ": ASSERTION FAILED at",
    // The driver gave the device up: an acknowledgement did not come, or it broke the rules.
    "the device is fenced off",
];

/// How the allocator's reports on its objects begin: `BUG kmalloc-64 (Not tainted): …`.
const SLAB: &str = "BUG ";

/// Texts that end a report.
const ENDS: &[&str] = &["---[ end", "</TASK>"];
/// What ends a report of a sanitizer, which goes on behind its first trace: who allocated, who freed.
const RULE: &str = "==========";
/// Kmemleak's lines, which have nothing that ends them.
const LEAK: &str = "kmemleak:";
/// How its lines begin that show what is in the memory.
const LEAK_BYTES: &str = "    ";

/// What the kernel said about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The lines, time stamps taken off.
    pub lines: Vec<String>,
}

/// Takes the console's bytes and finds the reports in them.
#[derive(Default)]
pub struct Watcher {
    line: Vec<u8>,
    kept: VecDeque<String>,
    reports: Vec<Report>,
    /// Whether the last report is still going on.
    open: bool,
}

impl Watcher {
    /// Takes the next piece, cut anywhere.
    pub fn feed(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match byte {
                b'\n' => self.end_line(),
                b'\r' => {}
                _ if self.line.len() < LINE_BYTES => self.line.push(*byte),
                _ => {}
            }
        }
    }

    /// The console is closed; what is left counts as a line.
    pub fn finish(&mut self) {
        if !self.line.is_empty() {
            self.end_line();
        }
    }

    /// All reports so far.
    pub fn reports(&self) -> &[Report] {
        &self.reports
    }

    /// The last lines, for a guest that died without a word.
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        self.kept
            .iter()
            .skip(self.kept.len().saturating_sub(count))
            .cloned()
            .collect()
    }

    fn end_line(&mut self) {
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
        if self.kept.len() == KEPT_LINES {
            self.kept.pop_front();
        }
        self.kept.push_back(line.clone());
        let Some(text) = kernel_text(&line) else {
            return;
        };
        let begins = SIGNS.iter().any(|sign| text.contains(sign)) || text.starts_with(SLAB);
        if self.open
            && self.about_leaks()
            && ![LEAK, LEAK_BYTES]
                .iter()
                .any(|start| text.starts_with(start))
        {
            self.open = false;
        }
        if begins && !self.open {
            self.open = self.reports.len() < REPORTS;
            if self.open {
                self.reports.push(Report::default());
            }
        }
        if self.open
            && let Some(report) = self.reports.last_mut()
        {
            let sanitizer = report.lines.first().is_some_and(|first| sanitizers(first));
            report.lines.push(text.to_owned());
            let ends = match sanitizer {
                true => text.starts_with(RULE),
                false => ENDS.iter().any(|end| text.contains(end)),
            };
            self.open = !ends && report.lines.len() < REPORT_LINES;
        }
    }

    /// Whether the last report is one of kmemleak.
    fn about_leaks(&self) -> bool {
        let first = self.reports.last().and_then(|report| report.lines.first());
        first.is_some_and(|line| line.starts_with(LEAK))
    }
}

/// Whether a report that begins with this line is one of those that a rule ends.
fn sanitizers(first: &str) -> bool {
    first.starts_with("BUG: KASAN:") || first.starts_with("BUG: KCSAN:")
}

/// A kernel line without its time stamp `[   12.345678] ` (and, with CONFIG_PRINTK_CALLER, the
/// caller); `None` for other lines.
fn kernel_text(line: &str) -> Option<&str> {
    let start = line.find('[')?;
    // Printed over what a program left unfinished on its line.
    let (stamp, text) = line[start + 1..].split_once(']')?;
    let (seconds, fraction) = stamp.trim_start().split_once('.')?;
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(seconds) || fraction.len() != 6 || !digits(fraction) {
        return None;
    }
    Some(text.strip_prefix(' ').unwrap_or(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(text: &str) -> Watcher {
        let mut watcher = Watcher::default();
        // Cut in pieces, as a pipe does.
        for piece in text.as_bytes().chunks(7) {
            watcher.feed(piece);
        }
        watcher.finish();
        watcher
    }

    const WARNING: &str = "[    1.000000] all is well\r\n\
        [    2.000000] ------------[ cut here ]------------\r\n\
        [    2.000001] WARNING: CPU: 1 PID: 77 at mm/x.c:12 f+0x1/0x2\r\n\
        [    2.000002] Call Trace:\r\n\
        [    2.000003]  <TASK>\r\n\
        [    2.000004]  g+0x3/0x4\r\n\
        [    2.000005]  </TASK>\r\n\
        [    2.000006] ---[ end trace 0000000000000000 ]---\r\n\
        [    3.000000] all is well again\r\n";

    #[test]
    fn a_warning_is_a_report_with_its_trace_and_nothing_else() {
        let watcher = watch(WARNING);
        assert_eq!(watcher.reports().len(), 1);
        let lines = &watcher.reports()[0].lines;
        assert_eq!(lines[0], "WARNING: CPU: 1 PID: 77 at mm/x.c:12 f+0x1/0x2");
        assert_eq!(lines.last().unwrap(), " </TASK>");
    }

    #[test]
    fn each_kind_of_report_is_found() {
        let samples = [
            "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100",
            "Oops: Oops: 0002 [#1] PREEMPT SMP NOPTI",
            "BUG: unable to handle page fault for address: ffff888100000000",
            "BUG: Bad page state in process x  pfn:01234",
            "WARNING: possible circular locking dependency detected",
            "WARNING: inconsistent lock state",
            "WARNING: suspicious RCU usage",
            "BUG: sleeping function called from invalid context at mm/x.c:1",
            "BUG: KASAN: slab-use-after-free in f+0x1/0x2",
            "UBSAN: array-index-out-of-bounds in x.c:1:2",
            "INFO: task x:12 blocked for more than 120 seconds.",
            "watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [x:12]",
            "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "rcu: INFO: rcu_preempt self-detected stall on CPU",
            "BUG: pte_notifier: page freed while a device maps it: pfn 0x1234",
            "BUG: KCSAN: data-race in f / g",
            "UBSAN: shift-out-of-bounds in x.c:1:2",
            "[ BUG: Invalid wait context ]",
            "WARNING: possible recursive locking detected",
            "WARNING: possible irq lock inversion dependency detected",
            "WARNING: held lock freed!",
            "WARNING: bad unlock balance detected!",
            "INFO: trying to register non-static key.",
            "kmemleak: unreferenced object 0xffff888007a3c340 (size 64):",
            "pagealloc: memory corruption",
            "BUG kmalloc-64 (Tainted: G           O      ): Poison overwritten",
            "BUG extlb_range (Not tainted): Objects remaining in extlb_range on __kmem_cache_shutdown()",
            "page_owner: BUG: Bad page map in process x  pte:1 pmd:2",
            "kernel BUG at mm/page_table_check.c:101!",
            "list_add corruption. prev->next should be next (1), but was 2. (prev=3).",
            "    # pte_notifier_first: EXPECTATION FAILED at mm/tests/x.c:12",
        ];
        for sample in samples {
            let watcher = watch(&format!("[    1.234567] {sample}\n"));
            assert_eq!(watcher.reports().len(), 1, "{sample}");
        }
    }

    #[test]
    fn a_sanitizers_report_goes_on_to_who_allocated_and_who_freed() {
        let watcher = watch(
            "[    1.000000] ==================================================\r\n\
             [    1.000001] BUG: KASAN: slab-use-after-free in f+0x1/0x2 [extlb]\r\n\
             [    1.000002] Write of size 4 at addr ffff888005e4d340 by task insmod/77\r\n\
             [    1.000003] Call Trace:\r\n\
             [    1.000004]  <TASK>\r\n\
             [    1.000005]  </TASK>\r\n\
             [    1.000006] Allocated by task 77:\r\n\
             [    1.000007] Freed by task 77:\r\n\
             [    1.000008] ==================================================\r\n\
             [    1.000009] Disabling lock debugging due to kernel taint\r\n",
        );
        assert_eq!(watcher.reports().len(), 1);
        let lines = &watcher.reports()[0].lines;
        assert!(lines[0].starts_with("BUG: KASAN: slab-use-after-free"));
        assert!(lines.contains(&"Freed by task 77:".to_owned()), "{lines:?}");
        assert!(lines.last().unwrap().starts_with(RULE), "{lines:?}");
    }

    #[test]
    fn leaks_are_one_report_and_end_where_something_else_is_said() {
        let watcher = watch(
            "[    1.000000] kmemleak: unreferenced object 0xffff888007a3c340 (size 64):\r\n\
             [    1.000001] kmemleak:   comm \"insmod\", pid 77, jiffies 4294673345\r\n\
             [    1.000002] kmemleak:     f+0x1/0x2 [extlb]\r\n\
             [    1.000003]     00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00  ................\r\n\
             [    1.000003] kmemleak: unreferenced object 0xffff888007a3c380 (size 64):\r\n\
             [    1.000004] reboot: Power down\r\n\
             [    1.000005] WARNING: CPU: 1 PID: 77 at mm/x.c:12 f+0x1/0x2\r\n",
        );
        let reports = watcher.reports();
        assert_eq!(reports.len(), 2, "{reports:?}");
        assert_eq!(reports[0].lines.len(), 5);
        assert!(reports[1].lines[0].starts_with("WARNING:"));
    }

    #[test]
    fn harmless_lines_and_programs_words_are_no_reports() {
        let samples = [
            "[    1.234567] Out of memory: Killed process 12 (x) total-vm:1kB",
            "[    1.234567] oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null)",
            "[    1.234567] x[12]: segfault at 0 ip 0 sp 0 error 4 in x[1,2]",
            "[    1.234567] clocksource: Marking clocksource 'tsc' as unstable",
            "[    1.234567] kmemleak: Kernel memory leak detector initialized (mem pool available: 1)",
            "[    1.234567] kmemleak: Automatic memory scanning thread started",
            "WARNING: a program said this",
            "Kernel panic, said a program",
            "[not a stamp] BUG: x",
        ];
        for sample in samples {
            assert!(
                watch(&format!("{sample}\n")).reports().is_empty(),
                "{sample}"
            );
        }
    }

    #[test]
    fn a_report_after_half_a_line_of_a_program_is_found() {
        let watcher = watch("prompt> [   10.000000] BUG: Bad page map in process x\n");
        assert_eq!(watcher.reports().len(), 1);
    }

    #[test]
    fn a_cut_report_is_kept() {
        let watcher = watch("[    1.234567] Kernel panic - not sy");
        assert_eq!(watcher.reports()[0].lines, ["Kernel panic - not sy"]);
    }

    #[test]
    fn a_babbling_guest_does_not_fill_the_memory() {
        let mut watcher = Watcher::default();
        for _ in 0..2000 {
            watcher.feed(&[b'x'; 5000]);
            watcher.feed(b"\n[    1.234567] WARNING: again\n");
        }
        assert!(watcher.reports().len() <= REPORTS);
        assert!(
            watcher
                .reports()
                .iter()
                .all(|report| report.lines.len() <= REPORT_LINES)
        );
        assert_eq!(watcher.last_lines(1000).len(), KEPT_LINES);
        assert!(
            watcher
                .last_lines(1000)
                .iter()
                .all(|line| line.len() <= LINE_BYTES)
        );
    }
}
