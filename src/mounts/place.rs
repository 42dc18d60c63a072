//! The directory to mount on, held open from the moment it was checked.
//!
//! The problem: root may mount below a folder in which another user can rename things at will. A
//! directory that was checked may be a link to `/etc` by the time the mount is made.
//!
//! The plan: open it once, component by component, without following links. Looking, locking and
//! mounting use only that descriptor.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Dir, Mode, OFlags, open, openat};

/// How long to wait for other commands that are mounting at the same place.
pub(super) const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_POLL: Duration = Duration::from_millis(5);

/// The flags that open a directory to hold it. On Linux that needs no read permission.
#[cfg(target_os = "linux")]
const HOLD: OFlags = OFlags::PATH;
#[cfg(not(target_os = "linux"))]
const HOLD: OFlags = OFlags::RDONLY;

/// The directory itself, and no link to one.
const THE_DIRECTORY: OFlags = OFlags::DIRECTORY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Opens a directory, whose path must be absolute and without links.
///
/// # Errors
/// ELOOP or ENOTDIR if a component has become a link, and every error of opening a directory.
pub(super) fn hold(path: &Path) -> io::Result<File> {
    let mut held = File::from(open("/", HOLD | THE_DIRECTORY, Mode::empty())?);
    for name in path.components().skip(1) {
        held = openat(&held, name.as_os_str(), HOLD | THE_DIRECTORY, Mode::empty())?.into();
    }
    Ok(held)
}

/// A directory that is held open.
#[derive(Debug)]
pub(super) struct Place {
    path: PathBuf,
    #[cfg_attr(not(target_os = "linux"), allow(dead_code))]
    held: File,
    readable: File,
}

impl Place {
    /// Opens a directory as [`hold`] does.
    pub fn open(path: &Path) -> io::Result<Self> {
        let held = hold(path)?;
        let readable = openat(&held, ".", OFlags::RDONLY | THE_DIRECTORY, Mode::empty())?.into();
        Ok(Self {
            path: path.to_owned(),
            held,
            readable,
        })
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether its path still leads to it: neither it nor a folder above it was renamed.
    #[cfg(target_os = "linux")]
    pub fn is_where_it_was(&self) -> bool {
        use std::os::fd::AsRawFd;
        let now = std::fs::read_link(format!("/proc/self/fd/{}", self.held.as_raw_fd()));
        now.is_ok_and(|now| now == self.path)
    }

    /// Always true, since the kernel does not tell.
    #[cfg(not(target_os = "linux"))]
    pub fn is_where_it_was(&self) -> bool {
        true
    }

    /// Makes it the working directory of this process.
    #[cfg(target_os = "linux")]
    pub fn enter(&self) -> io::Result<()> {
        Ok(rustix::process::fchdir(&self.held)?)
    }

    /// Whether it has no entries.
    pub fn is_empty(&self) -> io::Result<bool> {
        for entry in Dir::read_from(&self.readable)? {
            let entry = entry?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Locks it against other commands that mount here. Each holds its lock only for a moment;
    /// `None` if one holds it for longer.
    pub fn lock(&self) -> io::Result<Option<Lock>> {
        Lock::wait(self.readable.try_clone()?, File::try_lock)
    }
}

/// A lock on a directory, held until it is dropped. On file systems without locks, such as some
/// network ones, it locks nothing.
#[derive(Debug)]
pub(super) struct Lock {
    _folder: File,
}

impl Lock {
    /// Locks a folder to mount below it; others may do the same at the same time.
    pub fn shared(folder: &Path) -> Option<Self> {
        Self::wait(File::open(folder).ok()?, File::try_lock_shared).ok()?
    }

    /// Locks a folder to remove a mount below it.
    pub fn exclusive(folder: &Path) -> Option<Self> {
        Self::wait(File::open(folder).ok()?, File::try_lock).ok()?
    }

    fn wait(
        folder: File,
        try_lock: impl Fn(&File) -> Result<(), TryLockError>,
    ) -> io::Result<Option<Self>> {
        let give_up = Instant::now() + LOCK_PATIENCE;
        loop {
            match try_lock(&folder) {
                Ok(()) | Err(TryLockError::Error(_)) => {
                    return Ok(Some(Self { _folder: folder }));
                }
                Err(TryLockError::WouldBlock) if Instant::now() > give_up => return Ok(None),
                Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_POLL),
            }
        }
    }
}
