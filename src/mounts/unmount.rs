//! Unmounting: only odmoe-fs mounts, and in the same way for root and for other users.
//!
//! The problem: a mere look at a mount makes it busy for a moment; of several commands that unmount
//! at the same time, all but one come too late; and a mount that was removed here may still be
//! served for a container that has a copy of it.
//!
//! The plan: try again for a moment; before believing an error, check in the mount table that the
//! mount is still there; and wait for the daemon, or find out what keeps it.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::copies::{self, MountCopy};
use super::holders::{Users, users_of};
use super::table::{self, Links, MountEntry, mount_table};
use super::{State, process, status};
use crate::explain::{Explain, Hint, hint_of};
use crate::host::{HELPER_VARIABLE, fusermount};
use crate::sys;
use crate::sys::process::Watched;

/// Why a mount was not removed.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr, strum::EnumProperty)]
#[strum(serialize_all = "snake_case", prefix = "umount.")]
pub enum UnmountError {
    #[error("{0:?} does not exist")]
    #[strum(props(hint = "`odmoe-fs status` lists all mounts"))]
    Missing(PathBuf),
    #[error("{0:?} is not an odmoe-fs mount")]
    #[strum(props(hint = "`odmoe-fs status` lists all mounts"))]
    NotOurs(PathBuf),
    #[error("{directory:?} is in use{users}")]
    Busy {
        directory: PathBuf,
        /// Those that this user may see.
        users: Box<Users>,
    },
    #[error("{directory:?} is in use, and {} does not answer", process(*.pid))]
    NotAnswering {
        directory: PathBuf,
        pid: Option<u32>,
    },
    #[error("{directory:?} lies under another mount")]
    #[strum(props(hint = "unmount that first, with `umount`"))]
    Hidden { directory: PathBuf },
    #[error("{directory:?} was mounted by another user")]
    #[strum(props(hint = "ask that user or root to unmount it"))]
    AnotherUsers { directory: PathBuf },
    #[error("fusermount3 is not installed, and unmounting needs it unless you are root")]
    #[strum(props(hint = "install the package fuse3"))]
    NoFusermount,
    #[error("FUSERMOUNT_PATH is {0:?}, which is not a program")]
    #[strum(props(hint = "unset it, or name the fusermount3 of the package fuse3"))]
    WrongHelper(PathBuf),
    #[error("{directory:?} cannot be unmounted: {reason}")]
    Refused { directory: PathBuf, reason: String },
}

impl Explain for UnmountError {
    fn code(&self) -> &'static str {
        self.into()
    }

    fn hint(&self) -> Option<Hint> {
        match self {
            Self::Busy { users, .. } => Some(
                format!(
                    "{}, or pass --lazy to detach the mount now and end it when its last user has left",
                    users.advice()
                )
                .into(),
            ),
            Self::NotAnswering { pid, .. } => {
                let pid = pid.map_or("PID".to_owned(), |pid| pid.to_string());
                Some(
                    format!(
                        "wait, or `kill -CONT {pid}` if it was stopped, or pass --lazy to detach the mount now"
                    )
                    .into(),
                )
            }
            _ => hint_of(self),
        }
    }
}

/// A mount that was removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unmounted {
    /// The directory without links.
    pub directory: PathBuf,
    /// The daemon, if it has not ended.
    pub still_served: Option<StillServed>,
}

/// A daemon that continues after a mount of it was removed, and so keeps the model open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StillServed {
    pub pid: u32,
    /// The other mounts of its file system that this user may see.
    pub copies: Vec<MountCopy>,
}

/// How long a mount may be busy before it counts as in use: longer than a mere look takes.
const BUSY_PATIENCE: Duration = Duration::from_secs(1);
const BUSY_POLL: Duration = Duration::from_millis(25);
/// How long the daemon may take to end after its mount was removed.
const ENDING: Duration = Duration::from_secs(1);

/// Unmounts an odmoe-fs mount, dead or alive. A busy one is refused or, with `lazy`, detached now
/// and ended when its last user leaves.
///
/// Without `lazy` this waits for the daemon to end. Then nothing keeps the model open, and the disk
/// that holds it can be unmounted as well. If the daemon does not end, the result says why.
pub fn unmount(directory: &Path, lazy: bool) -> Result<Unmounted, UnmountError> {
    let directory = table::resolved(directory, Links::Any).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => not_found(directory, UnmountError::Missing),
        _ => UnmountError::Refused {
            directory: directory.to_owned(),
            reason: e.to_string(),
        },
    })?;
    let entry = table::mounted_on(&directory).filter(MountEntry::is_odmoe);
    let Some(entry) = entry else {
        return Err(not_found(&directory, UnmountError::NotOurs));
    };
    // With `lazy` it continues as long as the mount is used.
    let daemon = if lazy { None } else { status::pid_of(&entry) };
    let watched = daemon.and_then(|pid| Some((pid, Watched::process(pid)?)));
    remove(&entry, lazy)?;
    let still_served = watched
        .filter(|(_, daemon)| !daemon.ends_within(ENDING))
        .map(|(pid, _)| StillServed {
            pid,
            copies: copies::elsewhere(Some(&entry.device), pid),
        });
    Ok(Unmounted {
        directory,
        still_served,
    })
}

/// Why there is no mount of ours to be seen on a directory.
fn not_found(directory: &Path, otherwise: fn(PathBuf) -> UnmountError) -> UnmountError {
    let is_there = |mount: &MountEntry| mount.is_odmoe() && mount.directory == directory;
    let directory = directory.to_owned();
    match mount_table().iter().any(is_there) {
        true => UnmountError::Hidden { directory },
        false => otherwise(directory),
    }
}

/// Removes the mount of an entry of the table, and never one that has taken its place.
fn remove(entry: &MountEntry, lazy: bool) -> Result<(), UnmountError> {
    let directory = &entry.directory;
    let give_up = Instant::now() + BUSY_PATIENCE;
    loop {
        let failed = match try_once(directory, lazy) {
            Ok(()) => return Ok(()),
            Err(failed) => failed,
        };
        if table::mounted_on(directory).as_ref() != Some(entry) {
            // Another command was faster.
            return Err(UnmountError::NotOurs(directory.clone()));
        }
        match failed {
            // A dead mount is of no use, even to processes that have files of it open.
            Failed::Busy if status::state_of(directory) == State::Stale => {
                return detach(directory);
            }
            Failed::Busy if Instant::now() < give_up => std::thread::sleep(BUSY_POLL),
            Failed::Busy => return Err(busy(entry)),
            Failed::Error(e) => return Err(e),
        }
    }
}

/// Why a mount stays busy. Who waits for a daemon that does not answer has nothing open yet.
fn busy(entry: &MountEntry) -> UnmountError {
    let directory = entry.directory.clone();
    match status::state_of(&directory) {
        State::NotAnswering => UnmountError::NotAnswering {
            directory,
            pid: status::pid_of(entry),
        },
        _ => UnmountError::Busy {
            users: Box::new(users_of(entry)),
            directory,
        },
    }
}

/// Detaches a mount at once; open files stay usable.
pub(super) fn detach(directory: &Path) -> Result<(), UnmountError> {
    try_once(directory, true).map_err(|failed| match failed {
        Failed::Error(e) => e,
        Failed::Busy => UnmountError::Refused {
            directory: directory.to_owned(),
            reason: "it is busy".to_owned(),
        },
    })
}

enum Failed {
    Busy,
    Error(UnmountError),
}

fn try_once(directory: &Path, lazy: bool) -> Result<(), Failed> {
    let refused = |reason: String| {
        Failed::Error(UnmountError::Refused {
            directory: directory.to_owned(),
            reason,
        })
    };
    match sys::mount::unmount(directory, lazy) {
        Ok(()) => return Ok(()),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Err(Failed::Busy),
        // Not root; but the set-user-id helper may.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {}
        Err(e) => return Err(refused(e.to_string())),
    }
    let helper = fusermount().ok_or_else(|| {
        Failed::Error(match std::env::var_os(HELPER_VARIABLE) {
            Some(path) => UnmountError::WrongHelper(path.into()),
            None => UnmountError::NoFusermount,
        })
    })?;
    let flags: &[&OsStr] = if lazy {
        &["-u".as_ref(), "-z".as_ref()]
    } else {
        &["-u".as_ref()]
    };
    let output = Command::new(&helper)
        .args(flags)
        .arg("--")
        .arg(directory)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| refused(format!("{helper:?} cannot be run: {e}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("busy") {
        return Err(Failed::Busy);
    }
    // The helper looks for an entry of this user in the mount table.
    let is_there = || {
        mount_table()
            .iter()
            .any(|mount| mount.directory == directory)
    };
    if said.contains("not found in") && is_there() {
        return Err(Failed::Error(UnmountError::AnotherUsers {
            directory: directory.to_owned(),
        }));
    }
    Err(refused(said.trim().to_owned()))
}
