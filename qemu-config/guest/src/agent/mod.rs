//! The agent: process 1 of the guest, which runs programs on behalf of the rig.
//!
//! Threads: this one reads requests; `reaper` collects every child that ends; each program has one
//! thread per stream and one that waits for its end. All of them send through one [`Link`].

mod link;
mod pci;
mod program;
mod reaper;
mod system;

use std::convert::Infallible;
use std::fs::File;
use std::io::Read;

use anyhow::{Context, Result, bail};

use extlb_guest_protocol::{self as protocol, MAX_BODY, ToGuest, ToRig};
use link::Link;
use program::Program;
use reaper::Reaper;

/// Serves the rig until it asks for shutdown, then switches the machine off.
///
/// # Errors
/// When the guest cannot be set up far enough to speak with the rig, or the rig is gone.
pub fn main() -> Result<Infallible> {
    if std::process::id() != 1 {
        bail!("this program is process 1 of the guest and nothing else");
    }
    system::mount_all()?;
    system::load_modules()?;
    system::prepare_console();
    let reaper = Reaper::start()?;
    let (mut requests, link) = link::open()?;
    link.send(&ToRig::Hello {
        protocol: protocol::VERSION,
        kernel: system::kernel_release(),
    })?;
    let mut program: Option<Program> = None;
    while let Some((request, body)) =
        protocol::read_frame::<ToGuest>(&mut requests).context("channel to the rig")?
    {
        match request {
            ToGuest::Setup(setup) => {
                let answer = match system::set_up(&setup) {
                    Ok(()) => ToRig::Ready,
                    Err(error) => ToRig::Failed {
                        what: format!("{error:#}"),
                    },
                };
                link.send(&answer)?;
            }
            ToGuest::Exec(mut exec) => {
                if let Some(bdf) = pci::find() {
                    exec.env.push(("EXTLB_BDF".to_owned(), bdf));
                }
                if program.as_ref().is_some_and(Program::is_running) {
                    link.send(&ToRig::Failed {
                        what: "a program is already running".into(),
                    })?;
                    continue;
                }
                program = Program::start(&exec, &link, &reaper)?;
            }
            ToGuest::Stdin => {
                if let Some(program) = &program {
                    program.input(body);
                }
            }
            ToGuest::StdinEnd => {
                if let Some(program) = &mut program {
                    program.end_input();
                }
            }
            ToGuest::Resize(window) => {
                if let Some(program) = &program {
                    program.resize(window);
                }
            }
            ToGuest::ReadFile { path } => send_file(&link, &path)?,
            ToGuest::Shutdown => system::power_off(),
        }
    }
    bail!("the rig closed the channel");
}

fn send_file(link: &Link, path: &str) -> Result<()> {
    let read = || -> Result<Option<String>> {
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(error) => return Ok(Some(format!("{path}: {error}"))),
        };
        let mut piece = vec![0; MAX_BODY];
        loop {
            match file.read(&mut piece) {
                Ok(0) => return Ok(None),
                Ok(length) => link.send_body(&ToRig::File, &piece[..length])?,
                Err(error) => return Ok(Some(format!("{path}: {error}"))),
            }
        }
    };
    let error = read()?;
    link.send(&ToRig::FileEnd { error })
}
