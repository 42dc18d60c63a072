//! Unmounting with the system call, which needs root, and asking mounts that may never answer.

use std::ffi::CString;
use std::io;
use std::path::Path;

use super::{c_path, check};

/// Unmounts what is mounted at `path`. A busy mount is refused, or with `lazy` taken out of the
/// tree now and dropped when its last user leaves.
pub fn unmount(path: &Path, lazy: bool) -> io::Result<()> {
    let path = c_path(path)?;
    #[cfg(target_os = "linux")]
    {
        let flags = libc::UMOUNT_NOFOLLOW | if lazy { libc::MNT_DETACH } else { 0 };
        // SAFETY: the path ends with NUL.
        check(unsafe { libc::umount2(path.as_ptr(), flags) })?;
    }
    #[cfg(not(target_os = "linux"))]
    {
        let flags = if lazy { libc::MNT_FORCE } else { 0 };
        // SAFETY: the path ends with NUL.
        check(unsafe { libc::unmount(path.as_ptr(), flags) })?;
    }
    Ok(())
}

/// A question to a file system that may never answer, asked by a child process: where a daemon is
/// stopped, the asker may hang and cannot even be killed. Dropping it leaves such a child behind,
/// which ends when the file system does.
#[derive(Debug)]
pub struct Question {
    child: libc::pid_t,
    answer: Option<Answer>,
}

/// What a file system answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Alive,
    /// An errno.
    Error(i32),
}

impl Question {
    /// Asks what is mounted at `path` for something that the kernel does not remember.
    pub fn ask(path: &Path) -> io::Result<Self> {
        let path = c_path(path)?;
        // SAFETY: the child makes system calls only, on memory that was there before, and ends. So it
        // does not matter what other threads of this process have locked.
        match check(unsafe { libc::fork() })? {
            0 => {
                // Else who waits for the end of our output would wait for this child, too.
                close_all();
                let errno = unanswered(&path).err().and_then(|e| e.raw_os_error());
                // SAFETY: no arguments of concern; nothing of the parent's is run at this exit.
                unsafe { libc::_exit(errno.unwrap_or(0)) }
            }
            child => Ok(Self {
                child,
                answer: None,
            }),
        }
    }

    /// The answer, if it is there.
    pub fn answer(&mut self) -> Option<Answer> {
        if self.answer.is_none() {
            let mut status = 0;
            // SAFETY: the pointer is to an int.
            let ended = unsafe { libc::waitpid(self.child, &mut status, libc::WNOHANG) };
            if ended == self.child {
                self.answer = Some(match libc::WIFEXITED(status) {
                    true if libc::WEXITSTATUS(status) == 0 => Answer::Alive,
                    true => Answer::Error(libc::WEXITSTATUS(status)),
                    false => Answer::Error(libc::EINTR),
                });
            }
        }
        self.answer
    }
}

impl Question {
    /// Ends a child that has not answered, if it can be ended; that takes it a moment.
    pub fn give_up(&self) {
        if self.answer.is_none() {
            // SAFETY: the child is ours and was not waited for, so that the number is still its.
            unsafe { libc::kill(self.child, libc::SIGKILL) };
        }
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        self.give_up();
        // Leaves no zombie, unless it is not dead yet; who does not die must not hold us up.
        self.answer();
    }
}

/// Closes all descriptors of this process.
fn close_all() {
    #[cfg(target_os = "linux")]
    // SAFETY: it takes numbers only, and nothing of this child uses a descriptor.
    unsafe {
        libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0);
    }
    for descriptor in 0..=2 {
        // SAFETY: as above; of one that is closed already it is an error that does no harm.
        unsafe { libc::close(descriptor) };
    }
}

/// Asks with `stat` first, which tells who may not enter: to those, `statfs` answers with zeros. And
/// with `statfs`, since the kernel knows all else by itself.
fn unanswered(path: &CString) -> io::Result<()> {
    // SAFETY: both are plain data, for which zeros are a value.
    let (mut stat, mut statfs): (libc::stat, libc::statfs) = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends with NUL and the buffer is a stat.
    check(unsafe { libc::stat(path.as_ptr(), &mut stat) })?;
    // SAFETY: the path ends with NUL and the buffer is a statfs.
    check(unsafe { libc::statfs(path.as_ptr(), &mut statfs) })?;
    Ok(())
}
