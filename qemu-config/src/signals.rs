//! The rig's own end by a signal: everything it started ends too, and its run folder goes.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};

/// Folders to be removed when a signal ends the rig.
static FOLDERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
/// Undoes what was done to the terminal.
static TERMINAL: Mutex<Option<nix::sys::termios::Termios>> = Mutex::new(None);

/// Takes the signals that end a program over. To be called first, before there are other threads
/// (they inherit the mask).
pub fn handle() -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("cannot block signals")?;
    let wait = move || {
        // Children have asked the kernel to be killed when this process ends.
        let code = match signals.wait() {
            Ok(signal) => 128 + signal as i32,
            Err(_) => return,
        };
        restore_terminal();
        let folders = std::mem::take(&mut *FOLDERS.lock().unwrap_or_else(PoisonError::into_inner));
        for folder in folders {
            let _ = std::fs::remove_dir_all(folder);
        }
        std::process::exit(code);
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(wait)
        .context("cannot start a thread")?;
    Ok(())
}

/// Has a folder removed if a signal ends the rig.
pub fn remove_at_end(folder: &Path) {
    FOLDERS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(folder.to_path_buf());
}

/// The folder was removed.
pub fn removed(folder: &Path) {
    FOLDERS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .retain(|known| known != folder);
}

/// Puts the terminal into raw mode until [`restore_terminal`], or the rig's end.
pub fn raw_terminal() -> Result<()> {
    use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
    let stdin = std::io::stdin();
    let before = tcgetattr(&stdin).context("standard input is no terminal")?;
    let mut raw = before.clone();
    cfmakeraw(&mut raw);
    *TERMINAL.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
    tcsetattr(&stdin, SetArg::TCSANOW, &raw).context("cannot set the terminal's mode")
}

/// Undoes [`raw_terminal`].
pub fn restore_terminal() {
    use nix::sys::termios::{SetArg, tcsetattr};
    let before = TERMINAL
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    if let Some(before) = before {
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &before);
    }
}
