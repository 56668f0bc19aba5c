//! The rig's end of the channel to the agent.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use anyhow::{Context, Result};
use extlb_guest_protocol::{self as protocol, MAX_BODY, ToGuest, ToRig, Window};

/// QEMU takes what is sent within this time, or something is badly wrong.
const SEND_LIMIT: Duration = Duration::from_secs(20);
/// How often the window's size is looked at.
const WINDOW_EVERY: Duration = Duration::from_millis(250);

/// Where the program's output goes.
pub struct Sinks {
    /// Standard output.
    pub stdout: Box<dyn Write + Send>,
    /// Standard error.
    pub stderr: Box<dyn Write + Send>,
}

impl Sinks {
    /// The rig's own streams.
    pub fn inherit() -> Self {
        Self {
            stdout: Box::new(io::stdout()),
            stderr: Box::new(io::stderr()),
        }
    }
}

/// What the reading thread hands on.
#[derive(Debug)]
pub enum Event {
    /// Anything but output and credit, which the thread deals with itself.
    Message(ToRig, Vec<u8>),
    /// A sink cannot be written to.
    OutputClosed,
    /// The channel has ended.
    Closed(String),
}

/// Sends frames to the agent; shared by the owner and the input thread.
#[derive(Clone)]
pub struct Sender {
    socket: Arc<Mutex<UnixStream>>,
    credit: Arc<Credit>,
}

impl Sender {
    /// Sends one frame.
    pub fn send(&self, header: &ToGuest, body: &[u8]) -> io::Result<()> {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        protocol::write_frame(&mut *socket, header, body)
    }
}

/// Bytes of standard input that the agent is ready to take.
#[derive(Default)]
struct Credit {
    bytes: Mutex<usize>,
    grown: Condvar,
}

impl Credit {
    fn add(&self, more: u32) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        *bytes = bytes.saturating_add(more as usize);
        self.grown.notify_all();
    }

    /// Waits for credit and takes as much as there is, at most one frame's body.
    fn take(&self) -> usize {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        while *bytes == 0 {
            bytes = self
                .grown
                .wait(bytes)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let taken = (*bytes).min(MAX_BODY);
        *bytes -= taken;
        taken
    }

    fn give_back(&self, bytes: usize) {
        self.add(u32::try_from(bytes).unwrap_or(u32::MAX));
    }
}

/// Starts the reading thread.
pub fn start(socket: UnixStream, events: SyncSender<Event>, mut sinks: Sinks) -> Result<Sender> {
    socket.set_write_timeout(Some(SEND_LIMIT))?;
    let mut reader = socket.try_clone().context("cannot duplicate a socket")?;
    let sender = Sender {
        socket: Arc::new(Mutex::new(socket)),
        credit: Arc::default(),
    };
    let credit = sender.credit.clone();
    let read = move || {
        let last = loop {
            let (message, body) = match protocol::read_frame::<ToRig>(&mut reader) {
                Ok(Some(frame)) => frame,
                Ok(None) => break Event::Closed("end of stream".to_owned()),
                Err(error) => break Event::Closed(error.to_string()),
            };
            let written = match message {
                ToRig::Stdout => write(&mut sinks.stdout, &body),
                ToRig::Stderr => write(&mut sinks.stderr, &body),
                ToRig::StdinCredit { bytes } => {
                    credit.add(bytes);
                    Ok(())
                }
                other => match events.send(Event::Message(other, body)) {
                    Ok(()) => Ok(()),
                    Err(_) => return,
                },
            };
            if written.is_err() {
                break Event::OutputClosed;
            }
        };
        let _ = events.send(last);
    };
    Builder::new()
        .name("channel".into())
        .spawn(read)
        .context("cannot start a thread")?;
    Ok(sender)
}

fn write(sink: &mut Box<dyn Write + Send>, body: &[u8]) -> io::Result<()> {
    sink.write_all(body)?;
    sink.flush()
}

/// Starts the thread that forwards standard input, against credit.
pub fn forward_input(sender: &Sender, terminal: bool) -> Result<()> {
    let to = sender.clone();
    let forward = move || {
        let mut stdin = io::stdin().lock();
        let mut piece = vec![0; MAX_BODY];
        loop {
            let room = to.credit.take();
            match stdin.read(&mut piece[..room]) {
                Ok(0) | Err(_) => {
                    let _ = to.send(&ToGuest::StdinEnd, &[]);
                    return;
                }
                Ok(length) => {
                    to.credit.give_back(room - length);
                    if to.send(&ToGuest::Stdin, &piece[..length]).is_err() {
                        return;
                    }
                }
            }
        }
    };
    Builder::new()
        .name("input".into())
        .spawn(forward)
        .context("cannot start a thread")?;
    if terminal {
        let to = sender.clone();
        let mut last = window();
        let watch = move || {
            loop {
                std::thread::sleep(WINDOW_EVERY);
                let now = window();
                if now != last {
                    last = now;
                    if to.send(&ToGuest::Resize(now), &[]).is_err() {
                        return;
                    }
                }
            }
        };
        Builder::new()
            .name("window".into())
            .spawn(watch)
            .context("cannot start a thread")?;
    }
    Ok(())
}

/// The size of the rig's terminal, or a usual one.
pub fn window() -> Window {
    match rustix::termios::tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_row > 0 => Window {
            rows: size.ws_row,
            columns: size.ws_col,
        },
        _ => Window {
            rows: 24,
            columns: 80,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::sync_channel;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);
    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    struct Broken;
    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_goes_to_its_sink_before_the_end_is_told() {
        let (ours, mut agent) = UnixStream::pair().unwrap();
        let (to, events) = sync_channel(4);
        let (out, err) = (Kept::default(), Kept::default());
        let sinks = Sinks {
            stdout: Box::new(out.clone()),
            stderr: Box::new(err.clone()),
        };
        let sender = start(ours, to, sinks).unwrap();
        protocol::write_frame(&mut agent, &ToRig::Stdout, b"out").unwrap();
        protocol::write_frame(&mut agent, &ToRig::Stderr, b"err").unwrap();
        protocol::write_frame(&mut agent, &ToRig::Ready, b"").unwrap();
        assert!(matches!(
            events.recv().unwrap(),
            Event::Message(ToRig::Ready, _)
        ));
        assert_eq!(*out.0.lock().unwrap(), b"out");
        assert_eq!(*err.0.lock().unwrap(), b"err");
        sender.send(&ToGuest::Shutdown, &[]).unwrap();
        let got = protocol::read_frame::<ToGuest>(&mut agent).unwrap();
        assert_eq!(got, Some((ToGuest::Shutdown, vec![])));
        agent.write_all(&[0xff; 8]).unwrap();
        assert!(matches!(events.recv().unwrap(), Event::Closed(_)));
    }

    #[test]
    fn a_reader_that_is_gone_is_told() {
        let (ours, mut agent) = UnixStream::pair().unwrap();
        let (to, events) = sync_channel(4);
        let sinks = Sinks {
            stdout: Box::new(Broken),
            stderr: Box::new(Broken),
        };
        let _sender = start(ours, to, sinks).unwrap();
        protocol::write_frame(&mut agent, &ToRig::Stdout, b"out").unwrap();
        assert!(matches!(events.recv().unwrap(), Event::OutputClosed));
    }

    #[test]
    fn credit_is_taken_and_given_back() {
        let credit = Credit::default();
        credit.add(10);
        assert_eq!(credit.take(), 10);
        credit.give_back(4);
        assert_eq!(credit.take(), 4);
        credit.add(u32::MAX);
        assert_eq!(credit.take(), MAX_BODY);
    }
}
