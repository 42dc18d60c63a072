//! One part of a model: held open, and checked to be what it was when it was opened.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use super::{PageCache, ReadError};
use crate::sys::file_system::comes_from_elsewhere;
use crate::sys::read::{
    is_cached, only_what_is_read, read_exact_direct, read_exact_uncached, reopen_direct,
    takes_uncached_reads,
};

/// One file of a model.
#[derive(Debug)]
pub struct PartFile {
    /// Absolute: a daemon leaves its working directory.
    pub path: PathBuf,
    pub identity: Identity,
    /// `None` if the part is opened for each read.
    file: Option<File>,
    /// What reading does to it; not always what was asked for.
    page_cache: PageCache,
    /// The same file opened for reads past the page cache; `None` if that is impossible or not
    /// wanted.
    direct: Option<File>,
    /// Whether the part was ever seen to have changed.
    changed: AtomicBool,
}

/// What distinguishes one state of one file from every other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    pub device: u64,
    pub inode: u64,
    pub bytes: u64,
    /// Modification time: seconds and nanoseconds.
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
    /// A part that was just opened; `file` is `None` if it must be opened for each read.
    pub fn new(path: PathBuf, identity: Identity, file: Option<File>) -> Self {
        Self {
            path,
            identity,
            file,
            page_cache: PageCache::default(),
            direct: None,
            changed: AtomicBool::new(false),
        }
    }

    /// From now on it is opened for each read.
    pub fn close(&mut self) {
        self.file = None;
    }

    /// Chooses what reading does to the page cache, where there is a choice.
    pub fn set_page_cache(&mut self, page_cache: PageCache) {
        let elsewhere = self.with_file(|file| Ok(comes_from_elsewhere(file)));
        self.page_cache = if elsewhere.unwrap_or(false) {
            // What serves such a file often has one stream for each descriptor, fetches far more
            // than it is asked for, and starts again when requests are not in order. The kernel
            // reads ahead in order, into its cache.
            PageCache::Filled
        } else {
            page_cache
        };
        let page_cache = self.page_cache;
        let file = self.file.as_ref();
        let file = file.filter(|_| page_cache == PageCache::Unchanged);
        // Pages that the kernel reads ahead would stay, or be read a second time.
        file.inspect(|file| only_what_is_read(file));
        self.direct = file.and_then(|file| reopen_direct(file).ok());
    }

    /// What reading does to the page cache.
    pub fn page_cache(&self) -> PageCache {
        self.page_cache
    }

    /// Whether reads can leave the page cache as they found it, in one way or the other.
    pub fn can_leave_page_cache(&self) -> bool {
        self.page_cache == PageCache::Unchanged
            && (self.direct.is_some() || self.file.as_ref().is_none_or(takes_uncached_reads))
    }

    /// Whether pieces of the part should be fetched before they are asked for: not if the kernel
    /// reads ahead itself, nor if the part must be opened for each piece.
    pub fn is_fetchable(&self) -> bool {
        self.page_cache == PageCache::Unchanged && self.file.is_some()
    }

    /// Fills the whole buffer from `offset`, or fails.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        self.with_file(|file| {
            let read = match self.page_cache {
                PageCache::Filled => file.read_exact_at(buffer, offset),
                PageCache::Unchanged => self.read_unchanged(file, buffer, offset),
            };
            self.checked(file, offset, read)
        })
    }

    /// Fills the buffer as [`read`](Self::read) does, but past the page cache if the file system
    /// can do that. The offset, the length and the address of the buffer must be multiples of
    /// [`DIRECT_ALIGNMENT`](crate::sys::read::DIRECT_ALIGNMENT). If the part ends within the
    /// buffer, the rest of it stays as it is.
    pub fn read_aligned(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        let wanted = self.identity.bytes.saturating_sub(offset);
        let wanted = usize::try_from(wanted).map_or(buffer.len(), |n| n.min(buffer.len()));
        self.with_file(|file| {
            let read = self.direct.as_ref().is_some_and(
                |direct| matches!(direct.read_at(buffer, offset), Ok(read) if read >= wanted),
            );
            let read = if read {
                Ok(())
            } else {
                self.read_unchanged(file, &mut buffer[..wanted], offset)
            };
            self.checked(file, offset, read)
        })
    }

    /// Whether a range is in the page cache, so that reading it needs no disk. The kernel answers
    /// this since Linux 6.5, and only to the owner of the part or somebody who may write to it.
    pub fn is_cached(&self, offset: u64, bytes: u64) -> bool {
        let file = self.file.as_ref();
        file.is_some_and(|file| is_cached(file, offset, bytes))
    }

    /// Fails if the part has changed since it was opened.
    pub fn is_unchanged(&self) -> Result<(), ReadError> {
        self.with_file(|file| self.check(file))
    }

    /// Fills the buffer, and leaves the page cache as it was if possible.
    fn read_unchanged(&self, file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
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

    /// Lends the file, opened again if it is not kept open. Fails if it is known to have changed.
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

    /// The result of a read that has just ended.
    fn checked(&self, file: &File, offset: u64, read: io::Result<()>) -> Result<(), ReadError> {
        // A change is a better explanation than the failure that it caused.
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

/// Opens a regular file for reading, and refuses all others. Never waits for the writer of a FIFO.
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
