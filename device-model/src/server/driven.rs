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

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use extlb_spec::{BAR_REGS, Gpa, regs};

    use super::*;
    use crate::GuestRam;
    use crate::ports::{Clock, Ignore};
    use crate::server::Options;
    use crate::server::report::{Report, Sink};
    use crate::server::session::Session;
    use crate::server::transport::{Ended, Transport as _};
    use crate::server::vfio_user::VfioUser;

    /// Fails the thread of this name, and nobody else.
    struct Broken(&'static str);

    impl Clock for Broken {
        fn now(&self) -> Duration {
            let it = std::thread::current().name() == Some(self.0);
            assert!(!it, "on purpose");
            Duration::ZERO
        }
    }

    #[test]
    fn a_device_whose_thread_panics_ends_its_session() {
        for (thread, record) in [("engine0", false), ("recorded", true)] {
            let (mut client, stream) = UnixStream::pair().expect("a pair");
            let report = Report::new(Sink::new(Box::new(std::io::sink())), "device");
            let link = Link::new(stream, "device", Arc::new(report), &Options::default());
            let ram = GuestRam::anonymous(&[(Gpa(0), 1 << 20)]).expect("maps");
            let ports = Ports {
                clock: Arc::new(Broken(thread)),
                ..Ports::stepped(Arc::new(ram), Arc::new(Ignore))
            };
            let record = record.then(|| -> Box<dyn Write + Send> { Box::new(std::io::sink()) });
            let device = Driven::new(Config::default(), ports, &link, record).expect("made");
            device.set_bus_master(true);
            for (register, value) in [
                (regs::CTX_TABLE, 0x1000),
                (regs::CTX_COUNT, 16),
                (regs::IQ_BASE, 0x2000),
                (regs::IQ_LOG2, 4),
                (regs::PRQ_BASE, 0x3000),
                (regs::PRQ_LOG2, 4),
                (regs::SHADOW, 0x4000),
                (regs::CTRL, 1u64),
            ] {
                let bytes = value.to_le_bytes();
                device.mmio_write(BAR_REGS, register.offset, &bytes[..register.width as usize]);
            }
            // The client finds its socket closed, and whoever serves it is told why.
            let limit = client.set_read_timeout(Some(Duration::from_secs(20)));
            limit.expect("set");
            assert_eq!(client.read(&mut [0]).expect("in time"), 0, "{thread}");
            let mut endpoint = Session::stepped(Config::default()).expect("made");
            match VfioUser(link).serve(&mut endpoint) {
                Err(Ended::Here(why)) => assert!(why.contains(thread), "{why}"),
                other => panic!("{thread}: {other:?}"),
            }
        }
    }
}
