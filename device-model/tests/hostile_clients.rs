//! Clients that break the protocol, stall, vanish or do not listen: each gets an error, or loses
//! its own session; the next one is served, and nothing of it is left in the server.

mod wire;

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use extlb_device::Config;
use extlb_device::server::Options;
use extlb_spec::{BAR_DOORBELLS, BAR_REGS, regs};
use nix::errno::Errno;
use wire::client::*;
use wire::*;

/// What becomes of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// An error, and the session goes on.
    Refused(Errno),
    /// An error, and the session ends.
    Last(Errno),
    /// The session ends without a word.
    Over,
}
use End::{Last, Over, Refused};

fn sized(mut message: Vec<u8>, size: u32) -> Vec<u8> {
    message[4..8].copy_from_slice(&size.to_le_bytes());
    message
}

/// A server that is soon through with a client that stalls.
fn impatient(once: bool) -> Served {
    Served::with(Options {
        once,
        patience: Some(Duration::from_secs(1)),
        ..Options::default()
    })
}

/// Sends one message to a session, and sees what becomes of it.
fn check(client: &mut Client, bytes: &[u8], fds: &[RawFd], end: End, what: &str) {
    client.send_bytes(bytes, fds).expect("sent");
    if let Refused(errno) | Last(errno) = end {
        let reply = client
            .receive()
            .unwrap_or_else(|| panic!("{what}: no reply"));
        assert!(
            reply.is_reply() && reply.flags & 1 << 5 != 0,
            "{what}: {reply:?}"
        );
        assert_eq!(Errno::from_raw(reply.error as i32), errno, "{what}");
        assert!(reply.body.is_empty(), "{what}");
    }
    match end {
        Refused(_) => client.get_irq_info(2).map(drop).expect("goes on"),
        Last(_) | Over => {
            // A part of a message never ends by itself.
            let _ = client.stream.shutdown(std::net::Shutdown::Write);
            assert_eq!(client.receive(), None, "{what}");
        }
    }
}

#[test]
fn each_wrong_message_has_its_own_error_or_end() {
    let served = Served::new(Config::default(), false);
    let regs: u32 = BAR_REGS.into();
    let good = message(7, GET_INFO, 0, &words(&[16, 0, 0, 0]));
    let body = words(&[16, 0, 0, 0]);
    let read = |offset: [u32; 2], region, count| {
        message(
            1,
            REGION_READ,
            0,
            &words(&[offset[0], offset[1], region, count]),
        )
    };
    let max = u32::MAX;
    // After the version.
    for (what, bytes, end) in [
        ("a part of a header", good[..9].to_vec(), Over),
        ("a part of a body", good[..20].to_vec(), Over),
        (
            "a size below the header",
            sized(good.clone(), 15),
            Last(Errno::EMSGSIZE),
        ),
        ("no size", sized(good.clone(), 0), Last(Errno::EMSGSIZE)),
        (
            "a size beyond all",
            sized(good.clone(), max),
            Last(Errno::EMSGSIZE),
        ),
        (
            "a size beyond the limit",
            sized(good.clone(), (1 << 20) + 33),
            Last(Errno::EMSGSIZE),
        ),
        ("a reply", message(1, GET_INFO, 1, &body), Over),
        ("no type", message(1, GET_INFO, 5, &body), Over),
        (
            "no command",
            message(1, 0, 0, &body),
            Refused(Errno::ENOSYS),
        ),
        (
            "unknown",
            message(1, 0xffff, 0, &[0xff; 4000]),
            Refused(Errno::ENOSYS),
        ),
        (
            "no fds",
            message(1, REGION_IO_FDS, 0, &body),
            Refused(Errno::EOPNOTSUPP),
        ),
        (
            "dirty pages",
            message(1, 14, 0, &body),
            Refused(Errno::EOPNOTSUPP),
        ),
        (
            "migration",
            message(1, 16, 0, &body),
            Refused(Errno::EOPNOTSUPP),
        ),
        (
            "the other way",
            message(1, DMA_READ, 0, &body),
            Refused(Errno::EOPNOTSUPP),
        ),
        (
            "short",
            message(1, GET_INFO, 0, &body[..12]),
            Refused(Errno::EINVAL),
        ),
        (
            "argsz",
            message(1, GET_INFO, 0, &[0; 16]),
            Refused(Errno::EINVAL),
        ),
        (
            "the version again",
            message(1, VERSION, 0, &version_body(0, "{}")),
            Refused(Errno::EINVAL),
        ),
        ("no such region", read([0, 0], 1, 4), Refused(Errno::EINVAL)),
        ("nor that", read([0, 0], max, 4), Refused(Errno::EINVAL)),
        (
            "over the end",
            read([4094, 0], regs, 4),
            Refused(Errno::EINVAL),
        ),
        ("wraps", read([max, max], regs, 4), Refused(Errno::EINVAL)),
        ("a bomb", read([0, 0], regs, max), Refused(Errno::E2BIG)),
        (
            "a lesser bomb",
            read([0, 0], regs, 1 << 20),
            Refused(Errno::EINVAL),
        ),
        (
            "less than it says",
            message(1, REGION_WRITE, 0, &words(&[0, 0, regs, 8, 1])),
            Refused(Errno::EINVAL),
        ),
        (
            "many writes",
            message(1, WRITE_MULTI, 0, &words(&[max, max, 0, 0])),
            Refused(Errno::EINVAL),
        ),
        (
            "a reset with more",
            message(1, RESET, 0, &[0]),
            Refused(Errno::EINVAL),
        ),
    ] {
        let mut client = Client::new(&served.socket);
        check(&mut client, &bytes, &[], end, what);
    }
    // Before it.
    for (what, bytes, end) in [
        ("anything", good.clone(), Last(Errno::EPROTO)),
        ("a reset", message(1, RESET, 0, &[]), Last(Errno::EPROTO)),
        ("unknown", message(1, 99, 0, &[]), Last(Errno::EPROTO)),
        (
            "no version",
            message(1, VERSION, 0, &[0; 3]),
            Last(Errno::EINVAL),
        ),
        (
            "no zero byte",
            message(1, VERSION, 0, b"\0\0\0\0{}"),
            Last(Errno::EINVAL),
        ),
        (
            "no JSON",
            message(1, VERSION, 0, b"\0\0\0\0{\0"),
            Last(Errno::EINVAL),
        ),
        (
            "another major",
            message(1, VERSION, 0, b"\x01\0\0\0{}\0"),
            Last(Errno::EPROTONOSUPPORT),
        ),
        (
            "half of it",
            message(1, VERSION, 0, b"\0\0\0\0{}\0")[..18].to_vec(),
            Over,
        ),
        ("nothing", vec![], Over),
    ] {
        let mut client = Client::silent(&served.socket);
        check(&mut client, &bytes, &[], end, what);
    }
    // One of two writes outside: the other is not carried out either.
    let mut client = Client::new(&served.socket);
    let table = regs::CTX_TABLE.offset;
    let (good, bad) = (
        [table as u32, 0, regs, 4, 0x1000, 0],
        [4096, 0, regs, 4, 1, 0],
    );
    let both = words(&[&[2, 0], &good[..], &bad].concat());
    assert_eq!(client.call(WRITE_MULTI, &both, &[]), Err(Errno::EINVAL));
    let mut value = [0xff; 4];
    client.region_read(regs, table, &mut value).expect("read");
    assert_eq!(value, [0; 4]);
    // Posted, and wrong: no reply, as it would answer something else.
    client.post(regs, 1 << 40, &[1; 4]);
    client.send(99, NO_REPLY, &[], &[]);
    let mut id = [0; 4];
    client.region_read(regs, 0, &mut id).expect("read");
    assert_eq!(u32::from_le_bytes(id), regs::ID_VALUE);
}

/// File descriptors of this process, which the server is part of.
fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("listed").count()
}

/// Alone in its process, as it counts that process's file descriptors: see below.
fn file_descriptors_are_taken_or_closed() {
    let served = Served::new(Config::default(), false);
    // One session, so that all is there that stays.
    drop(Client::new(&served.socket));
    let mut client = Client::new(&served.socket);
    let file = memory(0x4000);
    let fd = file.as_raw_fd();
    let before = open_fds();
    let map = message(1, DMA_MAP, 0, &{
        let mut body = words(&[32, 3]);
        body.extend(
            [0u64, 0, 0x4000]
                .iter()
                .flat_map(|value| value.to_le_bytes()),
        );
        body
    });
    let irqs = |count| message(2, SET_IRQS, 0, &words(&[20, 0x24, 2, 0, count]));
    let info = message(3, GET_INFO, 0, &words(&[16, 0, 0, 0]));
    for _ in 0..3 {
        for (what, bytes, fds, errno) in [
            ("a command that takes none", &info, vec![fd], Errno::EINVAL),
            ("two files for a range", &map, vec![fd; 2], Errno::EINVAL),
            ("more than may be", &map, vec![fd; 9], Errno::E2BIG),
            ("many more", &map, vec![fd; 253], Errno::E2BIG),
            ("no event fds", &irqs(4), vec![fd; 4], Errno::EINVAL),
            ("too few", &irqs(4), vec![fd; 3], Errno::EINVAL),
            ("too many", &irqs(4), vec![fd; 5], Errno::EINVAL),
        ] {
            check(&mut client, bytes, &fds, Refused(errno), what);
        }
        // A different one with each byte.
        for byte in &info {
            client.send_bytes(&[*byte], &[fd; 20]).expect("sent");
        }
        let reply = client.receive().expect("a reply");
        assert_eq!(reply.error, Errno::E2BIG as u32);
    }
    assert_eq!(open_fds(), before, "left open");
    // Taken, and given back with the session.
    client.dma_map(0, 0, 0x4000, fd).expect("mapped");
    drop(client);
    drop(Client::new(&served.socket));
    let mut last = Client::new(&served.socket);
    last.greet_again();
    assert!(open_fds() <= before, "left open by a session");
}

impl Client {
    /// Something that is answered when all before it is done.
    fn greet_again(&mut self) {
        self.get_irq_info(2).expect("answered");
    }
}

#[test]
fn what_a_client_sends_beyond_what_may_be_is_closed() {
    const ALONE: &str = "EXTLB_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return file_descriptors_are_taken_or_closed();
    }
    let this = std::env::current_exe().expect("a path");
    let name = "what_a_client_sends_beyond_what_may_be_is_closed";
    let child = std::process::Command::new(this)
        .args(["--exact", name, "--test-threads=1"])
        .env(ALONE, "1")
        .output()
        .expect("runs");
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success(), "{said}");
}

#[test]
fn a_client_that_does_not_listen_is_dropped() {
    let served = impatient(false);
    let client = Client::new(&served.socket);
    // Replies of a megabyte, until neither side's buffer takes more.
    let bells: u32 = BAR_DOORBELLS.into();
    let read = message(1, REGION_READ, 0, &words(&[0, 0, bells, 1 << 20]));
    client.stream.set_nonblocking(true).expect("set");
    let begun = Instant::now();
    for _ in 0..100 {
        if (&client.stream).write(&read).is_err() {
            break;
        }
    }
    // Served only when the one before is gone, though that has not left.
    let mut next = Client::new(&served.socket);
    next.greet_again();
    assert!(
        begun.elapsed() > Duration::from_millis(500),
        "it had its time"
    );
    let _ = client.stream.shutdown(std::net::Shutdown::Both);
}

#[test]
fn a_client_that_stalls_in_a_message_or_says_nothing_is_dropped() {
    for start in [
        &[][..],
        &message(1, VERSION, 0, &version_body(0, QEMU))[..30],
    ] {
        let served = impatient(false);
        let mut client = Client::silent(&served.socket);
        client.send_bytes(start, &[]).expect("sent");
        let mut next = Client::new(&served.socket);
        next.greet_again();
        // Nothing was lost, and the first one knows.
        assert_eq!(client.receive(), None);
    }
}

#[test]
fn a_client_that_is_idle_between_messages_is_served() {
    let served = impatient(true);
    let mut client = Client::new(&served.socket);
    // Longer than a message may take.
    std::thread::sleep(Duration::from_millis(1500));
    client.greet_again();
}

#[test]
fn devices_of_one_process_know_nothing_of_each_other() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let (listens, connected) = (path("a.sock"), path("b.sock"));
    let report = path("report");
    let server = extlb_device::server::Server::bind(Options {
        at: vec![listens.clone().into(), connected.clone().into()],
        report: Some(report.clone()),
        once: true,
        ..Options::default()
    });
    let server = server.expect("listens");
    let thread = std::thread::spawn(move || server.serve().expect("serves"));
    let mut one = Wire::connect(&listens);
    let mut other = Wire::connect(&connected);
    one.start();
    assert_eq!(one.get(regs::STATUS), 1);
    assert_eq!(other.get(regs::STATUS), 0);
    assert_eq!(other.get(regs::IQ_BASE), 0);
    // One breaks the protocol; the other goes on.
    one.client.send_bytes(&[0xff; 16], &[]).expect("sent");
    assert_eq!(one.client.receive().map(|reply| reply.error), None);
    other.start();
    assert_eq!(other.get(regs::STATUS), 1);
    drop(other);
    thread.join().expect("ends");
    let text = std::fs::read_to_string(report).expect("a report");
    for socket in [&listens, &connected] {
        let name = format!("\"device\":\"{}\"", socket.display());
        assert!(text.contains(&name), "{name}: {text}");
        assert!(!socket.exists(), "cleaned up");
    }
}

#[test]
fn event_fds_at_their_end_hold_nothing_up() {
    let served = Served::new(Config::default(), true);
    let mut wire = Wire::connect(&served.socket);
    // Blocks, as its maker has it.
    let full = nix::sys::eventfd::EventFd::from_value(0).expect("an event fd");
    full.write(u64::MAX - 1).expect("filled");
    let fds = [full.as_fd().as_raw_fd()];
    wire.client.set_irqs(2, 0x24, 3, 1, &fds).expect("assigned");
    wire.client.set_irqs(2, 0x21, 3, 1, &[]).expect("raised");
    wire.client.greet_again();
    drop(wire);
    served.report();
}
