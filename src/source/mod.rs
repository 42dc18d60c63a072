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

mod open;
mod part;
mod share;

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memmap2::Mmap;

pub use open::{OpenError, open};

use self::part::PartFile;
use crate::explain::{Explain, Hint, written};
use crate::sys;
pub use crate::sys::read::DIRECT_ALIGNMENT;
use crate::sys::read::{is_cached, only_what_is_read, reopen_direct, takes_uncached_reads};

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

impl ReadError {
    /// The path of the part.
    pub fn path(&self) -> &Path {
        match self {
            Self::Changed { path } | Self::Reopen { path, .. } | Self::Read { path, .. } => path,
        }
    }
}

fn reopen_hint(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => "allow more open files with `ulimit -n`",
        _ => "put it back, reads of it fail until then",
    }
}

impl Explain for ReadError {
    fn code(&self) -> &'static str {
        self.into()
    }

    fn hint(&self) -> Option<Hint> {
        match self {
            Self::Read { cause, .. } => cause.hint(),
            Self::Changed { .. } | Self::Reopen { .. } => written(self),
        }
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
