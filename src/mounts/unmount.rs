//! Unmounting: only ever one of ours, alike for root and for others.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::holders::{Holder, holders};
use super::{State, status, table};
use crate::explain::{Explain, Hint, written};
use crate::sys;
use crate::sys::process::Watched;

/// Why a directory was not unmounted.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case", prefix = "umount.")]
pub enum UnmountError {
    #[error("{0:?} does not exist; name one of those that `odmoe-fs status` lists")]
    Missing(PathBuf),
    #[error("{0:?} is no odmoe-fs mount; name one of those that `odmoe-fs status` lists")]
    NotOurs(PathBuf),
    #[error(
        "{directory:?} is in use by {}; end that, or say --lazy to take the mount away now and end it when the last user has left",
        in_words(.holders)
    )]
    Busy {
        directory: PathBuf,
        /// As far as this user may see them.
        holders: Vec<Holder>,
    },
    #[error(
        "fusermount3 is not installed, and unmounting needs it unless you are root; install the package fuse3"
    )]
    NoFusermount,
    #[error("{directory:?} cannot be unmounted: {reason}")]
    Refused { directory: PathBuf, reason: String },
}

impl Explain for UnmountError {
    fn code(&self) -> &'static str {
        self.into()
    }

    fn hint(&self) -> Option<Hint> {
        written(self)
    }
}

/// The first of those who use a mount, and how many more there are.
fn in_words(holders: &[Holder]) -> String {
    const SHOWN: usize = 4;
    let names: Vec<_> = holders.iter().take(SHOWN).map(Holder::to_string).collect();
    match holders.len().saturating_sub(SHOWN) {
        _ if holders.is_empty() => "a process that only its owner or root may see".to_owned(),
        0 => names.join(", "),
        more => format!("{} and {more} more", names.join(", ")),
    }
}

/// How long the daemon of what was unmounted may take to end.
const ENDING: Duration = Duration::from_secs(1);

/// Unmounts one of our mounts, a dead one too. A busy one is refused, or with `lazy` taken out of
/// the tree now and ended when its last user leaves. Returns the directory without links.
///
/// Without `lazy` nobody holds the model any more when it returns, as far as this user can see the
/// daemon: the disk that the model lies on can be unmounted, too.
pub fn unmount(directory: &Path, lazy: bool) -> Result<PathBuf, UnmountError> {
    let directory = table::resolved(directory).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => UnmountError::Missing(directory.to_owned()),
        _ => UnmountError::Refused {
            directory: directory.to_owned(),
            reason: e.to_string(),
        },
    })?;
    match table::mounted_on(&directory) {
        Some(entry) if entry.is_odmoe() => {
            let daemon = match lazy {
                true => None, // it goes on as long as it is used
                false => status::pid_of(&entry).and_then(Watched::process),
            };
            run(&directory, lazy).or_else(|e| match e {
                // Nobody can use a dead one, whoever has files of it open.
                UnmountError::Busy { .. } if status::state_of(&directory) == State::Stale => {
                    run(&directory, true)
                }
                UnmountError::Busy { directory, .. } => Err(UnmountError::Busy {
                    holders: holders(&entry),
                    directory,
                }),
                e => Err(e),
            })?;
            if let Some(daemon) = daemon {
                daemon.wait_for_end(ENDING);
            }
        }
        _ => return Err(UnmountError::NotOurs(directory)),
    }
    Ok(directory)
}

/// Takes a mount out of the tree at once; its open files go on.
pub(super) fn detach(directory: &Path) -> Result<(), UnmountError> {
    run(directory, true)
}

fn run(directory: &Path, lazy: bool) -> Result<(), UnmountError> {
    let refused = |reason: String| UnmountError::Refused {
        directory: directory.to_owned(),
        reason,
    };
    let busy = || UnmountError::Busy {
        directory: directory.to_owned(),
        holders: Vec::new(),
    };
    match sys::mount::unmount(directory, lazy) {
        Ok(()) => return Ok(()),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            return Err(busy());
        }
        // Not root: the setuid helper may.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {}
        Err(e) => return Err(refused(e.to_string())),
    }
    let helper = fusermount().ok_or(UnmountError::NoFusermount)?;
    let output = Command::new(&helper)
        .args(if lazy { &["-u", "-z"][..] } else { &["-u"] })
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
        return Err(busy());
    }
    // The helper keeps a list of who mounted what.
    if said.contains("not found in") {
        let reason = "another user has mounted it; only that user or root can unmount it";
        return Err(refused(reason.to_owned()));
    }
    Err(refused(said.trim().to_owned()))
}

/// The setuid helper that mounts and unmounts for users, where fuser looks for it, too.
pub(crate) fn fusermount() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("FUSERMOUNT_PATH") {
        return Some(PathBuf::from(path)).filter(|path| is_program(path));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = std::env::split_paths(&path)
        .chain(["/sbin".into(), "/bin".into()])
        .collect();
    ["fusermount3", "fusermount"]
        .into_iter()
        .flat_map(|name| folders.iter().map(move |folder| folder.join(name)))
        .find(|candidate| is_program(candidate))
}

fn is_program(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}
