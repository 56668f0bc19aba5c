//! The agent's end of the channel.

use std::fs::{self, File, OpenOptions};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use extlb_guest_protocol::{self as protocol, PORT_NAME, ToRig};

/// The port needs the driver's probe to be through, which runs beside process 1.
const PORT_WAIT: Duration = Duration::from_secs(20);

/// Sends frames; shared by all threads, one frame at a time.
#[derive(Clone)]
pub struct Link(Arc<Mutex<File>>);

impl Link {
    /// Sends a frame without a body. Blocks while the rig does not read.
    pub fn send(&self, header: &ToRig) -> Result<()> {
        self.send_body(header, &[])
    }

    /// Sends a frame. Blocks while the rig does not read.
    pub fn send_body(&self, header: &ToRig, body: &[u8]) -> Result<()> {
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        protocol::write_frame(&mut *port, header, body).context("channel to the rig")
    }
}

/// Opens the virtio serial port: its reading half and the link that writes.
pub fn open() -> Result<(File, Link)> {
    let path = find_port()?;
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let reader = port.try_clone().context("cannot duplicate the port")?;
    Ok((reader, Link(Arc::new(Mutex::new(port)))))
}

fn find_port() -> Result<PathBuf> {
    let start = Instant::now();
    loop {
        for entry in fs::read_dir("/sys/class/virtio-ports")
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            let device = PathBuf::from("/dev").join(entry.file_name());
            if name.trim_end() == PORT_NAME && device.exists() {
                return Ok(device);
            }
        }
        if start.elapsed() > PORT_WAIT {
            bail!("no virtio serial port named {PORT_NAME}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
