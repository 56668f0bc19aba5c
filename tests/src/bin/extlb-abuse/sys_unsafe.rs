//! System calls as numbers: what a hostile program makes.
#![allow(unsafe_code)]

use std::os::fd::RawFd;

use anyhow::{Result, ensure};
use extlb_driver::{Kernel, Pending, Queue, Raw};
use extlb_spec::work::{Descriptor, Opcode};
use nix::errno::Errno;
use nix::libc;

/// Size of a page, in bytes.
pub const PAGE: u64 = 4096;

/// Where all memory is that hostile calls may name; nothing of this program is there. The numbers
/// are fixed, so that the same seed makes the same calls.
pub const ARENA: u64 = 0x1000_0000_0000;
/// Bytes of memory for the device, at [`ARENA`].
pub const ARENA_BYTES: u64 = 1 << 20;
/// Where pages of the device are mapped: so many places of so many bytes.
pub const MAPS: u64 = ARENA + (1 << 28);
/// Number of these places.
pub const MAP_PLACES: u64 = 32;
/// Bytes of one, of which the first half can be mapped.
pub const MAP_BYTES: u64 = 16 * PAGE;
/// Arguments of calls: for each thread a page that can be written, and after a hole one that cannot.
pub const ARGUMENTS: u64 = ARENA + (2 << 28);
/// Bytes of one thread's.
pub const ARGUMENT_BYTES: u64 = 4 * PAGE;
/// End of all that may be named.
const END: u64 = ARENA + (3 << 28);

/// The files that hostile calls may name: from this number on, far above those of this program.
pub const FILES: u64 = 500;
/// Number of files.
pub const FILE_PLACES: u64 = 320;

/// Makes a system call and returns what the kernel said.
///
/// # Panics
/// If the call could reach something of this program's own.
pub fn call(number: i64, args: [u64; 6]) -> Result<u64, Errno> {
    assert!(is_harmless(number, args), "{number} {args:x?}");
    // SAFETY: all that the call changes is memory in [ARENA, END), where this program has no
    // object, and files numbered from FILES on, which are nobody else's; see `is_harmless`.
    let result =
        unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], args[4], args[5]) };
    Errno::result(result).map(|value| value as u64)
}

fn is_inside(addr: u64, len: u64) -> bool {
    (ARENA..END).contains(&addr) && len <= END - addr
}

/// A place that this program cannot have mapped: the first page, or the kernel's half.
fn is_nowhere(addr: u64) -> bool {
    !(PAGE..1 << 47).contains(&addr)
}

fn is_file(number: u64) -> bool {
    (FILES..FILES + FILE_PLACES).contains(&number)
}

/// Whether a call keeps to the memory and to the files that are given up to it.
fn is_harmless(number: i64, args: [u64; 6]) -> bool {
    let [a, b, c, d, ..] = args;
    let flag = |value: i32| value as u64;
    match number {
        libc::SYS_ioctl => is_file(a) && (is_inside(c, PAGE) || is_nowhere(c)),
        libc::SYS_mmap => {
            is_inside(a, b)
                && d & flag(libc::MAP_FIXED) != 0
                && (is_file(args[4]) || args[4] == u64::MAX)
        }
        libc::SYS_munmap
        | libc::SYS_mprotect
        | libc::SYS_madvise
        | libc::SYS_mlock
        | libc::SYS_munlock
        | libc::SYS_msync => is_inside(a, b),
        libc::SYS_mremap => {
            let fixed = flag(libc::MREMAP_FIXED | libc::MREMAP_MAYMOVE);
            is_inside(a, b.max(c)) && (d == 0 || d == fixed && is_inside(args[4], c))
        }
        libc::SYS_pread64 | libc::SYS_pwrite64 | libc::SYS_read | libc::SYS_write => {
            is_inside(b, c) || is_nowhere(b)
        }
        libc::SYS_close | libc::SYS_lseek | libc::SYS_fsync | libc::SYS_fcntl => is_file(a),
        libc::SYS_dup3 => is_file(b),
        // Three words of 4 bytes, each written at once: that rings a doorbell.
        libc::SYS_getresuid => is_inside(a, 4) && is_inside(b, 4) && is_inside(c, 4),
        libc::SYS_poll => is_inside(a, b * 8),
        libc::SYS_membarrier => true,
        _ => false,
    }
}

/// Reserves the memory that hostile calls may name, and maps the arena, the same for each thread.
pub fn reserve() -> Result<()> {
    let none =
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    let len = (END - ARENA) as usize;
    let at = std::ptr::with_exposed_provenance_mut(ARENA as usize);
    // SAFETY: not over something that is there.
    let got = unsafe { libc::mmap(at, len, libc::PROT_NONE, none, -1, 0) };
    ensure!(
        got == at,
        "the arena's addresses are taken: {}",
        Errno::last()
    );
    Ok(())
}

/// Opens the device, as the file of that number.
pub fn open_at(path: &std::ffi::CStr, flags: i32, file: u64) -> Result<u64, Errno> {
    assert!(is_file(file));
    // SAFETY: opens a file; the number that it is moved to is not one of this program's.
    unsafe {
        let fd = Errno::result(libc::open(path.as_ptr(), flags | libc::O_CLOEXEC))?;
        let moved = Errno::result(libc::dup3(fd, file as RawFd, libc::O_CLOEXEC));
        libc::close(fd);
        moved.map(|fd| fd as u64)
    }
}

/// A file in memory, by which memory is written and read: a place where nothing is mapped is then
/// an errno and no signal.
pub fn memory_file() -> Result<u64, Errno> {
    // SAFETY: opens a file, which stays open until the program ends.
    Errno::result(unsafe { libc::memfd_create(c"bytes".as_ptr(), libc::MFD_CLOEXEC) })
        .map(|fd| fd as u64)
}

/// Writes bytes to memory, if it can be written.
pub fn poke(memory_file: u64, addr: u64, bytes: &[u8]) -> Result<(), Errno> {
    // SAFETY: reads the bytes.
    let put = unsafe { libc::pwrite(memory_file as RawFd, bytes.as_ptr().cast(), bytes.len(), 0) };
    Errno::result(put)?;
    let args = [memory_file, addr, bytes.len() as u64, 0, 0, 0];
    call(libc::SYS_pread64, args).map(drop)
}

/// Submits an operation on the arena, where no Rust object is, whatever is mapped there.
pub fn submit(
    queue: &Queue<Kernel>,
    descriptor: Descriptor,
) -> extlb_driver::Result<Pending<Kernel, Raw, ()>> {
    let reads = descriptor.opcode == Opcode::Crc32c as u8;
    let writes = descriptor.opcode == Opcode::Fill as u8;
    assert!(
        descriptor.flags == 0
            && (reads && is_inside(descriptor.src, descriptor.len)
                || writes && is_inside(descriptor.dst, descriptor.len)),
        "{descriptor:?}"
    );
    // SAFETY: as the assertion says.
    unsafe { queue.submit_raw(descriptor) }
}

/// Gives whole pages of memory back to the kernel; those of private memory are zero then.
pub fn discard(bytes: &mut [u8]) -> Result<(), Errno> {
    let start = bytes.as_mut_ptr();
    let whole =
        start.addr().is_multiple_of(PAGE as usize) && bytes.len().is_multiple_of(PAGE as usize);
    assert!(whole, "{} bytes at {start:p}", bytes.len());
    // SAFETY: only the content of these bytes changes, which are borrowed for writing.
    let result = unsafe { libc::madvise(start.cast(), bytes.len(), libc::MADV_DONTNEED) };
    Errno::result(result).map(drop)
}

/// Forks a child that runs `calls` and ends; waits for it.
///
/// `calls` must not allocate or lock: it may run in a copy of a process with several threads.
pub fn fork_for(calls: impl FnOnce()) -> Result<(), Errno> {
    // SAFETY: the child makes calls as above and ends, as callers promise.
    unsafe {
        let child = Errno::result(libc::fork())?;
        if child == 0 {
            calls();
            libc::_exit(0);
        }
        let mut status = 0;
        loop {
            match Errno::result(libc::waitpid(child, &mut status, 0)) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
                Ok(_) if status == 0 => return Ok(()),
                Ok(_) => return Err(Errno::ECHILD),
            }
        }
    }
}

/// Unloads a module; `EAGAIN` if it is in use.
pub fn unload_module(name: &std::ffi::CStr) -> Result<(), Errno> {
    // SAFETY: reads the name.
    let result = unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) };
    Errno::result(result).map(drop)
}

/// Loads a module.
pub fn load_module(path: &str, parameters: &str) -> Result<()> {
    let file = std::fs::File::open(path)?;
    let parameters = std::ffi::CString::new(parameters)?;
    // SAFETY: reads the file and the parameters.
    let result = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            std::os::fd::AsRawFd::as_raw_fd(&file),
            parameters.as_ptr(),
            0,
        )
    };
    Errno::result(result)?;
    Ok(())
}
