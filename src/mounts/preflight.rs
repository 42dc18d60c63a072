//! The checks before a mount is made, each with an error of its own, and the removal of an odmoe-fs
//! mount that is in the way.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::place::{LOCK_PATIENCE, Lock, Place};
use super::table::{self, Links, MountEntry};
use super::{MountError, Options, State, UnmountError, status, unmount};
use crate::host::{self, DEVICE};
use crate::model::Model;
use crate::sys::process::effective_ids;

/// A directory that can be mounted on.
pub(super) struct Claim {
    pub place: Place,
    /// These keep other commands away until the mount is made and answers.
    pub locks: Vec<Lock>,
}

/// Checks a directory, and claims it: no other odmoe-fs command mounts there meanwhile.
pub(super) fn claim(model: &Model, given: &Path, options: &Options) -> Result<Claim, MountError> {
    let directory = table::resolved(given, Links::Trusted).map_err(|e| unusable(given, e))?;
    for part in model.source().paths() {
        match hidden_by(&directory, part) {
            Some(part) if part == directory => return Err(MountError::NotADirectory(directory)),
            Some(part) => return Err(MountError::HidesModel { directory, part }),
            None => {}
        }
    }
    let give_up = Instant::now() + LOCK_PATIENCE;
    loop {
        not_inside_a_mount(&directory)?;
        clear(&directory, options.replace)?;
        // A command that removes mounts locks the folder above exclusively, if it can be read.
        let above = directory.parent().and_then(Lock::shared);
        // The mount of a command that was faster is replaced as well.
        let has_rival = |e: &MountError| {
            let is_replaced = matches!(e, MountError::AlreadyMounted { .. }) && options.replace;
            is_replaced && Instant::now() < give_up
        };
        match not_mounted(&directory) {
            Err(e) if has_rival(&e) => continue,
            checked => checked?,
        }
        let place = Place::open(&directory).map_err(|e| unusable(&directory, e))?;
        let locked = place.lock().map_err(|e| unusable(&directory, e))?;
        let locked = locked.ok_or_else(|| MountError::DirectoryLocked(directory.clone()))?;
        // Again, since another command may have mounted there before we had the lock.
        match not_mounted(&directory) {
            Err(e) if has_rival(&e) => continue,
            checked => checked?,
        }
        if !options.nonempty && !place.is_empty().map_err(|e| unusable(&directory, e))? {
            return Err(MountError::NotEmpty(directory));
        }
        let locks = above.into_iter().chain([locked]).collect();
        return Ok(Claim { place, locks });
    }
}

fn unusable(directory: &Path, cause: io::Error) -> MountError {
    let directory = directory.to_owned();
    match cause.kind() {
        io::ErrorKind::NotFound => MountError::DirectoryMissing(directory),
        io::ErrorKind::NotADirectory => MountError::NotADirectory(directory),
        // It was not a link a moment ago.
        _ if cause.raw_os_error() == Some(libc::ELOOP) => MountError::Moved(directory),
        _ => MountError::Directory { directory, cause },
    }
}

/// The path of a part if it is in the directory: that of its name, which may be a link, or that of
/// the link's target. Parts may have to be opened again by name, and a daemon must not wait for
/// itself.
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

/// Removes a dead odmoe-fs mount from the directory, which is of no use to anybody. With `replace`
/// also a living one.
fn clear(directory: &Path, replace: bool) -> Result<(), MountError> {
    if in_the_way(directory, replace)?.is_none() {
        return Ok(());
    }
    // Other commands may be about to do the same, and a late one must not unmount what another has
    // just mounted. The directory itself cannot be locked, but the one above it can, if it is
    // readable.
    let _rivals = directory.parent().and_then(Lock::exclusive);
    while let Some((mount, state)) = in_the_way(directory, replace)? {
        let source = status::source_name(&mount);
        match unmount::unmount(directory, true) {
            // A command without the lock was faster.
            Err(UnmountError::NotOurs(_)) => continue,
            Err(cause) => {
                let directory = directory.to_owned();
                return Err(match state {
                    State::Stale => MountError::Repair { directory, cause },
                    _ => MountError::CannotReplace { directory, cause },
                });
            }
            Ok(_) => {}
        }
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

/// Unmounts a dead odmoe-fs mount, if there is one on a directory. Fails if there is one that does
/// not answer.
pub fn unmount_stale(directory: &Path) -> Result<(), MountError> {
    let directory = table::resolved(directory, Links::Any).map_err(|e| unusable(directory, e))?;
    clear(&directory, false)
}

/// The odmoe-fs mount on a directory if it must be removed. Fails if it does not answer and may not
/// be replaced.
fn in_the_way(directory: &Path, replace: bool) -> Result<Option<(MountEntry, State)>, MountError> {
    let Some(mount) = table::mounted_on(directory).filter(MountEntry::is_odmoe) else {
        return Ok(None);
    };
    match status::state_of(directory) {
        state if state == State::Stale || replace => Ok(Some((mount, state))),
        State::NotAnswering => Err(MountError::NotAnswering {
            directory: directory.to_owned(),
            source_name: status::source_name(&mount),
            pid: status::pid_of(&mount),
        }),
        _ => Ok(None), // `not_mounted` reports it
    }
}

/// Fails if an odmoe-fs mount is on the directory, or the directory is inside of one.
fn not_mounted(directory: &Path) -> Result<(), MountError> {
    not_inside_a_mount(directory)?;
    match table::mounted_on(directory).filter(MountEntry::is_odmoe) {
        None => Ok(()),
        Some(mount) => Err(MountError::AlreadyMounted {
            directory: directory.to_owned(),
            source_name: status::source_name(&mount),
        }),
    }
}

/// Fails if the directory is inside of an odmoe-fs mount. The mount is not touched, since it may
/// not answer.
fn not_inside_a_mount(directory: &Path) -> Result<(), MountError> {
    match table::mount_of(directory).filter(MountEntry::is_odmoe) {
        Some(mount) if mount.directory != directory => Err(MountError::InsideMount {
            directory: directory.to_owned(),
            mount: mount.directory,
        }),
        _ => Ok(()),
    }
}

/// Whether this user can mount on this machine.
pub(super) fn usable_fuse(options: &Options) -> Result<(), MountError> {
    if cfg!(target_os = "macos") {
        return Ok(()); // there is no such device, and macFUSE has error messages of its own
    }
    let opened = File::options().read(true).write(true).open(DEVICE);
    opened.map_err(|e| match e.raw_os_error() {
        // The node may exist where the driver does not.
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => MountError::NoDevice,
        Some(libc::EACCES) => MountError::DeviceDenied,
        _ => MountError::Device(e),
    })?;
    let is_root = effective_ids().0 == 0;
    if !is_root && host::may_mount() != Some(true) && host::fusermount().is_none() {
        return Err(match std::env::var_os(host::HELPER_VARIABLE) {
            Some(path) => MountError::WrongHelper(path.into()),
            None => MountError::NoFusermount,
        });
    }
    if !is_root && options.allow_other && !host::user_allow_other() {
        return Err(MountError::UserAllowOther);
    }
    Ok(())
}
