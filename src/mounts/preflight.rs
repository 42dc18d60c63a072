//! Everything that can be known to go wrong before a mount is tried, each with its own words.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{MountEntry, MountError, Options, State, status, table, unmount};
use crate::host::{DEVICE, fusermount, user_allow_other};
use crate::model::Model;
use crate::sys::process::effective_ids;

/// How long to wait for another mount on the same directory to be made, or refused.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Checks a mount, and returns the directory without links, and the lock on it that keeps others
/// from mounting there until this mount is made.
pub(super) fn check(
    model: &Model,
    directory: &Path,
    options: &Options,
) -> Result<(PathBuf, Option<File>), MountError> {
    usable_fuse(options)?;
    let directory = usable_directory(directory, options.replace)?;
    let lock = lock(&directory)?;
    // Again: somebody else may have mounted there before we had the lock.
    not_mounted(&directory)?;
    for part in model.source().paths() {
        if let Some(part) = hidden_by(&directory, part) {
            return Err(MountError::HidesModel { directory, part });
        }
    }
    if !options.nonempty && !is_empty(&directory)? {
        return Err(MountError::NotEmpty(directory));
    }
    Ok((directory, lock))
}

/// The path of a part that lies in the directory: its name, which may be a link, or what that
/// leads to. Parts may have to be opened again by name, and a daemon must not wait for itself.
fn hidden_by(directory: &Path, part: &Path) -> Option<PathBuf> {
    let name = part.parent().and_then(|folder| folder.canonicalize().ok());
    let name = name
        .zip(part.file_name())
        .map(|(folder, name)| folder.join(name));
    [name, part.canonicalize().ok()]
        .into_iter()
        .flatten()
        .find(|path| path.starts_with(directory))
}

/// Locks a directory against rivals, each of which is done within a moment. Where locks do not
/// exist, as on some network file systems, there is none.
fn lock(directory: &Path) -> Result<Option<File>, MountError> {
    let folder = File::open(directory).map_err(|cause| MountError::Directory {
        directory: directory.to_owned(),
        cause,
    })?;
    let give_up = Instant::now() + LOCK_PATIENCE;
    loop {
        match folder.try_lock() {
            Ok(()) => return Ok(Some(folder)),
            Err(TryLockError::Error(_)) => return Ok(None),
            Err(TryLockError::WouldBlock) if Instant::now() > give_up => {
                return Err(MountError::DirectoryLocked(directory.to_owned()));
            }
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn usable_directory(given: &Path, replace: bool) -> Result<PathBuf, MountError> {
    let fail = |cause: io::Error| match cause.kind() {
        io::ErrorKind::NotFound => MountError::DirectoryMissing(given.to_owned()),
        _ => MountError::Directory {
            directory: given.to_owned(),
            cause,
        },
    };
    let directory = table::resolved(given).map_err(fail)?;
    clear(&directory, replace)?;
    not_mounted(&directory)?;
    if !directory.metadata().map_err(fail)?.is_dir() {
        return Err(MountError::NotADirectory(directory));
    }
    Ok(directory)
}

/// Unmounts what a daemon of ours that is dead has left on the directory: nobody can use it, and
/// nothing is lost. With `replace` also what is alive.
fn clear(directory: &Path, replace: bool) -> Result<(), MountError> {
    if in_the_way(directory, replace)?.is_none() {
        return Ok(());
    }
    // Rivals may be about to do so, too, and who comes late must not unmount what another has just
    // mounted. The directory itself cannot be locked, but the one above it can, if it can be read.
    let _rivals = directory.parent().and_then(|above| lock(above).ok());
    while let Some((mount, state)) = in_the_way(directory, replace)? {
        unmount::unmount(directory, true).map_err(|cause| MountError::Repair {
            directory: directory.to_owned(),
            cause,
        })?;
        let source = mount.source.to_string_lossy();
        match state {
            State::Stale => tracing::warn!(
                "{directory:?} was a mount of {source:?} whose process is dead; unmounted it"
            ),
            _ => tracing::warn!(
                "{directory:?} was a mount of {source:?}; unmounted it, and programs that have files of it open keep it"
            ),
        }
    }
    Ok(())
}

/// Unmounts what is on a directory if it is one of ours that nobody serves.
pub(super) fn unmount_stale(directory: &Path) -> Result<(), MountError> {
    clear(directory, false)
}

/// The mount on a directory if it is one of ours that shall go. Fails if that does not answer.
fn in_the_way(directory: &Path, replace: bool) -> Result<Option<(MountEntry, State)>, MountError> {
    let Some(mount) = table::mounted_on(directory).filter(MountEntry::is_odmoe) else {
        return Ok(None);
    };
    match status::state_of(directory) {
        state if state == State::Stale || replace => Ok(Some((mount, state))),
        State::NotAnswering => Err(MountError::NotAnswering {
            directory: directory.to_owned(),
            source_name: mount.source.to_string_lossy().into_owned(),
            pid: status::pid_of(&mount),
        }),
        _ => Ok(None), // for `not_mounted` to say
    }
}

/// Fails if one of our mounts is on the directory, or around it.
fn not_mounted(directory: &Path) -> Result<(), MountError> {
    let directory = directory.to_owned();
    match table::mount_of(&directory).filter(MountEntry::is_odmoe) {
        None => Ok(()),
        Some(mount) if mount.directory == directory => Err(MountError::AlreadyMounted {
            directory,
            source_name: mount.source.to_string_lossy().into_owned(),
        }),
        Some(mount) => Err(MountError::InsideMount {
            directory,
            mount: mount.directory,
        }),
    }
}

fn is_empty(directory: &Path) -> Result<bool, MountError> {
    match directory.read_dir() {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(cause) => Err(MountError::Directory {
            directory: directory.to_owned(),
            cause,
        }),
    }
}

/// Whether this user can mount on this machine.
fn usable_fuse(options: &Options) -> Result<(), MountError> {
    if cfg!(target_os = "macos") {
        return Ok(()); // there is no such device, and macFUSE explains itself
    }
    let opened = File::options().read(true).write(true).open(DEVICE);
    opened.map_err(|e| match e.raw_os_error() {
        // The node may exist where the driver does not.
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => MountError::NoDevice,
        Some(libc::EACCES | libc::EPERM) => MountError::DeviceDenied,
        _ => MountError::Device(e),
    })?;
    let is_root = effective_ids().0 == 0;
    if !is_root && fusermount().is_none() {
        return Err(MountError::NoFusermount);
    }
    if !is_root && options.allow_other && !user_allow_other() {
        return Err(MountError::UserAllowOther);
    }
    Ok(())
}

/// What the mount helper or the kernel said, with the cure of the usual cases.
pub(super) fn explain(error: &io::Error) -> String {
    let said = error.to_string();
    let said = said.trim().trim_start_matches("fusermount3: ");
    let cure = if said.contains("write access") || said.contains("ermission denied") {
        "; you must own the directory, or be allowed to write to it"
    } else if said.contains("peration not permitted") {
        "; in a container start it with `--device /dev/fuse --cap-add SYS_ADMIN`"
    } else if said.contains("too many FUSE") {
        "; raise mount_max in /etc/fuse.conf"
    } else {
        ""
    };
    format!("{said}{cure}")
}
