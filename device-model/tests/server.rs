//! The server, by a real client over a real socket, and by clients that break the protocol.

mod wire;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use extlb_device::Config;
use extlb_device::server::{Address, Error, Options, Server, qemu_args};
use extlb_spec::{BAR_REGS, regs};
use nix::errno::Errno;
use wire::client::Client;

const CONFIG: u32 = 7;

fn serve(folder: &Path, once: bool) -> (std::path::PathBuf, std::thread::JoinHandle<()>) {
    let socket = folder.join("device.sock");
    let server = Server::bind(Options {
        at: vec![socket.clone().into()],
        report: Some(folder.join("report.json")),
        config: Config::default(),
        once,
        ..Options::default()
    })
    .expect("listens");
    let thread = std::thread::spawn(move || server.serve().expect("serves"));
    (socket, thread)
}

fn read_u32(client: &mut Client, region: u32, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    client
        .region_read(region, offset, &mut bytes)
        .expect("read");
    u32::from_le_bytes(bytes)
}

fn write(client: &mut Client, register: regs::Register, value: u64) {
    let bytes = value.to_le_bytes();
    client
        .region_write(
            BAR_REGS.into(),
            register.offset,
            &bytes[..register.width as usize],
        )
        .expect("written");
}

fn memory(len: u64) -> File {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(len).expect("sized");
    file
}

/// Waits for what another process's thread is going to do.
fn eventually(mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "it did not happen");
        std::thread::yield_now();
    }
}

#[test]
fn a_client_attaches_enables_and_gets_its_wait_acknowledged() {
    let folder = tempfile::tempdir().expect("a folder");
    let (socket, thread) = serve(folder.path(), true);
    let mut client = Client::new(&socket);
    assert_eq!(read_u32(&mut client, CONFIG, 0), 0xe71b_1234);
    assert_eq!(read_u32(&mut client, BAR_REGS.into(), 0), regs::ID_VALUE);
    assert_eq!(client.region(2).map(|r| r.size), Ok(1 << 20));
    assert_eq!(client.get_irq_info(2).expect("irqs").count, 4);
    let ram = memory(1 << 20);
    client
        .dma_map(0, 0, 1 << 20, ram.as_raw_fd())
        .expect("mapped");
    client.region_write(CONFIG, 4, &[6, 0]).expect("bus master");
    for (register, value) in [
        (regs::CTX_TABLE, 0x1000),
        (regs::CTX_COUNT, 16),
        (regs::IQ_BASE, 0x2000),
        (regs::IQ_LOG2, 4),
        (regs::PRQ_BASE, 0x3000),
        (regs::PRQ_LOG2, 4),
        (regs::SHADOW, 0x4000),
        (regs::CTRL, 1),
    ] {
        write(&mut client, register, value);
    }
    let status = read_u32(&mut client, BAR_REGS.into(), regs::STATUS.offset);
    assert_eq!(status, regs::status::ENABLED);
    let command = extlb_spec::invalidation::Command {
        kind: 2,
        flags: 0x21,
        addr: 0x4180,
        value: 77,
        ..Default::default()
    };
    ram.write_all_at(&command.to_bytes(), 0x2000)
        .expect("posted");
    ram.write_all_at(&1u32.to_le_bytes(), 0x4000).expect("tail");
    write(&mut client, regs::KICK, 1);
    eventually(|| {
        let mut ack = [0; 8];
        ram.read_exact_at(&mut ack, 0x4180).expect("read");
        u64::from_le_bytes(ack) == 77
    });
    // RAM that goes away is gone: the next look at the queue is a fatal error, not an access.
    client.dma_unmap(0, 1 << 20).expect("unmapped");
    write(&mut client, regs::KICK, 1);
    let mut status = 0;
    eventually(|| {
        status = read_u32(&mut client, BAR_REGS.into(), regs::STATUS.offset);
        status == regs::status::FATAL
    });
    client.reset().expect("reset");
    assert_eq!(
        read_u32(&mut client, BAR_REGS.into(), regs::STATUS.offset),
        0
    );
    drop(client);
    thread.join().expect("ends");
    let report = std::fs::read_to_string(folder.path().join("report.json")).expect("a report");
    let last = report.lines().last().expect("a summary");
    let summary: serde_json::Value = serde_json::from_str(last).expect("JSON");
    assert_eq!(summary["event"], "summary");
    assert_eq!(summary["drains"], 1);
    assert_eq!(summary["oracle_stale"], 0);
    assert!(!socket.exists(), "cleaned up");
}

#[test]
fn accesses_outside_regions_and_odd_ranges_are_refused_without_harm() {
    let folder = tempfile::tempdir().expect("a folder");
    let (socket, thread) = serve(folder.path(), true);
    let mut client = Client::new(&socket);
    let ram = memory(0x1000);
    // Longer than the file, misaligned, wrapping: none of these is mapped; nobody dies.
    for (offset, at, len) in [
        (0, 0, 0x2000),
        (0, 5, 0x1000),
        (0, !0xfff, 0x2000),
        (u64::MAX, 0, 0x1000),
        (0, 0, 0),
    ] {
        let mapped = client.dma_map(offset, at, len, ram.as_raw_fd());
        assert_eq!(mapped, Err(Errno::EINVAL));
    }
    let pipe = std::io::pipe().expect("a pipe").1;
    let assigned = client.set_irqs(2, 0x24, 0, 1, &[pipe.as_raw_fd()]);
    assert_eq!(assigned, Err(Errno::EINVAL));
    client.set_irqs(2, 0x21, 0, 0, &[]).expect("disabled");
    assert_eq!(client.set_irqs(2, 0x24, 3, 9, &[]), Err(Errno::EINVAL));
    assert_eq!(read_u32(&mut client, BAR_REGS.into(), 0), regs::ID_VALUE);
    drop(client);
    thread.join().expect("ends");
}

#[test]
fn a_client_that_breaks_the_protocol_ends_its_own_session_only() {
    let folder = tempfile::tempdir().expect("a folder");
    let (socket, _thread) = serve(folder.path(), false);
    let header = |command: u16, size: u32| {
        let mut bytes = vec![1, 0];
        bytes.extend(command.to_le_bytes());
        bytes.extend(size.to_le_bytes());
        bytes.extend([0; 8]);
        bytes
    };
    let mut short_version = header(1, 16);
    short_version.extend([0; 4]);
    let mut no_nul = header(1, 24);
    no_nul.extend([0; 4]);
    no_nul.extend(b"{}{}");
    let mut huge_read = header(9, 32);
    huge_read.extend([0; 8]);
    huge_read.extend(0u32.to_le_bytes());
    huge_read.extend(u32::MAX.to_le_bytes());
    for message in [
        short_version,
        no_nul,
        huge_read,
        header(0xffff, 16),
        vec![0xff; 5],
        vec![0xff; 4096],
    ] {
        let mut stream = UnixStream::connect(&socket).expect("connects");
        // The server may close first; both are fine.
        let _ = stream.write_all(&message);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .expect("set");
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    }
    let mut client = Client::new(&socket);
    assert_eq!(read_u32(&mut client, BAR_REGS.into(), 0), regs::ID_VALUE);
}

#[test]
fn paths_that_are_taken_are_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let (socket, _thread) = serve(folder.path(), false);
    let again = |socket: &Path| {
        Server::bind(Options {
            at: vec![Address::Path(socket.into())],
            ..Default::default()
        })
        .err()
    };
    assert!(matches!(again(&socket), Some(Error::InUse(_))));
    let file = folder.path().join("file");
    std::fs::write(&file, "").expect("written");
    assert!(matches!(again(&file), Some(Error::NotSocket(_))));
    // Left behind by a server that was killed.
    let stale = folder.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).expect("bound"));
    assert!(again(&stale).is_none());
    assert!(matches!(
        again(&folder.path().join("no/such/folder.sock")),
        Some(Error::Bind { .. })
    ));
}

#[test]
fn qemu_is_told_the_path_as_json() {
    let args = qemu_args(Path::new("/tmp/a \"b\".sock"));
    let device: serde_json::Value = serde_json::from_str(&args[1]).expect("JSON");
    assert_eq!(args[0], "-device");
    assert_eq!(device["driver"], "vfio-user-pci");
    assert_eq!(device["socket"]["path"], "/tmp/a \"b\".sock");
}
