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

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use self::claims::Expected;
pub use self::difference::{Difference, TensorNames, What};
use self::listing::Listing;
use crate::folder::Entry;
use crate::layout::{METADATA_PATH, REGISTRY_PATH};
use crate::model::Model;
use crate::on_disk::{Comparer, Fault, OnDisk, Run};
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
    #[error(
        "the mount on {0:?} does not answer, so nothing can be compared; see with `odmoe-fs status` which process serves it"
    )]
    NotAnswering(PathBuf),
    #[error(
        "the process of the mount on {0:?} is dead, so nothing can be compared; mount it again"
    )]
    Stale(PathBuf),
    #[error("the mount on {0:?} ended during the comparison; mount it, and compare again")]
    Ended(PathBuf),
    /// The model, not the tree, cannot be read, so nothing can be said.
    #[error(transparent)]
    Model(#[from] ReadError),
}

fn hint(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::ENOTCONN) => "; its process is dead, so mount it again",
        Some(libc::EACCES) => {
            "; only a user who may read it can compare it, and a mount may be entered only by the user who made it"
        }
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
    tree: OnDisk,
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

impl<'a> Comparison<'a> {
    /// Finds out what the tree at `root` claims to hold, and whether that, and nothing else, is there.
    pub fn new(model: &'a Model, root: &'a Path, depth: Depth) -> Result<Self, VerifyError> {
        let found = Listing::of(model, root)?;
        let mut comparison = Self {
            model,
            root,
            tree: found.tree,
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
        let told = |bytes| {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
            progress(Progress { bytes, files: 0 });
        };
        let comparer = Comparer {
            model: self.model,
            stop,
            progress: &told,
        };
        let buffer = || vec![0; 2 * PIECE_BYTES];
        let files: Vec<&Expected> = self.expected.iter().collect();
        in_parallel(jobs, &files, buffer, |file, buffer| {
            let compared = self.compare(file, buffer, &comparer);
            progress(Progress { bytes: 0, files: 1 });
            compared
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

    /// What is said of a file that cannot be opened or read.
    fn unreadable(&self, ino: Ino, cause: io::Error) -> Result<What, VerifyError> {
        match cause.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => {
                let path = self.model.tree().path(ino).unwrap_or_default();
                let path = self.root.join(path);
                Err(VerifyError::Descriptors { path, cause })
            }
            _ => Ok(What::Unreadable(cause.to_string())),
        }
    }

    fn compare(
        &self,
        expected: &Expected,
        buffer: &mut [u8],
        comparer: &Comparer,
    ) -> Result<(), VerifyError> {
        let ino = expected.ino;
        let what = match self.tree.open(self.model.tree(), ino) {
            Ok(Entry::There((file, metadata))) => {
                return self.compare_file(expected, &file, metadata.len(), buffer, comparer);
            }
            Ok(Entry::Missing) => What::Missing,
            Ok(Entry::Other(_)) => NO_FILE,
            Err(cause) => self.unreadable(ino, cause)?,
        };
        self.add(ino, None, None, what);
        Ok(())
    }

    fn compare_file(
        &self,
        expected: &Expected,
        file: &File,
        found: u64,
        buffer: &mut [u8],
        comparer: &Comparer,
    ) -> Result<(), VerifyError> {
        let ino = expected.ino;
        read::forget(file);
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
        for region in self.regions(expected, self.depth) {
            let start = region.range.start;
            let run = Run {
                ino,
                start,
                len: region.range.end.min(found).saturating_sub(start),
                found_start: start,
            };
            match comparer.first_difference(run, file, buffer) {
                Ok(None) => {}
                Ok(Some(offset)) => self.add(ino, Some(offset), region.tensor, region.what),
                Err(Fault::File { offset, cause }) => {
                    let what = What::Unreadable(cause.to_string());
                    self.add(ino, Some(offset), region.tensor, what);
                }
                Err(Fault::Model(e)) => return Err(e.into()),
                Err(Fault::Stopped) => return Err(VerifyError::Stopped),
            }
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

/// What is said of a link, a folder or a device where a file should be.
const NO_FILE: What = What::Kind {
    expected: "regular file",
};

/// The documents that say what a tree holds.
const DOCUMENTS: [&str; 2] = [REGISTRY_PATH, METADATA_PATH];

/// A run of bytes of a file that is compared, and named, as one.
struct Region {
    range: Range<u64>,
    tensor: Option<TensorNames>,
    what: What,
}
