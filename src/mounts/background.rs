//! Serving from a daemon, and learning whether it came up.
//!
//! The problem: the daemon must come up before its caller returns, and must not come up if its caller
//! is gone by then; and until the mount is made it must stay in its caller's session and process
//! group, by which an automounter knows those who may pass its trap.
//!
//! The plan: fork first. The child opens the model, mounts, leaves its caller and says READY, each
//! with whatever the work needs, threads as well. Its caller tries the mount and acknowledges; a child
//! that gets no acknowledgement unmounts again. So whatever ends the caller, there is either a mount
//! and a success, or neither.

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
    Ended, Forked, Signals, fork, reset_inherited_signals, terminate, wait_for,
};

/// What became of a process that was to serve.
#[derive(Debug)]
pub enum Launched {
    /// It serves, and said this of itself.
    Ready(Vec<u8>),
    /// It could not, and said why.
    Failed(Vec<u8>),
    /// It ended without a word; how.
    Died(String),
    /// This process was told by a signal to stop before it served. It does not serve.
    Interrupted(i32),
}

/// Begins a message. Its length follows, as a little-endian u32, and that many bytes.
const READY: u8 = 1;
const FAILED: u8 = 2;

/// The process that waits for the daemon, seen from that.
#[derive(Debug)]
pub struct Caller(UnixStream);

impl Caller {
    /// Says that the mount is made. When this returns, the caller has tried it, and will report
    /// success as soon as the result is dropped.
    ///
    /// # Errors
    /// If the caller has ended, was interrupted, or could not use the mount.
    pub fn ready(mut self, message: &[u8]) -> io::Result<Self> {
        self.tell(READY, message)?;
        self.0.read_exact(&mut [0])?;
        Ok(self)
    }

    /// Says that there will be no mount.
    pub fn failed(mut self, message: &[u8]) {
        // The caller may be gone.
        let _ = self.tell(FAILED, message);
    }

    fn tell(&mut self, kind: u8, message: &[u8]) -> io::Result<()> {
        let length = u32::try_from(message.len()).map_err(io::Error::other)?;
        let head = [&[kind][..], &length.to_le_bytes()].concat();
        self.0.write_all(&[&head, message].concat())
    }
}

/// Runs `serve` in a process of its own, which ends with what it returns. Once that says READY,
/// `try_it` finds out whether the mount answers.
///
/// To be called before this process has a second thread. SIGINT, SIGTERM and SIGHUP end the child,
/// and make this return when it has ended; a second one ends this process at once.
pub fn launch(
    serve: impl FnOnce(Caller) -> i32,
    try_it: impl FnOnce(&[u8]) -> Result<(), MountError>,
) -> Result<Launched, MountError> {
    let failed = MountError::Background;
    // Both processes start without a moment in which a signal is lost.
    let signals = Signals::block(Signals::STOPPING).map_err(failed)?;
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    match fork().map_err(failed)? {
        Forked::Child => {
            drop(ours);
            // Until there is a mount, a signal ends this process at once.
            let reset = reset_inherited_signals();
            let status = reset.map_or(1, |()| serve(Caller(theirs)));
            std::process::exit(status)
        }
        Forked::Parent { child } => {
            drop(theirs);
            wait_for_daemon(child, ours, signals, try_it)
        }
    }
}

/// How long a daemon that serves may take to release its locks.
const RELEASE: Duration = Duration::from_secs(1);

/// Who was first: the daemon, or a signal.
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
                Race::Served => {} // too late: it is done, and will be reported
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
    if let (Ok(Some(Launched::Ready(_))), Race::Open) = (&result, &*race_now)
        && socket.write_all(&[READY]).is_ok()
    {
        *race_now = Race::Served;
        // The daemon releases its locks before it closes its end, so that the next command meets none.
        let _ = socket.set_read_timeout(Some(RELEASE));
        let _ = socket.read(&mut [0]);
        return result.map(|ready| ready.expect("it was just looked at"));
    }
    drop(race_now);
    let _ = socket.shutdown(Shutdown::Both); // which unmounts, if there is a mount
    let fate = wait_for(child);
    if let Race::Interrupted(signal) = *race.lock() {
        return Ok(Launched::Interrupted(signal)); // whatever else that has led to
    }
    match (result?, fate) {
        (Some(failed @ Launched::Failed(_)), _) => Ok(failed),
        // Ctrl-C reaches both, and may have reached the child first.
        (_, Ok(Ended::Killed(signal @ (libc::SIGINT | libc::SIGTERM | libc::SIGHUP)))) => {
            Ok(Launched::Interrupted(signal))
        }
        (_, fate) => Ok(Launched::Died(in_words(fate))),
    }
}

/// A message of the daemon: what begins it, and its bytes.
fn message(socket: &mut UnixStream) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    socket.read_exact(&mut head)?;
    let [kind, length @ ..] = head;
    let mut said = vec![0; u32::from_le_bytes(length) as usize];
    socket.read_exact(&mut said)?;
    Ok((kind, said))
}

fn in_words(fate: io::Result<Ended>) -> String {
    match fate {
        Ok(Ended::Killed(libc::SIGABRT)) => "it gave up, as it does without memory".to_owned(),
        Ok(Ended::Killed(signal)) => format!("killed by signal {signal}"),
        Ok(Ended::Exited(status)) => format!("exit status {status}"),
        Err(e) => e.to_string(),
    }
}

/// Whether a mount that was just made answers.
///
/// It is for its caller to ask: a daemon must never wait for itself.
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
