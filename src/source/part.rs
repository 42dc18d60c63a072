//! One part of a model on disk: held open, and checked to be what it was when it was opened.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use super::ReadError;
use crate::sys::read::{is_cached, only_what_is_read, read_exact_direct, read_exact_uncached};

#[derive(Debug)]
pub struct PartFile {
    /// Absolute: a daemon leaves its working directory.
    pub path: PathBuf,
    pub identity: Identity,
    /// `None` for a part that is opened for each read.
    pub file: Option<File>,
    /// The same file once more, to read past the page cache; `None` where that is impossible or not
    /// wanted.
    pub direct: Option<File>,
    /// Set for good when the part was seen to have changed.
    changed: AtomicBool,
}

/// What tells one state of one file from every other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    pub device: u64,
    pub inode: u64,
    pub bytes: u64,
    /// Seconds and nanoseconds of the last change of content.
    pub modified: (i64, i64),
}

impl Identity {
    pub fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }

    pub fn modified(&self) -> SystemTime {
        let (seconds, nanoseconds) = self.modified;
        let nanoseconds = Duration::from_nanos(nanoseconds.max(0) as u64);
        let whole = Duration::from_secs(seconds.unsigned_abs());
        let base = if seconds < 0 {
            SystemTime::UNIX_EPOCH - whole
        } else {
            SystemTime::UNIX_EPOCH + whole
        };
        base + nanoseconds
    }
}

impl PartFile {
    /// A part that was just opened; `file` is `None` where it is to be opened for each read.
    pub fn new(path: PathBuf, identity: Identity, file: Option<File>) -> Self {
        Self {
            path,
            identity,
            file,
            direct: None,
            changed: AtomicBool::new(false),
        }
    }

    /// Fills the buffer, and leaves the page cache as it was if that can be done.
    pub fn read_unchanged(&self, file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if self.file.is_none() {
            only_what_is_read(file); // opened just now
        }
        read_exact_uncached(file, buffer, offset, |buffer, offset| {
            // Btrfs, and every file system before Linux 6.14.
            let direct = self.direct.as_ref();
            let direct = direct.filter(|_| !is_cached(file, offset, buffer.len() as u64));
            if direct.is_some_and(|direct| read_exact_direct(direct, buffer, offset).is_ok()) {
                return Ok(());
            }
            file.read_exact_at(buffer, offset)
        })
    }

    /// Uses the file, opened again where it is not kept open, unless it is known to have changed.
    pub fn with_file<T>(
        &self,
        use_file: impl FnOnce(&File) -> Result<T, ReadError>,
    ) -> Result<T, ReadError> {
        if self.changed.load(Ordering::Relaxed) {
            return Err(self.changed_error());
        }
        match &self.file {
            Some(file) => use_file(file),
            None => use_file(&self.reopen()?),
        }
    }

    /// The result of a read that was just made.
    pub fn checked(&self, file: &File, offset: u64, read: io::Result<()>) -> Result<(), ReadError> {
        // A change explains a failed read better than the failure does.
        self.check(file)?;
        read.map_err(|cause| self.read_error(offset, cause))
    }

    /// Checks that the part is as it was, and remembers if it is not.
    pub fn check(&self, file: &File) -> Result<(), ReadError> {
        let metadata = file.metadata().map_err(|cause| self.read_error(0, cause))?;
        if Identity::of(&metadata) == self.identity {
            return Ok(());
        }
        self.changed.store(true, Ordering::Relaxed);
        Err(self.changed_error())
    }

    fn reopen(&self) -> Result<File, ReadError> {
        let fail = |cause| ReadError::Reopen {
            path: self.path.clone(),
            cause,
        };
        let (file, metadata) = open_regular(&self.path).map_err(fail)?;
        let found = Identity::of(&metadata);
        if (found.device, found.inode) != (self.identity.device, self.identity.inode) {
            return Err(fail(io::Error::other("another file has taken its place")));
        }
        self.check(&file)?;
        Ok(file)
    }

    fn changed_error(&self) -> ReadError {
        ReadError::Changed {
            path: self.path.clone(),
        }
    }

    pub fn read_error(&self, offset: u64, cause: io::Error) -> ReadError {
        ReadError::Read {
            path: self.path.clone(),
            offset,
            cause,
        }
    }
}

/// Opens a file for reading if it is a regular one; never waits for the writer of a FIFO.
pub fn open_regular(path: &Path) -> io::Result<(File, Metadata)> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_file() {
        return Ok((file, metadata));
    }
    let what = if metadata.is_dir() {
        "it is a directory"
    } else {
        "it is a device, pipe or socket"
    };
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("{what}, not a regular file"),
    ))
}
