//! A model directory in the tree: what the bytes of its files are.
//!
//! [`hf`](crate::hf) says which rows of the model each tensor is made of. Here each of its arrays
//! becomes a list of extents: ranges of the model where rows lie as they are wanted, and recipes
//! where they are computed or put into another order.

mod documents;

use std::io;

use super::arranged::{Arranged, arranged};
use super::counting::CountingWriter;
use super::{Doc, Layout, LayoutError, MAX_PAYLOAD_BYTES, PAGE_BYTES, Recipe};
use crate::codec::{Codec, Float, Output};
use crate::computed::{Job, Small};
use crate::form::{Form, Shown};
use crate::gguf::{ModelHeader, Tensor};
use crate::hf::{self, Document, HfError, HfTensor, Inputs, Naming, Piece, Rows};
use crate::safetensors::{Array, Dtype, LENGTH_WORD_BYTES, MAX_HEADER_BYTES, Shape};
use crate::tree::{Content, NewFile, RecipeId};

/// The folder of the model directory.
pub const HF_DIRECTORY: &str = "hf";
const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";
/// Arrays of a piece at most.
const MAX_ARRAYS: u32 = 4;
/// Recipes from this number on are of the directory.
const FIRST_RECIPE: u32 = 1 << 31;
/// Numbers of tensors in jobs from this one on are of the directory.
const FIRST_JOB: u32 = 1 << 30;
/// What takes the place of the scales of blocks that are shown as they are: mlx-kquant wants an
/// array of this name.
const PLACEHOLDER_BYTES: u64 = 1;

/// The dtype of numbers where blocks as they are were asked for but cannot be had: of a matrix that
/// must be transposed.
const INSTEAD_OF_BLOCKS: Float = Float::F16;

#[derive(Debug)]
pub(super) struct Directory {
    plan: hf::Directory,
    form: Form,
    /// Bytes in front of the payload of each file of the plan.
    header_bytes: Vec<u64>,
    /// Pieces that are not merely ranges of the model.
    segments: Vec<Segment>,
    /// Files that are neither weights nor the index.
    documents: Vec<Document>,
    total_bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct Segment {
    piece: Piece,
    shown: Shown,
}

/// A tensor of the directory in its form.
struct View {
    tensor: HfTensor,
    shape: Shape,
    /// The first of the tensors that it is made of.
    source: u32,
    shown: Shown,
    /// Whether an array of one byte follows, in the place of scales.
    has_placeholder: bool,
}

impl View {
    fn arrays(&self) -> usize {
        self.shown.arrays() + usize::from(self.has_placeholder)
    }

    fn array<'a>(&'a self, n: usize, model: &ModelHeader) -> Array<'a> {
        let name = &self.tensor.name;
        if n == self.shown.arrays() {
            let stem = name.strip_suffix(".weight").unwrap_or(name);
            return Array {
                name: format!("{stem}.scales").into(),
                dtype: Dtype::U8,
                shape: Shape::of_dims(&[PLACEHOLDER_BYTES]),
                bytes: PLACEHOLDER_BYTES,
            };
        }
        let ggml_type = model.tensors[self.source as usize].info.ggml_type;
        self.shown.array(n, ggml_type, name, &self.shape)
    }
}

impl Directory {
    pub(super) fn new(
        model: &ModelHeader,
        form: Form,
        inputs: &Inputs,
    ) -> Result<Self, LayoutError> {
        let naming = match form {
            Form::Numbers(_) => Naming::Checkpoint,
            Form::Raw | Form::Mlx { .. } => Naming::Mlx,
        };
        let mut directory = Self {
            plan: hf::Directory::new(model, naming, inputs)?,
            form,
            header_bytes: Vec::new(),
            segments: Vec::new(),
            documents: Vec::new(),
            total_bytes: 0,
        };
        let mut total = 0u128;
        for file in 0..directory.plan.files().len() {
            let mut json = CountingWriter::new(io::sink());
            let mut bytes = 0u128;
            let views = directory.views(file, model)?;
            for (view, n) in &order(&views, model) {
                bytes += u128::from(views[*view].array(*n, model).bytes);
            }
            directory
                .write_json(model, &views, &mut json)
                .expect("counting bytes cannot fail");
            let header = (LENGTH_WORD_BYTES + json.bytes).next_multiple_of(PAGE_BYTES);
            total += bytes + u128::from(header);
            let path = || format!("{HF_DIRECTORY}/{}", directory.plan.files()[file].name);
            if header - LENGTH_WORD_BYTES > MAX_HEADER_BYTES {
                return Err(LayoutError::HeaderTooLarge {
                    path: path(),
                    bytes: header,
                });
            }
            if total > u128::from(MAX_PAYLOAD_BYTES) {
                return Err(LayoutError::TooLarge { form, path: path() });
            }
            directory.total_bytes += bytes as u64;
            directory.header_bytes.push(header);
        }
        directory.documents = directory.make_documents(model)?;
        Ok(directory)
    }

    pub(super) fn plan(&self) -> &hf::Directory {
        &self.plan
    }

    /// The tensors of a file in their form.
    fn views(&self, file: usize, model: &ModelHeader) -> Result<Vec<View>, HfError> {
        let tensors = self.plan.tensors(&self.plan.files()[file]);
        tensors.map(|tensor| self.view(tensor, model)).collect()
    }

    fn view(&self, tensor: HfTensor, model: &ModelHeader) -> Result<View, HfError> {
        let rows: Vec<Rows> = tensor.pieces.iter().flat_map(Piece::rows).collect();
        let rows = || rows.iter();
        let source = rows().next().map_or(0, |rows| rows.tensor);
        let info = &model.tensors[source as usize].info;
        let ggml_type = info.ggml_type;
        let is_quantised = Dtype::of(ggml_type) == Dtype::U8;
        let mut types = rows().map(|rows| model.tensors[rows.tensor as usize].info.ggml_type.id);
        let is_mixed = types.any(|id| id != ggml_type.id);
        let is_moved = tensor.pieces.iter().any(|p| !matches!(p, Piece::Rows(_)));
        let reversed: Vec<u64> = tensor.shape.iter().rev().copied().collect();
        let shape = Shape::of_dims(&reversed);
        let plain = match (self.form, ggml_type.name) {
            _ if tensor.precise => Float::F32,
            (Form::Numbers(float) | Form::Mlx { scales: float, .. }, _) => float,
            (Form::Raw, "F32") => Float::F32,
            (Form::Raw, "BF16") => Float::Bf16,
            (Form::Raw, _) => INSTEAD_OF_BLOCKS,
        };
        // Of more than one type, or in another order than blocks can be, only numbers are left.
        let only_numbers = is_mixed || is_moved || tensor.precise;
        let shown = match self.form {
            Form::Raw if !only_numbers => Shown::Stored,
            Form::Mlx { .. } if is_quantised && tensor.is_layer && !only_numbers => {
                Shown::of(self.form, ggml_type, &tensor.name, &shape)
                    .unwrap_or(Shown::Numbers(plain))
            }
            _ if Dtype::of(ggml_type) == Dtype::from(plain) && !is_mixed => Shown::Stored,
            _ => Shown::Numbers(plain),
        };
        let numbers = Output::Numbers(plain);
        for rows in rows() {
            let info = &model.tensors[rows.tensor as usize].info;
            let is_known = Codec::of(info.ggml_type, numbers).is_some();
            let are_whole = info.ggml_type.row_bytes(rows.columns).is_some();
            if (shown.is_computed() && !is_known) || !are_whole {
                return Err(HfError::Tensor {
                    name: info.name.clone(),
                    dims: info.dims().to_vec(),
                    ggml_type: info.ggml_type,
                    problem: "its numbers are not known".to_owned(),
                });
            }
        }
        Ok(View {
            has_placeholder: self.form == Form::Raw
                && is_quantised
                && shown == Shown::Stored
                && tensor.is_layer,
            tensor,
            shape,
            source,
            shown,
        })
    }

    /// The files of the directory. Numbers the pieces that are computed.
    pub(super) fn new_files(&mut self, layout: &Layout) -> Vec<NewFile> {
        let model = &layout.model;
        let mut files = Vec::new();
        for file in 0..self.plan.files().len() {
            let views = self.views(file, model).expect("they were made before");
            let firsts: Vec<u32> = views.iter().map(|view| self.add_segments(view)).collect();
            let header = Content::Made(Doc::DirectoryHeader(file as u32).id());
            let mut runs = vec![(self.header_bytes[file], header)];
            for (view, n) in order(&views, model) {
                self.add_runs(&views[view], firsts[view], n, model, &mut runs);
            }
            files.push(NewFile {
                name: self.plan.files()[file].name.clone(),
                runs,
            });
        }
        self.segments.shrink_to_fit();
        let mut counted = CountingWriter::new(io::sink());
        self.write_index(model, &mut counted)
            .expect("counting bytes cannot fail");
        let documents = self
            .documents
            .iter()
            .map(|(name, bytes)| (*name, bytes.len() as u64));
        let documents = documents.chain([(INDEX, counted.bytes)]);
        files.extend((0..).zip(documents).map(|(n, (name, bytes))| NewFile {
            name: name.to_owned(),
            runs: vec![(bytes, Content::Made(Doc::DirectoryDocument(n).id()))],
        }));
        files
    }

    /// Numbers the pieces of a tensor that are not ranges of the model; returns the first number.
    fn add_segments(&mut self, view: &View) -> u32 {
        let first = self.segments.len() as u32;
        let computed = view
            .tensor
            .pieces
            .iter()
            .filter(|p| is_recipe(p, view.shown));
        let shown = view.shown;
        self.segments
            .extend(computed.map(|&piece| Segment { piece, shown }));
        first
    }

    fn add_runs(
        &self,
        view: &View,
        first: u32,
        n: usize,
        model: &ModelHeader,
        runs: &mut Vec<(u64, Content)>,
    ) {
        if n == view.shown.arrays() {
            let content = Content::Made(Doc::Placeholder.id());
            runs.push((PLACEHOLDER_BYTES, content));
            return;
        }
        let mut segment = first;
        for piece in &view.tensor.pieces {
            if is_recipe(piece, view.shown) {
                let id = RecipeId(FIRST_RECIPE + segment * MAX_ARRAYS + n as u32);
                runs.push((self.array_bytes(segment, n, model), Content::Computed(id)));
                segment += 1;
            } else if let Piece::Rows(rows) = piece {
                let (part, offset, len) = range(rows, model);
                runs.push((len, Content::Model { part, offset }));
            }
        }
    }

    /// Bytes of an array of a segment.
    fn array_bytes(&self, segment: u32, n: usize, model: &ModelHeader) -> u64 {
        let Segment { piece, shown } = self.segments[segment as usize];
        match arranged(&piece, shown, n, model) {
            Some(Arranged::Apart { apart, .. }) => apart.bytes(),
            Some(Arranged::Transposed { transposed, .. }) => transposed.size(),
            None => {
                let (tensor, rows) = of_rows(&piece, model);
                let codec = shown
                    .codec(n, tensor.info.ggml_type)
                    .expect("it is computed");
                let unit = codec.unit();
                range(&rows, model).2 / unit.blocks as u64 * unit.out as u64
            }
        }
    }

    fn segment(&self, id: RecipeId) -> Option<(u32, usize)> {
        let number = id.0.checked_sub(FIRST_RECIPE)?;
        Some((number / MAX_ARRAYS, (number % MAX_ARRAYS) as usize))
    }

    /// How an array is made that is not in the order of the model.
    pub(super) fn arranged(&self, id: RecipeId, model: &ModelHeader) -> Option<Arranged> {
        let (segment, n) = self.segment(id)?;
        let Segment { piece, shown } = self.segments[segment as usize];
        arranged(&piece, shown, n, model)
    }

    /// How an array is made that is.
    pub(super) fn recipe(&self, id: RecipeId, model: &ModelHeader) -> Option<Recipe> {
        let (segment, n) = self.segment(id)?;
        let Segment { piece, shown } = self.segments[segment as usize];
        let (tensor, rows) = of_rows(&piece, model);
        let (part, offset, len) = range(&rows, model);
        Some(Recipe {
            part,
            offset,
            len,
            codec: shown.codec(n, tensor.info.ggml_type)?,
        })
    }

    pub(super) fn job(&self, id: RecipeId, model: &ModelHeader) -> Option<Job> {
        let (segment, array) = self.segment(id)?;
        let Segment { piece, shown } = self.segments[segment as usize];
        let (tensor, rows) = of_rows(&piece, model);
        let codec = |n| (n < shown.arrays()).then(|| shown.codec(n, tensor.info.ggml_type))?;
        let len = range(&rows, model).2;
        let bytes = |codec: Codec| {
            let unit = codec.unit();
            len / unit.blocks as u64 * unit.out as u64
        };
        let small = |n| {
            let codec = codec(n)?;
            let bytes = bytes(codec);
            Some(Small { codec, bytes })
        };
        Some(Job {
            tensor: FIRST_JOB + segment,
            array,
            codec: codec(array)?,
            largest: codec(0).map_or(0, bytes),
            small: [small(1), small(2)],
        })
    }

    /// Bytes of the model that are read for an array and for no array before it.
    pub(super) fn source_bytes(&self, id: RecipeId, model: &ModelHeader) -> Option<u64> {
        let (segment, n) = self.segment(id)?;
        let rows = self.segments[segment as usize].piece.rows();
        let bytes = rows.map(|rows| {
            let (_, row, _) = row_of(&rows, model);
            row * rows.count
        });
        Some(if n == 0 { bytes.sum() } else { 0 })
    }
}

/// The arrays of a file in the order of their bytes: that of the tensors, unless it would leave an
/// array unaligned to its own dtype. Then the widest come first.
fn order(views: &[View], model: &ModelHeader) -> Vec<(usize, usize)> {
    let all = (0..)
        .zip(views)
        .flat_map(|(place, view)| (0..view.arrays()).map(move |n| (place, n)));
    let mut all: Vec<(usize, usize)> = all.collect();
    let mut offset = 0u64;
    let aligned = all.iter().all(|&(view, n)| {
        let array = views[view].array(n, model);
        let start = offset;
        offset = offset.saturating_add(array.bytes);
        start.is_multiple_of(array.dtype.width())
    });
    if !aligned {
        all.sort_by_key(|&(view, n)| std::cmp::Reverse(views[view].array(n, model).dtype.width()));
    }
    all
}

pub(super) fn is_side_by_side(rows: &Rows) -> bool {
    rows.step == 1 || rows.count == 1
}

/// Whether a piece is more than a range of the model.
fn is_recipe(piece: &Piece, shown: Shown) -> bool {
    !matches!(piece, Piece::Rows(rows) if is_side_by_side(rows)) || shown.is_computed()
}

/// The tensor of rows, the bytes of one of them, and the first byte of the first.
pub(super) fn row_of<'a>(rows: &Rows, model: &'a ModelHeader) -> (&'a Tensor, u64, u64) {
    let tensor = &model.tensors[rows.tensor as usize];
    let row = tensor.info.ggml_type.row_bytes(rows.columns);
    let row = row.expect("rows of whole blocks were checked before");
    (tensor, row, tensor.info.offset + rows.first * row)
}

/// Part, first byte and length of rows that lie side by side.
fn range(rows: &Rows, model: &ModelHeader) -> (u32, u64, u64) {
    let (tensor, row, offset) = row_of(rows, model);
    (tensor.part, offset, rows.count * row)
}

pub(super) fn of_rows<'a>(piece: &Piece, model: &'a ModelHeader) -> (&'a Tensor, Rows) {
    let rows = piece.rows().next().expect("a piece has rows");
    (&model.tensors[rows.tensor as usize], rows)
}
