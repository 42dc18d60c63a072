//! Asking a mount whether it answers, without waiting for one that does not.
//!
//! The problem: a process that touches a mount whose daemon is stopped hangs, and cannot always be
//! killed.
//!
//! The plan: a child process asks and writes the answer into a pipe. Only the pipe is waited for,
//! and the child is signalled only through a process descriptor, never by its number: in a program
//! that ignores SIGCHLD, the kernel reaps children at once, and their numbers are soon reused.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use super::{c_path, check};

/// A question to a file system that may never answer. A child that cannot be killed is left behind
/// when this is dropped; it ends when the file system answers or is gone.
#[derive(Debug)]
pub struct Probe {
    pipe: File,
    /// `None` on kernels before 5.3 and on other systems; then the child is neither killed nor
    /// reaped.
    #[cfg_attr(not(target_os = "linux"), allow(dead_code))]
    child: Option<OwnedFd>,
    answer: Option<Answer>,
    numbers: [u64; NUMBERS],
}

/// The ioctl that asks an odmoe-fs mount how many parts of its model have changed: `_IOR('o', 1,
/// uint64_t)`, composed as in asm-generic/ioctl.h.
pub const CHANGED_PARTS: u32 = 2 << 30 | 8 << 16 | (b'o' as u32) << 8 | 1;

/// How many numbers say what a mount has asked of servers.
pub const NUMBERS: usize = 5;

/// The ioctl by which it is asked for them: `_IOR('o', 2, uint64_t[5])`.
pub const TRAFFIC: u32 = 2 << 30 | (8 * NUMBERS as u32) << 16 | (b'o' as u32) << 8 | 2;

/// Bytes of a child's reply: an i32, and the numbers.
const REPLY_BYTES: usize = 4 + 8 * NUMBERS;

/// The answer of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Alive,
    /// Parts of the model are not what they were.
    Changed,
    /// An errno.
    Error(i32),
}

impl Probe {
    /// Asks the mount at `path` for something that the kernel does not cache.
    pub fn ask(path: &Path) -> io::Result<Self> {
        let path = c_path(path)?;
        let (pipe, writer) = io::pipe()?;
        let (gate, opener) = io::pipe()?;
        // SAFETY: until it ends, the child only makes system calls, on memory that was there before
        // the fork and on its own stack. So it does not matter what other threads have locked.
        match check(unsafe { libc::fork() })? {
            // SAFETY: this is that child.
            0 => unsafe { ask_and_exit(&path, writer.as_fd(), gate.as_fd()) },
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

    /// The answer. This waits for it; the [descriptor](AsFd) is readable once there is one.
    pub fn answer(&mut self) -> Answer {
        *self.answer.get_or_insert_with(|| {
            let mut reply = [0; REPLY_BYTES];
            if self.pipe.read_exact(&mut reply).is_err() {
                return Answer::Error(libc::EINTR); // the child was killed
            }
            let (answer, numbers) = reply.split_first_chunk().expect("it is longer");
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
            // A child that has answered ends at once. One that cannot be killed is not waited for.
            let patience = match self.answer {
                Some(_) => WaitIdOptions::EXITED,
                None => WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
            };
            let _ = waitid(WaitId::PidFd(child.as_fd()), patience);
        }
    }
}

/// The child's work: it waits until its parent holds a descriptor of it, asks, replies and exits.
///
/// # Safety
/// Only for a child that was just forked, since it closes all other descriptors.
unsafe fn ask_and_exit(path: &CString, writer: BorrowedFd, gate: BorrowedFd) -> ! {
    // This process has the parent's end of the gate as well, and the gate opens only when all
    // copies of that end are closed.
    // SAFETY: this process is a fresh copy with one thread, which from here on uses only these two
    // of its descriptors.
    unsafe { close_all_but(writer.as_raw_fd(), gate.as_raw_fd()) };
    // If it fails, the parent has no descriptor of this child yet, and then cannot kill it.
    let _ = rustix::io::read(gate, &mut [0_u8; 1]);
    let mut numbers = [0; NUMBERS];
    let answer = match ask(path, &mut numbers) {
        Ok(0) => 0,
        Ok(_) => CHANGED,
        Err(e) => e.raw_os_error().unwrap_or(libc::EINVAL),
    };
    let mut reply = [0; REPLY_BYTES];
    reply[..4].copy_from_slice(&answer.to_ne_bytes());
    for (bytes, number) in reply[4..].chunks_mut(8).zip(numbers) {
        bytes.copy_from_slice(&number.to_ne_bytes());
    }
    // A parent that is gone needs no reply.
    let _ = rustix::io::write(writer, &reply);
    // SAFETY: `_exit` ends the process; it runs no destructors and no exit handlers, which belong
    // to the parent.
    unsafe { libc::_exit(0) }
}

/// Closes all descriptors but two, standard output and error included: a caller that waits for the
/// end of our output would wait for this child as well.
///
/// # Safety
/// Nothing in this process may use any other descriptor from now on.
unsafe fn close_all_but(a: RawFd, b: RawFd) {
    let (low, high) = (a.min(b), a.max(b));
    let ranges = [(0, low - 1), (low + 1, high - 1), (high + 1, i32::MAX)];
    for (first, last) in ranges.into_iter().filter(|(first, last)| first <= last) {
        // SAFETY: the call takes only numbers, and the caller promises that nothing uses the
        // descriptors.
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
            // Before Linux 5.9. Descriptors that a caller waits for have low numbers.
            for descriptor in first..=last.min(255) {
                // SAFETY: as above. Closing a number that is not open is a harmless error.
                unsafe { libc::close(descriptor) };
            }
        }
    }
}

/// The child's reply, in place of an errno, if parts have changed.
const CHANGED: i32 = -1;

/// Asks a mount how many parts of its model have changed, and what it has asked of servers; zeros if
/// its daemon is too old to say.
///
/// First with `stat`, which fails for users who may not enter, whereas `statfs` gives them zeros.
/// Then with `statfs`, which the kernel never answers from its cache.
///
/// It must not allocate, and with a C string rustix does not.
fn ask(path: &CString, numbers: &mut [u64; NUMBERS]) -> io::Result<u64> {
    rustix::fs::stat(path)?;
    rustix::fs::statfs(path)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(path, flags, Mode::empty())?;
    let mut changed = 0_u64;
    // SAFETY: the number encodes that the kernel writes 8 bytes at most, and `changed` has 8.
    let asked = check(unsafe { libc::ioctl(root.as_raw_fd(), CHANGED_PARTS.into(), &mut changed) });
    let mut traffic = [0_u64; NUMBERS];
    // SAFETY: the number encodes that the kernel writes as many bytes at most as `traffic` has.
    if check(unsafe { libc::ioctl(root.as_raw_fd(), TRAFFIC.into(), &mut traffic) }).is_ok() {
        *numbers = traffic;
    }
    Ok(asked.map_or(0, |_| changed))
}
