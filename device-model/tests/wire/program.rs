//! The server as a program, which does not outlive its test.
#![allow(dead_code)] // each test file uses its part

use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use super::eventually;

pub const BINARY: &str = env!("CARGO_BIN_EXE_extlb-device");

pub struct Program(Child);

impl Program {
    /// Starts it, with what it finds as its standard input: a socket, for `--fd 0`.
    pub fn start(arguments: &[&str], stdin: OwnedFd) -> Self {
        let mut command = Command::new(BINARY);
        command.args(arguments).stdin(stdin).stdout(Stdio::null());
        Self::run(&mut command)
    }

    pub fn run(command: &mut Command) -> Self {
        Self(command.spawn().expect("starts"))
    }

    /// Starts it at a socket, and waits until it listens there.
    pub fn listening(socket: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new(BINARY);
        command.arg("--socket-path").arg(socket).args(arguments);
        let mut program = Self::run(command.stdin(Stdio::null()).stdout(Stdio::piped()));
        let out = program.0.stdout.take().expect("piped");
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line).expect("read");
        assert!(line.starts_with("listening on "), "{line}");
        program
    }

    pub fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.0.id() as i32)
    }

    pub fn is_running(&mut self) -> bool {
        self.0.try_wait().expect("asked").is_none()
    }

    /// Waits for its end.
    pub fn end(mut self) -> ExitStatus {
        eventually("it ends", || !self.is_running());
        self.0.wait().expect("waited")
    }

    /// Starts it, and waits for its end: its code, and what it has said on its outputs, which is
    /// little, as nobody reads it before.
    pub fn run_to_its_end(command: &mut Command) -> (Option<i32>, String, String) {
        let mut program = Self::run(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
        let text = |from: Option<&mut dyn Read>| {
            let mut text = String::new();
            from.expect("piped")
                .read_to_string(&mut text)
                .expect("read");
            text
        };
        eventually("it ends", || !program.is_running());
        let said = text(program.0.stdout.as_mut().map(|out| out as _));
        let wrong = text(program.0.stderr.as_mut().map(|out| out as _));
        (program.end().code(), said, wrong)
    }

    /// Ends it at once, whatever it is at.
    pub fn kill(mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("ended");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Has ended already, mostly.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
