//! Serving a mount from its making to its end, whatever ends it.
//!
//! The problem: the session of a mount ends when it is unmounted everywhere, but also when somebody
//! aborts its connection (`umount -f`, even of a mere copy in another mount namespace), which leaves
//! a dead mount behind. And between the making and the end, the mount may be moved, a folder around
//! it renamed, or another file system mounted over it.
//!
//! The plan: a mount is known by its device number, which no other mount has while its session
//! lives. [`Attached`] finds it by that in the mount table, wherever it lies by then.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuser::{Config, SessionACL};
use parking_lot::Mutex;

use super::attach::{self, Made};
use super::place::Place;
use super::table::{self, MountEntry, mount_table};
use super::unmount::{self, UnmountError};
use super::workers::wait_for_workers;
use super::{Mount, MountError, State, copies, status};
use crate::explain::Explain;
use crate::fuse::OdmoeFs;
use crate::sys::privileges;
use crate::sys::process::{FROM_PARENT, Signals};

/// How long the kernel may take to remove a mount from the table once its session has ended.
const REMOVAL: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(50);
/// How long readers may take to leave before the log says that they are waited for.
const LEAVING: Duration = Duration::from_millis(300);

impl Mount {
    /// Mounts, calls `ready`, and serves until somebody unmounts, or until SIGINT, SIGTERM or
    /// SIGHUP: then the mount is taken out of the tree at once, readers finish, and this returns
    /// when the last has left. A second signal ends the process.
    ///
    /// An error of `ready` means that whoever asked for the mount is gone; then it is unmounted. What
    /// it returns is dropped when nothing keeps others from mounting or unmounting there any more.
    ///
    /// It is for a process that does nothing else, and ends when this returns: the calling thread
    /// receives those signals no more, and the working directory becomes `/`.
    pub fn serve<T>(self, ready: impl FnOnce() -> io::Result<T>) -> Result<(), MountError> {
        // Before any thread starts, so that all of them leave the signals to the one that waits.
        let signals = [Signals::STOPPING, &[FROM_PARENT]].concat();
        let signals = Signals::block(&signals).map_err(MountError::Background)?;
        let life = Arc::<Mutex<Life>>::default();
        let watched = life.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || end_on_signal(&watched, signals))
            .map_err(MountError::Background)?;

        let threads = self.threads;
        let directory = self.place.path().to_owned();
        let made = attach::make(&self.place, &self.wishes)
            .inspect_err(|_| remove_what_was_left(&directory))?;
        let attached = Attached::of(&self.place, &made);
        let by_ourselves = made.by_ourselves;
        let started = start(self.file_system, made, self.acl, threads);
        let was_moved = !self.place.is_where_it_was();
        drop(self.place); // or the file system below would stay busy
        let session = match started {
            Ok(session) if !was_moved => session,
            failed => {
                attached.detach_or_log();
                return Err(match failed {
                    Ok(_) => MountError::Moved(directory),
                    Err(cause) => MountError::Session { directory, cause },
                });
            }
        };
        if by_ourselves {
            give_up_privileges();
        }
        if let Some(signal) = life.lock().begin(&attached) {
            attached.detach_or_log();
            return Err(MountError::Interrupted(signal));
        }
        tracing::info!("mounted on {directory:?}, {threads} worker threads");
        let told = ready();
        drop(self.locks);
        if let Err(cause) = told.map(drop) {
            attached.detach_or_log();
            return Err(MountError::Abandoned(cause));
        }
        let served = session
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the workers panicked")));
        tracing::info!("the mount on {directory:?} has ended");
        match served {
            Ok(()) => attached.after_the_end(),
            Err(cause) => {
                // Not ended by the kernel, so the mount may still be there, and nobody serves it.
                attached.detach_or_log();
                Err(MountError::Session { directory, cause })
            }
        }
    }
}

/// Serves a mount that was just made, in threads of its own.
fn start(
    file_system: OdmoeFs,
    made: Made,
    acl: SessionACL,
    threads: usize,
) -> io::Result<JoinHandle<io::Result<()>>> {
    let mut config = Config::default();
    config.acl = acl;
    config.n_threads = Some(threads);
    let session = made.serve(file_system, acl, config)?.spawn()?;
    wait_for_workers(session.guard, threads)
}

/// A mount helper that was killed half-way may have left a mount that nobody will serve.
fn remove_what_was_left(directory: &Path) {
    let left = table::mounted_on(directory).filter(MountEntry::is_odmoe);
    if left.is_some() && status::state_of(directory) == State::Stale {
        let _ = unmount::detach(directory); // the error that matters is the one before
    }
}

/// From here on nothing is mounted, only served and unmounted. A user's daemon unmounts with the
/// set-user-id helper, which has to keep working; it has no privileges of its own to give up.
fn give_up_privileges() {
    if let Err(e) = privileges::keep_what_serving_needs() {
        tracing::warn!("the daemon keeps all its privileges: {e}");
    }
    privileges::no_new_privileges();
}

/// How far a mount has come, for the thread that waits for signals.
#[derive(Default)]
enum Life {
    /// There is nothing to unmount yet, or nobody knows yet what.
    #[default]
    Starting,
    /// A signal came meanwhile.
    Interrupted(i32),
    Serving(Attached),
}

impl Life {
    /// The mount is there. Returns the signal that came before it was.
    fn begin(&mut self, attached: &Attached) -> Option<i32> {
        match self {
            Self::Interrupted(signal) => Some(*signal),
            _ => {
                *self = Self::Serving(attached.clone());
                None
            }
        }
    }

    /// A signal has come. Returns the mount to end because of it.
    fn interrupt(&mut self, signal: i32) -> Option<Attached> {
        if let Self::Serving(attached) = self {
            return Some(attached.clone());
        }
        *self = Self::Interrupted(signal);
        None
    }
}

/// Ends a mount when a signal asks for it, and the process when a user sends a second one.
fn end_on_signal(life: &Mutex<Life>, signals: Signals) {
    let (mut has_begun, mut by_user) = (false, 0);
    while let Ok(signal) = signals.wait() {
        by_user += u32::from(signal != FROM_PARENT);
        if by_user > 1 {
            std::process::exit(128 + signal);
        }
        if !std::mem::replace(&mut has_begun, true) {
            let serving = life.lock().interrupt(signal);
            if let Some(attached) = serving {
                attached.end();
            }
        }
    }
}

/// One of our mounts, while its session lives.
#[derive(Debug, Clone)]
pub(super) struct Attached {
    /// Where it was mounted.
    directory: PathBuf,
    /// `major:minor` of its file system; `None` where there is no mount table.
    device: Option<String>,
}

impl Attached {
    /// The mount that was just made on a directory.
    fn of(place: &Place, made: &Made) -> Self {
        let device = made.device_number().or_else(|| {
            // Older kernels do not tell. The directory is locked, so what is there is ours.
            let entry = table::mounted_on(place.path()).filter(MountEntry::is_odmoe);
            Some(entry?.device)
        });
        Self {
            directory: place.path().to_owned(),
            device,
        }
    }

    /// Wherever it is mounted in our mount namespace: moved, renamed, or bound to other places.
    fn mounts(&self) -> Vec<MountEntry> {
        copies::of_device(mount_table(), self.device.as_deref())
    }

    /// Takes the mount out of the tree at once, wherever it is; open files go on. What lies under
    /// another mount cannot be reached and stays.
    fn detach(&self) -> Result<Vec<PathBuf>, UnmountError> {
        if self.device.is_none() {
            unmount::detach(&self.directory)?;
            return Ok(vec![self.directory.clone()]);
        }
        let mut detached = Vec::new();
        loop {
            let table = mount_table();
            let mut refused = None;
            let before = detached.len();
            for mount in self.mounts().into_iter().rev() {
                if table::visible(&table, &mount.directory) != Some(&mount) {
                    let directory = mount.directory;
                    refused.get_or_insert(UnmountError::Hidden { directory });
                    continue;
                }
                match unmount::detach(&mount.directory) {
                    Ok(()) => detached.push(mount.directory),
                    Err(e) => drop(refused.get_or_insert(e)),
                }
            }
            // What lay under another mount of ours can be reached now.
            match refused {
                None => return Ok(detached),
                Some(refused) if detached.len() == before => return Err(refused),
                Some(_) => {}
            }
        }
    }

    fn detach_or_log(&self) {
        if let Err(e) = self.detach() {
            tracing::error!("{}", e.line());
        }
    }

    /// Ends the mount because a signal asked for it, and tells the log what keeps it, if anything.
    fn end(&self) {
        match self.detach() {
            Ok(directories) => {
                // Usually the session ends at once, and the process with it.
                std::thread::sleep(LEAVING);
                let others = copies::elsewhere(self.device.as_deref());
                let used = match others.first() {
                    None => "files of it are still open".to_owned(),
                    Some(copy) => format!("it is still mounted {copy}"),
                };
                tracing::warn!(
                    "unmounted {directories:?}, but {used}: waiting for that to end; a second signal ends the process now"
                );
            }
            Err(e) => tracing::error!("{}; a second signal ends the process now", e.line()),
        }
    }

    /// Whether the session was ended by an unmount. If it was not, a dead mount is left, which is
    /// removed here.
    fn after_the_end(&self) -> Result<(), MountError> {
        let give_up = Instant::now() + REMOVAL;
        loop {
            let mut left = self.mounts();
            // The number may be another mount's by now, which lives.
            left.retain(|mount| status::state_of(&mount.directory) == State::Stale);
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > give_up {
                self.detach_or_log();
                return Err(MountError::Aborted(self.directory.clone()));
            }
            std::thread::sleep(POLL);
        }
    }
}
