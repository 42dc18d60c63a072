//! Processes: identity, limits, forking, signals.

use std::fs::File;
use std::io;
#[cfg(target_os = "linux")]
use std::os::fd::OwnedFd;
use std::time::Duration;

#[cfg(target_os = "linux")]
use rustix::event::{PollFd, PollFlags, poll};
#[cfg(target_os = "linux")]
use rustix::process::PidfdFlags;
use rustix::process::{
    Pid, Resource, WaitOptions, getegid, geteuid, getrlimit, setrlimit, setsid, waitpid,
};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::check;

/// The effective user and group of this process.
pub fn effective_ids() -> (u32, u32) {
    (geteuid().as_raw(), getegid().as_raw())
}

/// Raises the soft limit of open descriptors to the hard one.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // macOS refuses more than OPEN_MAX where the hard limit is "unlimited".
    if cfg!(target_os = "macos") {
        limit.current = Some(limit.current.unwrap_or(u64::MAX).min(10_240));
    }
    Ok(setrlimit(Resource::Nofile, limit)?)
}

/// How many descriptors this process may have open.
pub fn descriptor_limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Makes it an error to write beyond the limit on file sizes (`ulimit -f`). Otherwise the kernel
/// ends the process.
pub fn ignore_file_size_signal() {
    // SAFETY: SIG_IGN installs no handler, so no code of ours runs in signal context.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Undoes what a caller may have handed down through `exec`: an ignored SIGCHLD, with which the
/// kernel reaps our children before we can wait for them; an ignored SIGTERM, with which service
/// managers and users could not end us; and blocked signals, with which Ctrl-C would do nothing.
///
/// SIGHUP and SIGINT stay *ignored* if they are: `nohup` ignores the one, and a shell that runs a
/// command of a script in the background ignores the other.
///
/// For the start of a program: it changes the signal mask of the calling thread, and what the whole
/// process does on SIGCHLD and SIGTERM.
pub fn reset_inherited_signals() -> io::Result<()> {
    stop_ignoring(&[libc::SIGCHLD, libc::SIGTERM]);
    set_mask(libc::SIG_SETMASK, &empty_set()?)
}

/// Gives signals their default action.
pub(crate) fn stop_ignoring(signals: &[i32]) {
    for &signal in signals {
        // SAFETY: SIG_DFL installs no handler, so no code of ours runs in signal context.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Which of the two processes this is after a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forked {
    Parent { child: Pid },
    Child,
}

/// Forks a process that has a single thread.
///
/// # Errors
/// If the process has more threads, since locks that they hold would stay locked in the child; or
/// if their number is unknown, since `/proc` is not mounted.
pub fn fork() -> io::Result<Forked> {
    #[cfg(target_os = "linux")]
    {
        let threads = std::fs::read_dir("/proc/self/task")?.count();
        if threads != 1 {
            let problem = format!("this process has {threads} threads, and only one may fork");
            return Err(io::Error::other(problem));
        }
    }
    // SAFETY: on Linux this is the only thread, as was just counted, so no lock is held by another
    // and the child may do whatever its parent may. Elsewhere threads are not counted, and fork is
    // still sound as long as the caller has started none, as `launch` requires.
    match check(unsafe { libc::fork() })? {
        0 => Ok(Forked::Child),
        child => Ok(Forked::Parent {
            child: Pid::from_raw(child).expect("fork returns a process number"),
        }),
    }
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Exited(i32),
    /// By a signal of this number.
    Killed(i32),
}

/// Waits for a child to end.
pub fn wait_for(child: Pid) -> io::Result<Ended> {
    loop {
        match waitpid(Some(child), WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) | Ok(None) => {}
            Err(e) => return Err(e.into()),
            Ok(Some((_, status))) => {
                let killed = status.terminating_signal().map(Ended::Killed);
                return Ok(killed.unwrap_or(Ended::Exited(status.exit_status().unwrap_or(0))));
            }
        }
    }
}

/// The signal with which a parent asks its child to end. Those of [`Signals::STOPPING`] may come
/// from a user, to both processes at once; this one only comes from the parent.
pub const FROM_PARENT: i32 = libc::SIGUSR1;

/// Asks a child to end that was not waited for yet.
pub fn terminate(child: Pid) {
    // It may have ended by itself.
    let _ = rustix::process::kill_process(child, rustix::process::Signal::USR1);
}

/// A process whose end can be waited for. It need not be a child.
pub struct Watched(#[cfg(target_os = "linux")] OwnedFd);

impl Watched {
    /// `None` if there is no such process, or if this system cannot watch processes.
    pub fn process(pid: u32) -> Option<Self> {
        #[cfg(target_os = "linux")]
        {
            let pid = Pid::from_raw(pid.try_into().ok()?)?;
            let watched = rustix::process::pidfd_open(pid, PidfdFlags::empty());
            watched.ok().map(Self)
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = pid;
            None
        }
    }

    /// Waits until the process has ended and its files are closed, but no longer than `patience`.
    /// Returns whether it has ended.
    pub fn ends_within(&self, patience: Duration) -> bool {
        #[cfg(target_os = "linux")]
        {
            let timeout = patience.try_into().ok();
            let mut watched = [PollFd::new(&self.0, PollFlags::IN)];
            poll(&mut watched, timeout.as_ref()).is_ok_and(|ready| ready > 0)
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = patience;
            false
        }
    }
}

/// Detaches this process from its caller: a session of its own, `/` as working directory, and
/// `output` (or nothing) in place of the caller's stdin, stdout and stderr. SIGHUP and SIGINT are no
/// longer ignored: they can no longer come from the caller's terminal.
///
/// # Errors
/// EPERM if the process leads a process group; a forked child does not.
pub fn leave_caller(output: Option<&File>) -> io::Result<()> {
    setsid()?;
    std::env::set_current_dir("/")?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let output = output.unwrap_or(&null);
    dup2_stdin(&null)?;
    dup2_stdout(output)?;
    dup2_stderr(output)?;
    stop_ignoring(&[libc::SIGHUP, libc::SIGINT]);
    Ok(())
}

/// Closes every descriptor but stdin, stdout and stderr. A daemon must not keep inherited
/// descriptors, since its caller may wait for the end of a pipe or for a lock.
///
/// # Safety
/// Nothing in this process may use a descriptor that is open when this is called. So it must be
/// called first thing in a program, before it has opened anything.
pub unsafe fn close_inherited_descriptors() -> io::Result<()> {
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
        // SAFETY: the caller promises that nothing uses it. That of the listing itself is closed
        // already, and closing it again is a harmless error, since no thread opens files meanwhile.
        unsafe { libc::close(number) };
    }
    Ok(())
}

/// A set of signals that threads do not receive but wait for.
#[derive(Clone, Copy)]
pub struct Signals(libc::sigset_t);

impl Signals {
    /// The signals with which users and service managers ask a program to end.
    pub const STOPPING: &'static [i32] = &[libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

    /// Blocks signals in the calling thread and in the threads that it starts from now on.
    pub fn block(signals: &[i32]) -> io::Result<Self> {
        let mut set = empty_set()?;
        for &signal in signals {
            // SAFETY: `set` is an initialised sigset_t.
            check(unsafe { libc::sigaddset(&mut set, signal) })?;
        }
        set_mask(libc::SIG_BLOCK, &set)?;
        Ok(Self(set))
    }

    /// Blocks every signal in the calling thread: for threads that must leave them to those that
    /// were there before, or that will wait for them. A signal that comes to a process ends it if
    /// only one of its threads has not blocked it.
    pub fn block_all() {
        // SAFETY: sigset_t consists of integers only, for which zeros are valid.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a sigset_t.
        unsafe { libc::sigfillset(&mut set) };
        set_mask(libc::SIG_BLOCK, &set).expect("the arguments are valid");
    }

    /// Lets the calling thread receive them again.
    pub fn unblock(&self) -> io::Result<()> {
        // SAFETY: the first pointer is to a sigset_t, and the second may be null.
        match unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &self.0, std::ptr::null_mut()) } {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Waits for one of the signals and takes it. Those that are ignored when they come, as SIGHUP
    /// is under `nohup`, are dropped: Linux keeps an ignored signal while it is blocked.
    pub fn wait(&self) -> io::Result<i32> {
        loop {
            let mut signal = 0;
            // SAFETY: the pointers are to an initialised sigset_t and to an int.
            match unsafe { libc::sigwait(&self.0, &mut signal) } {
                0 if is_ignored(signal)? => {}
                0 => return Ok(signal),
                error => return Err(io::Error::from_raw_os_error(error)),
            }
        }
    }
}

fn empty_set() -> io::Result<libc::sigset_t> {
    // SAFETY: sigset_t consists of integers only, for which zeros are valid.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a sigset_t.
    check(unsafe { libc::sigemptyset(&mut set) })?;
    Ok(set)
}

fn set_mask(how: libc::c_int, set: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: the first pointer is to an initialised sigset_t, and the second may be null.
    match unsafe { libc::pthread_sigmask(how, set, std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

fn is_ignored(signal: i32) -> io::Result<bool> {
    // SAFETY: zeros are valid for all fields of sigaction: integers, and a function pointer that is
    // optional.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null new action only asks for the old one, which the kernel writes to `action`.
    check(unsafe { libc::sigaction(signal, std::ptr::null(), &mut action) })?;
    Ok(action.sa_sigaction == libc::SIG_IGN)
}

/// Makes the allocator map each large buffer by itself, whatever was freed before. Then memory that is
/// never touched is never resident.
///
/// glibc takes buffers as large as the largest that was freed from its heap from then on, where they
/// must be zeroed.
pub fn map_large_buffers() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: the calls take only numbers.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 8 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 16 << 20);
    }
}

/// Makes the allocator use one arena for all threads.
///
/// glibc reserves 64 MiB of address space for the arena of each thread, which counts against
/// `ulimit -v`. Our threads allocate so seldom that they do not contend for one arena.
pub fn use_one_arena() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: the call takes only numbers. It is not for processes with more threads only because
    // these read the setting meanwhile; it is one word, and they may see either value.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
