//! Unmounting: only ever one of ours, alike for root and for others.
//!
//! The problem: a mount may be busy for the moment in which somebody looks at it; of several who
//! unmount at the same time all but one come too late; and what was unmounted here may go on being
//! served, for a container that has a copy of it.
//!
//! The plan: try for a moment; ask the mount table whether the mount is still there before an error
//! is believed; and wait for the daemon, or find out what keeps it.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::copies::{self, MountCopy};
use super::holders::{Use, use_of};
use super::table::{self, Links, MountEntry, mount_table};
use super::{State, status};
use crate::explain::{Explain, Hint, hint_of};
use crate::host::{HELPER_VARIABLE, fusermount};
use crate::sys;
use crate::sys::process::Watched;
/// Why a directory was not unmounted.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr, strum::EnumProperty)]
#[strum(serialize_all = "snake_case", prefix = "umount.")]
pub enum UnmountError {
    #[error("{0:?} does not exist")]
    #[strum(props(hint = "name one of those that `odmoe-fs status` lists"))]
    Missing(PathBuf),
    #[error("{0:?} is not an odmoe-fs mount")]
    #[strum(props(hint = "name one of those that `odmoe-fs status` lists"))]
    NotOurs(PathBuf),
    #[error("{directory:?} is in use{users}")]
    Busy {
        directory: PathBuf,
        /// As far as this user may see it.
        users: Box<Use>,
    },
    #[error("{directory:?} lies under another mount")]
    #[strum(props(hint = "unmount that first"))]
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
                format!("{}, or pass --lazy to take the mount away now and end it when its last user has left", users.advice()).into(),
            ),
            _ => hint_of(self),
        }
    }
}

/// A mount that was taken out of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unmounted {
    /// The directory without links.
    pub directory: PathBuf,
    /// What is known of a daemon that goes on serving.
    pub still_served: Option<StillServed>,
}

/// A daemon that has not ended though a mount of it was removed, and so holds the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StillServed {
    pub pid: u32,
    /// Where else its file system is mounted, as far as this user may see it.
    pub copies: Vec<MountCopy>,
}

/// How long a mount may be busy before somebody is said to use it: those who merely look are gone by
/// then.
const BUSY_PATIENCE: Duration = Duration::from_secs(1);
const BUSY_POLL: Duration = Duration::from_millis(25);
/// How long the daemon of what was unmounted may take to end.
const ENDING: Duration = Duration::from_secs(1);

/// Unmounts one of our mounts, a dead one too. A busy one is refused, or with `lazy` taken out of
/// the tree now and ended when its last user leaves.
///
/// Without `lazy` it waits for the daemon to end, after which nobody holds the model any more: the
/// disk that the model lies on can be unmounted, too. If it does not end, the result says so, and
/// why.
pub fn unmount(directory: &Path, lazy: bool) -> Result<Unmounted, UnmountError> {
    let directory = table::resolved(directory, Links::Any).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => UnmountError::Missing(directory.to_owned()),
        _ => UnmountError::Refused {
            directory: directory.to_owned(),
            reason: e.to_string(),
        },
    })?;
    let entry = table::mounted_on(&directory).filter(MountEntry::is_odmoe);
    let Some(entry) = entry else {
        return Err(UnmountError::NotOurs(directory));
    };
    // It goes on as long as a lazily unmounted mount is used.
    let daemon = if lazy { None } else { status::pid_of(&entry) };
    let watched = daemon.and_then(|pid| Some((pid, Watched::process(pid)?)));
    patiently(&entry, lazy)?;
    let still_served = watched
        .filter(|(_, daemon)| !daemon.ends_within(ENDING))
        .map(|(pid, _)| StillServed {
            pid,
            copies: copies::elsewhere(Some(&entry.device)),
        });
    Ok(Unmounted {
        directory,
        still_served,
    })
}

/// Unmounts what an entry of the table stands for, and nothing else that may be there by now.
fn patiently(entry: &MountEntry, lazy: bool) -> Result<(), UnmountError> {
    let directory = &entry.directory;
    let give_up = Instant::now() + BUSY_PATIENCE;
    loop {
        let failed = match run(directory, lazy) {
            Ok(()) => return Ok(()),
            Err(failed) => failed,
        };
        if table::mounted_on(directory).as_ref() != Some(entry) {
            // Somebody else was faster.
            return Err(UnmountError::NotOurs(directory.clone()));
        }
        match failed {
            // Nobody can use a dead one, whoever has files of it open.
            Failed::Busy if status::state_of(directory) == State::Stale => {
                return detach(directory);
            }
            Failed::Busy if Instant::now() < give_up => std::thread::sleep(BUSY_POLL),
            Failed::Busy => {
                return Err(UnmountError::Busy {
                    users: Box::new(use_of(entry)),
                    directory: directory.clone(),
                });
            }
            Failed::Error(e) => return Err(e),
        }
    }
}

/// Takes a mount out of the tree at once; its open files go on.
pub(super) fn detach(directory: &Path) -> Result<(), UnmountError> {
    run(directory, true).map_err(|failed| match failed {
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

fn run(directory: &Path, lazy: bool) -> Result<(), Failed> {
    let refused = |reason: String| {
        Failed::Error(UnmountError::Refused {
            directory: directory.to_owned(),
            reason,
        })
    };
    match sys::mount::unmount(directory, lazy) {
        Ok(()) => return Ok(()),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Err(Failed::Busy),
        // Not root: the set-user-id helper may.
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
