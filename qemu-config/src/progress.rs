//! What a step is doing, for people: a live line on a terminal, else a line every few seconds.
//!
//! A step that ends within two seconds says nothing.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// A step shorter than this is not worth a line.
const QUIET: Duration = Duration::from_secs(2);
/// Between two lines when nobody watches live.
const LINE_EVERY: Duration = Duration::from_secs(10);
/// Between two updates of a live line.
const REDRAW_EVERY: Duration = Duration::from_millis(200);

/// A step under way. Dropped without [`Step::done`], it leaves its line as it is.
pub struct Step {
    name: String,
    start: Instant,
    shown: Option<Instant>,
    live: bool,
}

impl Step {
    /// Begins a step; `name` says what is done ("building the kernel").
    pub fn begin(name: impl Into<String>) -> Self {
        let live = std::io::stderr().is_terminal();
        Self {
            name: name.into(),
            start: Instant::now(),
            shown: None,
            live,
        }
    }

    /// How long the step has been going on.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// To be called often; `detail` (how far it is) is asked for only if a line is due.
    pub fn tick(&mut self, detail: impl FnOnce() -> String) {
        let due = match self.shown {
            None => self.elapsed() >= QUIET,
            Some(last) => last.elapsed() >= if self.live { REDRAW_EVERY } else { LINE_EVERY },
        };
        if due {
            self.shown = Some(Instant::now());
            self.print(&detail(), !self.live);
        }
    }

    /// Ends the step.
    pub fn done(self) {
        if self.shown.is_some() {
            self.print("done", true);
        }
    }

    fn print(&self, detail: &str, finish_line: bool) {
        let (clear, end) = match (self.live, finish_line) {
            (true, true) => ("\r\x1b[K", "\n"),
            (true, false) => ("\r\x1b[K", ""),
            (false, _) => ("", "\n"),
        };
        let separator = if detail.is_empty() { "" } else { ": " };
        let mut stderr = std::io::stderr().lock();
        let _ = write!(
            stderr,
            "{clear}extlb: {}{separator}{detail} ({}){end}",
            self.name,
            clock(self.elapsed())
        );
        let _ = stderr.flush();
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if self.live && self.shown.is_some() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

/// A duration as people read it: "7 s", "4 min 05 s".
pub fn clock(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        _ => format!("{} min {:02} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(clock(Duration::from_millis(7900)), "7 s");
        assert_eq!(clock(Duration::from_secs(245)), "4 min 05 s");
    }

    #[test]
    fn a_short_step_is_not_asked_how_far_it_is() {
        let mut step = Step::begin("x");
        step.tick(|| unreachable!("nothing is due within two seconds"));
        step.done();
    }
}
