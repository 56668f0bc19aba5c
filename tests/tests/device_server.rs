//! The device server, as its own process.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const RIG: &str = env!("CARGO_BIN_EXE_extlb-under-test");

/// A message of the vfio-user protocol: VERSION, as every client sends it first.
fn version() -> Vec<u8> {
    let capabilities = b"{}\0";
    let size = 16 + 4 + capabilities.len() as u32;
    let mut message = Vec::new();
    message.extend([7u16, 1].iter().flat_map(|field| field.to_le_bytes()));
    message.extend([size, 0, 0].iter().flat_map(|field| field.to_le_bytes()));
    message.extend([0u16, 0].iter().flat_map(|field| field.to_le_bytes()));
    message.extend(capabilities);
    message
}

#[test]
fn a_server_whose_output_nobody_reads_serves() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("device.sock");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut server = Command::new(RIG)
        .args(["device", "--socket"])
        .arg(&socket)
        .stdin(Stdio::null())
        .stdout(writer)
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    let answered = loop {
        let answer = UnixStream::connect(&socket).and_then(|mut client| {
            client.set_read_timeout(Some(Duration::from_secs(10)))?;
            client.write_all(&version())?;
            let mut header = [0; 16];
            client.read_exact(&mut header).map(|()| header)
        });
        match answer {
            Ok(header) => break Ok(header),
            Err(error) if Instant::now() > end => break Err(error),
            Err(_) => std::thread::yield_now(),
        }
    };
    let _ = server.kill();
    let _ = server.wait();
    assert_eq!(answered.unwrap()[..4], [7, 0, 1, 0]);
}
