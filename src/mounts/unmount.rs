//! Unmounting: only ever one of ours, alike for root and for others.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::table;
use crate::sys;

/// Why a directory was not unmounted.
#[derive(Debug, thiserror::Error)]
pub enum UnmountError {
    #[error("{0:?} does not exist")]
    Missing(PathBuf),
    #[error("{0:?} is no odmoe-fs mount; `odmoe-fs status` lists them")]
    NotOurs(PathBuf),
    #[error(
        "{0:?} is in use: a program has a file open or works in it; close it, or say --lazy to unmount when the last has left"
    )]
    Busy(PathBuf),
    #[error(
        "fusermount3 is not installed, and unmounting needs it unless you are root; install the package fuse3"
    )]
    NoFusermount,
    #[error("{directory:?} cannot be unmounted: {reason}")]
    Refused { directory: PathBuf, reason: String },
}

/// Unmounts one of our mounts, a dead one too. A busy one is refused, or with `lazy` taken out of
/// the tree now and ended when its last user leaves. Returns the directory without links.
pub fn unmount(directory: &Path, lazy: bool) -> Result<PathBuf, UnmountError> {
    let directory = table::resolved(directory).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => UnmountError::Missing(directory.to_owned()),
        _ => UnmountError::Refused {
            directory: directory.to_owned(),
            reason: e.to_string(),
        },
    })?;
    match table::mounted_on(&directory) {
        Some(entry) if entry.is_odmoe() => run(&directory, lazy)?,
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
    match sys::mount::unmount(directory, lazy) {
        Ok(()) => return Ok(()),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            return Err(UnmountError::Busy(directory.to_owned()));
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
        return Err(UnmountError::Busy(directory.to_owned()));
    }
    // The helper keeps a list of who mounted what.
    if said.contains("not found in") {
        let reason = "another user has mounted it; only that user or root can unmount it";
        return Err(refused(reason.to_owned()));
    }
    Err(refused(said.trim().to_owned()))
}

/// The setuid helper that mounts and unmounts for users, where fuser looks for it, too.
pub(super) fn fusermount() -> Option<PathBuf> {
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
