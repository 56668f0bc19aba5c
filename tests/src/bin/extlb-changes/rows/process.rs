//! Whole processes that end or become others.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use crate::area_unsafe::Area;
use crate::proc_fs::eventually;
use crate::sys_unsafe::{let_end, release_memory, stop_at_end};
use crate::trial::{Access, Mode, Trial};

const PAGES: usize = 256;
const CONTEXTS: &str = "/sys/kernel/debug/extlb/extlb0/contexts";

/// Contexts, as the driver counts them, and the pages that their devices have.
fn contexts() -> Result<(usize, u64)> {
    let text = fs::read_to_string(CONTEXTS).context(CONTEXTS)?;
    let mapped = |line: &str| -> Option<u64> {
        let rest = line.split_once("mapped ")?.1;
        rest.split(',').next()?.parse().ok()
    };
    let mapped: Option<u64> = text.lines().map(mapped).sum();
    Ok((text.lines().count(), mapped.context("contexts")?))
}

/// How a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Exit,
    Exec,
    Kill,
}

/// What another process does: it lets the device have memory, waits to be told, and ends.
pub fn live(how: &str) -> Result<()> {
    let mut trial = Trial::new(Mode::Sound)?;
    let area = Area::anonymous(PAGES)?;
    trial.give(&area, Access::Write)?;
    println!("ready");
    std::io::stdin().read_line(&mut String::new())?;
    match how {
        // Not by way of destructors, which would give all back first.
        "Exit" => std::process::exit(0),
        // For the kernel's own checks at the end of an address space: a part is not mapped any more.
        "Unmap" => {
            area.unmap(4..8)?;
            std::process::exit(0)
        }
        "Exec" => bail!(Command::new("/bin/busybox").args(["sleep", "1000"]).exec()),
        _ => bail!("told to end, and not killed"),
    }
}

/// Starts another process, and lets `watch` see it end; `watch` gets the number of contexts before.
fn beside(how: End, watch: impl FnOnce(&mut Child, usize) -> Result<()>) -> Result<()> {
    let (before, _) = contexts()?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--live", &format!("{how:?}")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start another process")?;
    let result = is_ready(&mut child, before).and_then(|()| watch(&mut child, before));
    let _ = child.kill();
    child.wait()?;
    result
}

fn is_ready(child: &mut Child, before: usize) -> Result<()> {
    let mut line = String::new();
    let stdout = child.stdout.take().context("standard output")?;
    BufReader::new(stdout).read_line(&mut line)?;
    ensure!(line == "ready\n", "the other process says {line:?}");
    let (now, mapped) = contexts()?;
    ensure!(now == before + 1, "{now} contexts, {before} before");
    ensure!(mapped > PAGES as u64, "only {mapped} pages are mapped");
    Ok(())
}

fn end(t: &mut Trial, how: End) -> Result<()> {
    beside(how, |child, before| {
        t.change(0, || {
            match how {
                End::Kill => child.kill()?,
                End::Exit | End::Exec => drop(child.stdin.take()),
            }
            eventually("the context is gone", || Ok(contexts()?.0 == before))?;
            let (_, mapped) = contexts()?;
            ensure!(mapped < PAGES as u64, "{mapped} pages are still mapped");
            if how == End::Exec {
                ensure!(
                    child.try_wait()?.is_none(),
                    "it did not become another program"
                );
            }
            Ok(())
        })
    })
}

/// What the kernel does to a process that was killed for lack of memory, before it ends by itself.
pub fn reap(t: &mut Trial) -> Result<()> {
    let heard = !t.is_broken();
    beside(End::Kill, |child, before| {
        let pid = child.id() as i32;
        stop_at_end(pid)?;
        let taken = t.change(0, || {
            release_memory(pid)?;
            let (now, mapped) = contexts()?;
            ensure!(now == before + 1, "the context is gone already");
            Ok(mapped < PAGES as u64)
        });
        let_end(pid)?;
        let taken = taken?;
        ensure!(taken == heard, "pages taken: {taken}, not {heard}");
        Ok(())
    })
}

pub fn exit(t: &mut Trial) -> Result<()> {
    end(t, End::Exit)
}

pub fn exec(t: &mut Trial) -> Result<()> {
    end(t, End::Exec)
}

pub fn kill(t: &mut Trial) -> Result<()> {
    end(t, End::Kill)
}
