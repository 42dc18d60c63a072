//! Compares a tree on disk, mounted or materialized, with its model.
//!
//! The problem: any of hundreds of gigabytes may have been lost or changed, and the tree may hold
//! only a part of the model.
//!
//! The plan: the two documents list the files that the tree claims to hold, so they are read first.
//! Listing its folders finds missing and extra files. Then each file is compared with the model,
//! several at a time: header, size and every tensor. A tensor that differs is reported once, at its
//! first byte that does. If a file has another header, its tensors are compared at the places that
//! this header gives (`header`). A model without a tree is searched for bytes that were never
//! written (`unfinished`).

mod claims;
mod difference;
mod form;
mod header;
mod listing;
mod shown;
mod unfinished;

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use self::claims::Expected;
pub use self::difference::{Difference, DifferenceKind, TensorNames};
pub use self::form::form_of;
pub(crate) use self::form::known_form_of;
use self::header::FoundHeader;
use self::listing::Listing;
pub use self::shown::shown_in;
pub use self::unfinished::Unfinished;
use crate::explain::{Explain, Hint, hint_of};
use crate::folder::Entry;
use crate::layout::{METADATA_PATH, REGISTRY_PATH, TensorFile};
use crate::model::Model;
use crate::on_disk::{Comparer, Fault, OnDisk, Run};
use crate::source::ReadError;
use crate::sys::read;
use crate::tree::Ino;
use crate::work::{Progress, in_parallel};

/// Bytes that are read at a time on each side.
const PIECE_BYTES: usize = 2 << 20;

/// Why a tree could not be compared.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr, strum::EnumProperty)]
#[strum(serialize_all = "snake_case", prefix = "verify.")]
pub enum VerifyError {
    #[error("{0:?} does not exist")]
    #[strum(props(hint = "name a directory that was mounted or materialized"))]
    Missing(PathBuf),
    #[error("{0:?} is not a directory")]
    #[strum(props(hint = "name one that was mounted or materialized"))]
    NotADirectory(PathBuf),
    #[error("cannot list {path:?}: {cause}")]
    List { path: PathBuf, cause: io::Error },
    /// A limit on this process, which says nothing about the tree.
    #[error("cannot open {path:?}: {cause}")]
    #[strum(props(hint = "allow more open files with `ulimit -n`, or use fewer --jobs"))]
    Descriptors { path: PathBuf, cause: io::Error },
    #[error("stopped before everything was compared")]
    Stopped,
    #[error("the mount on {0:?} does not answer, so nothing can be compared")]
    #[strum(props(hint = "`odmoe-fs status` shows which process serves it"))]
    NotAnswering(PathBuf),
    #[error("the process of the mount on {0:?} is dead, so nothing can be compared")]
    #[strum(props(hint = "mount it again"))]
    Stale(PathBuf),
    #[error(
        "the model of the mount on {0:?} has changed since it was mounted, so that it refuses reads"
    )]
    #[strum(props(hint = "mount it again, with --replace, and compare again"))]
    Changed(PathBuf),
    #[error("the mount on {0:?} ended during the comparison")]
    #[strum(props(hint = "mount it, and compare again"))]
    Ended(PathBuf),
    /// The model itself cannot be read, so nothing is known about the tree.
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
        match self {
            Self::List { cause, .. } if cause.raw_os_error() == Some(libc::EACCES) => {
                Some("run it as a user who may read that directory: a mount may be entered only by the user who made it".into())
            }
            Self::List { cause, .. } => cause.hint(),
            Self::Model(cause) => cause.hint(),
            _ => hint_of(self),
        }
    }
}

/// The depth of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Names, sizes, headers and documents.
    Quick,
    /// Every byte.
    Whole,
}

/// The result of a comparison.
#[derive(Debug)]
pub struct Report {
    /// Sorted by path and offset; empty if the tree is the model's.
    pub differences: Vec<Difference>,
    /// Files that were compared; none that could not be read.
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
    /// Files that are there and should be, without the two documents, sorted by inode number.
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
    /// Finds out which files the tree at `root` claims to hold, and whether exactly those are
    /// there.
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
        let is_document = |ino| {
            DOCUMENTS
                .iter()
                .any(|path| model.tree().find(path) == Some(ino))
        };
        for &ino in found.known.iter().filter(|ino| !is_document(**ino)) {
            if expected
                .binary_search_by_key(&ino, |file| file.ino)
                .is_err()
            {
                comparison.add(ino, None, None, DifferenceKind::Extra);
            }
        }
        expected.retain(|file| {
            let is_there = found.known.contains(&file.ino);
            if !is_there && file.is_required {
                comparison.add(file.ino, None, None, DifferenceKind::Missing);
            }
            is_there
        });
        comparison.expected = expected;
        Ok(comparison)
    }

    /// Bytes that [`run`](Self::run) will compare.
    pub fn bytes(&self) -> u64 {
        let bytes = self.expected.iter().map(|expected| match self.depth {
            Depth::Quick => expected.header_bytes,
            Depth::Whole => self.model.tree().size(expected.ino).unwrap_or(0),
        });
        bytes.sum()
    }

    /// Compares the files, `jobs` at a time. `progress` is called from the workers. Once `stop` is
    /// set, the comparison ends early.
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
        let unreadable = differences.iter().filter(|d| d.is_unreadable());
        let unreadable: HashSet<_> = unreadable.map(|d| d.path.as_path()).collect();
        let path = |file: &&Expected| self.model.tree().path(file.ino).unwrap_or_default();
        let compared = self.expected.iter();
        let compared = compared.filter(|file| !unreadable.contains(Path::new(&path(file))));
        let files = self.documents + compared.count();
        Ok(Report {
            differences,
            files,
            bytes: self.bytes.into_inner(),
            experts: self.experts,
            base_files: self.base_files,
        })
    }

    fn add(
        &self,
        ino: Ino,
        offset: Option<u64>,
        tensor: Option<TensorNames>,
        kind: DifferenceKind,
    ) {
        let path = self.model.tree().path(ino).unwrap_or_default().into();
        self.differences.lock().push(Difference {
            path,
            offset,
            tensor,
            kind,
        });
    }

    /// The difference of a file that cannot be opened or read.
    fn unreadable(&self, ino: Ino, cause: io::Error) -> Result<DifferenceKind, VerifyError> {
        match cause.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => {
                let path = self.model.tree().path(ino).unwrap_or_default();
                let path = self.root.join(path);
                Err(VerifyError::Descriptors { path, cause })
            }
            _ => Ok(DifferenceKind::Unreadable(cause.to_string())),
        }
    }

    fn compare(
        &self,
        expected: &Expected,
        buffer: &mut [u8],
        comparer: &Comparer,
    ) -> Result<(), VerifyError> {
        let ino = expected.ino;
        let kind = match self.tree.open(self.model.tree(), ino) {
            Ok(Entry::There((file, metadata))) => {
                return self.compare_file(expected, &file, metadata.len(), buffer, comparer);
            }
            Ok(Entry::Missing) => DifferenceKind::Missing,
            Ok(Entry::Other(_)) => NO_FILE,
            Err(cause) => self.unreadable(ino, cause)?,
        };
        self.add(ino, None, None, kind);
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
        read::forget(file);
        let size = self.model.tree().size(expected.ino).unwrap_or(0);
        let against = Against {
            ino: expected.ino,
            file,
            found,
            comparer,
        };
        let Some(layout) = expected.file else {
            let len = match self.depth {
                Depth::Quick => expected.header_bytes,
                Depth::Whole => size,
            };
            let region = Region {
                start: 0,
                len,
                found: 0..len,
                tensor: None,
                kind: DifferenceKind::Document,
            };
            self.compare_region(&against, region, buffer)?;
            self.compare_size(&against, size, &[]);
            return Ok(());
        };
        let header = Region {
            start: 0,
            len: layout.header_bytes,
            found: 0..layout.header_bytes,
            tensor: None,
            kind: DifferenceKind::Header,
        };
        let has_header = self.compare_region(&against, header, buffer)?;
        let own_header = match has_header {
            true => None,
            false => FoundHeader::read(file, found, layout.header_bytes),
        };
        let end = own_header.as_ref().map_or(size, |header| header.end);
        let regions = self.tensors(&against, layout, own_header);
        self.compare_size(&against, end, &regions);
        if self.depth == Depth::Whole {
            for region in regions {
                self.compare_region(&against, region, buffer)?;
            }
        }
        Ok(())
    }

    /// The places of a file's tensors: those that its own header gives, if it has one, otherwise
    /// those of the model's tree. Reports tensors that its own header lacks, adds or resizes.
    fn tensors(
        &self,
        against: &Against,
        file: &TensorFile,
        header: Option<FoundHeader>,
    ) -> Vec<Region> {
        let mut left = header.map(|header| header.tensors);
        let mut end = file.header_bytes;
        let mut regions = Vec::new();
        for view in self.model.layout().arrays(file) {
            let array = view.array();
            let start = end;
            end += array.bytes;
            let names = Some(TensorNames {
                name: array.name.to_string(),
                gguf_name: Some(view.tensor.gguf_name.to_owned()),
            });
            let found = match &mut left {
                None => Some(start..end),
                Some(left) => left.remove(&*array.name),
            };
            let Some(found) = found else {
                self.add(against.ino, None, names, DifferenceKind::TensorMissing);
                continue;
            };
            let bytes = found.end - found.start;
            if bytes != array.bytes {
                let kind = DifferenceKind::TensorSize {
                    expected: array.bytes,
                    found: bytes,
                };
                self.add(against.ino, Some(found.start), names, kind);
                continue;
            }
            regions.push(Region {
                start,
                len: bytes,
                found,
                tensor: names,
                kind: DifferenceKind::Payload,
            });
        }
        for (name, found) in left.into_iter().flatten() {
            let names = Some(TensorNames {
                name,
                gguf_name: None,
            });
            self.add(
                against.ino,
                Some(found.start),
                names,
                DifferenceKind::TensorExtra,
            );
        }
        regions
    }

    /// Reports a file that is not as long as the model, or its own header, requires.
    fn compare_size(&self, against: &Against, expected: u64, regions: &[Region]) {
        let Against { ino, found, .. } = *against;
        if found == expected {
            return;
        }
        let end = found.min(expected);
        let cut = regions.iter().find(|region| region.found.contains(&end));
        let tensor = cut.and_then(|region| region.tensor.clone());
        self.add(
            ino,
            Some(end),
            tensor,
            DifferenceKind::Size { expected, found },
        );
    }

    /// Compares a run of a file as far as the file goes. Returns whether it is the model's.
    fn compare_region(
        &self,
        against: &Against,
        region: Region,
        buffer: &mut [u8],
    ) -> Result<bool, VerifyError> {
        let run = Run {
            ino: against.ino,
            start: region.start,
            len: region
                .len
                .min(against.found.saturating_sub(region.found.start)),
            found_start: region.found.start,
        };
        let compared = against.comparer.first_difference(run, against.file, buffer);
        let (offset, kind) = match compared {
            Ok(None) => return Ok(true),
            Ok(Some(offset)) => (offset, region.kind),
            Err(Fault::File { offset, cause }) => {
                // The rest counts as done, but was not compared.
                let left = run.found_start + run.len - offset;
                self.bytes.fetch_sub(left, Ordering::Relaxed);
                (offset, DifferenceKind::Unreadable(cause.to_string()))
            }
            Err(Fault::Model(e)) => return Err(e.into()),
            Err(Fault::Stopped) => return Err(VerifyError::Stopped),
        };
        self.add(against.ino, Some(offset), region.tensor, kind);
        Ok(false)
    }
}

/// A link, folder or device in the place of a file.
const NO_FILE: DifferenceKind = DifferenceKind::Kind {
    expected: "regular file",
};

/// The documents that list a tree's files.
const DOCUMENTS: [&str; 2] = [REGISTRY_PATH, METADATA_PATH];

/// A file on disk that is being compared.
#[derive(Clone, Copy)]
struct Against<'a> {
    ino: Ino,
    file: &'a File,
    /// Its size.
    found: u64,
    comparer: &'a Comparer<'a>,
}

/// A run of bytes that is compared and reported as one.
struct Region {
    /// First byte in the model's tree.
    start: u64,
    len: u64,
    /// Its place in the file on disk.
    found: Range<u64>,
    tensor: Option<TensorNames>,
    kind: DifferenceKind,
}
