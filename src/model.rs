//! A model, opened and laid out: the pipeline put together, and the bytes of its files.
//!
//! Serving, writing, comparing and describing a model all start here.

use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::explain::{Explain, Hint};
use crate::layout::{Doc, Layout, LayoutError};
use crate::source::{self, Held, OpenError, PageCache, ReadError, Run, Source};
use crate::tree::{Content, DocId, Ino, Origin, Tree};

/// Larger documents are kept after their first read. Smaller ones are the headers of experts:
/// rendering one again costs less than keeping 23,040 of them.
const KEPT_DOCUMENT_BYTES: u64 = 64 << 10;

/// Why a model cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("{path:?}: {cause}")]
    Layout { path: PathBuf, cause: LayoutError },
}

impl Explain for ModelError {
    fn code(&self) -> &'static str {
        match self {
            Self::Open(cause) => cause.code(),
            Self::Layout { cause, .. } => cause.code(),
        }
    }

    fn hint(&self) -> Option<Hint> {
        match self {
            Self::Open(cause) => cause.hint(),
            Self::Layout { cause, .. } => cause.hint(),
        }
    }
}

/// A model's layout, tree and parts.
#[derive(Debug)]
pub struct Model {
    layout: Layout,
    tree: Tree,
    source: Source,
    kept: Kept,
}

/// Large documents, rendered when they are first read.
#[derive(Debug)]
struct Kept(Vec<(DocId, OnceLock<Box<[u8]>>)>);

impl Model {
    /// Opens a model by the path of its file or of any part of a split set.
    ///
    /// Reads the headers of all parts, decides what each file of the tree holds, and checks that
    /// every byte of every tensor is in one of them, once. No payload is read.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let (header, source) = source::open(path)?;
        let (layout, tree) = Layout::new(header).map_err(|cause| ModelError::Layout {
            path: path.to_owned(),
            cause,
        })?;
        let kept = Kept::of(&tree);
        tracing::info!(
            "{path:?} opened: parts {}, tensors {}, files {}",
            source.paths().len(),
            layout.model().tensors.len(),
            tree.files().count()
        );
        Ok(Self {
            layout,
            tree,
            source,
            kept,
        })
    }

    /// What each file holds.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The directories and files.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// The parts on disk.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Chooses what reading does to the page cache of the parts.
    pub fn set_page_cache(&mut self, page_cache: PageCache) {
        self.source.set_page_cache(page_cache);
    }

    /// Reads a file of the tree from `offset`: fills the buffer as far as the file goes, and
    /// returns how many bytes that is, or an error. Only the end of the file makes a read short.
    pub fn read_at(&self, file: Ino, offset: u64, buffer: &mut [u8]) -> Result<usize, ReadError> {
        let mut filled = 0;
        for slice in self.tree.slices(file, offset, buffer.len() as u64) {
            let end = filled + slice.len as usize;
            let piece = &mut buffer[filled..end];
            match slice.origin {
                Origin::Part(part) => self.source.read_at(part, slice.offset, piece)?,
                Origin::Made(doc) => self.read_document(doc, slice.offset, piece),
            }
            filled = end;
        }
        Ok(filled)
    }

    /// The bytes of a range of a file of the tree, which must end within it. They are borrowed if
    /// they were fetched in one piece; otherwise they are read into `space`.
    pub(crate) fn bytes<'a>(
        &self,
        file: Ino,
        range: Range<u64>,
        space: &'a mut Vec<u8>,
    ) -> Result<Bytes<'a>, ReadError> {
        let len = range.end - range.start;
        let run = runs(&self.tree, file, range.clone()).next();
        if let Some(run) = run.filter(|run| run.len == len)
            && let Some(held) = self.source.held(run)
        {
            return Ok(Bytes::Held(held));
        }
        let len = len as usize;
        if space.len() < len {
            space.resize(len, 0);
        }
        let read = self.read_at(file, range.start, &mut space[..len])?;
        Ok(Bytes::Read(&space[..read]))
    }

    /// Fetches a range of a file of the tree that a reader will ask for, about the first `near`
    /// bytes of it now. This replaces the reader's previous range; an empty one means that it wants
    /// nothing more.
    pub(crate) fn fetch_ahead(&self, reader: u64, file: Ino, range: Range<u64>, near: u64) {
        let runs: Vec<Run> = runs(&self.tree, file, range).collect();
        self.source.fetch_ahead(reader, &runs, near);
    }

    /// Reads a whole file of the tree into memory.
    pub fn read(&self, file: Ino) -> Result<Vec<u8>, ReadError> {
        let mut bytes = vec![0; self.tree.size(file).unwrap_or(0) as usize];
        let read = self.read_at(file, 0, &mut bytes)?;
        debug_assert_eq!(read, bytes.len());
        Ok(bytes)
    }

    fn read_document(&self, doc: DocId, offset: u64, buffer: &mut [u8]) {
        let render = |out: &mut dyn Write| {
            let mut out = out;
            self.layout
                .render(Doc::of_id(doc), &mut out)
                .expect("writing to memory cannot fail");
        };
        match self.kept.get(doc) {
            Some(kept) => {
                let whole = kept.get_or_init(|| {
                    let mut bytes = Vec::new();
                    render(&mut bytes);
                    bytes.into()
                });
                let start = offset as usize;
                buffer.copy_from_slice(&whole[start..start + buffer.len()]);
            }
            None => {
                let mut window = Window {
                    skip: offset as usize,
                    rest: buffer,
                };
                render(&mut window);
                assert!(window.rest.is_empty(), "a document is as long as its size");
            }
        }
    }
}

/// Bytes of a file.
pub(crate) enum Bytes<'a> {
    /// Borrowed from the memory they were fetched into.
    Held(Held),
    /// In the caller's memory.
    Read(&'a [u8]),
}

impl std::ops::Deref for Bytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Held(held) => held,
            Self::Read(bytes) => bytes,
        }
    }
}

/// The runs of parts that make up a range of a file, in order. Documents are left out, and runs
/// that follow each other in a part are joined.
fn runs(tree: &Tree, file: Ino, range: Range<u64>) -> impl Iterator<Item = Run> + '_ {
    let slices = tree.slices(file, range.start, range.end - range.start);
    let runs = slices.filter_map(|slice| match slice.origin {
        Origin::Part(part) => Some(Run {
            part,
            offset: slice.offset,
            len: slice.len,
        }),
        Origin::Made(_) => None,
    });
    let mut runs = runs.peekable();
    std::iter::from_fn(move || {
        let mut run = runs.next()?;
        while let Some(next) = runs.next_if(|next| run.is_followed_by(next)) {
            run.len += next.len;
        }
        Some(run)
    })
}

impl Kept {
    fn of(tree: &Tree) -> Self {
        let mut large: Vec<_> = tree
            .files()
            .flat_map(|file| tree.extents(file))
            .filter(|extent| extent.len > KEPT_DOCUMENT_BYTES)
            .filter_map(|extent| match extent.content {
                Content::Made(doc) => Some((doc, OnceLock::new())),
                Content::Model { .. } => None,
            })
            .collect();
        large.sort_by_key(|(doc, _)| *doc);
        Self(large)
    }

    fn get(&self, doc: DocId) -> Option<&OnceLock<Box<[u8]>>> {
        let at = self.0.binary_search_by_key(&doc, |(doc, _)| *doc).ok()?;
        Some(&self.0[at].1)
    }
}

/// Keeps the bytes of a document that fall into a buffer, and drops the others.
struct Window<'a> {
    /// Bytes to drop first.
    skip: usize,
    rest: &'a mut [u8],
}

impl Write for Window<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        let wanted = &bytes[skipped..];
        let count = wanted.len().min(self.rest.len());
        let (here, rest) = std::mem::take(&mut self.rest).split_at_mut(count);
        here.copy_from_slice(&wanted[..count]);
        self.rest = rest;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
