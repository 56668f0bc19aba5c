//! The transport: vfio-user over a UNIX stream socket.

use std::fmt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;

use super::Options;
use super::connection::{Broken, Connection, Message};
use super::dispatch::Dispatcher;
use super::dma::{Questions, this_thread_serves};
use super::inbox::Inbox;
use super::protocol::{command, error_reply};
use super::report::Report;
use super::transport::{Ended, Endpoint, Transport};

/// Why the session ends from this side.
#[derive(Clone, Debug)]
enum Fault {
    /// The device cannot go on.
    Device(String),
    /// It cannot go on with this client.
    Client(&'static str),
}

/// One client's connection, as everybody sees it who has to do with that client.
pub(super) struct Link {
    pub(super) connection: Connection,
    /// What the device asks the client.
    pub(super) questions: Questions,
    /// The device, as messages name it.
    name: String,
    report: Arc<Report>,
    failed: OnceLock<Fault>,
    silence: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Link {
    pub(super) fn new(
        stream: UnixStream,
        name: &str,
        report: Arc<Report>,
        options: &Options,
    ) -> Arc<Self> {
        Arc::new(Self {
            connection: Connection::new(stream, options.patience),
            questions: Questions::new(options.dma_messages),
            name: name.to_owned(),
            report,
            failed: OnceLock::new(),
            silence: OnceLock::new(),
        })
    }

    /// How to take memory and interrupts from the device at once.
    pub(super) fn on_lost_write(&self, silence: Box<dyn Fn() + Send + Sync>) {
        // A link has one device.
        let _ = self.silence.set(silence);
    }

    /// Ends the session, as the device cannot go on: the client finds its socket closed.
    pub(super) fn fail(&self, why: String) {
        self.end(Fault::Device(why));
    }

    /// Ends the session, as it cannot go on with this client; likewise.
    pub(super) fn give_up(&self, why: &'static str) {
        self.end(Fault::Client(why));
    }

    fn end(&self, fault: Fault) {
        // The first reason counts.
        let _ = self.failed.set(fault);
        self.connection.hang_up();
    }

    /// Ends the session as if the client had left: the next one is served.
    pub(super) fn hang_up(&self) {
        self.connection.hang_up();
    }

    /// A question about memory stays without an answer.
    pub(super) fn lose(&self, number: u16, at: u64, count: usize) {
        let write = number == command::DMA_WRITE;
        let what = match write {
            true => "DMA_WRITE",
            false => "DMA_READ",
        };
        let name = &self.name;
        eprintln!("extlb-device: {name}: no answer to {what} of {count} bytes at {at:#x}");
        self.report.no_answer(what, at, count);
        if write {
            if let Some(silence) = self.silence.get() {
                silence();
            }
            self.give_up("the client does not say whether it has written what it was given");
        }
    }

    /// Whether the session has to end, and why.
    fn check(&self) -> Result<(), Ended> {
        match self.failed.get() {
            Some(Fault::Device(why)) => Err(Ended::Here(why.clone())),
            Some(Fault::Client(why)) => Err(Ended::Protocol((*why).into())),
            None => Ok(()),
        }
    }

    /// The next message; `None`: the client has left.
    fn receive(&self, first: bool) -> Result<Option<Message>, Ended> {
        match self.connection.receive(first) {
            Err(Broken::Size(header)) => {
                if header.is_command() {
                    let refusal = error_reply(&header, Errno::EMSGSIZE);
                    let _ = self.connection.send(&refusal);
                }
                Err(Broken::Size(header).into())
            }
            received => Ok(received?),
        }
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("name", &self.name)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

/// A vfio-user client.
pub(super) struct VfioUser(pub(super) Arc<Link>);

impl Transport for VfioUser {
    fn serve(&self, endpoint: &mut dyn Endpoint) -> Result<(), Ended> {
        let dispatcher = Dispatcher::new(endpoint, &self.0.name);
        let served = match self.0.questions.on() {
            false => self.serve_here(dispatcher),
            true => self.serve_asking(dispatcher),
        };
        // What the other side finds after a failure here is a consequence.
        self.0.check()?;
        served
    }
}

impl VfioUser {
    /// Receives and carries out on this thread: one wake-up a request.
    fn serve_here(&self, mut dispatcher: Dispatcher<'_>) -> Result<(), Ended> {
        while let Some(message) = self.0.receive(dispatcher.client().is_none())? {
            self.handle(&mut dispatcher, message)?;
        }
        Ok(())
    }

    /// Receives on a thread of its own: answers of the client come while a request is carried out
    /// that waits for them, as one that takes memory back does.
    fn serve_asking(&self, mut dispatcher: Dispatcher<'_>) -> Result<(), Ended> {
        this_thread_serves();
        let inbox = Inbox::default();
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("receive".into());
            let receiver = thread.spawn_scoped(scope, || {
                let received = self.sort(&inbox);
                // Nobody need wait for what will not come.
                self.0.questions.close();
                inbox.close();
                received
            });
            let receiver = match receiver {
                Ok(receiver) => receiver,
                Err(error) => return Err(Ended::Here(format!("no thread: {error}"))),
            };
            let mut served = Ok(());
            while let Some(message) = inbox.take() {
                served = self.handle(&mut dispatcher, message);
                if served.is_err() {
                    break;
                }
                if let Some(client) = dispatcher.client() {
                    self.0.questions.open(client.max_data_xfer_size);
                }
            }
            // Whatever ended it: the receiver waits for the client, or for room.
            self.0.connection.hang_up();
            inbox.close();
            let received = receiver
                .join()
                .unwrap_or_else(|_| Err(Ended::Here("the receiver has panicked".into())));
            served.and(received)
        })
    }

    /// Hands answers to whoever waits for them, and requests to the inbox.
    fn sort(&self, inbox: &Inbox) -> Result<(), Ended> {
        let mut first = true;
        while let Some(message) = self.0.receive(first)? {
            first = false;
            if message.header.is_reply() {
                let answered = self.0.questions.answer(&message.header, &message.body);
                answered.map_err(|nonsense| Ended::Protocol(nonsense.into()))?;
            } else if !inbox.put(message) {
                break;
            }
        }
        Ok(())
    }

    fn handle(&self, dispatcher: &mut Dispatcher<'_>, message: Message) -> Result<(), Ended> {
        dispatcher.handle(message, &mut |bytes| self.0.connection.send(bytes))?;
        self.0.check()
    }
}
