//! A part, wherever it is: a file on this machine, or behind a URL.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::time::SystemTime;

use super::part::PartFile;
#[cfg(feature = "remote")]
use super::remote::{RemotePart, cache::index::BLOCK_BYTES};
use super::{PageCache, ReadError};
use crate::sys::read::DIRECT_ALIGNMENT;

/// A part of a model.
#[derive(Debug)]
pub enum Part {
    File(PartFile),
    #[cfg(feature = "remote")]
    Remote(Box<RemotePart>),
}

impl Part {
    /// The absolute path, or the address without anything secret.
    pub fn path(&self) -> &Path {
        match self {
            Self::File(part) => &part.path,
            #[cfg(feature = "remote")]
            Self::Remote(part) => &part.path,
        }
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::File(part) => part.identity.bytes,
            #[cfg(feature = "remote")]
            Self::Remote(part) => part.bytes(),
        }
    }

    /// When the file was last changed, as far as that is known.
    pub fn modified(&self) -> SystemTime {
        match self {
            Self::File(part) => part.identity.modified(),
            #[cfg(feature = "remote")]
            Self::Remote(part) => part.modified(),
        }
    }

    /// The file on this machine.
    pub fn file(&self) -> Option<&PartFile> {
        match self {
            Self::File(part) => Some(part),
            #[cfg(feature = "remote")]
            Self::Remote(_) => None,
        }
    }

    /// The part of a server.
    #[cfg(feature = "remote")]
    pub fn remote(&self) -> Option<&RemotePart> {
        match self {
            Self::File(_) => None,
            Self::Remote(part) => Some(part),
        }
    }

    /// Chooses what reading does to the page cache, where there is a choice.
    pub fn set_page_cache(&mut self, page_cache: PageCache) {
        match self {
            Self::File(part) => part.set_page_cache(page_cache),
            #[cfg(feature = "remote")]
            Self::Remote(_) => {}
        }
    }

    /// Whether reads go through the page cache, though another way is wanted.
    pub fn insists_on_page_cache(&self, wanted: PageCache) -> bool {
        self.file().is_some_and(|part| part.page_cache() != wanted)
    }

    /// Whether reads can leave the page cache as they found it.
    pub fn can_leave_page_cache(&self) -> bool {
        self.file().is_none_or(PartFile::can_leave_page_cache)
    }

    /// Whether pieces of the part should be fetched before they are asked for.
    pub fn is_fetchable(&self) -> bool {
        self.file().is_none_or(PartFile::is_fetchable)
    }

    /// Multiples of this are where reads should end, so that nothing is read twice.
    pub fn alignment(&self) -> u64 {
        match self {
            Self::File(_) => DIRECT_ALIGNMENT,
            #[cfg(feature = "remote")]
            Self::Remote(_) => BLOCK_BYTES,
        }
    }

    /// Whether a range is in the page cache.
    pub fn is_cached(&self, offset: u64, bytes: u64) -> bool {
        self.file()
            .is_some_and(|part| part.is_cached(offset, bytes))
    }

    /// Whether a range comes from a disk of this machine.
    #[cfg_attr(not(feature = "remote"), expect(unused_variables))]
    pub fn is_on_disk(&self, range: &Range<u64>) -> bool {
        match self {
            Self::File(_) => true,
            #[cfg(feature = "remote")]
            Self::Remote(part) => part.is_cached(range),
        }
    }

    /// Fills the whole buffer from `offset`, or fails.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        match self {
            Self::File(part) => part.read(offset, buffer),
            #[cfg(feature = "remote")]
            Self::Remote(part) => part.read(offset, buffer),
        }
    }

    /// Reads a range into a buffer that begins where a direct read of it does; from a server as a
    /// stream, if that is wanted, and else in pieces side by side.
    #[cfg_attr(not(feature = "remote"), expect(unused_variables))]
    pub fn read_chunk(
        &self,
        range: &Range<u64>,
        buffer: &mut [u8],
        is_streamed: bool,
    ) -> Result<(), ReadError> {
        let skip = range.start % DIRECT_ALIGNMENT;
        let first = range.start - skip;
        match self {
            Self::File(part) => {
                let aligned = (range.end - first).next_multiple_of(DIRECT_ALIGNMENT);
                part.read_aligned(first, &mut buffer[..aligned as usize])
            }
            #[cfg(feature = "remote")]
            Self::Remote(part) => part.read_chunk(range, skip as usize, buffer, is_streamed),
        }
    }

    /// Fails if the part has changed since it was opened.
    pub fn is_unchanged(&self) -> Result<(), ReadError> {
        match self {
            Self::File(part) => part.is_unchanged(),
            #[cfg(feature = "remote")]
            Self::Remote(part) => part.is_unchanged(),
        }
    }

    /// Lends the file, as it was opened.
    pub fn with_file<T>(&self, borrow: impl FnOnce(&File) -> T) -> Result<T, ReadError> {
        let Some(part) = self.file() else {
            let cause = io::Error::other("it is not a file on this machine");
            return Err(self.read_error(0, cause));
        };
        part.with_file(|file| {
            let result = borrow(file);
            part.check(file)?;
            Ok(result)
        })
    }

    pub fn read_error(&self, offset: u64, cause: io::Error) -> ReadError {
        ReadError::Read {
            path: self.path().to_owned(),
            offset,
            cause,
        }
    }
}
