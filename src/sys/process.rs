//! Processes: identity, limits, forking into the background, signals.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
#[cfg(target_os = "linux")]
use std::os::fd::OwnedFd;
use std::time::Duration;

#[cfg(target_os = "linux")]
use rustix::event::{PollFd, PollFlags, poll};
#[cfg(target_os = "linux")]
use rustix::process::PidfdFlags;

use super::check;

/// The effective user and group of this process.
pub fn effective_ids() -> (u32, u32) {
    // SAFETY: these calls have no arguments and cannot fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// Raises the soft limit of open descriptors to the hard one.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let mut limit = descriptor_limits()?;
    limit.rlim_cur = limit.rlim_max;
    // macOS refuses more than OPEN_MAX where the hard limit is "unlimited".
    #[cfg(target_os = "macos")]
    {
        limit.rlim_cur = limit.rlim_cur.min(10_240);
    }
    // SAFETY: the pointer is to an rlimit.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) })?;
    Ok(())
}

/// How many descriptors this process may have open.
pub fn descriptor_limit() -> io::Result<u64> {
    #[allow(clippy::unnecessary_cast)] // rlim_t differs between platforms
    Ok(descriptor_limits()?.rlim_cur as u64)
}

fn descriptor_limits() -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to an rlimit.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) })?;
    Ok(limit)
}

/// Makes writing beyond the largest file that this process may write (`ulimit -f`) an error; else it
/// ends the process.
pub fn ignore_file_size_signal() {
    // SAFETY: no handler is installed. It fails for no signal that exists.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Which of the two processes after a fork this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forked {
    Parent { child: i32 },
    Child,
}

/// Forks.
///
/// # Panics
/// If the process has more than one thread: the child would have one, and whatever the others
/// held locked would stay so.
pub fn fork() -> io::Result<Forked> {
    #[cfg(target_os = "linux")]
    {
        let threads = std::fs::read_dir("/proc/self/task").map_or(1, |tasks| tasks.count());
        assert_eq!(threads, 1, "forking needs a single thread");
    }
    // SAFETY: there is one thread, so the child starts in a consistent state.
    match check(unsafe { libc::fork() })? {
        0 => Ok(Forked::Child),
        child => Ok(Forked::Parent { child }),
    }
}

/// Waits for a child and returns its exit status, or the negated signal that ended it.
pub fn wait_for(child: i32) -> io::Result<i32> {
    let mut status = 0;
    loop {
        // SAFETY: the pointer is to an int.
        match check(unsafe { libc::waitpid(child, &mut status, 0) }) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
            Ok(_) if libc::WIFEXITED(status) => return Ok(libc::WEXITSTATUS(status)),
            Ok(_) => return Ok(-libc::WTERMSIG(status)),
        }
    }
}

/// A process of anybody, whose end can be waited for.
pub struct Watched(#[cfg(target_os = "linux")] OwnedFd);

impl Watched {
    /// `None` if there is no such process, or where they cannot be watched.
    pub fn process(pid: u32) -> Option<Self> {
        #[cfg(target_os = "linux")]
        {
            let pid = rustix::process::Pid::from_raw(pid.try_into().ok()?)?;
            let watched = rustix::process::pidfd_open(pid, PidfdFlags::empty());
            watched.ok().map(Self)
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = pid;
            None
        }
    }

    /// Returns when it has ended and everything that it had open is closed, or after a while.
    pub fn wait_for_end(&self, patience: Duration) {
        #[cfg(target_os = "linux")]
        {
            let timeout = patience.try_into().ok();
            let _ = poll(&mut [PollFd::new(&self.0, PollFlags::IN)], timeout.as_ref());
        }
        #[cfg(not(target_os = "linux"))]
        let _ = patience;
    }
}

/// Leaves the caller behind: a session of its own, `/` as working directory, and `output` (or
/// nothing) instead of the caller's stdin, stdout and stderr.
pub fn leave_caller(output: Option<&File>) -> io::Result<()> {
    // SAFETY: no arguments. A fresh child leads no process group, so this cannot fail with EPERM.
    check(unsafe { libc::setsid() })?;
    std::env::set_current_dir("/")?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let output = output.unwrap_or(&null).as_raw_fd();
    for (from, to) in [(null.as_raw_fd(), 0), (output, 1), (output, 2)] {
        // SAFETY: both are descriptors; the old ones behind `to` are closed by the call.
        check(unsafe { libc::dup2(from, to) })?;
    }
    Ok(())
}

/// Closes every descriptor but stdin, stdout and stderr: a daemon must not hold what it inherited,
/// since its caller may wait for the end of a pipe or for a lock. To be called before this
/// process has opened anything of its own.
pub fn close_inherited_descriptors() -> io::Result<()> {
    let listing = if cfg!(target_os = "linux") {
        "/proc/self/fd"
    } else {
        "/dev/fd"
    };
    let entries = std::fs::read_dir(listing)?;
    let numbers: Vec<i32> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&number| number > 2)
        .collect();
    for number in numbers {
        // SAFETY: nothing of this process uses these descriptors. The one of the listing is
        // closed already, which is an error that does no harm.
        unsafe { libc::close(number) };
    }
    Ok(())
}

/// A set of signals that threads do not receive but wait for.
#[derive(Clone, Copy)]
pub struct Signals(libc::sigset_t);

impl Signals {
    /// Blocks signals for the calling thread, and for the threads that it starts from now on. Those
    /// that the caller of this process has told it to ignore, as `nohup` does, stay ignored.
    pub fn block(signals: &[i32]) -> io::Result<Self> {
        // SAFETY: sigset_t is plain data, which sigemptyset then initialises.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a sigset_t.
        check(unsafe { libc::sigemptyset(&mut set) })?;
        for &signal in signals {
            if !is_ignored(signal)? {
                // SAFETY: the pointer is to an initialised sigset_t.
                check(unsafe { libc::sigaddset(&mut set, signal) })?;
            }
        }
        // SAFETY: the pointer is to a sigset_t; a null old set is allowed.
        match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) } {
            0 => Ok(Self(set)),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Lets the calling thread receive them again.
    pub fn unblock(&self) -> io::Result<()> {
        // SAFETY: the pointer is to a sigset_t; a null old set is allowed.
        match unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &self.0, std::ptr::null_mut()) } {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Waits for one of the signals and takes it.
    pub fn wait(&self) -> io::Result<i32> {
        let mut signal = 0;
        // SAFETY: the pointers are to a sigset_t and an int.
        match unsafe { libc::sigwait(&self.0, &mut signal) } {
            0 => Ok(signal),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

fn is_ignored(signal: i32) -> io::Result<bool> {
    // SAFETY: sigaction is plain data, for which zeros are a value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null new action only asks; the pointer is to a sigaction.
    check(unsafe { libc::sigaction(signal, std::ptr::null(), &mut action) })?;
    Ok(action.sa_sigaction == libc::SIG_IGN)
}
