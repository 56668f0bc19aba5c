//! Time limits: a step that takes too long ends the program, and shows what the machine is at.

use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a step may take without a sign of life. A machine may be slow, emulated and busy; what
/// hangs, hangs for ever.
const LIMIT: Duration = Duration::from_secs(400);

struct State {
    what: String,
    since: Instant,
    over: bool,
}

/// Watches over the steps of one kind of abuse.
pub struct Watch(Arc<Mutex<State>>);

impl Watch {
    /// `verdict` is the line that says that it failed.
    pub fn new(verdict: String) -> Self {
        let state = Arc::new(Mutex::new(State {
            what: "start".to_owned(),
            since: Instant::now(),
            over: false,
        }));
        let watched = state.clone();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_millis(200));
                let state = watched.lock().unwrap_or_else(PoisonError::into_inner);
                if state.over {
                    return;
                }
                if state.since.elapsed() > LIMIT {
                    show_machine();
                    println!("{verdict} # nothing moves for {LIMIT:?}: {}", state.what);
                    std::process::exit(1);
                }
            }
        });
        Self(state)
    }

    /// The next step begins.
    pub fn step(&self, what: &str) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        what.clone_into(&mut state.what);
        state.since = Instant::now();
    }

    /// The step is not done, but goes on.
    pub fn alive(&self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.since = Instant::now();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.over = true;
    }
}

/// Where every process of this program is, and what the driver has.
fn show_machine() {
    let device = "/sys/kernel/debug/extlb/extlb0";
    for file in ["contexts", "stats"] {
        let text = fs::read_to_string(format!("{device}/{file}")).unwrap_or_default();
        text.lines().for_each(|line| println!("# {file}: {line}"));
    }
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let threads = fs::read_dir(process.path().join("task"));
        for thread in threads.into_iter().flatten().flatten() {
            let read = |name| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
            let (name, stat) = (read("comm"), read("stat"));
            let state = stat.rsplit(')').next().unwrap_or_default().trim();
            let ours = name.starts_with("extlb");
            if ours || state.starts_with('D') {
                let id = thread.file_name();
                let state = state.get(..1).unwrap_or("?");
                println!("# thread {} {} {state}", id.display(), name.trim());
                read("stack")
                    .lines()
                    .for_each(|line| println!("#   {line}"));
            }
        }
    }
    // Locks and blocked tasks, into the kernel's log.
    for key in ["w", "d"] {
        let _ = fs::write("/proc/sysrq-trigger", key);
    }
}
