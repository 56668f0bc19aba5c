//! The channel between the rig and the agent: frames over one virtio serial port.
//!
//! A frame is two little-endian 32-bit lengths (header, body), the header (JSON), the body (raw
//! bytes). Both lengths are bounded, so that neither end can make the other allocate without limit.
//!
//! Backpressure: output of the guest's program is held back by the port itself (a rig that does not
//! read stops the agent's writes). Standard input is sent only against [`ToRig::StdinCredit`], so
//! that a program that does not read its input does not block control messages behind it.

pub mod figures;

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Number of this protocol; the two ends must agree.
pub const VERSION: u32 = 2;

/// Name of the virtio serial port.
pub const PORT_NAME: &str = "extlb.agent";

/// A file of the guest that names the modules to load before anything else, one absolute path a line,
/// in this order. Words `NAME.PARAMETER=VALUE` of the kernel's command line go to the module NAME.
pub const MODULES_FILE: &str = "/etc/extlb-modules";

/// Largest header of a frame, in bytes (arguments and environment of a command travel in it).
pub const MAX_HEADER: usize = 1 << 20;

/// Largest body of a frame, in bytes.
pub const MAX_BODY: usize = 64 << 10;

/// Standard input in flight towards a program, in bytes.
pub const STDIN_WINDOW: u32 = 64 << 10;

/// Size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Number of lines.
    pub rows: u16,
    /// Number of characters in a line.
    pub columns: u16,
}

/// What the agent sets up before a program runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// The device is attached: the agent waits until the kernel's driver offers it, or says why not.
    pub expect_device: bool,
    /// The driver that the device is handed to instead of its own (`vfio-pci`).
    pub bind: Option<String>,
    /// Disk with an ext4 file system, by its serial number, to be mounted read-only.
    pub input: Option<Mount>,
    /// Disk to swap to, by its serial number. Its content is lost.
    pub swap: Option<String>,
}

/// A disk and where it is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The disk's serial number, as given to QEMU.
    pub serial: String,
    /// Absolute path in the guest; made if it is absent.
    pub path: String,
}

/// A program to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Name and arguments; never empty. A name without `/` is searched in `PATH`.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: String,
    /// Runs on a terminal of this size; otherwise on three pipes.
    pub tty: Option<Window>,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// It returned this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

impl Exit {
    /// The code a shell would report: the program's own, or 128 + signal.
    pub fn shell_code(self) -> i32 {
        match self {
            Exit::Code(code) => code,
            Exit::Signal(signal) => 128_i32.saturating_add(signal),
        }
    }
}

/// Headers of frames from the rig to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToGuest {
    /// First message; answered by [`ToRig::Ready`] or [`ToRig::Failed`].
    Setup(Setup),
    /// Runs a program; one at a time. The agent adds `EXTLB_BDF`, the device's address on the bus (as
    /// in sysfs), to its environment if the device is there. Answered by output and then [`ToRig::Exited`].
    Exec(Exec),
    /// The body is standard input of the running program.
    Stdin,
    /// Standard input has ended.
    StdinEnd,
    /// The terminal has a new size.
    Resize(Window),
    /// Answered by [`ToRig::File`] frames and [`ToRig::FileEnd`].
    ReadFile {
        /// Absolute path in the guest.
        path: String,
    },
    /// Ends all programs, unloads the driver, switches the machine off.
    Shutdown,
}

/// Headers of frames from the agent to the rig.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToRig {
    /// First message: the guest is up.
    Hello {
        /// [`VERSION`] of the agent.
        protocol: u32,
        /// Release of the running kernel.
        kernel: String,
    },
    /// Everything asked for in [`Setup`] is in place.
    Ready,
    /// A request could not be carried out.
    Failed {
        /// What went wrong, in words for people.
        what: String,
    },
    /// The body is standard output of the program.
    Stdout,
    /// The body is standard error of the program.
    Stderr,
    /// The rig may send this many more bytes of standard input.
    StdinCredit {
        /// Number of bytes.
        bytes: u32,
    },
    /// The program has ended and all it wrote has been sent.
    Exited(Exit),
    /// The body is a piece of the file asked for.
    File,
    /// The file is complete, or could not be read.
    FileEnd {
        /// Why it could not be read.
        error: Option<String>,
    },
}

/// Writes one frame. `body` must not be longer than [`MAX_BODY`].
pub fn write_frame<H: Serialize>(mut to: impl Write, header: &H, body: &[u8]) -> io::Result<()> {
    let header = serde_json::to_vec(header).map_err(io::Error::other)?;
    if header.len() > MAX_HEADER || body.len() > MAX_BODY {
        return Err(invalid(format!(
            "frame too long: header {} bytes, body {} bytes",
            header.len(),
            body.len()
        )));
    }
    let mut frame = Vec::with_capacity(8 + header.len() + body.len());
    frame.extend_from_slice(&(header.len() as u32).to_le_bytes());
    frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
    frame.extend_from_slice(&header);
    frame.extend_from_slice(body);
    to.write_all(&frame)?;
    to.flush()
}

/// Reads one frame; `Ok(None)` when the stream ends between two frames.
///
/// # Errors
/// `InvalidData` for lengths over the limits or a header that is not one of `H`; `UnexpectedEof`
/// when the stream ends inside a frame.
pub fn read_frame<H: DeserializeOwned>(mut from: impl Read) -> io::Result<Option<(H, Vec<u8>)>> {
    let mut lengths = [0; 8];
    let first = loop {
        match from.read(&mut lengths) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    if first == 0 {
        return Ok(None);
    }
    from.read_exact(&mut lengths[first..])?;
    let [h0, h1, h2, h3, b0, b1, b2, b3] = lengths;
    let header_len = u32::from_le_bytes([h0, h1, h2, h3]) as usize;
    let body_len = u32::from_le_bytes([b0, b1, b2, b3]) as usize;
    if header_len > MAX_HEADER || body_len > MAX_BODY {
        return Err(invalid(format!(
            "frame too long: header {header_len} bytes, body {body_len} bytes"
        )));
    }
    let mut header = vec![0; header_len];
    from.read_exact(&mut header)?;
    let mut body = vec![0; body_len];
    from.read_exact(&mut body)?;
    let header = serde_json::from_slice(&header)
        .map_err(|error| invalid(format!("header of a frame: {error}")))?;
    Ok(Some((header, body)))
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(header: &[u8], body: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u32).to_le_bytes().to_vec();
        bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(header);
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn frames_come_back_as_they_went() {
        let exec = ToGuest::Exec(Exec {
            argv: vec!["sh".into(), "-c".into(), "echo \"ä\"\n".into()],
            env: vec![("PATH".into(), "/bin".into())],
            cwd: "/".into(),
            tty: Some(Window {
                rows: 25,
                columns: 80,
            }),
        });
        let mut stream = Vec::new();
        write_frame(&mut stream, &exec, b"").unwrap();
        write_frame(&mut stream, &ToGuest::Stdin, &[0, 255, b'{']).unwrap();
        let mut from = stream.as_slice();
        assert_eq!(read_frame(&mut from).unwrap(), Some((exec, vec![])));
        assert_eq!(
            read_frame(&mut from).unwrap(),
            Some((ToGuest::Stdin, vec![0, 255, b'{']))
        );
        assert_eq!(read_frame::<ToGuest>(&mut from).unwrap(), None);
    }

    #[test]
    fn a_stream_cut_at_any_byte_is_an_error_and_never_a_frame() {
        let mut stream = Vec::new();
        write_frame(&mut stream, &ToRig::Exited(Exit::Signal(9)), b"rest").unwrap();
        for end in 1..stream.len() {
            let error = read_frame::<ToRig>(&stream[..end]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "cut at {end}");
        }
    }

    #[test]
    fn lengths_over_the_limit_are_refused_before_anything_is_allocated() {
        for (header, body) in [(u32::MAX, 0), (0, u32::MAX), (MAX_HEADER as u32 + 1, 0)] {
            let mut bytes = header.to_le_bytes().to_vec();
            bytes.extend_from_slice(&body.to_le_bytes());
            let error = read_frame::<ToRig>(bytes.as_slice()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn headers_that_are_not_messages_are_refused() {
        let deep = "[".repeat(100_000);
        let samples: [&[u8]; 6] = [
            b"",
            b"null",
            b"{\"type\":\"no such\"}",
            b"{\"type\":\"stdin_credit\",\"bytes\":-1}",
            b"\xff\xfe",
            deep.as_bytes(),
        ];
        for header in samples {
            let error = read_frame::<ToRig>(frame(header, b"").as_slice()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn a_body_over_the_limit_is_not_sent() {
        let mut stream = Vec::new();
        assert!(write_frame(&mut stream, &ToRig::Stdout, &vec![0; MAX_BODY + 1]).is_err());
        assert!(stream.is_empty());
    }

    #[test]
    fn exit_codes_are_a_shells() {
        assert_eq!(Exit::Code(3).shell_code(), 3);
        assert_eq!(Exit::Signal(9).shell_code(), 137);
    }
}
