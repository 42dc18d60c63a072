//! Asking a mount whether it answers, without being held up by one that does not.
//!
//! The problem: whoever touches a mount whose daemon is stopped waits, and cannot even be killed.
//!
//! The plan: a child process asks and writes the answer into a pipe. Nothing is waited for but the
//! pipe, and the child is only ever reached through a descriptor of the process, never by its
//! number: a program that ignores SIGCHLD has no children to wait for, and their numbers are soon
//! given to others.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use super::{c_path, check};

/// A question to a file system that may never answer. Dropping it leaves behind a child that could
/// not be ended, which ends when the file system does.
#[derive(Debug)]
pub struct Probe {
    pipe: File,
    /// `None` on kernels before 5.3 and off Linux; then the child is left to itself.
    #[cfg_attr(not(target_os = "linux"), allow(dead_code))]
    child: Option<OwnedFd>,
    answer: Option<Answer>,
    numbers: [u64; NUMBERS],
}

/// The ioctl by which a mount of ours is asked how many parts of its model have changed: `_IOR('o', 1,
/// uint64_t)`, as asm-generic/ioctl.h makes such numbers.
pub const CHANGED_PARTS: u32 = 2 << 30 | 8 << 16 | (b'o' as u32) << 8 | 1;

/// How many numbers say what a mount has asked of servers.
pub const NUMBERS: usize = 5;

/// The ioctl by which it is asked for them: `_IOR('o', 2, uint64_t[5])`.
pub const TRAFFIC: u32 = 2 << 30 | (8 * NUMBERS as u32) << 16 | (b'o' as u32) << 8 | 2;

/// Bytes of what a child tells: an i32, and the numbers.
const TOLD_BYTES: usize = 4 + 8 * NUMBERS;

/// What a file system answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Alive,
    /// Parts of the model are not what they were.
    Changed,
    /// An errno.
    Error(i32),
}

impl Probe {
    /// Asks what is mounted at `path` for something that the kernel does not remember.
    pub fn ask(path: &Path) -> io::Result<Self> {
        let path = c_path(path)?;
        let (pipe, teller) = io::pipe()?;
        let (gate, opener) = io::pipe()?;
        let (teller_fd, gate_fd) = (teller.as_raw_fd(), gate.as_raw_fd());
        // SAFETY: until it ends, the child only makes system calls, on memory that was there before
        // the fork and on its own stack. So it does not matter what other threads have locked.
        match check(unsafe { libc::fork() })? {
            // SAFETY: this is that child.
            0 => unsafe { ask_and_exit(&path, teller_fd, gate_fd) },
            child => {
                let child = descriptor_of(child);
                drop(opener); // from here on the child may end
                Ok(Self {
                    pipe: File::from(OwnedFd::from(pipe)),
                    child,
                    answer: None,
                    numbers: [0; NUMBERS],
                })
            }
        }
    }

    /// The answer. Waits for it, so ask for it only when the [descriptor](AsFd) is readable, which
    /// it is from the answer on.
    pub fn answer(&mut self) -> Answer {
        *self.answer.get_or_insert_with(|| {
            let mut told = [0; TOLD_BYTES];
            if self.pipe.read_exact(&mut told).is_err() {
                return Answer::Error(libc::EINTR); // somebody has killed the child
            }
            let (answer, numbers) = told.split_first_chunk().expect("it is longer");
            for (number, bytes) in self.numbers.iter_mut().zip(numbers.as_chunks().0) {
                *number = u64::from_ne_bytes(*bytes);
            }
            match i32::from_ne_bytes(*answer) {
                0 => Answer::Alive,
                CHANGED => Answer::Changed,
                errno => Answer::Error(errno),
            }
        })
    }

    /// What the mount has asked of servers, as far as it has answered; zeros of a model on this
    /// machine.
    pub fn numbers(&self) -> [u64; NUMBERS] {
        self.numbers
    }

    /// Whether [`answer`](Self::answer) was called, and so returns at once.
    pub fn is_answered(&self) -> bool {
        self.answer.is_some()
    }
}

impl AsFd for Probe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

#[cfg(target_os = "linux")]
fn descriptor_of(child: libc::pid_t) -> Option<OwnedFd> {
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    pidfd_open(Pid::from_raw(child)?, PidfdFlags::empty()).ok()
}

#[cfg(not(target_os = "linux"))]
fn descriptor_of(_: libc::pid_t) -> Option<OwnedFd> {
    None
}

impl Drop for Probe {
    fn drop(&mut self) {
        #[cfg(target_os = "linux")]
        if let Some(child) = &self.child {
            use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

            if self.answer.is_none() {
                let _ = pidfd_send_signal(child, Signal::KILL);
            }
            // A child that answered ends at once. One that cannot be killed must not hold us up.
            let patience = match self.answer {
                Some(_) => WaitIdOptions::EXITED,
                None => WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
            };
            let _ = waitid(WaitId::PidFd(child.as_fd()), patience);
        }
    }
}

/// What the child does: waits until its parent holds a descriptor of it, asks, tells, ends.
///
/// # Safety
/// Only for a child that was just forked: it closes all descriptors.
unsafe fn ask_and_exit(path: &CString, teller: RawFd, gate: RawFd) -> ! {
    let mut byte = 0_u8;
    // SAFETY: the parent's end of the gate is ours as well and must be closed for the gate to open;
    // nothing in this process uses any descriptor but these two.
    unsafe { close_all_but(teller, gate) };
    // SAFETY: the buffer is one byte long. At the end of the pipe nothing is written to it.
    unsafe { libc::read(gate, (&raw mut byte).cast(), 1) };
    let mut numbers = [0; NUMBERS];
    let answer = match ask(path, &mut numbers) {
        Ok(0) => 0,
        Ok(_) => CHANGED,
        Err(e) => e.raw_os_error().unwrap_or(libc::EINVAL),
    };
    let mut told = [0; TOLD_BYTES];
    told[..4].copy_from_slice(&answer.to_ne_bytes());
    for (bytes, number) in told[4..].chunks_mut(8).zip(numbers) {
        bytes.copy_from_slice(&number.to_ne_bytes());
    }
    // SAFETY: the pointer and the length are those of the array; `_exit` runs nothing of the
    // parent's.
    unsafe {
        libc::write(teller, told.as_ptr().cast(), told.len());
        libc::_exit(0)
    }
}

/// Closes all descriptors but two; also those of our output, since a caller that waits for its end
/// would wait for this child as well.
///
/// # Safety
/// Nothing in this process may use a descriptor but these.
unsafe fn close_all_but(a: RawFd, b: RawFd) {
    let (low, high) = (a.min(b), a.max(b));
    let ranges = [(0, low - 1), (low + 1, high - 1), (high + 1, i32::MAX)];
    for (first, last) in ranges.into_iter().filter(|(first, last)| first <= last) {
        // SAFETY: the caller promises that nobody uses them.
        #[cfg(target_os = "linux")]
        let closed = unsafe {
            libc::syscall(
                libc::SYS_close_range,
                first as libc::c_uint,
                last as libc::c_uint,
                0,
            ) == 0
        };
        #[cfg(not(target_os = "linux"))]
        let closed = false;
        if !closed {
            // Before Linux 5.9. These are the ones that somebody may wait for.
            for descriptor in first..=last.min(255) {
                // SAFETY: as above; an error if it is closed already, which does no harm.
                unsafe { libc::close(descriptor) };
            }
        }
    }
}

/// What a child tells instead of an errno where parts have changed.
const CHANGED: i32 = -1;

/// Asks with `stat` first, which tells who may not enter: to those, `statfs` answers with zeros. And
/// with `statfs`, since the kernel knows everything else by itself. Then for the number of changed
/// parts, and for what was asked of servers, which older daemons of ours do not know.
fn ask(path: &CString, numbers: &mut [u64; NUMBERS]) -> io::Result<u64> {
    // SAFETY: both are plain data, for which zeros are a value.
    let (mut stat, mut statfs): (libc::stat, libc::statfs) = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends with NUL and the buffer is a stat.
    check(unsafe { libc::stat(path.as_ptr(), &mut stat) })?;
    // SAFETY: the path ends with NUL and the buffer is a statfs.
    check(unsafe { libc::statfs(path.as_ptr(), &mut statfs) })?;
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
    // SAFETY: the path ends with NUL.
    let root = check(unsafe { libc::open(path.as_ptr(), flags) })?;
    let mut changed = 0_u64;
    // SAFETY: by its number, the call writes a u64 there, or nothing.
    let asked = check(unsafe { libc::ioctl(root, CHANGED_PARTS.into(), &mut changed) });
    let mut traffic = [0_u64; NUMBERS];
    // SAFETY: by its number, the call writes so many u64 there, or nothing.
    if check(unsafe { libc::ioctl(root, TRAFFIC.into(), &mut traffic) }).is_ok() {
        *numbers = traffic;
    }
    Ok(asked.map_or(0, |_| changed))
}
