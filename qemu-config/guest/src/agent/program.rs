//! One program that runs for the rig: its start, its streams, its end.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread::{Builder, JoinHandle};

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::termios::{Winsize, tcsetwinsize};

use super::link::Link;
use super::reaper::Reaper;
use extlb_guest_protocol::{Exec, Exit, MAX_BODY, STDIN_WINDOW, ToRig, Window};

/// Exit code for a program that does not exist, as of a shell.
const NOT_FOUND: i32 = 127;
/// Exit code for a program that cannot be run, as of a shell.
const NOT_RUNNABLE: i32 = 126;

/// A started program.
pub struct Program {
    running: Arc<AtomicBool>,
    input: Option<Sender<Vec<u8>>>,
    terminal: Option<OwnedFd>,
}

/// The near ends of a program's streams.
struct Streams {
    input: File,
    /// (stream, header of its frames)
    outputs: Vec<(File, ToRig)>,
    terminal: Option<OwnedFd>,
}

impl Program {
    /// Starts a program and the threads that serve it. A program that cannot be started is reported
    /// as a shell would do it, and is not an error: `Ok(None)`.
    pub fn start(exec: &Exec, link: &Link, reaper: &Reaper) -> Result<Option<Self>> {
        let mut streams = None;
        let started = reaper.watch(|| {
            let (pid, near) = spawn(exec)?;
            streams = Some(near);
            Ok::<i32, io::Error>(pid)
        });
        let (pid, streams) = match (started, streams) {
            (Ok(pid), Some(streams)) => (pid, streams),
            (Err(error), _) => {
                let code = match error.kind() {
                    io::ErrorKind::NotFound => NOT_FOUND,
                    _ => NOT_RUNNABLE,
                };
                let name = exec.argv.first().map_or("", String::as_str);
                let said = format!("extlb: {name}: {error}\n");
                link.send_body(&ToRig::Stderr, said.as_bytes())?;
                link.send(&ToRig::Exited(Exit::Code(code)))?;
                return Ok(None);
            }
            (Ok(_), None) => unreachable!("a start that succeeds sets the streams"),
        };

        let (ended_near, ended_far) =
            nix::unistd::pipe2(OFlag::O_CLOEXEC).context("cannot make a pipe")?;
        let ended_far = Arc::new(ended_far);
        let mut pumps = Vec::new();
        for (stream, header) in streams.outputs {
            let (link, ended) = (link.clone(), ended_near.try_clone()?);
            pumps.push(thread("output", move || {
                pump(stream, &header, &link, &ended)
            })?);
        }
        let (input, pieces) = mpsc::channel::<Vec<u8>>();
        let (credit, mut stdin) = (link.clone(), streams.input);
        link.send(&ToRig::StdinCredit {
            bytes: STDIN_WINDOW,
        })?;
        thread("input", move || {
            for piece in pieces {
                // A program that closed its input still drains the channel: credit goes back.
                let _ = stdin.write_all(&piece);
                let bytes = piece.len() as u32; // at most MAX_BODY
                if credit.send(&ToRig::StdinCredit { bytes }).is_err() {
                    return;
                }
            }
        })?;
        let running = Arc::new(AtomicBool::new(true));
        let (link, reaper, still) = (link.clone(), reaper.clone(), running.clone());
        thread("end", move || {
            let exit = reaper.wait(pid);
            // Closing the far end wakes the pumps: they send what is left and stop, even if a
            // grandchild keeps the stream open.
            drop(ended_far);
            for pump in pumps {
                let _ = pump.join();
            }
            still.store(false, Ordering::Release);
            let _ = link.send(&ToRig::Exited(exit));
        })?;
        Ok(Some(Self {
            running,
            input: Some(input),
            terminal: streams.terminal,
        }))
    }

    /// Whether the program's end has not been sent yet.
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// Hands a piece of standard input over. The rig sends against credit, so what waits here is
    /// bounded by [`STDIN_WINDOW`].
    pub fn input(&self, piece: Vec<u8>) {
        if let Some(input) = &self.input {
            let _ = input.send(piece);
        }
    }

    /// Closes standard input after what was handed over.
    pub fn end_input(&mut self) {
        match &self.terminal {
            // A terminal ends by its end-of-file character; it stays open for output.
            Some(_) => self.input(vec![4]),
            None => self.input = None,
        }
    }

    /// Changes the terminal's size.
    pub fn resize(&self, window: Window) {
        if let Some(terminal) = &self.terminal {
            let _ = tcsetwinsize(terminal, winsize(window));
        }
    }
}

fn winsize(window: Window) -> Winsize {
    Winsize {
        ws_row: window.rows,
        ws_col: window.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

fn thread<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    Builder::new()
        .name(name.into())
        .spawn(run)
        .context("cannot start a thread")
}

fn spawn(exec: &Exec) -> io::Result<(i32, Streams)> {
    let Some((name, arguments)) = exec.argv.split_first() else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "no program named",
        ));
    };
    fs::create_dir_all(&exec.cwd)?;
    let Some(window) = exec.tty else {
        let mut command = Command::new(name);
        command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = at_home(&mut command, exec).spawn()?;
        let taken = "stream was asked for";
        let input = OwnedFd::from(child.stdin.take().expect(taken)).into();
        let stdout = OwnedFd::from(child.stdout.take().expect(taken)).into();
        let stderr = OwnedFd::from(child.stderr.take().expect(taken)).into();
        let outputs = vec![(stdout, ToRig::Stdout), (stderr, ToRig::Stderr)];
        return Ok((
            child.id() as i32,
            Streams {
                input,
                outputs,
                terminal: None,
            },
        ));
    };
    let pty = nix::pty::openpty(None, None)?;
    // Left open in the program, the near end would keep the terminal from ever hanging up.
    fcntl(&pty.master, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    fcntl(&pty.slave, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    tcsetwinsize(&pty.master, winsize(window))?;
    // The applet makes the terminal the session's own, which has to happen in the new process.
    let mut command = Command::new("/bin/busybox");
    command
        .args(["setsid", "-c"])
        .args(&exec.argv)
        .stdin(pty.slave.try_clone()?)
        .stdout(pty.slave.try_clone()?)
        .stderr(pty.slave);
    let child = at_home(&mut command, exec).spawn()?;
    let streams = Streams {
        input: pty.master.try_clone()?.into(),
        outputs: vec![(pty.master.try_clone()?.into(), ToRig::Stdout)],
        terminal: Some(pty.master),
    };
    Ok((child.id() as i32, streams))
}

fn at_home<'a>(command: &'a mut Command, exec: &Exec) -> &'a mut Command {
    command
        .env_clear()
        .envs(exec.env.iter().map(|(name, value)| (name, value)));
    command.current_dir(&exec.cwd)
}

/// Sends what a stream carries until it ends, or until the program has ended and nothing is left.
fn pump(mut stream: File, header: &ToRig, link: &Link, ended: &OwnedFd) {
    let flags = fcntl(&stream, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
    if let Ok(flags) = flags {
        // The near end of a pipe is ours alone. A terminal's is shared with the input thread, which
        // must block; poll before each read keeps both true.
        if !matches!(header, ToRig::Stdout) || !is_terminal(&stream) {
            let _ = fcntl(&stream, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK));
        }
    }
    let mut piece = vec![0; MAX_BODY];
    loop {
        let mut wait = [
            PollFd::new(stream.as_fd(), PollFlags::POLLIN),
            PollFd::new(ended.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut wait, PollTimeout::NONE) {
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(_) => return,
        }
        let ready = wait[0].any().unwrap_or(false);
        if !ready {
            // Only the program's end can have woken us.
            return;
        }
        match stream.read(&mut piece) {
            Ok(0) => return,
            Ok(length) => {
                if link.send_body(header, &piece[..length]).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // A terminal whose last process has gone.
            Err(_) => return,
        }
    }
}

fn is_terminal(stream: &File) -> bool {
    std::io::IsTerminal::is_terminal(stream)
}
