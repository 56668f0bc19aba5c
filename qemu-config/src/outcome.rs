//! How a run ended, and the exit code for it.

use extlb_guest_protocol::Exit;
use serde_json::Value;

use crate::console::Report;

/// Exit code: a demonstration or a test failed.
pub const FAILED: i32 = 1;
/// Exit code: the rig could not run (EX_UNAVAILABLE).
pub const UNAVAILABLE: i32 = 69;
/// Exit code: the guest died, or reported a fault of its own (EX_SOFTWARE).
pub const GUEST_DIED: i32 = 70;
/// Exit code: the time was up, as of timeout(1).
pub const TIMED_OUT: i32 = 124;

/// How the program's run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It ended by itself.
    Exited(Exit),
    /// The guest, QEMU or the device went away under it.
    Died(String),
    /// It took longer than allowed.
    TimedOut,
    /// Nobody reads the rig's output any more.
    OutputClosed,
}

/// Everything to be said about a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How the program's run ended.
    pub end: End,
    /// What the guest's kernel reported.
    pub kernel_reports: Vec<Report>,
    /// Accesses of the device to pages that were taken back, as the device recorded them; it does
    /// not record all of many.
    pub stale_accesses: Vec<Value>,
    /// How many there were.
    pub stale_count: u64,
    /// The device's own summary, if it wrote one.
    pub device_summary: Option<Value>,
    /// Last lines of the console, of QEMU and of the device, for a death without a report.
    pub last_words: Vec<String>,
}

impl Outcome {
    /// Whether the machine stayed sound, whatever the program did.
    pub fn sound(&self) -> bool {
        !matches!(self.end, End::Died(_)) && self.kernel_reports.is_empty() && self.stale_count == 0
    }

    /// The exit code.
    pub fn code(&self) -> i32 {
        if !self.sound() {
            return GUEST_DIED;
        }
        match &self.end {
            End::Exited(exit) => exit.shell_code(),
            End::TimedOut => TIMED_OUT,
            End::OutputClosed => 128 + nix::sys::signal::Signal::SIGPIPE as i32,
            End::Died(_) => GUEST_DIED,
        }
    }

    /// What people have to be told, line by line; nothing for a sound run that ended by itself.
    pub fn explanation(&self) -> Vec<String> {
        let mut lines = Vec::new();
        match &self.end {
            End::Died(why) => lines.push(format!("extlb: {why}")),
            End::TimedOut => lines.push("extlb: the time was up; the guest was ended".to_owned()),
            End::Exited(_) | End::OutputClosed => {}
        }
        for report in &self.kernel_reports {
            lines.push("extlb: the guest's kernel reported:".to_owned());
            lines.extend(report.lines.iter().map(|line| format!("    {line}")));
        }
        for stale in self.stale_accesses.iter().take(SHOWN_STALE) {
            lines.push(format!("extlb: stale access by the device: {stale}"));
        }
        let shown = self.stale_accesses.len().min(SHOWN_STALE) as u64;
        if self.stale_count > shown {
            lines.push(format!(
                "extlb: and {} more stale accesses",
                self.stale_count - shown
            ));
        }
        if matches!(self.end, End::Died(_)) && self.kernel_reports.is_empty() {
            lines.extend(self.last_words.iter().map(|line| format!("    {line}")));
        }
        lines
    }
}

/// Stale accesses shown one by one.
const SHOWN_STALE: usize = 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(end: End) -> Outcome {
        Outcome {
            end,
            kernel_reports: vec![],
            stale_accesses: vec![],
            stale_count: 0,
            device_summary: None,
            last_words: vec!["last".into()],
        }
    }

    #[test]
    fn codes_pass_through_unless_the_machine_is_unsound() {
        assert_eq!(outcome(End::Exited(Exit::Code(0))).code(), 0);
        assert_eq!(outcome(End::Exited(Exit::Code(17))).code(), 17);
        assert_eq!(outcome(End::Exited(Exit::Signal(11))).code(), 139);
        assert_eq!(outcome(End::TimedOut).code(), 124);
        assert_eq!(outcome(End::Died("x".into())).code(), 70);
        let mut reported = outcome(End::Exited(Exit::Code(0)));
        reported.kernel_reports.push(Report {
            lines: vec!["BUG: x".into()],
        });
        assert_eq!(reported.code(), 70);
        assert!(reported.explanation().join("\n").contains("BUG: x"));
        let mut stale = outcome(End::TimedOut);
        stale.stale_accesses.push(serde_json::json!({"iova": 4096}));
        stale.stale_count = 3;
        assert_eq!(stale.code(), 70);
        assert!(stale.explanation().join("\n").contains("and 2 more"));
        assert!(stale.explanation().join("\n").contains("4096"));
    }

    #[test]
    fn a_sound_run_says_nothing_and_a_silent_death_shows_last_words() {
        assert!(outcome(End::Exited(Exit::Code(3))).explanation().is_empty());
        let died = outcome(End::Died("QEMU died: signal 9".into())).explanation();
        assert_eq!(died, ["extlb: QEMU died: signal 9", "    last"]);
    }
}
