//! The parts of a model on disk: found, opened, and read by range. The only code that reads
//! model bytes.
//!
//! The problem: a mount lives for weeks, and meanwhile its source may be renamed, replaced,
//! truncated or rewritten. Readers must get the bytes that were there at the start, or an error.
//!
//! The plan: hold the descriptors, so that names do not matter. After every read compare size and
//! time of change with those at the start; a part that differs answers errors from then on. Where
//! a split set has more parts than descriptors, the first parts stay open and the others are
//! opened for each read, which must find the same inode.
//!
//! Whoever keeps the bytes elsewhere (a mount in the kernel's cache of its own files, a copy on
//! disk) wants no second copy of them in memory: with [`PageCache::Unchanged`] reads leave the
//! page cache of the parts as they found it.

mod error;
mod folder;
mod open;
mod share;
mod store;
mod unfinished;

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use memmap2::Mmap;

pub use error::OpenError;
pub use open::open;

use crate::sys;
pub use crate::sys::process::raise_descriptor_limit;
pub use crate::sys::read::DIRECT_ALIGNMENT;
use crate::sys::read::{
    is_cached, only_what_is_read, read_exact_direct, read_exact_uncached, reopen_direct,
    takes_uncached_reads,
};

/// The open parts of a model.
#[derive(Debug)]
pub struct Source {
    parts: Vec<PartFile>,
    /// Which part the model was opened by.
    given: usize,
    page_cache: PageCache,
}

/// What reading does to the page cache of the parts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PageCache {
    /// What was read stays there, as after every read.
    #[default]
    Filled,
    /// What was there stays, nothing is added, as far as kernel and file system allow.
    Unchanged,
}

#[derive(Debug)]
struct PartFile {
    /// Absolute: a daemon leaves its working directory.
    path: PathBuf,
    identity: Identity,
    /// `None` for a part that is opened for each read.
    file: Option<File>,
    /// The same file once more, to read past the page cache; `None` where that is impossible or not
    /// wanted.
    direct: Option<File>,
    /// Set for good when the part was seen to have changed.
    changed: AtomicBool,
    /// Whether it was said that the part cannot be opened again.
    missed: AtomicBool,
}

/// What tells one state of one file from every other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    /// Seconds and nanoseconds of the last change of content.
    modified: (i64, i64),
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }

    fn modified(&self) -> SystemTime {
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

/// Why a range of a part cannot be read. To a reader of a mount all of them are EIO.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case", prefix = "read.")]
pub enum ReadError {
    #[error(
        "{path:?} has changed since it was opened; open it again once nobody writes to it: unmount and mount, or say the same command"
    )]
    Changed { path: PathBuf },
    #[error("{path:?} cannot be opened again: {cause}; {}", reopen_hint(.cause))]
    Reopen { path: PathBuf, cause: io::Error },
    #[error("{path:?} cannot be read at byte {offset}: {cause}")]
    Read {
        path: PathBuf,
        offset: u64,
        cause: io::Error,
    },
}

fn reopen_hint(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => "allow more open files with `ulimit -n`",
        _ => "put it back, reads of it fail until then",
    }
}

impl Source {
    /// Chooses what reading does to the page cache.
    pub fn set_page_cache(&mut self, page_cache: PageCache) {
        self.page_cache = page_cache;
        for part in &mut self.parts {
            let file = part.file.as_ref();
            let file = file.filter(|_| page_cache == PageCache::Unchanged);
            // What was read ahead of a range would stay, or be read again.
            file.inspect(|file| only_what_is_read(file));
            part.direct = file.and_then(|file| reopen_direct(file).ok());
        }
    }

    /// What reading does to the page cache.
    pub fn page_cache(&self) -> PageCache {
        self.page_cache
    }

    /// Whether reads can leave the page cache of the first part as they found it, in one way or the
    /// other.
    pub fn can_leave_page_cache(&self) -> bool {
        let part = &self.parts[0];
        part.direct.is_some() || part.file.as_ref().is_some_and(takes_uncached_reads)
    }

    /// Fills the buffer from `offset` of a part (0-based): all of it, or an error.
    pub fn read_at(&self, part: u32, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        let part = &self.parts[part as usize];
        part.with_file(|file| {
            let read = match self.page_cache {
                PageCache::Filled => file.read_exact_at(buffer, offset),
                PageCache::Unchanged => part.read_unchanged(file, buffer, offset),
            };
            part.checked(file, offset, read)
        })
    }

    /// Whether a part is kept open, so that reading a piece of it takes no more than that.
    pub fn is_kept_open(&self, part: u32) -> bool {
        self.parts[part as usize].file.is_some()
    }

    /// Fills the buffer as [`read_at`](Self::read_at) does, but past the page cache where the file
    /// system can do that. The place of a read, its length and the address of the buffer must be
    /// multiples of [`DIRECT_ALIGNMENT`]; where the part ends before, the rest of the buffer stays
    /// as it is.
    pub fn read_aligned(&self, part: u32, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        let part = &self.parts[part as usize];
        let wanted = part.identity.bytes.saturating_sub(offset);
        let wanted = usize::try_from(wanted).map_or(buffer.len(), |n| n.min(buffer.len()));
        part.with_file(|file| {
            let read = part.direct.as_ref().is_some_and(
                |direct| matches!(direct.read_at(buffer, offset), Ok(read) if read >= wanted),
            );
            let read = if read {
                Ok(())
            } else {
                part.read_unchanged(file, &mut buffer[..wanted], offset)
            };
            part.checked(file, offset, read)
        })
    }

    /// Whether a range of a part is in the page cache, so that reading it costs no disk. The kernel
    /// tells since Linux 6.5, and only the owner of the part or who may write to it.
    pub fn is_cached(&self, part: u32, offset: u64, bytes: u64) -> bool {
        let file = self.parts[part as usize].file.as_ref();
        file.is_some_and(|file| is_cached(file, offset, bytes))
    }

    /// Fails if a part has changed since it was opened.
    pub fn check(&self, part: u32) -> Result<(), ReadError> {
        let part = &self.parts[part as usize];
        part.with_file(|file| part.check(file))
    }

    /// When the newest part was last modified.
    pub fn modified(&self) -> SystemTime {
        let parts = self.parts.iter().map(|part| part.identity.modified());
        parts.max().unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// The paths of the parts, absolute, in order.
    pub fn paths(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.parts.iter().map(|part| part.path.as_path())
    }

    /// The path of the part that the model was opened by, absolute.
    pub fn given_path(&self) -> &Path {
        &self.parts[self.given].path
    }

    /// Maps a part (0-based) for reading: its tensors without a copy, each at its
    /// [`gguf_offset`](crate::safetensors::TensorView::gguf_offset).
    ///
    /// # Safety
    /// Nobody may change the part's file while the map lives: a truncated file raises SIGBUS, a
    /// rewritten one changes bytes behind shared references.
    #[allow(unsafe_code)]
    pub unsafe fn map(&self, part: u32) -> Result<Mmap, ReadError> {
        // SAFETY: the caller promises that the file does not change.
        let map = self.with_part(part, |file| unsafe { sys::map(file) })?;
        map.map_err(|cause| self.parts[part as usize].read_error(0, cause))
    }
}

impl PartFile {
    /// Fills the buffer, and leaves the page cache as it was if that can be done.
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

    /// Uses the file, opened again where it is not kept open, unless it is known to have changed.
    fn with_file<T>(
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
    fn checked(&self, file: &File, offset: u64, read: io::Result<()>) -> Result<(), ReadError> {
        // A change explains a failed read better than the failure does.
        self.check(file)?;
        read.map_err(|cause| self.read_error(offset, cause))
    }

    /// Checks that the part is as it was; if not, says so once and remembers.
    fn check(&self, file: &File) -> Result<(), ReadError> {
        let metadata = file.metadata().map_err(|cause| self.read_error(0, cause))?;
        if Identity::of(&metadata) == self.identity {
            return Ok(());
        }
        let error = self.changed_error();
        if !self.changed.swap(true, Ordering::Relaxed) {
            tracing::error!("{error}; reads of it fail from now on");
        }
        Err(error)
    }

    fn reopen(&self) -> Result<File, ReadError> {
        let fail = |cause| {
            let path = self.path.clone();
            let error = ReadError::Reopen { path, cause };
            if !self.missed.swap(true, Ordering::Relaxed) {
                tracing::error!("{error}");
            }
            error
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

    fn read_error(&self, offset: u64, cause: io::Error) -> ReadError {
        ReadError::Read {
            path: self.path.clone(),
            offset,
            cause,
        }
    }
}

/// Opens a file for reading if it is a regular one; never waits for the writer of a FIFO.
fn open_regular(path: &Path) -> io::Result<(File, Metadata)> {
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
