//! Serving a mount from beginning to end, whatever ends it.
//!
//! The problem: the session of a mount ends when it is unmounted everywhere, but also when somebody
//! aborts its connection (`umount -f`, even of a mere copy in another mount namespace), which
//! leaves a dead mount behind. Until then the mount may be moved, a folder above it renamed, or
//! another file system mounted over it.
//!
//! The plan: a mount is identified by its device number, which no other mount has while its session
//! lives. [`Attached`] finds it by that number in the mount table, wherever it is by then.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuser::{Config, SessionACL};
use parking_lot::Mutex;

use super::attach::{self, NewMount};
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
/// How long readers may take to leave before the log mentions that the daemon waits for them.
const LEAVING: Duration = Duration::from_millis(300);

impl Mount {
    /// Mounts, calls `ready`, and serves until the mount is unmounted, or until SIGINT, SIGTERM or
    /// SIGHUP. On a signal the mount is detached at once, and this returns when the last reader has
    /// left. A second signal ends the process.
    ///
    /// An error of `ready` means that the process that asked for the mount is gone; then the mount
    /// is removed. Its result is dropped after the locks on the directory are released.
    ///
    /// For a process that does nothing else, and ends when this returns: the calling thread no
    /// longer receives those signals, and the working directory becomes `/`.
    pub fn serve<T>(self, ready: impl FnOnce() -> io::Result<T>) -> Result<(), MountError> {
        // Before any thread starts: all of them must leave the signals to the one that waits.
        let signals = [Signals::STOPPING, &[FROM_PARENT]].concat();
        let signals = Signals::block(&signals).map_err(MountError::Background)?;
        let stage = Arc::<Mutex<Stage>>::default();
        let watched = stage.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || end_on_signal(&watched, signals))
            .map_err(MountError::Background)?;

        let threads = self.threads;
        let directory = self.place.path().to_owned();
        let made = attach::make(&self.place, &self.parameters)
            .inspect_err(|_| remove_what_was_left(&directory))?;
        let attached = Attached::of(&self.place, &made);
        let directly = made.directly;
        let started = start(self.file_system, made, self.acl, threads);
        let was_moved = !self.place.is_where_it_was();
        drop(self.place); // otherwise the file system below would stay busy
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
        if directly {
            give_up_privileges();
        }
        if let Some(signal) = stage.lock().begin(&attached) {
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
                // The kernel did not end it, so the mount may still be there, unserved.
                attached.detach_or_log();
                Err(MountError::Session { directory, cause })
            }
        }
    }
}

/// Starts the threads that serve a mount that was just made.
fn start(
    file_system: OdmoeFs,
    made: NewMount,
    acl: SessionACL,
    threads: usize,
) -> io::Result<JoinHandle<io::Result<()>>> {
    let mut config = Config::default();
    config.acl = acl;
    config.n_threads = Some(threads);
    let session = made.serve(file_system, acl, config)?.spawn()?;
    wait_for_workers(session.guard, threads)
}

/// Removes the mount that a mount helper leaves behind when it is killed halfway.
fn remove_what_was_left(directory: &Path) {
    let left = table::mounted_on(directory).filter(MountEntry::is_odmoe);
    if left.is_some() && status::state_of(directory) == State::Stale {
        let _ = unmount::detach(directory); // the helper's error is the one to report
    }
}

/// Gives up what is needed only for mounting. Not for the daemon of a normal user: it has no
/// privileges to give up, and unmounts with the set-user-id helper, which must keep working.
fn give_up_privileges() {
    if let Err(e) = privileges::keep_what_serving_needs() {
        tracing::warn!("the daemon keeps all its privileges: {e}");
    }
    privileges::no_new_privileges();
}

/// The stage that a mount has reached, for the thread that waits for signals.
#[derive(Default)]
enum Stage {
    /// The mount is not made yet, or not identified yet.
    #[default]
    Starting,
    /// A signal came at that stage.
    Interrupted(i32),
    Serving(Attached),
}

impl Stage {
    /// Records that the mount is made. Returns the signal that came before, if any.
    fn begin(&mut self, attached: &Attached) -> Option<i32> {
        match self {
            Self::Interrupted(signal) => Some(*signal),
            _ => {
                *self = Self::Serving(attached.clone());
                None
            }
        }
    }

    /// Records a signal. Returns the mount that it must end, if there is one.
    fn interrupt(&mut self, signal: i32) -> Option<Attached> {
        if let Self::Serving(attached) = self {
            return Some(attached.clone());
        }
        *self = Self::Interrupted(signal);
        None
    }
}

/// Ends the mount on the first signal, and the process on the second one of a user.
fn end_on_signal(stage: &Mutex<Stage>, signals: Signals) {
    let (mut has_begun, mut by_user) = (false, 0);
    while let Ok(signal) = signals.wait() {
        by_user += u32::from(signal != FROM_PARENT);
        if by_user > 1 {
            std::process::exit(128 + signal);
        }
        if !std::mem::replace(&mut has_begun, true) {
            let serving = stage.lock().interrupt(signal);
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
    fn of(place: &Place, made: &NewMount) -> Self {
        let device = made.device_number().or_else(|| {
            // An older kernel. The directory is locked, so the mount there is ours.
            let entry = table::mounted_on(place.path()).filter(MountEntry::is_odmoe);
            Some(entry?.device)
        });
        Self {
            directory: place.path().to_owned(),
            device,
        }
    }

    /// All its mounts in our mount namespace, also after moves, renames and bind mounts.
    fn mounts(&self) -> Vec<MountEntry> {
        copies::of_device(mount_table(), self.device.as_deref())
    }

    /// Detaches the mount at once, wherever it is; open files stay usable. A mount under another
    /// one cannot be reached and stays. Returns the directories that it was detached from.
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
            // Mounts that were under another one of ours can be reached now.
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

    /// Ends the mount after a signal, and logs what keeps it alive, if anything.
    fn end(&self) {
        match self.detach() {
            Ok(directories) => {
                // Usually the session ends at once, and the process with it.
                std::thread::sleep(LEAVING);
                let others = copies::elsewhere(self.device.as_deref(), std::process::id());
                let used = match others.first() {
                    None => "files of it are still open".to_owned(),
                    Some(copy) => format!("it is still mounted {copy}"),
                };
                let directories = directories.iter().map(|path| format!("{path:?}"));
                let directories = directories.collect::<Vec<_>>().join(", ");
                tracing::warn!(
                    "unmounted {directories}, but {used}: waiting for that to end; a second signal ends the process at once"
                );
            }
            Err(e) => tracing::error!("{}; a second signal ends the process at once", e.line()),
        }
    }

    /// Called when the session has ended. If an unmount has ended it, no mount is left. Otherwise
    /// the dead mount is removed, and the result is an error.
    fn after_the_end(&self) -> Result<(), MountError> {
        let give_up = Instant::now() + REMOVAL;
        loop {
            let mut left = self.mounts();
            // By now, the number may belong to another mount, which lives.
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
