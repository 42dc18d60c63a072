//! Serving from a daemon, and finding out whether it came up.
//!
//! The problem: the daemon must be up before its caller returns, and must not stay if its caller is
//! gone by then. Until the mount is made it must stay in its caller's session and process group,
//! since these let an automounter recognise the processes that may pass its trap.
//!
//! The plan: fork first. The child opens the model, mounts, leaves its caller and sends READY;
//! since it has forked already, it may use threads. The caller tries the mount and acknowledges. A
//! child that gets no acknowledgement unmounts again. Whatever ends the caller, there is either a
//! mount and a success, or neither.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::process::Pid;

use super::{MountError, odmoe_mount_of};
use crate::layout::EXPERTS_DIRECTORY;
use crate::sys::process::{
    Ended, FROM_PARENT, Forked, Signals, fork, reset_inherited_signals, stop_ignoring, terminate,
    wait_for,
};

/// The result of launching a daemon.
#[derive(Debug)]
pub enum Launched {
    /// It serves. The bytes are its message.
    Ready(Vec<u8>),
    /// It cannot serve. The bytes are its message.
    Failed(Vec<u8>),
    /// It ended without a message. The text says how.
    Died(String),
    /// A signal came before it served. It does not serve.
    Interrupted(i32),
}

/// The first byte of a message. The length follows as a little-endian u32, then that many bytes.
const READY: u8 = 1;
const FAILED: u8 = 2;

/// The daemon's connection to the process that waits for it.
#[derive(Debug)]
pub struct Caller(UnixStream);

impl Caller {
    /// Reports that the mount is made. When this returns, the caller has tried the mount, and will
    /// report success as soon as the result is dropped.
    ///
    /// # Errors
    /// If the caller has ended, was interrupted, or could not use the mount.
    pub fn ready(mut self, message: &[u8]) -> io::Result<Self> {
        self.send(READY, message)?;
        self.0.read_exact(&mut [0])?;
        Ok(self)
    }

    /// Reports that there will be no mount.
    pub fn failed(mut self, message: &[u8]) {
        // The caller may be gone.
        let _ = self.send(FAILED, message);
    }

    fn send(&mut self, kind: u8, message: &[u8]) -> io::Result<()> {
        let length = u32::try_from(message.len()).map_err(io::Error::other)?;
        let head = [&[kind][..], &length.to_le_bytes()].concat();
        self.0.write_all(&[&head, message].concat())
    }
}

/// Runs `serve` in a process of its own, whose exit status is the result. When that process reports
/// READY, `try_it` checks that the mount answers, and `tell` tells the user. The mount stays only if
/// this process lives until then: a mount that nobody was told of is unmounted.
///
/// This process must have only one thread when it calls this. SIGINT, SIGTERM and SIGHUP end the
/// child, and this returns when it has ended. A second signal ends this process at once.
pub fn launch(
    serve: impl FnOnce(Caller) -> i32,
    try_it: impl FnOnce(&[u8]) -> Result<(), MountError>,
    tell: impl FnOnce(&[u8]),
) -> Result<Launched, MountError> {
    let failed = MountError::Background;
    // Blocked before the fork, so that neither process loses a signal.
    let signals = Signals::block(Signals::STOPPING).map_err(failed)?;
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    match fork().map_err(failed)? {
        Forked::Child => {
            drop(ours);
            // Until there is a mount, a signal ends this process at once.
            stop_ignoring(&[FROM_PARENT]);
            let reset = reset_inherited_signals();
            let status = reset.map_or(1, |()| serve(Caller(theirs)));
            std::process::exit(status)
        }
        Forked::Parent { child } => {
            drop(theirs);
            wait_for_daemon(child, ours, signals, try_it, tell)
        }
    }
}

/// How long a daemon that serves may take to release its locks.
const RELEASE: Duration = Duration::from_secs(1);

/// Which came first: the daemon or a signal.
#[derive(Default)]
enum Race {
    #[default]
    Open,
    Served,
    Interrupted(i32),
}

fn wait_for_daemon(
    child: Pid,
    mut socket: UnixStream,
    signals: Signals,
    try_it: impl FnOnce(&[u8]) -> Result<(), MountError>,
    tell: impl FnOnce(&[u8]),
) -> Result<Launched, MountError> {
    let race = Arc::<Mutex<Race>>::default();
    let (watched, hung_up) = (race.clone(), socket.try_clone());
    let hung_up = hung_up.map_err(MountError::Background)?;
    let watching = std::thread::Builder::new().spawn(move || {
        while let Ok(signal) = signals.wait() {
            let mut race = watched.lock();
            match *race {
                Race::Open => {
                    *race = Race::Interrupted(signal);
                    terminate(child);
                    let _ = hung_up.shutdown(Shutdown::Both);
                }
                Race::Served => {} // too late: the mount is made, and will be reported
                Race::Interrupted(_) => std::process::exit(128 + signal),
            }
        }
    });
    if let Err(cause) = watching {
        terminate(child);
        drop(socket);
        let _ = wait_for(child); // the error that matters is the one before
        return Err(MountError::Background(cause));
    }
    let result = match message(&mut socket) {
        Ok((READY, said)) => try_it(&said).map(|()| Some(Launched::Ready(said))),
        Ok((_, said)) => Ok(Some(Launched::Failed(said))),
        Err(_) => Ok(None),
    };
    let mut race_now = race.lock();
    if let (Ok(Some(Launched::Ready(said))), Race::Open) = (&result, &*race_now) {
        *race_now = Race::Served;
        drop(race_now);
        tell(said);
        if socket.write_all(&[READY]).is_ok() {
            // The daemon releases its locks before it closes its end. The next command meets none.
            let _ = socket.set_read_timeout(Some(RELEASE));
            let _ = socket.read(&mut [0]);
            return result.map(|ready| ready.expect("it was just matched"));
        }
    } else {
        drop(race_now);
    }
    let _ = socket.shutdown(Shutdown::Both); // makes the daemon unmount, if it has mounted
    let fate = wait_for(child);
    if let Race::Interrupted(signal) = *race.lock() {
        return Ok(Launched::Interrupted(signal)); // other errors follow from the signal
    }
    match (result?, fate) {
        (Some(failed @ Launched::Failed(_)), _) => Ok(failed),
        // Ctrl-C reaches both, and may have reached the child first.
        (_, Ok(Ended::Killed(signal @ (libc::SIGINT | libc::SIGTERM | libc::SIGHUP)))) => {
            Ok(Launched::Interrupted(signal))
        }
        (_, fate) => Ok(Launched::Died(description(fate))),
    }
}

/// Receives a message of the daemon: its first byte and its content.
fn message(socket: &mut UnixStream) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    socket.read_exact(&mut head)?;
    let [kind, length @ ..] = head;
    let mut said = vec![0; u32::from_le_bytes(length) as usize];
    socket.read_exact(&mut said)?;
    Ok((kind, said))
}

fn description(fate: io::Result<Ended>) -> String {
    match fate {
        Ok(Ended::Killed(libc::SIGABRT)) => "it aborted, as it does without memory".to_owned(),
        Ok(Ended::Killed(signal)) => format!("killed by signal {signal}"),
        Ok(Ended::Exited(status)) => format!("exit status {status}"),
        Err(e) => e.to_string(),
    }
}

/// Whether a mount that was just made answers.
///
/// Only the daemon's caller may ask: the daemon would wait for itself.
pub fn answers(directory: &Path) -> Result<(), MountError> {
    let asked = directory.join(EXPERTS_DIRECTORY).symlink_metadata();
    // It may have been moved or unmounted meanwhile.
    let directory = directory.to_owned();
    match (odmoe_mount_of(&directory), asked) {
        (None, _) => Err(MountError::Moved(directory)),
        (_, Err(cause)) => Err(MountError::Session { directory, cause }),
        (Some(_), Ok(_)) => Ok(()),
    }
}
