//! Comparing a tree on disk, mounted or materialized, with the model that it shall show.
//!
//! The problem: hundreds of gigabytes, of which any byte may have been lost or changed, and a tree
//! that may hold only a part of the model.
//!
//! The plan: the two documents say which files the tree claims to hold, so they are read first.
//! Listing its folders finds what is missing and what is extra. Then each file is compared with the
//! model, several at a time: size, header, and every tensor, each of which is named once, at the
//! first of its bytes that differs.

mod claims;
mod difference;
mod listing;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use self::claims::Expected;
pub use self::difference::{Difference, TensorNames, What};
use self::listing::Listing;
use crate::explain::{Explain, Hint, written};
use crate::layout::{METADATA_PATH, REGISTRY_PATH};
use crate::model::Model;
use crate::source::ReadError;
use crate::sys::read;
use crate::tree::Ino;
use crate::work::{Progress, in_parallel};

/// Bytes that are read at a time, of either side.
const PIECE_BYTES: usize = 2 << 20;

/// Why a tree could not be compared.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case", prefix = "verify.")]
pub enum VerifyError {
    #[error("{0:?} does not exist; name a directory that was mounted or materialized")]
    Missing(PathBuf),
    #[error("{0:?} is not a directory; name one that was mounted or materialized")]
    NotADirectory(PathBuf),
    #[error("cannot list {path:?}: {cause}{}", hint(.cause))]
    List { path: PathBuf, cause: io::Error },
    /// Our own fault, which says nothing of the tree.
    #[error(
        "cannot open {path:?}: {cause}; allow more open files with `ulimit -n`, or use fewer --jobs"
    )]
    Descriptors { path: PathBuf, cause: io::Error },
    #[error("stopped before everything was compared")]
    Stopped,
    /// The model, not the tree, cannot be read, so nothing can be said.
    #[error(transparent)]
    Model(#[from] ReadError),
}

impl Explain for VerifyError {
    fn code(&self) -> &'static str {
        match self {
            Self::Model(cause) => cause.code(),
            _ => self.into(),
        }
    }

    fn hint(&self) -> Option<Hint> {
        written(self).or_else(|| match self {
            Self::List { cause, .. } => cause.hint(),
            Self::Model(cause) => cause.hint(),
            _ => None,
        })
    }
}

fn hint(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::ENOTCONN) => "; its process is dead, so mount it again",
        _ => "",
    }
}

/// How much to compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Names, sizes, headers and documents.
    Quick,
    /// Every byte.
    Whole,
}

/// What a comparison found.
#[derive(Debug)]
pub struct Report {
    /// Sorted by path and offset; empty if the tree is that of the model.
    pub differences: Vec<Difference>,
    /// Files that were compared.
    pub files: usize,
    /// Bytes that were compared.
    pub bytes: u64,
    /// Experts that the tree claims to hold.
    pub experts: usize,
    /// Base files that the tree claims to hold.
    pub base_files: usize,
}

/// A tree on disk and a model, ready to be compared.
pub struct Comparison<'a> {
    model: &'a Model,
    root: &'a Path,
    depth: Depth,
    /// What is there and is to be there, sorted by inode number; without the two documents.
    expected: Vec<Expected<'a>>,
    /// How many of the two documents were compared.
    documents: usize,
    experts: usize,
    base_files: usize,
    /// Bytes that were compared.
    bytes: AtomicU64,
    differences: Mutex<Vec<Difference>>,
}

/// Who watches a comparison.
struct Watch<'a> {
    stop: &'a AtomicBool,
    progress: &'a (dyn Fn(Progress) + Sync),
}

impl<'a> Comparison<'a> {
    /// Finds out what the tree at `root` claims to hold, and whether that, and nothing else, is there.
    pub fn new(model: &'a Model, root: &'a Path, depth: Depth) -> Result<Self, VerifyError> {
        let found = Listing::of(model, root)?;
        let mut comparison = Self {
            model,
            root,
            depth,
            expected: Vec::new(),
            documents: 0,
            experts: 0,
            base_files: 0,
            bytes: AtomicU64::new(0),
            differences: Mutex::new(found.strangers),
        };
        let claims = comparison.claims(&found.known)?;
        (comparison.experts, comparison.base_files) = claims.counts(model);
        let mut expected = claims.files(model);
        let is_document = |ino| DOCUMENTS.iter().any(|path| comparison.ino(path) == ino);
        for &ino in found.known.iter().filter(|ino| !is_document(**ino)) {
            if expected
                .binary_search_by_key(&ino, |file| file.ino)
                .is_err()
            {
                comparison.add(ino, None, None, What::Extra);
            }
        }
        expected.retain(|file| {
            let is_there = found.known.contains(&file.ino);
            if !is_there && file.is_required {
                comparison.add(file.ino, None, None, What::Missing);
            }
            is_there
        });
        comparison.expected = expected;
        Ok(comparison)
    }

    /// Bytes that [`run`](Self::run) is going to compare.
    pub fn bytes(&self) -> u64 {
        let bytes = self.expected.iter().map(|expected| match expected.file {
            Some(file) if self.depth == Depth::Quick => file.header_bytes,
            _ => self.model.tree().size(expected.ino).unwrap_or(0),
        });
        bytes.sum()
    }

    /// Compares file by file, `jobs` at a time. `progress` is called from the workers; once `stop` is
    /// set, it ends early.
    pub fn run(
        self,
        jobs: NonZeroUsize,
        stop: &AtomicBool,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Report, VerifyError> {
        let watch = Watch { stop, progress };
        let buffer = || vec![0; 2 * PIECE_BYTES];
        let files: Vec<&Expected> = self.expected.iter().collect();
        in_parallel(jobs, &files, buffer, |file, buffer| {
            self.compare(file, buffer, &watch)
        })?;
        let mut differences = self.differences.into_inner();
        differences.sort();
        Ok(Report {
            differences,
            files: self.documents + self.expected.len(),
            bytes: self.bytes.into_inner(),
            experts: self.experts,
            base_files: self.base_files,
        })
    }

    fn add(&self, ino: Ino, offset: Option<u64>, tensor: Option<TensorNames>, what: What) {
        let path = self.model.tree().path(ino).unwrap_or_default().into();
        self.differences.lock().push(Difference {
            path,
            offset,
            tensor,
            what,
        });
    }

    fn ino(&self, path: &str) -> Ino {
        self.model
            .tree()
            .find(path)
            .expect("every tree has its documents")
    }

    /// Opens a file of the tree, and tells its size. What is no regular file is never followed and
    /// never waited for.
    fn open(&self, ino: Ino) -> Result<Option<(File, u64)>, VerifyError> {
        let path = self
            .root
            .join(self.model.tree().path(ino).unwrap_or_default());
        let what = match fs::symlink_metadata(&path) {
            Ok(metadata) if !metadata.is_file() => What::Kind {
                expected: "regular file",
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => What::Missing,
            Err(e) => What::Unreadable(e.to_string()),
            Ok(_) => {
                let opened = OpenOptions::new()
                    .read(true)
                    .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                    .open(&path)
                    .and_then(|file| Ok((file.metadata()?.len(), file)));
                match opened {
                    Ok((size, file)) => return Ok(Some((file, size))),
                    Err(cause)
                        if matches!(cause.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) =>
                    {
                        return Err(VerifyError::Descriptors { path, cause });
                    }
                    Err(e) => What::Unreadable(e.to_string()),
                }
            }
        };
        self.add(ino, None, None, what);
        Ok(None)
    }

    fn compare(
        &self,
        expected: &Expected,
        buffer: &mut [u8],
        watch: &Watch,
    ) -> Result<(), VerifyError> {
        let ino = expected.ino;
        let Some((file, found)) = self.open(ino)? else {
            return Ok(());
        };
        read::forget(&file);
        let size = self.model.tree().size(ino).unwrap_or(0);
        if found != size {
            let end = found.min(size);
            let mut regions = self.regions(expected, Depth::Whole).into_iter();
            let cut = regions.find(|region| region.range.contains(&end));
            let what = What::Size {
                expected: size,
                found,
            };
            self.add(ino, Some(end), cut.and_then(|region| region.tensor), what);
        }
        for mut region in self.regions(expected, self.depth) {
            region.range.end = region.range.end.min(found);
            self.compare_region(ino, &file, region, buffer, watch)?;
        }
        (watch.progress)(Progress { bytes: 0, files: 1 });
        Ok(())
    }

    fn compare_region(
        &self,
        ino: Ino,
        file: &File,
        region: Region,
        buffer: &mut [u8],
        watch: &Watch,
    ) -> Result<(), VerifyError> {
        let told = |bytes| {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
            (watch.progress)(Progress { bytes, files: 0 });
        };
        let Region {
            range,
            tensor,
            what,
        } = region;
        let piece = buffer.len() as u64 / 2;
        let mut start = range.start;
        while start < range.end {
            if watch.stop.load(Ordering::Relaxed) {
                return Err(VerifyError::Stopped);
            }
            // Up to where a page of the file ends, so that no page is read twice.
            let end = range.end.min(start - start % piece + piece);
            match first_difference(self.model, ino, file, start..end, buffer) {
                Ok(None) => told(end - start),
                Ok(Some(offset)) => {
                    told(range.end - start);
                    self.add(ino, Some(offset), tensor, what);
                    return Ok(());
                }
                Err(Fault::File { offset, cause }) => {
                    told(range.end - start);
                    self.add(
                        ino,
                        Some(offset),
                        tensor,
                        What::Unreadable(cause.to_string()),
                    );
                    return Ok(());
                }
                Err(Fault::Model(e)) => return Err(e.into()),
            }
            start = end;
        }
        Ok(())
    }

    /// The runs of a file that are compared one by one.
    fn regions(&self, expected: &Expected, depth: Depth) -> Vec<Region> {
        let Some(file) = expected.file else {
            let size = self.model.tree().size(expected.ino).unwrap_or(0);
            return vec![Region {
                range: 0..size,
                tensor: None,
                what: What::Document,
            }];
        };
        let mut end = file.header_bytes;
        let mut regions = vec![Region {
            range: 0..end,
            tensor: None,
            what: What::Header,
        }];
        if depth == Depth::Whole {
            regions.extend(self.model.layout().tensors(file).map(|tensor| {
                let start = end;
                end += tensor.bytes;
                Region {
                    range: start..end,
                    tensor: Some(TensorNames {
                        name: tensor.name.to_owned(),
                        gguf_name: tensor.gguf_name.to_owned(),
                    }),
                    what: What::Payload,
                }
            }));
        }
        regions
    }
}

/// The documents that say what a tree holds.
const DOCUMENTS: [&str; 2] = [REGISTRY_PATH, METADATA_PATH];

/// A run of bytes of a file that is compared, and named, as one.
struct Region {
    range: Range<u64>,
    tensor: Option<TensorNames>,
    what: What,
}

/// Why two runs of bytes could not be compared.
pub(crate) enum Fault {
    /// The model cannot be read.
    Model(ReadError),
    /// The file cannot be read, from this byte on.
    File { offset: u64, cause: io::Error },
}

/// Where a file differs first from what the model's tree holds, within a range that it has. The
/// buffer takes a piece of each. Reads past the page cache where the kernel can do that, so that
/// the disk is asked and not the memory.
pub(crate) fn first_difference(
    model: &Model,
    ino: Ino,
    file: &File,
    range: Range<u64>,
    buffer: &mut [u8],
) -> Result<Option<u64>, Fault> {
    let (expected, found) = buffer.split_at_mut(buffer.len() / 2);
    let mut offset = range.start;
    while offset < range.end {
        let len = (range.end - offset).min(expected.len() as u64) as usize;
        let (expected, found) = (&mut expected[..len], &mut found[..len]);
        model.read_at(ino, offset, expected).map_err(Fault::Model)?;
        let plainly = |buffer: &mut [u8], offset| file.read_exact_at(buffer, offset);
        read::read_exact_uncached(file, found, offset, plainly)
            .map_err(|cause| Fault::File { offset, cause })?;
        if expected != found {
            let same = expected.iter().zip(&*found).take_while(|(a, b)| a == b);
            return Ok(Some(offset + same.count() as u64));
        }
        offset += len as u64;
    }
    Ok(None)
}
