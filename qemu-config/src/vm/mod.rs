//! A running guest: QEMU, the device server, the console and the channel to the agent.
//!
//! Threads: the owner of [`Vm`] decides; one reads the channel (and writes the program's output, so
//! that a slow reader of it holds back the guest and nobody else); one reads the console; one
//! forwards standard input. Deaths are noticed by the owner while it waits, within
//! [`LOOK_EVERY`].

mod channel;
mod device;
mod folder;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use extlb_guest_protocol::{self as protocol, Exec, Exit, Setup, ToGuest, ToRig};

use crate::child::last_lines;
use crate::console::Watcher;
use crate::outcome::{End, Outcome};
use crate::paths::Cache;
use crate::qemu::Qemu;
use crate::qemu::command::{Machine, add_arguments};
use crate::spawn_unsafe::{dies_with_us, gives_way};
use channel::{Event, Sender};
pub use channel::{Sinks, window};
pub use device::DeviceServer;
use folder::RunFolder;

/// How often the owner looks after its children while it waits for a message.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// When one child has died: how long to wait for the other, to tell which was first.
const SETTLE: Duration = Duration::from_millis(500);
/// The guest has to switch off within this time, or it is ended.
const SHUTDOWN: Duration = Duration::from_secs(20);

/// What the device server is given to end after a run that has failed anyway.
const DEVICE_END: Duration = Duration::from_secs(3);

/// Lines of the console that are shown for a death without a report.
const SHOWN_CONSOLE: usize = 15;

/// Names in the run folder. Children work in it and use these relative names, because a socket's
/// path may have only 108 bytes.
const QEMU_LOG: &str = "qemu.log";

/// Everything needed to start a guest.
pub struct Start<'a> {
    /// Where run folders may be made.
    pub cache: &'a Cache,
    /// The QEMU to use.
    pub qemu: &'a Qemu,
    /// The machine; its `device` and `initramfs` are filled in here.
    pub machine: Machine,
    /// The device; `None` for a guest without.
    pub device: Option<DeviceServer>,
    /// Writes the initramfs to the path it is given.
    pub initramfs: &'a mut dyn FnMut(&Path) -> Result<()>,
    /// Where the program's output goes.
    pub sinks: Sinks,
    /// How often the guest may restart.
    pub reboots: u32,
    /// The console is copied to standard error.
    pub show_console: bool,
    /// How many times longer than usual the guest may take for its own things.
    pub slowness: u32,
}

/// Standard input of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Ends at once.
    Empty,
    /// The rig's own.
    Forwarded {
        /// Changes of the window's size are passed on.
        terminal: bool,
    },
}

/// What ended the wait for a message.
#[derive(Debug)]
pub enum Stop {
    /// The guest, QEMU or the device is gone.
    Died(String),
    /// The time is up.
    TimedOut,
    /// Nobody reads the program's output.
    OutputClosed,
}

impl From<Stop> for End {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Died(why) => End::Died(why),
            Stop::TimedOut => End::TimedOut,
            Stop::OutputClosed => End::OutputClosed,
        }
    }
}

/// A running guest. Dropped, it is killed.
pub struct Vm {
    qemu: Child,
    device: Option<Child>,
    console: Arc<Mutex<Watcher>>,
    console_reader: Option<JoinHandle<()>>,
    events: Receiver<Event>,
    sender: Sender,
    folder: RunFolder,
    /// The device serves one client after the other and does not end by itself.
    hot_plug: bool,
    /// What the agent was asked to set up, in each boot.
    setup: Setup,
    reboots_left: u32,
    /// Time to switch off.
    shutdown: Duration,
    /// The kernel's release, once the agent has said hello.
    pub kernel: String,
}

impl Vm {
    /// Starts device and QEMU. The guest is up after [`Vm::wait_until_up`].
    pub fn start(start: Start<'_>) -> Result<Self> {
        let folder = RunFolder::new(start.cache)?;
        let mut machine = start.machine;
        machine.initramfs = folder.path().join("initramfs");
        (start.initramfs)(&machine.initramfs)?;
        let length = fs::metadata(&machine.initramfs)?.len();
        if length > machine.memory * (1 << 20) / 3 {
            bail!(
                "{} MiB of files do not fit into a guest with {} MiB: give it more with --memory",
                length >> 20,
                machine.memory
            );
        }
        let device = match &start.device {
            Some(server) => {
                machine.device = Some(device::SOCKET.into());
                Some(device::start(server, &folder)?)
            }
            None => None,
        };

        let (ours, theirs) = UnixStream::pair().context("cannot make a socket")?;
        let mut command = start.qemu.command();
        add_arguments(&mut command, &machine)?;
        command
            .current_dir(folder.path())
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::piped())
            .stderr(File::create(folder.path().join(QEMU_LOG))?);
        // Emulated processors spin until the device acknowledges; where they are as many as the
        // cores, the device must not wait for one of them to use its time up.
        let mut qemu = gives_way(dies_with_us(&mut command), 10)
            .spawn()
            .context("cannot start QEMU")?;
        // Our copy of the guest's end of the socket goes with the command.
        drop(command);
        let stdout = qemu.stdout.take().context("QEMU has no output")?;
        let console = Arc::new(Mutex::new(Watcher::default()));
        let console_reader = Some(read_console(stdout, console.clone(), start.show_console)?);
        let (events_to, events) = sync_channel(16);
        let sender = channel::start(ours, events_to, start.sinks)?;
        let kernel = String::new();
        Ok(Self {
            qemu,
            device,
            console,
            console_reader,
            events,
            sender,
            folder,
            hot_plug: start.device.is_some_and(|device| device.hot_plug),
            setup: Setup::default(),
            reboots_left: start.reboots,
            shutdown: SHUTDOWN * start.slowness,
            kernel,
        })
    }

    /// Waits for the agent and has it set the guest up.
    ///
    /// # Errors
    /// The inner error says that the guest is up and its setup failed; a [`Stop`] that it is not up.
    pub fn wait_until_up(&mut self, setup: Setup, deadline: Instant) -> Result<Result<()>, Stop> {
        let hello = self.next(Some(deadline))?;
        self.setup = setup;
        self.welcome(hello, Some(deadline))
    }

    /// Takes the agent's first message and has it set the guest up.
    fn welcome(&mut self, hello: ToRig, deadline: Option<Instant>) -> Result<Result<()>, Stop> {
        match hello {
            ToRig::Hello { protocol, kernel } if protocol == protocol::VERSION => {
                self.kernel = kernel;
            }
            other => {
                return Err(Stop::Died(format!(
                    "the agent is not of this rig: {other:?}"
                )));
            }
        }
        self.send(&ToGuest::Setup(self.setup.clone()))?;
        match self.next(deadline)? {
            ToRig::Ready => Ok(Ok(())),
            ToRig::Failed { what } => Ok(Err(anyhow::Error::msg(what))),
            other => Err(Stop::Died(format!(
                "the agent answered setup with {other:?}"
            ))),
        }
    }

    /// A guest that has started again is set up again, if it may and had no reason to.
    fn welcome_back(&mut self, hello: ToRig, deadline: Option<Instant>) -> Result<(), Stop> {
        let Some(left) = self.reboots_left.checked_sub(1) else {
            return Err(Stop::Died("the guest restarted too often".to_owned()));
        };
        self.reboots_left = left;
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        if !console.reports().is_empty() {
            return Err(Stop::Died(
                "the guest's kernel gave up and restarted".to_owned(),
            ));
        }
        drop(console);
        self.welcome(hello, deadline)?
            .map_err(|error| Stop::Died(format!("the guest could not be set up again: {error:#}")))
    }

    /// Runs a program to its end; its output goes to the sinks. If the guest restarts meanwhile, and
    /// may, the program is run again: `EXTLB_BOOT` in its environment counts.
    pub fn run(
        &mut self,
        exec: Exec,
        input: Input,
        deadline: Option<Instant>,
    ) -> Result<Exit, Stop> {
        let boot = |count: u32| {
            let mut exec = exec.clone();
            exec.env.push(("EXTLB_BOOT".to_owned(), count.to_string()));
            ToGuest::Exec(exec)
        };
        self.send(&boot(0))?;
        match input {
            Input::Empty => self.send(&ToGuest::StdinEnd)?,
            Input::Forwarded { terminal } => channel::forward_input(&self.sender, terminal)
                .map_err(|error| Stop::Died(format!("{error:#}")))?,
        }
        for count in 1.. {
            match self.next(deadline)? {
                ToRig::Exited(exit) => return Ok(exit),
                hello @ ToRig::Hello { .. } => {
                    self.welcome_back(hello, deadline)?;
                    self.send(&boot(count))?;
                    if input == Input::Empty {
                        self.send(&ToGuest::StdinEnd)?;
                    }
                }
                other => {
                    return Err(Stop::Died(format!(
                        "the agent answered a program with {other:?}"
                    )));
                }
            }
        }
        Err(Stop::Died("the guest restarted too often".to_owned()))
    }

    /// Reads a file of the guest, of at most `limit` bytes.
    pub fn read_file(
        &mut self,
        path: &str,
        limit: usize,
        deadline: Option<Instant>,
    ) -> Result<Result<Vec<u8>>, Stop> {
        self.send(&ToGuest::ReadFile {
            path: path.to_owned(),
        })?;
        let mut content = Vec::new();
        let mut too_long = false;
        loop {
            match self.next_with_body(deadline)? {
                (ToRig::File, piece) => {
                    too_long |= content.len() + piece.len() > limit;
                    if !too_long {
                        content.extend_from_slice(&piece);
                    }
                }
                (ToRig::FileEnd { error: None }, _) if too_long => {
                    return Ok(Err(anyhow::anyhow!("{path} is longer than {limit} bytes")));
                }
                (ToRig::FileEnd { error: None }, _) => return Ok(Ok(content)),
                (ToRig::FileEnd { error: Some(error) }, _) => {
                    return Ok(Err(anyhow::Error::msg(error)));
                }
                (other, _) => {
                    return Err(Stop::Died(format!(
                        "the agent answered a read with {other:?}"
                    )));
                }
            }
        }
    }

    /// Ends the guest, in good order if it is still whole, and says what there is to say.
    pub fn finish(mut self, end: End) -> Outcome {
        let mut end = end;
        let orderly = matches!(end, End::Exited(_));
        if orderly && self.send(&ToGuest::Shutdown).is_ok() {
            if !wait_for(&mut self.qemu, self.shutdown) {
                end = End::Died("the guest did not switch off".to_owned());
            }
        } else if matches!(end, End::Died(_)) {
            // A kernel that panics ends QEMU; its last lines are still coming.
            wait_for(&mut self.qemu, SETTLE);
        }
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        if let Some(device) = &mut self.device {
            // It has seen its client go; it writes its summary and ends.
            let limit = if orderly { SHUTDOWN } else { DEVICE_END };
            if self.hot_plug {
                if let Err(error) = device::wait_until_idle(&self.folder, limit)
                    && orderly
                {
                    end = End::Died(format!("the device process is not well: {error:#}"));
                }
            } else if !wait_for(device, limit) && orderly {
                end = End::Died("the device process did not end with its client".to_owned());
            }
            // Nothing is to be told by the end of one that we end.
            let ended = device.try_wait().ok().flatten();
            let _ = device.kill();
            let _ = device.wait();
            if let Some(status) = ended
                && !status.success()
                && matches!(end, End::Exited(_))
            {
                end = End::Died(format!("the device process died: {}", how(status)));
            }
        }
        if let Some(reader) = self.console_reader.take() {
            let _ = reader.join();
        }
        let (stale_accesses, device_summary) =
            device::read_report(&self.folder.path().join(device::REPORT));
        let counted = device_summary
            .as_ref()
            .and_then(|summary| summary["oracle_stale"].as_u64());
        let stale_count = counted.unwrap_or(0).max(stale_accesses.len() as u64);
        let mut console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        console.finish();
        let mut last_words = console.last_lines(SHOWN_CONSOLE);
        for log in [QEMU_LOG, device::LOG] {
            let text = fs::read(self.folder.path().join(log)).unwrap_or_default();
            let text = last_lines(&String::from_utf8_lossy(&text), 20);
            last_words.extend(text.lines().map(str::to_owned));
        }
        let kernel_reports = console.reports().to_vec();
        drop(console);
        Outcome {
            end,
            kernel_reports,
            stale_accesses,
            stale_count,
            device_summary,
            last_words,
        }
    }

    fn send(&self, message: &ToGuest) -> Result<(), Stop> {
        // A failure to send is a death that the next look explains better.
        let _ = self.sender.send(message, &[]);
        Ok(())
    }

    fn next(&mut self, deadline: Option<Instant>) -> Result<ToRig, Stop> {
        self.next_with_body(deadline).map(|(message, _)| message)
    }

    fn next_with_body(&mut self, deadline: Option<Instant>) -> Result<(ToRig, Vec<u8>), Stop> {
        let mut closed: Option<(Instant, String)> = None;
        loop {
            let event = self.events.recv_timeout(LOOK_EVERY);
            match event {
                Ok(Event::Message(message, body)) => return Ok((message, body)),
                Ok(Event::OutputClosed) => return Err(Stop::OutputClosed),
                // QEMU's end closes the channel too, and is the better explanation.
                Ok(Event::Closed(why)) => closed = Some((Instant::now(), why)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    closed.get_or_insert_with(|| (Instant::now(), "the channel is closed".into()));
                    std::thread::sleep(LOOK_EVERY);
                }
            }
            if let Some(why) = self.death() {
                return Err(Stop::Died(why));
            }
            if let Some((since, why)) = &closed
                && since.elapsed() > SETTLE
            {
                return Err(Stop::Died(format!("the channel to the guest broke: {why}")));
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(Stop::TimedOut);
            }
        }
    }

    /// What has died, if anything has.
    fn death(&mut self) -> Option<String> {
        let ended = |child: &mut Child| child.try_wait().ok().flatten();
        let mut qemu = ended(&mut self.qemu);
        let mut device = self.device.as_mut().and_then(ended);
        if qemu.is_none() && device.is_none() {
            return None;
        }
        // The end of one may bring the other down, and only a signal or an error code tells which
        // of them was the cause.
        let start = Instant::now();
        while start.elapsed() < SETTLE && (qemu.is_none() || device.is_none()) {
            std::thread::sleep(LOOK_EVERY);
            qemu = qemu.or_else(|| ended(&mut self.qemu));
            device = device.or_else(|| self.device.as_mut().and_then(ended));
        }
        let failed = |status: &Option<ExitStatus>| status.filter(|status| !status.success());
        if let Some(status) = failed(&device) {
            return Some(format!("the device process died: {}", how(status)));
        }
        if let Some(status) = failed(&qemu) {
            return Some(format!("QEMU died: {}", how(status)));
        }
        if qemu.is_some() {
            return Some(
                "the guest stopped (a kernel panic, or it switched itself off)".to_owned(),
            );
        }
        Some("the device process ended while the guest was running".to_owned())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        for child in std::iter::once(&mut self.qemu).chain(self.device.as_mut()) {
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Some(reader) = self.console_reader.take() {
            let _ = reader.join();
        }
    }
}

fn read_console(
    mut from: impl Read + Send + 'static,
    watcher: Arc<Mutex<Watcher>>,
    show: bool,
) -> Result<JoinHandle<()>> {
    let read = move || {
        let mut piece = [0; 4096];
        while let Ok(length) = from.read(&mut piece) {
            if length == 0 {
                break;
            }
            watcher
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .feed(&piece[..length]);
            if show {
                let _ = std::io::stderr().write_all(&piece[..length]);
            }
        }
    };
    std::thread::Builder::new()
        .name("console".into())
        .spawn(read)
        .context("cannot start a thread")
}

fn wait_for(child: &mut Child, limit: Duration) -> bool {
    let start = Instant::now();
    loop {
        if child.try_wait().ok().flatten().is_some() {
            return true;
        }
        if start.elapsed() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (_, Some(signal)) => format!("signal {signal}"),
        (Some(code), None) => format!("exit code {code}"),
        (None, None) => status.to_string(),
    }
}
