//! A vfio-user server of one's own, which does not outlive whoever started it.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::error::{Error, Result};

/// How long a server may take until it listens.
const LIMIT: Duration = Duration::from_secs(10);

/// A process `extlb-device` with a socket in a folder of its own, which only this user can enter.
///
/// It ends when this value is dropped, when its client has left, and when this process ends, however
/// that comes about.
#[derive(Debug)]
pub struct SocketServer {
    folder: TempDir,
    pid: u32,
    /// Whose loss makes the keeper end the process.
    keep: Option<Sender<()>>,
    keeper: Option<JoinHandle<()>>,
}

impl SocketServer {
    /// Starts `binary`, which takes the options of `extlb-device`, with a device as `config` says
    /// (TOML, as of `extlb-device --config`; empty for the defaults), and waits until it listens.
    ///
    /// # Errors
    /// When it cannot be started, or ends, or does not listen within ten seconds. What it says about
    /// that is on standard error.
    pub fn spawn(binary: impl AsRef<Path>, config: &str) -> Result<Self> {
        let binary = binary.as_ref().to_owned();
        let failed = |error: &dyn std::fmt::Display| {
            Error::Hardware(format!(
                "{}: {error}; `cargo build -p extlb-device` makes the server",
                binary.display()
            ))
        };
        let folder = tempfile::Builder::new()
            .prefix("extlb-")
            .tempdir()
            .map_err(|error| failed(&error))?;
        let file = folder.path().join("device.toml");
        std::fs::write(&file, config).map_err(|error| failed(&error))?;
        let mut command = Command::new(&binary);
        command
            .arg("--once")
            .args([
                "--socket-path".as_ref(),
                folder.path().join(SOCKET).as_os_str(),
            ])
            .args(["--config".as_ref(), file.as_os_str()])
            .args(["--report".as_ref(), folder.path().join(REPORT).as_os_str()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let (keep, kept) = channel();
        let (say, started) = channel();
        let keeper = std::thread::Builder::new()
            .name("device server".into())
            .spawn(move || keep_child(&mut command, &say, &kept))
            .map_err(|error| failed(&error))?;
        let (pid, stdout) = match started.recv() {
            Ok(Ok(started)) => started,
            Ok(Err(error)) => return Err(failed(&error)),
            Err(error) => return Err(failed(&error)),
        };
        // From here on dropping it ends the process.
        let server = Self {
            folder,
            pid,
            keep: Some(keep),
            keeper: Some(keeper),
        };
        wait_until_it_listens(stdout).map_err(|error| failed(&error))?;
        Ok(server)
    }

    /// The socket.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join(SOCKET)
    }

    /// Where the server writes stale accesses, and at its end a summary; JSON, a line each.
    pub fn report(&self) -> PathBuf {
        self.folder.path().join(REPORT)
    }

    /// The number of the process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Kills the process, as if it had crashed, and waits for its end.
    pub fn kill(&mut self) {
        self.keep = None;
        if let Some(keeper) = self.keeper.take() {
            // It does nothing that panics; if it did, there would be nothing left to do.
            let _ = keeper.join();
        }
    }
}

impl Drop for SocketServer {
    fn drop(&mut self) {
        self.kill();
    }
}

const SOCKET: &str = "device.sock";
const REPORT: &str = "report.json";

/// Starts the process, and stays until it shall end: the signal that a child gets at the end of its
/// parent is bound to the parent's *thread*.
fn keep_child(
    command: &mut Command,
    say: &Sender<io::Result<(u32, ChildStdout)>>,
    kept: &Receiver<()>,
) {
    let mut child = match dies_with_us(command).spawn() {
        Ok(child) => child,
        Err(error) => return drop(say.send(Err(error))),
    };
    let stdout = child.stdout.take().expect("it is a pipe");
    if say.send(Ok((child.id(), stdout))).is_ok() {
        // Nothing is ever sent: this ends with the sender.
        let _ = kept.recv();
    }
    end(&mut child);
}

fn end(child: &mut Child) {
    // An error means that it has ended by itself; its number is kept for it until it is waited for.
    let _ = child.kill();
    let _ = child.wait();
}

/// Makes the kernel kill the child when the thread that starts it ends.
fn dies_with_us(command: &mut Command) -> &mut Command {
    let us = std::process::id();
    let prepare = move || -> io::Result<()> {
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        // If the parent ended before the call above, nobody will send the signal any more. (Zero:
        // the parent is outside the child's process namespace.)
        let parent = nix::unistd::getppid().as_raw() as u32;
        match parent == us || parent == 0 {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(nix::libc::ESRCH)),
        }
    };
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe work is allowed:
    // it makes two system calls and allocates nothing (an error is built from a number).
    unsafe { command.pre_exec(prepare) }
}

/// Reads the server's output up to the line that says so.
fn wait_until_it_listens(stdout: ChildStdout) -> io::Result<()> {
    let mut stdout = File::from(std::os::fd::OwnedFd::from(stdout));
    let end = Instant::now() + LIMIT;
    let mut text = Vec::new();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::ZERO);
        let ready = poll(
            &mut [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)],
            timeout,
        );
        match ready {
            Ok(0) => return Err(io::Error::other("does not listen within ten seconds")),
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let mut piece = [0; 256];
        match stdout.read(&mut piece)? {
            0 => return Err(io::Error::other("ended before it listened")),
            read => text.extend(&piece[..read]),
        }
        let listens = |line: &[u8]| line.starts_with(b"listening on ");
        if text.ends_with(b"\n") && text.split(|byte| *byte == b'\n').any(listens) {
            return Ok(());
        }
        if text.len() > 64 << 10 {
            return Err(io::Error::other("says much, but not that it listens"));
        }
    }
}
