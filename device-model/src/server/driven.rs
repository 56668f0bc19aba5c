//! A client's device and the threads that drive it.

use std::io::Write;
use std::ops::Deref;
use std::sync::Arc;

use super::Error;
use super::vfio_user::Link;
use crate::fault::Interposed;
use crate::ports::{Ports, Wake};
use crate::record::{Flag, Pacer, Recorder};
use crate::runner::{Bell, Runner};
use crate::{Config, Core};

/// The device, behind what breaks it on purpose if that was asked for.
pub(super) struct Driven {
    /// Ends the threads when it goes: before the device. Without any, it is stepped by hand.
    _threads: Option<Threads>,
    core: Box<dyn Core>,
    recorder: Option<Arc<Recorder>>,
}

/// Kicks, handed to the device's own thread.
struct HandOver(Arc<Bell>);

impl Wake for HandOver {
    fn work(&self) {
        self.0.work();
    }

    fn invalidation(&self) {
        self.0.ring_invalidation();
    }
}

/// Kept only to be dropped.
enum Threads {
    Runner { _threads: Runner },
    Pacer { _thread: Pacer },
}

impl Driven {
    /// A fresh device, for the client at the other end of `link`. With `record`, its run is
    /// written there, and one thread drives it. The wake port of `ports` is not used.
    pub(super) fn new(
        config: Config,
        ports: Ports,
        link: &Arc<Link>,
        record: Option<Box<dyn Write + Send>>,
    ) -> Result<Self, Error> {
        match record {
            None => Self::threaded(config, ports, link),
            Some(out) => Self::recorded(config, ports, link, out),
        }
    }

    /// A fresh device without threads.
    pub(super) fn stepped(config: Config, ports: Ports) -> Result<Self, Error> {
        Ok(Self {
            _threads: None,
            core: Box::new(Interposed::new(config, ports)?),
            recorder: None,
        })
    }

    fn threaded(config: Config, ports: Ports, link: &Arc<Link>) -> Result<Self, Error> {
        let bell = Bell::new();
        bell.on_panic(alarm(link));
        let wake: Arc<dyn Wake> = match link.questions.on() {
            // Whoever delivers a kick carries out requests, and must not ask the client.
            true => Arc::new(HandOver(bell.clone())),
            false => bell.clone(),
        };
        let device = Interposed::new(config, Ports { wake, ..ports })?;
        device.on_disconnect(disconnect(link));
        let runner = Runner::start(device.device(), &bell).map_err(Error::Threads)?;
        Ok(Self {
            _threads: Some(Threads::Runner { _threads: runner }),
            core: Box::new(device),
            recorder: None,
        })
    }

    fn recorded(
        config: Config,
        ports: Ports,
        link: &Arc<Link>,
        out: Box<dyn Write + Send>,
    ) -> Result<Self, Error> {
        let flag = Flag::new();
        let clock = ports.clock.clone();
        let ports = Ports {
            wake: flag.clone(),
            ..ports
        };
        // Directly around the device, inside what breaks it: what is recorded is what the device
        // did, and it is replayed without the card.
        let make = |config, ports| Recorder::new(config, ports, out);
        let device = Interposed::around(config, ports, make)?;
        device.on_disconnect(disconnect(link));
        let recorder = device.device().clone();
        let pacer = Pacer::start(&recorder, &flag, clock, alarm(link)).map_err(Error::Threads)?;
        Ok(Self {
            _threads: Some(Threads::Pacer { _thread: pacer }),
            core: Box::new(device),
            recorder: Some(recorder),
        })
    }

    /// Ends the record, if there is one, and says so if it is not whole.
    pub(super) fn finish(&self) {
        if let Some(recorder) = &self.recorder
            && let Err(error) = recorder.finish()
        {
            eprintln!("extlb-device: the run is not recorded to its end: {error}");
        }
    }
}

/// What to do when a thread of the device has panicked: a device that does nothing more, and does
/// not say so, is worse than one that is gone.
fn alarm(link: &Arc<Link>) -> Box<dyn Fn(&str) + Send + Sync> {
    let link = link.clone();
    Box::new(move |thread| link.fail(format!("its thread {thread} has panicked")))
}

fn disconnect(link: &Arc<Link>) -> impl Fn() + Send + Sync + use<> {
    let link = link.clone();
    move || link.hang_up()
}

impl Deref for Driven {
    type Target = dyn Core;

    fn deref(&self) -> &Self::Target {
        &*self.core
    }
}
