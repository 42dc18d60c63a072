//! A model, opened and laid out: the pipeline put together, and the bytes of its files.
//!
//! Serving, writing, comparing and describing a model all start here.

mod blocks;
mod documents;
mod inputs;
mod starts;
mod windows;

use std::collections::HashSet;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use self::blocks::{PartBlocks, blocks_run};
use self::documents::Kept;
use self::inputs::{inputs, rope_factors};
use self::starts::Starts;
use self::windows::Windows;
use crate::computed::{self, Job, Stash};
use crate::explain::{Explain, Hint};
use crate::form::Form;
use crate::gguf::{HeaderError, ModelHeader};
use crate::hf::Inputs;
use crate::layout::{Arranged, Layout, LayoutError, Stored};
use crate::predictor::reader_of_whole;
use crate::show::Show;
#[cfg(feature = "remote")]
use crate::source::remote;
use crate::source::{self, Held, Near, OpenError, PageCache, ReadError, Run, Source};
use crate::tree::{Content, Ino, Origin, RecipeId, Slice, Tree};

/// Why a model cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("{path:?}: {cause}")]
    Header { path: PathBuf, cause: HeaderError },
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("{path:?}: {cause}")]
    Layout { path: PathBuf, cause: LayoutError },
}

impl Explain for ModelError {
    fn code(&self) -> &'static str {
        match self {
            Self::Open(cause) => cause.code(),
            Self::Header { cause, .. } => cause.code(),
            Self::Read(cause) => cause.code(),
            Self::Layout { cause, .. } => cause.code(),
        }
    }

    fn hint(&self) -> Option<Hint> {
        match self {
            Self::Open(cause) => cause.hint(),
            Self::Header { cause, .. } => cause.hint(),
            Self::Read(cause) => cause.hint(),
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
    stash: Stash,
    windows: Windows,
    starts: Starts,
    /// For each file of a form with computed arrays, the bytes of the model that it is made from;
    /// `u64::MAX` until somebody asks.
    source_bytes: Vec<AtomicU64>,
}

impl Model {
    /// Opens a model by the path of its file or of any part of a split set.
    ///
    /// Reads the headers of all parts, decides what each file of the tree holds, and checks that
    /// every byte of every tensor is in one of them, once. No payload is read.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        Self::open_as(path, Form::Raw)
    }

    /// The same, with quantised tensors shown in a form.
    pub fn open_as(path: &Path, form: Form) -> Result<Self, ModelError> {
        Self::open_shown(path, form, Show::default())
    }

    /// The same, with the choice of what the tree shows.
    pub fn open_shown(path: &Path, form: Form, show: Show) -> Result<Self, ModelError> {
        Self::lay_out(source::open(path)?, form, show)
    }

    /// Opens a model by the address of its file or of any part of a split set; of other parts, too,
    /// if these are not to be found beside it.
    #[cfg(feature = "remote")]
    pub fn open_remote(
        given: &remote::Address,
        others: &[remote::Address],
        options: &remote::Options,
        form: Form,
        show: Show,
    ) -> Result<Self, ModelError> {
        let model = Self::lay_out(remote::open(given, others, options)?, form, show)?;
        model.source.set_units(model.units());
        Ok(model)
    }

    fn lay_out(
        (header, source): (ModelHeader, Source),
        form: Form,
        show: Show,
    ) -> Result<Self, ModelError> {
        let path = source.given_path();
        let inputs = match show.hf {
            true => inputs(&header, &source, path)?,
            false => Inputs::default(),
        };
        let laid_out = Layout::shown(header, form, show, &inputs);
        drop(inputs);
        let (layout, tree) = laid_out.map_err(|cause| ModelError::Layout {
            path: path.to_owned(),
            cause,
        })?;
        let kept = Kept::of(&tree);
        let nodes = match (form, show) {
            (Form::Raw, show) if show == Show::default() => 0,
            _ => tree.len() + 1,
        };
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
            stash: Stash::default(),
            windows: Windows::default(),
            starts: Starts::default(),
            source_bytes: (0..nodes).map(|_| AtomicU64::new(u64::MAX)).collect(),
        })
    }

    /// Why no model directory can be shown of the model in its form; `None` if one can.
    pub fn refuses_directory(&self) -> Result<Option<LayoutError>, ReadError> {
        let header = self.layout.model();
        let inputs = Inputs {
            rope_factors: rope_factors(header, &self.source)?,
            ..Inputs::default()
        };
        Ok(self.layout.refuses_directory(&inputs))
    }

    /// Which file of the tree each range of each part belongs to.
    #[cfg(feature = "remote")]
    fn units(&self) -> Vec<Vec<remote::Unit>> {
        let mut units = vec![Vec::new(); self.source.paths().len()];
        for file in self.tree.files() {
            for run in self.runs(file, 0..self.tree.size(file).unwrap_or(0)) {
                let (range, number) = (run.range(), file);
                units[run.part as usize].push(remote::Unit { range, number });
            }
        }
        for units in &mut units {
            units.sort_by_key(|unit: &remote::Unit| unit.range.start);
        }
        units
    }

    /// The bytes of the model that files of the tree are made from, each once, in the order of the
    /// files.
    #[cfg(feature = "remote")]
    pub fn wanted(&self, files: &[Ino]) -> Vec<Run> {
        let all = |file: &Ino| self.runs(*file, 0..self.tree.size(*file).unwrap_or(0));
        files.iter().flat_map(all).collect()
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
                Origin::Computed(id) => self.compute(id, slice.offset, piece)?,
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
        let mut slices = self.tree.slices(file, range.start, len);
        match slices.next() {
            Some(slice) if slice.len == len => {
                if let Some(run) = run_of(&slice)
                    && let Some(held) = self.source.held(run)
                {
                    return Ok(Bytes::Held(held));
                }
            }
            _ => {}
        }
        for slice in self.tree.slices(file, range.start, len) {
            self.hold_blocks(file, &slice);
        }
        let len = len as usize;
        if space.len() < len {
            space.resize(len, 0);
        }
        let read = self.read_at(file, range.start, &mut space[..len])?;
        Ok(Bytes::Read(&space[..read]))
    }

    /// Fetches a range of a file of the tree that a reader will ask for, about the first `near` bytes
    /// of the model that it comes from now. This replaces the reader's previous range; an empty one
    /// means that it wants nothing more.
    pub(crate) fn fetch_ahead(
        &self,
        reader: u64,
        file: Ino,
        range: Range<u64>,
        near: impl Into<Near>,
    ) {
        let runs = self.runs(file, range);
        self.source.fetch_ahead(reader, &runs, near);
    }

    /// Whether a range of a file comes from a disk of this machine.
    pub(crate) fn is_on_disk(&self, file: Ino, range: Range<u64>) -> bool {
        !self.source.is_remote() || self.source.is_on_disk(&self.runs(file, range), u64::MAX)
    }

    /// Says that a file will be read from a place on, in order, by one thread. A server is asked for
    /// much of it at once. A disk works on the next blocks while these are computed; what is only
    /// copied is read in large pieces, and no faster for it.
    pub(crate) fn will_read(&self, file: Ino, place: u64) {
        if self.source.is_remote() || self.layout.form() != Form::Raw {
            let size = self.tree.size(file).unwrap_or(0);
            let ahead = self.source.pace().map_or(0, |pace| pace.ahead);
            self.fetch_ahead(reader_of_whole(file), file, place..size, ahead);
        }
    }

    /// Bytes of the model from which a file is made, documents left out.
    pub(crate) fn source_bytes(&self, file: Ino) -> u64 {
        let extents = self.tree.extents(file);
        let size = self.tree.size(file).unwrap_or(0);
        let Some(known) = self.source_bytes.get(file as usize) else {
            // As they are.
            return size - extents.first().map_or(0, |header| header.len);
        };
        match known.load(Ordering::Relaxed) {
            u64::MAX => {
                let bytes = extents.iter().map(|extent| match extent.content {
                    Content::Made(_) => 0,
                    Content::Model { .. } => extent.len,
                    Content::Computed(id) => self.layout.source_bytes(id),
                });
                let bytes = bytes.sum();
                known.store(bytes, Ordering::Relaxed);
                bytes
            }
            bytes => bytes,
        }
    }

    /// Where the slice of a tensor lies in a file that holds the byte at `offset`; empty if there is no
    /// such byte.
    pub(crate) fn slice_around(&self, file: Ino, offset: u64) -> Range<u64> {
        let Some(extent) = self.tree.extent_at(file, offset) else {
            return 0..0;
        };
        let (start, end) = (extent.start, extent.start + extent.len);
        let Content::Model {
            part,
            offset: origin,
        } = extent.content
        else {
            return start..end;
        };
        let header = self.layout.model();
        let tensor = self.starts.around(header, part, origin + (offset - start));
        let in_file = |place: u64| start + place.saturating_sub(origin).min(extent.len);
        in_file(tensor.start)..in_file(tensor.end)
    }

    /// The runs of parts that make up a range of a file, in order. Documents are left out, and what
    /// was computed before. Each tensor's blocks come once, whatever is computed from them, and
    /// runs that follow each other in a part are joined.
    fn runs(&self, file: Ino, range: Range<u64>) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let mut tensors = Vec::new();
        let mut windows = HashSet::new();
        let len = range.end.saturating_sub(range.start);
        let mut add = |run: Run| match runs.last_mut() {
            Some(last) if last.is_followed_by(&run) => last.len += run.len,
            _ => runs.push(run),
        };
        for slice in self.tree.slices(file, range.start, len) {
            match slice.origin {
                Origin::Made(_) => {}
                Origin::Part(_) => run_of(&slice).into_iter().for_each(&mut add),
                Origin::Computed(id) => {
                    if let Some(arranged) = self.layout.arranged(id) {
                        let missing = self.missing_windows(&arranged, &slice).into_iter();
                        let new = missing.filter(|run| windows.insert((run.part, run.offset)));
                        new.for_each(&mut add);
                        continue;
                    }
                    let job = self.layout.job(id);
                    if job.array == 0 || !tensors.contains(&job.tensor) {
                        self.missing_runs(id, &job, &slice)
                            .into_iter()
                            .for_each(&mut add);
                    }
                    tensors.push(job.tensor);
                }
            }
        }
        runs
    }

    /// Scales and biases come from many times their bytes of blocks, which the other arrays of the
    /// tensor will be made of, too: has them fetched, so that they are held until then.
    fn hold_blocks(&self, file: Ino, slice: &Slice) {
        let Origin::Computed(id) = slice.origin else {
            return;
        };
        if let Some(arranged) = self.layout.arranged(id) {
            let runs = self.missing_windows(&arranged, slice);
            let bytes: u64 = runs.iter().map(|run| run.len).sum();
            if !runs.iter().all(|run| self.source.is_begun(*run)) {
                self.source.fetch_ahead(reader_of_whole(file), &runs, bytes);
            }
            return;
        }
        let job = self.layout.job(id);
        if job.array == 0 {
            return;
        }
        let mut runs = self.missing_runs(id, &job, slice);
        let bytes: u64 = runs.iter().map(|run| run.len).sum();
        if runs.iter().all(|run| self.source.is_begun(*run)) {
            return;
        }
        if let Some(last) = runs.last_mut() {
            // Whoever reads on needs the rest of the tensor. Knowing that makes full buffers of few
            // chunks, so that all blocks of an expert fit into them until its weights are read.
            let recipe = self.layout.recipe(id);
            last.len = recipe.offset + recipe.len - last.offset;
            // Those who read the arrays side by side are the readers of the whole file soon.
            self.source.fetch_ahead(reader_of_whole(file), &runs, bytes);
        }
    }

    /// The windows that are not here of those from which a range of an array is put together.
    fn missing_windows(&self, arranged: &Arranged, slice: &Slice) -> Vec<Run> {
        let needs = arranged.needs(slice.offset..slice.offset + slice.len);
        let needs = needs.into_iter();
        needs
            .flat_map(|(rows, range)| self.windows.missing(&rows, range))
            .collect()
    }

    /// The blocks from which a range of an array is computed, other than those of which the result
    /// is kept.
    fn missing_runs(&self, id: RecipeId, job: &Job, slice: &Slice) -> Vec<Run> {
        let wanted = slice.offset..slice.offset + slice.len;
        let missing = match job.array.checked_sub(1) {
            Some(n) => self.stash.missing(job.tensor, n, &wanted),
            None => vec![wanted],
        };
        let recipe = self.layout.recipe(id);
        let runs = missing.into_iter();
        runs.map(|gap| blocks_run(&recipe, job, gap)).collect()
    }

    /// Reads a whole file of the tree into memory.
    pub fn read(&self, file: Ino) -> Result<Vec<u8>, ReadError> {
        let mut bytes = vec![0; self.tree.size(file).unwrap_or(0) as usize];
        let read = self.read_at(file, 0, &mut bytes)?;
        debug_assert_eq!(read, bytes.len());
        Ok(bytes)
    }

    /// Computes a range of an array from the blocks beneath it.
    fn compute(&self, id: RecipeId, offset: u64, out: &mut [u8]) -> Result<(), ReadError> {
        if let Some(arranged) = self.layout.arranged(id) {
            return self.arrange(arranged, offset, out);
        }
        let job = self.layout.job(id);
        let blocks = PartBlocks {
            source: &self.source,
            recipe: self.layout.recipe(id),
        };
        // What was computed before a change is right, but nobody must see a mixture of both states.
        self.source.check_unchanged(blocks.recipe.part)?;
        computed::range(&job, &self.stash, &blocks, offset, out)
    }

    /// Puts together a range of an array whose order is not that of the model.
    fn arrange(&self, arranged: Arranged, offset: u64, out: &mut [u8]) -> Result<(), ReadError> {
        for (rows, _) in arranged.needs(offset..offset + out.len() as u64) {
            self.source.check_unchanged(rows.part)?;
        }
        let reader = |rows: Stored| self.windows.of(&self.source, rows);
        match arranged {
            Arranged::Apart { rows, apart } => {
                let mut reader = reader(rows);
                apart.range(offset, out, |at, bytes| {
                    reader.read(rows.offset + at, bytes)
                })
            }
            Arranged::Transposed {
                matrices,
                transposed,
            } => {
                let mut readers = matrices.map(reader);
                transposed.range(offset, out, |n, at, bytes| {
                    let n = n as usize;
                    readers[n].read(matrices[n].offset + at, bytes)
                })
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

impl Deref for Bytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Held(held) => held,
            Self::Read(bytes) => bytes,
        }
    }
}

/// The bytes of a part that a slice shows as they are.
fn run_of(slice: &Slice) -> Option<Run> {
    match slice.origin {
        Origin::Part(part) => Some(Run {
            part,
            offset: slice.offset,
            len: slice.len,
        }),
        Origin::Made(_) | Origin::Computed(_) => None,
    }
}
