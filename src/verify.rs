//! Comparing a tree on disk, mounted or materialized, with the model that it shall show.
//!
//! The problem: hundreds of gigabytes, of which any byte may have been lost or changed, and a tree
//! that may hold only a part of the model.
//!
//! The plan: the two documents say which files the tree claims to hold, so they are read first.
//! Listing its folders finds what is missing and what is extra. Then each file is compared with the
//! model, several at a time: size, header, and every tensor, each of which is named once, at the
//! first of its bytes that differs.

use std::collections::HashSet;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use serde_json::Value;

use crate::layout::{
    File as LayoutFile, FileKind, METADATA_GGUF_PATH, METADATA_PATH, REGISTRY_PATH,
};
use crate::model::Model;
use crate::source::ReadError;
use crate::sys::read;
use crate::tree::{Ino, ROOT};
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

/// One thing that is not as the model has it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    /// Below the root of the tree.
    pub path: PathBuf,
    /// The byte of the file that it starts at.
    pub offset: Option<u64>,
    /// The tensor it lies in.
    pub tensor: Option<TensorNames>,
    pub what: What,
}

/// A tensor by both of its names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct TensorNames {
    /// In the safetensors file.
    pub name: String,
    /// In the model.
    pub gguf_name: String,
}

/// What is different.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// The tree claims to hold the file, or must, and does not.
    Missing,
    /// The model has no such file, or the tree does not claim to hold it.
    Extra,
    /// A link, device or folder where a file should be, or no folder where one should be.
    Kind {
        expected: &'static str,
    },
    Size {
        expected: u64,
        found: u64,
    },
    Header,
    Payload,
    Document,
    /// The tree cannot be read there; the reason.
    Unreadable(String),
}

impl What {
    /// One stable word for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Extra => "extra",
            Self::Kind { .. } => "kind",
            Self::Size { .. } => "size",
            Self::Header => "header",
            Self::Payload => "payload",
            Self::Document => "document",
            Self::Unreadable(_) => "unreadable",
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.what {
            What::Missing => write!(f, "is missing")?,
            What::Extra => write!(f, "does not belong there")?,
            What::Kind { expected } => write!(f, "is not a {expected}")?,
            What::Size { expected, found } => {
                write!(f, "has {found} bytes instead of {expected}")?;
            }
            What::Header => write!(f, "has another header")?,
            What::Payload => write!(f, "holds other bytes")?,
            What::Document => write!(f, "says something else")?,
            What::Unreadable(reason) => write!(f, "cannot be read ({reason})")?,
        }
        if let Some(offset) = self.offset {
            write!(f, ", from byte {offset}")?;
        }
        if let Some(TensorNames { name, gguf_name }) = &self.tensor {
            write!(f, ", in tensor {name:?}")?;
            if name != gguf_name {
                write!(f, " ({gguf_name:?} of the model)")?;
            }
        }
        Ok(())
    }
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

    /// Reads what the documents claim, and compares them with what they would have to say. Where one
    /// cannot be understood, what is there counts as claimed.
    fn claims(&mut self, found: &HashSet<Ino>) -> Result<Claims, VerifyError> {
        let registry = self.document(self.ino(REGISTRY_PATH), found)?;
        let metadata = self.document(self.ino(METADATA_PATH), found)?;
        let listed = Listed::of(registry.as_deref(), metadata.as_deref());
        let (layout, tree) = (self.model.layout(), self.model.tree());
        let is_there = |path: &str| tree.find(path).is_some_and(|ino| found.contains(&ino));
        let is_claimed = |file: &LayoutFile| {
            let names = match file.kind {
                FileKind::Expert { .. } => &listed.experts,
                FileKind::Base(_) => &listed.base,
            };
            match names {
                Some(names) => names.contains(&file.kind.stem()),
                None => is_there(&file.kind.path()),
            }
        };
        let mut rendered = [Vec::new(), Vec::new()];
        layout
            .render_registry(&is_claimed, &mut rendered[0])
            .and_then(|()| layout.render_metadata(&is_claimed, &mut rendered[1]))
            .expect("writing to memory cannot fail");
        for ((path, found), expected) in DOCUMENTS
            .into_iter()
            .zip([registry, metadata])
            .zip(rendered)
        {
            let Some(found) = found else {
                continue; // said already
            };
            self.documents += 1;
            self.bytes.fetch_add(found.len() as u64, Ordering::Relaxed);
            if found != expected {
                let same = found.iter().zip(&expected).take_while(|(a, b)| a == b);
                self.add(
                    self.ino(path),
                    Some(same.count() as u64),
                    None,
                    What::Document,
                );
            }
        }
        Ok(Claims(layout.files().iter().map(is_claimed).collect()))
    }

    fn ino(&self, path: &str) -> Ino {
        self.model
            .tree()
            .find(path)
            .expect("every tree has its documents")
    }

    /// The bytes of a document of the tree, if it can be one of this model.
    fn document(&self, ino: Ino, found: &HashSet<Ino>) -> Result<Option<Vec<u8>>, VerifyError> {
        if !found.contains(&ino) {
            self.add(ino, None, None, What::Missing);
            return Ok(None);
        }
        let Some((file, size)) = self.open(ino)? else {
            return Ok(None);
        };
        // A part of the model has shorter lists, never longer ones.
        let longest = self.model.tree().size(ino).unwrap_or(0);
        if size > longest {
            let what = What::Size {
                expected: longest,
                found: size,
            };
            self.add(ino, None, None, what);
            return Ok(None);
        }
        let mut bytes = vec![0; size as usize];
        match file.read_exact_at(&mut bytes, 0) {
            Ok(()) => Ok(Some(bytes)),
            Err(e) => {
                self.add(ino, None, None, What::Unreadable(e.to_string()));
                Ok(None)
            }
        }
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

/// What a tree's folders hold.
struct Listing {
    /// Files whose names are known, by inode number in the model's tree.
    known: HashSet<Ino>,
    /// Everything else.
    strangers: Vec<Difference>,
}

impl Listing {
    fn of(model: &Model, root: &Path) -> Result<Self, VerifyError> {
        let tree = model.tree();
        let mut listing = Self {
            known: HashSet::new(),
            strangers: Vec::new(),
        };
        match fs::metadata(root) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(VerifyError::Missing(root.to_owned()));
            }
            Ok(metadata) if !metadata.is_dir() => {
                return Err(VerifyError::NotADirectory(root.to_owned()));
            }
            _ => {} // listing it says what is wrong
        }
        for entry in entries(root)? {
            let path = entry.path();
            let name = entry.file_name();
            let Some(directory) = tree.lookup(ROOT, name.as_bytes()) else {
                if !is_part(model, &path) {
                    listing.stranger(name.into(), What::Extra);
                }
                continue;
            };
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                listing.stranger(
                    name.into(),
                    What::Kind {
                        expected: "directory",
                    },
                );
                continue;
            }
            for entry in entries(&path)? {
                let file = entry.file_name();
                match tree.lookup(directory, file.as_bytes()) {
                    Some(ino) => {
                        listing.known.insert(ino);
                    }
                    None => listing.stranger(Path::new(&name).join(file), What::Extra),
                }
            }
        }
        Ok(listing)
    }

    fn stranger(&mut self, path: PathBuf, what: What) {
        self.strangers.push(Difference {
            path,
            offset: None,
            tensor: None,
            what,
        });
    }
}

fn entries(folder: &Path) -> Result<Vec<fs::DirEntry>, VerifyError> {
    fs::read_dir(folder)
        .and_then(|entries| entries.collect())
        .map_err(|cause| VerifyError::List {
            path: folder.to_owned(),
            cause,
        })
}

/// Whether a path is that of a part of the model, which may lie beside the tree.
fn is_part(model: &Model, path: &Path) -> bool {
    let identity = |path: &Path| {
        let metadata = fs::metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    identity(path).is_some_and(|found| {
        model
            .source()
            .paths()
            .any(|part| identity(part) == Some(found))
    })
}

/// Which safetensors files a tree claims to hold, by index in `Layout::files`.
struct Claims(Vec<bool>);

impl Claims {
    fn counts(&self, model: &Model) -> (usize, usize) {
        let base = model.layout().files().len() - model.layout().experts().len();
        let count = |claimed: &[bool]| claimed.iter().filter(|claimed| **claimed).count();
        (count(&self.0[base..]), count(&self.0[..base]))
    }

    /// The files to be compared, but for the two documents, sorted by inode number.
    fn files<'a>(&self, model: &'a Model) -> Vec<Expected<'a>> {
        let tree = model.tree();
        let find = |path: &str| tree.find(path).expect("the layout's files are in the tree");
        let files = model.layout().files();
        let claimed = files.iter().zip(&self.0).filter(|(_, claimed)| **claimed);
        let mut expected: Vec<_> = claimed
            .map(|(file, _)| Expected {
                ino: find(&file.kind.path()),
                file: Some(file),
                is_required: true,
            })
            .collect();
        let has_base = files
            .first()
            .is_some_and(|f| matches!(f.kind, FileKind::Base(_)));
        expected.push(Expected {
            ino: find(METADATA_GGUF_PATH),
            file: None,
            // It goes with the base files.
            is_required: !has_base || self.counts(model).1 > 0,
        });
        expected.sort_by_key(|file| file.ino);
        expected
    }
}

/// A file of the tree that is to be compared.
struct Expected<'a> {
    ino: Ino,
    /// `None` for `metadata.gguf`.
    file: Option<&'a LayoutFile>,
    is_required: bool,
}

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

/// The names, without `.safetensors`, that documents list; `None` where one cannot be understood.
struct Listed {
    experts: Option<HashSet<String>>,
    base: Option<HashSet<String>>,
}

impl Listed {
    fn of(registry: Option<&[u8]>, metadata: Option<&[u8]>) -> Self {
        let parse = |bytes: Option<&[u8]>| serde_json::from_slice::<Value>(bytes?).ok();
        let experts = match parse(registry) {
            Some(Value::Object(map)) => Some(map.into_iter().map(|(name, _)| name).collect()),
            _ => None,
        };
        let base = parse(metadata).and_then(|metadata| {
            let files = metadata.get("weight_map")?.as_object()?.values();
            let stem =
                |file: &Value| Some(Path::new(file.as_str()?).file_stem()?.to_str()?.to_owned());
            files.map(stem).collect()
        });
        Self { experts, base }
    }
}
