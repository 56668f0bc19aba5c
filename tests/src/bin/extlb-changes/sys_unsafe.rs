//! System calls that have no safe wrapper.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_void};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use crate::area_unsafe::{Area, PAGE};

/// A forked child that waits to be asked for its verdict.
pub struct Child {
    pid: Pid,
    /// Closed to ask.
    ask: Option<OwnedFd>,
}

impl Child {
    /// Forks. The child runs `verdict` when it is asked, and ends.
    ///
    /// `verdict` must not allocate or lock: it may run in a copy of a process with several threads.
    pub fn fork(verdict: impl FnOnce() -> bool) -> Result<Self> {
        let (mine, theirs) = nix::unistd::pipe().context("pipe")?;
        // SAFETY: the child reads and writes memory, reads from a pipe and ends, as callers promise.
        match unsafe { fork() }.context("fork")? {
            ForkResult::Child => {
                drop(theirs);
                // Until the parent closes its end, by whatever way.
                let _ = nix::unistd::read(&mine, &mut [0]);
                let code = i32::from(!verdict());
                // SAFETY: ends the child without running anything else of this program.
                unsafe { libc::_exit(code) }
            }
            ForkResult::Parent { child } => Ok(Self {
                pid: child,
                ask: Some(theirs),
            }),
        }
    }

    /// What the child says.
    pub fn verdict(mut self) -> Result<bool> {
        self.end()
    }

    fn end(&mut self) -> Result<bool> {
        drop(self.ask.take());
        match waitpid(self.pid, None).context("waitpid")? {
            WaitStatus::Exited(_, code) => Ok(code == 0),
            other => bail!("a child ended with {other:?}"),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.ask.is_some() {
            // The row has failed already, or does not care.
            let _ = self.end();
        }
    }
}

fn pointer(addr: usize) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(addr)
}

/// Pages at the end of the heap. They go by [`shrink_heap`].
pub fn grow_heap(pages: usize) -> Result<Area> {
    // SAFETY: the memory is new; the allocator copes with others that grow the heap.
    let start = unsafe { libc::sbrk(0) }.addr();
    let pad = start.next_multiple_of(PAGE) - start;
    // SAFETY: as above.
    let got = unsafe { libc::sbrk((pad + pages * PAGE) as isize) };
    ensure!(got.addr() == start, "sbrk: {}", Errno::last());
    Ok(Area::adopt(start + pad, pages))
}

/// Takes back what [`grow_heap`] gave, if it is still at the end.
pub fn shrink_heap(area: &Area) -> Result<()> {
    let end = area.addr(area.pages() * PAGE).0 as usize;
    // SAFETY: only asks.
    let now = unsafe { libc::sbrk(0) }.addr();
    ensure!(now == end, "somebody else has grown the heap");
    // SAFETY: the pages that go are the area's, which holds no Rust objects.
    let got = unsafe { libc::sbrk(-((area.pages() * PAGE) as isize)) };
    ensure!(got.addr() == end, "sbrk: {}", Errno::last());
    Ok(())
}

/// A segment of System V shared memory, which goes by [`detach`].
pub fn attach(pages: usize) -> Result<Area> {
    // SAFETY: makes a new segment.
    let id = unsafe { libc::shmget(libc::IPC_PRIVATE, pages * PAGE, 0o600) };
    Errno::result(id).context("shmget")?;
    // SAFETY: the kernel picks the address.
    let at = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    // SAFETY: marks it to go with its last user.
    unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    ensure!(at.addr() != usize::MAX, "shmat: {}", Errno::last());
    Ok(Area::adopt(at.addr(), pages))
}

/// `shmdt`.
pub fn detach(area: &Area) -> Result<()> {
    let at = pointer(area.addr(0).0 as usize);
    // SAFETY: the pages that go are the area's, which holds no Rust objects.
    Errno::result(unsafe { libc::shmdt(at) }).context("shmdt")?;
    Ok(())
}

/// Moves pages to a node, with `move_pages`; returns where each is then (or an error, negative).
pub fn move_pages(area: &Area, pages: Range<usize>, node: Option<i32>) -> Result<Vec<i32>> {
    let addrs: Vec<_> = pages
        .map(|page| pointer(area.addr(page * PAGE).0 as usize))
        .collect();
    let nodes = node.map(|node| vec![node; addrs.len()]);
    let mut status = vec![0; addrs.len()];
    let wanted = nodes
        .as_ref()
        .map_or(std::ptr::null(), |nodes| nodes.as_ptr());
    let move_own = 1 << 1; // MPOL_MF_MOVE
    // SAFETY: three arrays of the length given, or null; the content of pages does not change.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            addrs.len(),
            addrs.as_ptr(),
            wanted,
            status.as_mut_ptr(),
            move_own,
        )
    };
    Errno::result(result).context("move_pages")?;
    Ok(status)
}

/// `madvise` on memory of another process.
pub fn advise_other(pid: i32, addrs: Range<u64>, advice: i32) -> Result<(), Errno> {
    let len = (addrs.end - addrs.start) as usize;
    let vector = libc::iovec {
        iov_base: pointer(addrs.start as usize),
        iov_len: len,
    };
    // SAFETY: opens a file.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the advice is one that changes no content; the kernel checks it.
    let result = unsafe { libc::syscall(libc::SYS_process_madvise, fd, &vector, 1, advice, 0) };
    let result = Errno::result(result);
    // SAFETY: opened above.
    unsafe { libc::close(fd as i32) };
    match result? as usize == len {
        true => Ok(()),
        false => Err(Errno::EAGAIN),
    }
}

/// Kills a process, and stops it when it is about to give its memory up. It goes on, and ends, when
/// this process does or by [`let_end`].
pub fn stop_at_end(pid: i32) -> Result<()> {
    let none = std::ptr::null_mut::<c_void>();
    // SAFETY: follows a child of this process; nothing of this one is changed.
    let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, none, libc::PTRACE_O_TRACEEXIT) };
    Errno::result(seized).context("PTRACE_SEIZE")?;
    nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL).context("kill")?;
    let mut status = 0;
    // SAFETY: the status is written.
    let waited = unsafe { libc::waitpid(pid, &mut status, libc::__WALL) };
    Errno::result(waited).context("waitpid")?;
    let stopped = libc::SIGTRAP | (libc::PTRACE_EVENT_EXIT << 8);
    ensure!(
        status >> 8 == stopped,
        "the process does not stop: {status:#x}"
    );
    Ok(())
}

/// Lets a process go on that [`stop_at_end`] has stopped.
pub fn let_end(pid: i32) -> Result<()> {
    let none = std::ptr::null_mut::<c_void>();
    // SAFETY: as above.
    let gone = unsafe { libc::ptrace(libc::PTRACE_DETACH, pid, none, none) };
    Errno::result(gone).context("PTRACE_DETACH")?;
    Ok(())
}

/// Frees the private memory of a process that is ending, as the kernel does when it is out of memory.
pub fn release_memory(pid: i32) -> Result<()> {
    // SAFETY: opens a file, which is nobody else's, and names a process that is ending.
    unsafe {
        let fd = Errno::result(libc::syscall(libc::SYS_pidfd_open, pid, 0)).context("pidfd")?;
        let fd = OwnedFd::from_raw_fd(fd as i32);
        let done = libc::syscall(libc::SYS_process_mrelease, fd.as_raw_fd(), 0);
        Errno::result(done).context("process_mrelease")?;
    }
    Ok(())
}

extern "C" fn nothing(_: libc::c_int) {}

/// Lets `SIGBUS` pass: the kernel sends it when it takes a page for broken.
pub fn survive_bus_errors() -> Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGBUS, &action) }.context("sigaction")?;
    Ok(())
}

/// Writes the pages of a shared mapping to their file.
pub fn sync_mapping(area: &Area) -> Result<()> {
    let at = pointer(area.addr(0).0 as usize);
    // SAFETY: changes no content.
    let result = unsafe { libc::msync(at, area.pages() * PAGE, libc::MS_SYNC) };
    Errno::result(result).context("msync")?;
    Ok(())
}

/// A file in memory of so many pages.
pub fn memory_file(pages: usize) -> Result<OwnedFd> {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    let fd = nix::sys::memfd::memfd_create(c"changes", flags).context("memfd_create")?;
    nix::unistd::ftruncate(&fd, (pages * PAGE) as i64).context("ftruncate")?;
    Ok(fd)
}

/// Frees pages of a file, which is as long as before.
pub fn punch(file: BorrowedFd<'_>, pages: Range<usize>) -> Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (start, len) = ((pages.start * PAGE) as i64, (pages.len() * PAGE) as i64);
    // SAFETY: changes a file.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, start, len) };
    Errno::result(result).context("fallocate")?;
    Ok(())
}

/// Writes a page of memory to a page of a file, from where it is: not by way of a buffer.
pub fn write_page(file: BorrowedFd<'_>, from: &Area, page: usize) -> Result<()> {
    let at = pointer(from.addr(0).0 as usize);
    // SAFETY: the kernel reads the first page of the area.
    let result = unsafe { libc::pwrite(file.as_raw_fd(), at, PAGE, (page * PAGE) as i64) };
    let written = Errno::result(result).context("pwrite")?;
    ensure!(written as usize == PAGE, "{written} bytes written");
    Ok(())
}

/// A file of memory that nobody else can read.
pub fn secret_file(pages: usize) -> Result<OwnedFd> {
    // SAFETY: opens a file, which is nobody else's.
    let fd = unsafe {
        let fd = Errno::result(libc::syscall(libc::SYS_memfd_secret, 0)).context("memfd_secret")?;
        OwnedFd::from_raw_fd(fd as i32)
    };
    nix::unistd::ftruncate(&fd, (pages * PAGE) as i64).context("ftruncate")?;
    Ok(fd)
}

/// A breakpoint at an offset of a file, in this process, for as long as the result lives. `kind` is
/// the number of the kernel's uprobe events.
pub fn uprobe(kind: u32, path: &CStr, offset: u64) -> Result<OwnedFd> {
    // struct perf_event_attr of <linux/perf_event.h>, in its second version.
    const DISABLED: u64 = 1;
    let mut attr = [0u64; 9];
    attr[0] = u64::from(kind) | (size_of_val(&attr) as u64) << 32;
    attr[5] = DISABLED;
    attr[7] = path.as_ptr().expose_provenance() as u64;
    attr[8] = offset;
    let (own, any_cpu) = (0, -1);
    // SAFETY: the structure has the size that it carries; the path lives across the call.
    unsafe {
        let fd = libc::syscall(
            libc::SYS_perf_event_open,
            attr.as_ptr(),
            own,
            any_cpu,
            -1,
            0,
        );
        let fd = Errno::result(fd).context("perf_event_open")?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}
