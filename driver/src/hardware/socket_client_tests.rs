//! The client against servers that do as they should, and that do not.

use super::*;
use std::io::Write;
use std::os::unix::net::UnixListener;

/// What a server answers to a message: (number, command, body) to bytes.
type Answer = fn(u16, u16, &[u8]) -> Vec<u8>;

fn message(id: u16, command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(id.to_le_bytes());
    bytes.extend(command.to_le_bytes());
    bytes.extend((16 + body.len() as u32).to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(u32::from(flags & ERROR != 0).to_le_bytes());
    bytes.extend(body);
    bytes
}

/// The answer of a server that does as it should.
fn good(id: u16, command: u16, asked: &[u8]) -> Vec<u8> {
    let body = match command {
        1 => Body::default().u32(0).bytes(b"{}\0"),
        4 => Body::default().u32(16).u32(3).u32(9).u32(5),
        5 => Body::default().u64(0).u64(0).u64(1 << 20).u64(0),
        7 => Body::default().u64(0).u32(2).u32(4),
        9 => Body::default().bytes(&asked[..16]).u32(0x1234_5678),
        _ => Body::default(),
    };
    message(id, command, REPLY, &body.0)
}

fn serve(mut stream: UnixStream, answer: Answer) -> std::io::Result<()> {
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let mut body = vec![0; usize::from(at(4)) - 16];
        stream.read_exact(&mut body)?;
        if u32_at(&header, 8) == Some(NO_REPLY) {
            continue;
        }
        // In two pieces, as a stream may come.
        let bytes = answer(at(0), at(2), &body);
        let middle = bytes.len().min(7);
        stream.write_all(&bytes[..middle])?;
        stream.write_all(&bytes[middle..])?;
    }
}

fn connect(answer: Answer) -> Result<Client> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("device.sock");
    let listener = UnixListener::bind(&path).expect("listens");
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a client");
        // Ends when either side leaves.
        let _ = serve(stream, answer);
    });
    Client::connect_within(&path, Duration::from_millis(200))
}

fn read(client: &mut Client) -> Result<u32> {
    let mut bytes = [0; 4];
    client.read(0, 0, &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// The error of a read that the server answers as told; all other commands it answers well.
fn read_error(answer: Answer) -> Option<Error> {
    let mut client = connect(answer).expect("connects");
    let error = read(&mut client).err();
    // It is dead for good, or goes on as if nothing had been.
    match client.check() {
        Err(dead) => assert_eq!(read(&mut client), Err(dead)),
        Ok(()) => client.unmap(0, 4096).expect("goes on"),
    }
    error
}

#[test]
fn answers_are_told_from_nonsense() {
    let dead = |errno| Some(Error::Dead { errno });
    assert_eq!(read_error(good), None);
    let wrong_number = read_error(|id, command, body| match command {
        9 => good(id.wrapping_add(1), command, body),
        _ => good(id, command, body),
    });
    assert_eq!(wrong_number, dead(Errno::EPROTO));
    let command = read_error(|id, command, body| match command {
        9 => message(id, 11, 0, &[0; 16]),
        _ => good(id, command, body),
    });
    assert_eq!(command, dead(Errno::EPROTO));
    let shorter_than_a_header = read_error(|id, command, body| match command {
        9 => [0; 16].into(),
        _ => good(id, command, body),
    });
    assert_eq!(shorter_than_a_header, dead(Errno::EPROTO));
    let endless = read_error(|id, command, body| match command {
        9 => vec![0xff; 64],
        _ => good(id, command, body),
    });
    assert_eq!(endless, dead(Errno::EPROTO));
    let too_short = read_error(|id, command, body| match command {
        9 => message(id, 9, REPLY, &[0; 17]),
        _ => good(id, command, body),
    });
    assert_eq!(too_short, dead(Errno::EPROTO));
    let silent = read_error(|id, command, body| match command {
        9 => Vec::new(),
        _ => good(id, command, body),
    });
    assert_eq!(silent, dead(Errno::ETIMEDOUT));
}

#[test]
fn refusals_are_errors_and_the_conversation_goes_on() {
    let refused = read_error(|id, command, body| match command {
        9 => message(id, 9, REPLY | ERROR, &[]),
        _ => good(id, command, body),
    });
    let Some(Error::Hardware(text)) = refused else {
        panic!("{refused:?}");
    };
    assert!(
        text.contains("REGION_READ") && text.contains("EPERM"),
        "{text}"
    );
    // A posted write that was refused is answered: the answer is nobody's.
    let late = read_error(|id, command, body| match command {
        9 => [
            message(id.wrapping_sub(1), 10, REPLY | ERROR, &[]),
            good(id, command, body),
        ]
        .concat(),
        _ => good(id, command, body),
    });
    assert_eq!(late, None);
}

#[test]
fn a_server_of_something_else_is_told_so() {
    let version: Answer = |id, command, body| match command {
        1 => message(id, 1, REPLY, &1u32.to_le_bytes()),
        _ => good(id, command, body),
    };
    let no_pci: Answer = |id, command, body| match command {
        4 => message(id, 4, REPLY, &[0; 16]),
        _ => good(id, command, body),
    };
    let small: Answer = |id, command, body| match command {
        5 => message(id, 5, REPLY, &[0; 32]),
        _ => good(id, command, body),
    };
    let no_interrupts: Answer = |id, command, body| match command {
        7 => message(id, 7, REPLY, &[0; 16]),
        _ => good(id, command, body),
    };
    let empty: Answer = |id, command, _| message(id, command, REPLY, &[]);
    for answer in [version, no_pci, small, no_interrupts, empty] {
        assert!(matches!(connect(answer), Err(Error::Hardware(_))));
    }
}

#[test]
fn a_server_that_does_not_read_ends_posted_writes() {
    let mut client = connect(good).expect("connects");
    // Nobody reads on the other side of this pair.
    let (ours, _theirs) = UnixStream::pair().expect("a pair");
    ours.set_write_timeout(Some(client.limit)).expect("set");
    client.stream = ours;
    let error = (0..100_000).find_map(|_| client.post(0, 0, &[0; 64]).err());
    let errno = Errno::ETIMEDOUT;
    assert_eq!(error, Some(Error::Dead { errno }));
}
