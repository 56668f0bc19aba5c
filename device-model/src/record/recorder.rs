//! A device whose run is recorded.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use extlb_spec::regs::VERSION_VALUE;

use super::entry::{Call, Entry, Return};
use super::log::{Header, Writer};
use super::taps::{Taps, len32};
use crate::config::ConfigError;
use crate::ports::Ports;
use crate::sync::lock;
use crate::{Config, Device, Step, Totals};

/// Why nothing can be recorded.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The device cannot have this configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The configuration cannot be put into the log.
    #[error("cannot write the configuration down")]
    Header(#[source] toml::ser::Error),
    /// The log cannot be written.
    #[error("cannot write the recorded run")]
    Write(#[source] io::Error),
}

/// A device that is called by one thread at a time, each call being written to a log together
/// with everything that the device asks of its ports meanwhile.
///
/// Calls may come from any thread; they take turns. The ports must not call the device: a wake
/// port only notes that there is something to do (see [`super::Pacer`]).
///
/// A log that cannot be written stops growing, and [`Recorder::finish`] tells why; the device is
/// not disturbed.
pub struct Recorder {
    config: Config,
    device: Mutex<Device>,
    log: Arc<Mutex<Writer>>,
    /// Callers that wait for their turn, other than by a step.
    callers: AtomicU32,
}

impl Recorder {
    /// A device as after power-on, recorded to `out` from now on.
    pub fn new(
        config: Config,
        ports: Ports,
        out: Box<dyn Write + Send>,
    ) -> Result<Self, RecordError> {
        config.check()?;
        let header = Header {
            interface: VERSION_VALUE,
            config: toml::to_string(&config).map_err(RecordError::Header)?,
        };
        let log = Writer::new(out, &header).map_err(RecordError::Write)?;
        let log = Arc::new(Mutex::new(log));
        let device = Device::new(config.clone(), Taps::install(ports, log.clone()))?;
        Ok(Self {
            config,
            device: Mutex::new(device),
            log,
            callers: AtomicU32::new(0),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// See [`Device::mmio_read`].
    pub fn mmio_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        let call = Call::MmioRead {
            bar,
            offset,
            len: len32(data.len()),
        };
        self.call(call, |device| {
            device.mmio_read(bar, offset, data);
            ((), Return::Data(data.to_vec()))
        });
    }

    /// See [`Device::mmio_write`].
    pub fn mmio_write(&self, bar: u8, offset: u64, data: &[u8]) {
        let call = Call::MmioWrite {
            bar,
            offset,
            data: data.to_vec(),
        };
        self.call(call, |device| {
            (device.mmio_write(bar, offset, data), Return::Nothing)
        });
    }

    /// See [`Device::set_bus_master`].
    pub fn set_bus_master(&self, on: bool) {
        self.call(Call::SetBusMaster(on), |device| {
            (device.set_bus_master(on), Return::Nothing)
        });
    }

    /// See [`Device::reset`].
    pub fn reset(&self) {
        self.call(Call::Reset, |device| (device.reset(), Return::Nothing));
    }

    /// See [`Device::quiesce`].
    pub fn quiesce(&self) {
        self.call(Call::Quiesce, |device| (device.quiesce(), Return::Nothing));
    }

    /// See [`Device::engine_step`]. Lets all other callers go first.
    pub fn engine_step(&self) -> Step {
        self.step(Call::EngineStep, Device::engine_step)
    }

    /// See [`Device::invalidation_step`]. Lets all other callers go first.
    pub fn invalidation_step(&self) -> Step {
        self.step(Call::InvalidationStep, Device::invalidation_step)
    }

    /// See [`Device::next_deadline`].
    pub fn next_deadline(&self) -> Option<Duration> {
        lock(&self.device).next_deadline()
    }

    /// See [`Device::totals`].
    pub fn totals(&self) -> Totals {
        lock(&self.device).totals()
    }

    /// Hands what is recorded so far to the file: if this process is killed, it is there.
    pub fn flush(&self) {
        lock(&self.log).flush();
    }

    /// Ends the log; calls after this are not recorded any more. What went wrong with it, if
    /// anything did.
    pub fn finish(&self) -> io::Result<()> {
        let device = lock(&self.device);
        let end = summary(&device.totals());
        lock(&self.log).finish(end)
    }

    fn step(&self, call: Call, step: impl FnOnce(&Device) -> Step) -> Step {
        // Who steps does so without pause; the lock alone would let others wait for long.
        while self.callers.load(Ordering::Relaxed) > 0 {
            std::thread::yield_now();
        }
        self.with(lock(&self.device), call, |device| {
            let step = step(device);
            (step, step.into())
        })
    }

    fn call<R>(&self, call: Call, f: impl FnOnce(&Device) -> (R, Return)) -> R {
        self.callers.fetch_add(1, Ordering::Relaxed);
        let device = lock(&self.device);
        self.callers.fetch_sub(1, Ordering::Relaxed);
        self.with(device, call, f)
    }

    fn with<R>(
        &self,
        device: MutexGuard<'_, Device>,
        call: Call,
        f: impl FnOnce(&Device) -> (R, Return),
    ) -> R {
        lock(&self.log).put(&Entry::Call(call));
        let (result, returned) = f(&device);
        lock(&self.log).put(&Entry::Return(returned));
        result
    }
}

/// What a device has done, as the end of a log has it.
pub(super) fn summary(totals: &Totals) -> String {
    serde_json::to_string(totals).unwrap_or_default()
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // Whoever wants to know has called it already.
        let _ = self.finish();
    }
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder").finish_non_exhaustive()
    }
}
