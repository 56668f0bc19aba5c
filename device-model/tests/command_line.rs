//! The server as a program: inherited sockets, service managers, exit codes, and its end.

mod wire;

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use extlb_spec::{BAR_REGS, regs};
use wire::client::{Client, QEMU, VERSION, message, version_body};
use wire::program::{BINARY, Program};

fn is_served(mut client: Client) {
    client.greet();
    let mut id = [0; 4];
    client
        .region_read(BAR_REGS.into(), 0, &mut id)
        .expect("read");
    assert_eq!(u32::from_le_bytes(id), regs::ID_VALUE);
}

fn listener(path: &Path) -> OwnedFd {
    UnixListener::bind(path).expect("bound").into()
}

#[test]
fn an_inherited_socket_that_listens_and_one_that_is_connected_are_served() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("s");
    let program = Program::start(&["--fd", "0", "--once"], listener(&path));
    is_served(Client::silent(&path));
    assert!(program.end().success());
    assert!(path.exists(), "it is not the server's to remove");
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    // Without --once: there is no other client.
    let program = Program::start(&["--fd", "0"], theirs.into());
    is_served(Client::on(ours));
    assert!(program.end().success());
}

#[test]
fn sockets_of_a_service_manager_are_served() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("s");
    let script = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" --once 3<&0 </dev/null";
    let mut shell = Command::new("sh");
    shell.args(["-c", script, BINARY]).stdin(listener(&path));
    let program = Program::run(shell.stdout(Stdio::null()));
    is_served(Client::silent(&path));
    assert!(program.end().success());
}

/// Its code, and what it says on its outputs.
fn run(arguments: &[&str], stdin: impl Into<Stdio>) -> (Option<i32>, String, String) {
    let mut command = Command::new(BINARY);
    Program::run_to_its_end(command.args(arguments).stdin(stdin))
}

#[test]
fn what_cannot_be_served_is_said() {
    for (arguments, code, says) in [
        (&[][..], 1, "--socket-path"),
        (&["--fd", "99"], 1, "file descriptor 99"),
        (&["--fd", "0"], 1, "file descriptor 0"),
        (&["--fd", "2"], 1, "file descriptor 2"),
        (&["--fd", "x"], 2, "--fd"),
        (
            &["--socket-path", "/no/such/folder/s"],
            1,
            "/no/such/folder/s",
        ),
        (
            &["--socket-path", "s", "--config", "/no/such/file"],
            1,
            "/no/such/file",
        ),
        (&["--dma-messages", "maybe"], 2, "standard"),
    ] {
        let (ended, _, said) = run(arguments, Stdio::null());
        assert_eq!(ended, Some(code), "{arguments:?}: {said}");
        assert!(said.contains(says), "{arguments:?}: {said}");
    }
    // Sockets that no client of ours connects to.
    let tcp = TcpListener::bind("127.0.0.1:0").expect("bound");
    let datagrams = UnixDatagram::unbound().expect("made");
    for socket in [OwnedFd::from(tcp), datagrams.into()] {
        let (ended, _, said) = run(&["--fd", "0"], socket);
        assert_eq!(ended, Some(1), "{said}");
        assert!(said.contains("not a UNIX stream socket"), "{said}");
    }
    let two = ["--socket-path", "a", "--socket-path", "b"];
    let (_, said, _) = run(&[&two[..], &["--print-qemu-args"]].concat(), Stdio::null());
    assert_eq!(said.lines().count(), 2, "{said}");
}

#[test]
fn a_signal_ends_it_whatever_its_client_is_at() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("s");
    let program = Program::start(&["--fd", "0"], listener(&path));
    // Answered: so it is at work, and at this client's next message.
    let mut client = Client::new(&path);
    let half = message(1, VERSION, 0, &version_body(0, QEMU));
    client.send_bytes(&half[..20], &[]).expect("sent");
    nix::sys::signal::kill(program.pid(), nix::sys::signal::Signal::SIGTERM).expect("sent");
    assert_eq!(program.end().code(), None);
}
