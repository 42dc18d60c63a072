//! The file and name of every tensor, and the content of each file.
//!
//! The problem: a GGUF stores one huge tensor for all experts of a layer. Loaders want one small
//! file per expert, and every other tensor in one of four base files. No byte may be lost.
//!
//! The plan: a [`View`] is a run of a tensor under a name of its own, repeated for every expert if
//! the tensor is a stack. A file is a list of [`Piece`]s, each one repetition of a view.
//! [`Layout::new`] sorts tensors into files (`names`, `experts`), chooses each header's padding,
//! and proves on the finished [`Tree`] that every tensor byte is in exactly one file, exactly once.

mod counting;
mod documents;
mod experts;
mod names;
mod partition;

use std::io::{self, Write};
use std::ops::Range;

pub use documents::{Doc, METADATA_GGUF_PATH, METADATA_PATH, Present, REGISTRY_PATH};
pub use names::{Component, ExpertName, Holds, Matrix};
pub use partition::PartitionError;

use self::counting::CountingWriter;
use crate::explain::{Explain, Hint};
use crate::gguf::{LLAMA_CPP_GPT_OSS, ModelHeader, Tensor};
use crate::safetensors::{
    self, Dtype, LENGTH_WORD_BYTES, METADATA_KEY, Shape, TensorView, write_header_json,
};
use crate::tree::{Content, NewFile, Tree};

/// The version of the mapping from models to trees, `odmoe.layout`: with the same version, the same
/// parts give the same bytes.
pub const LAYOUT_VERSION: &str = "2";
/// The folder of the always-resident tensors.
pub const BASE_DIRECTORY: &str = "base_model";
/// The folder of the routed experts.
pub const EXPERTS_DIRECTORY: &str = "experts";

/// The page size that payloads are aligned to: the block size of file systems that share blocks.
const PAGE_BYTES: u64 = 4096;
/// The most tensors in all expert files together, 15 times as many as in Kimi-K2.5. Each costs
/// memory and time, and a hostile model must not multiply experts and suffixes.
const MAX_EXPERT_TENSORS: usize = 1 << 20;
/// Payloads start at multiples of this, the width of the widest dtype.
const PAYLOAD_ALIGNMENT: u64 = 8;

/// A run of a tensor under a name of its own; of a stack, one run per expert.
#[derive(Debug, Clone)]
pub struct View {
    /// Index into [`ModelHeader::tensors`].
    pub tensor: u32,
    /// The name in the file; `None` is the tensor's own.
    pub name: Option<Box<str>>,
    /// The logical shape of one run, row-major.
    pub shape: Shape,
    /// The start of the first run in the tensor, in bytes.
    pub first: u64,
    /// Bytes of one run.
    pub bytes: u64,
    /// Bytes from the start of one run to that of the next; 0 if there is only one run.
    pub stride: u64,
}

impl View {
    fn whole(index: u32, tensor: &Tensor, name: Option<Box<str>>) -> Self {
        Self {
            tensor: index,
            name,
            shape: Shape::of_dims(tensor.info.dims()),
            first: 0,
            bytes: tensor.info.bytes,
            stride: 0,
        }
    }
}

/// One run of a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Index of the view.
    view: u32,
    /// The number of the run.
    run: u32,
}

/// The purpose of a safetensors file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FileKind {
    Base(Component),
    Expert { layer: u32, expert: u32 },
}

impl FileKind {
    /// The name without `.safetensors`.
    pub fn stem(self) -> String {
        match self {
            Self::Base(component) => component.name().to_owned(),
            Self::Expert { layer, expert } => format!("layer_{layer:02}_expert_{expert:03}"),
        }
    }

    /// The path below the root of the tree.
    pub fn path(self) -> String {
        let directory = match self {
            Self::Base(_) => BASE_DIRECTORY,
            Self::Expert { .. } => EXPERTS_DIRECTORY,
        };
        format!("{directory}/{}.safetensors", self.stem())
    }
}

/// One safetensors file of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorFile {
    pub kind: FileKind,
    pieces: Range<u32>,
    /// Bytes before the payload: length word, JSON and padding.
    pub header_bytes: u64,
    /// Bytes of payload.
    pub payload_bytes: u64,
    /// Payload bytes whose offset in the file is not that in the model, modulo 4096.
    pub incongruent_bytes: u64,
}

impl TensorFile {
    /// Bytes of the whole file.
    pub fn bytes(&self) -> u64 {
        self.header_bytes + self.payload_bytes
    }
}

/// Why a model has no layout.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case", prefix = "layout.")]
pub enum LayoutError {
    #[error("{first} and {second} are of the same layer, but disagree on the number of experts")]
    ExpertCounts { first: String, second: String },
    #[error("{name} of the same expert comes from both {first} and {second}")]
    TwoSources {
        name: String,
        first: String,
        second: String,
    },
    #[error("{0} has a fourth dimension, but experts are stacked along the third")]
    FourthDimension(String),
    #[error("{0} should hold gate and up rows, half of each, but has an odd number of rows")]
    OddFusedRows(String),
    #[error("{tensor} holds gate and up rows in turn, as Ollama writes gpt-oss ({sign})")]
    AlternatingRows {
        tensor: String,
        /// What shows that Ollama wrote the model.
        sign: String,
    },
    #[error(
        "{tensor} interleaves {interleave} rows, but one expert's matrix has {rows}, which is not a multiple of that"
    )]
    Interleave {
        tensor: String,
        rows: u64,
        interleave: u32,
    },
    #[error(
        "layer {layer} has {experts} experts, which makes {total} or more in all, more than any real model"
    )]
    TooManyExperts {
        layer: u32,
        experts: u64,
        total: u64,
    },
    #[error(
        "the experts up to layer {layer} hold {tensors} tensors together, more than any real model"
    )]
    TooManyExpertTensors { layer: u32, tensors: usize },
    #[error("a tensor is called {METADATA_KEY:?}, which safetensors reserves")]
    ReservedName,
    #[error(
        "the model has so many tensors that the header of {path} takes {bytes} bytes, but safetensors allows only 100000000"
    )]
    HeaderTooLarge { path: String, bytes: u64 },
    #[error(transparent)]
    Partition(#[from] PartitionError),
}

/// The hint for a converter's fault: another download would be the same.
const CONVERT: &str = "the converter wrote it so: convert the model again, or tell its publisher";
/// The hint for limits of this program, or of the format that it writes.
const REPORT: &str = "if this is a real model, report it to odmoe-fs";

impl Explain for LayoutError {
    fn code(&self) -> &'static str {
        self.into()
    }

    fn hint(&self) -> Option<Hint> {
        match self {
            Self::Partition(cause) => cause.hint(),
            Self::ExpertCounts { .. }
            | Self::TwoSources { .. }
            | Self::FourthDimension(_)
            | Self::OddFusedRows(_) => Some(CONVERT.into()),
            Self::AlternatingRows { .. } => Some(LLAMA_CPP_GPT_OSS.into()),
            Self::Interleave { interleave, .. } => {
                Some(format!("quantise the model to a type without _R{interleave}").into())
            }
            Self::TooManyExperts { .. }
            | Self::TooManyExpertTensors { .. }
            | Self::HeaderTooLarge { .. } => Some(REPORT.into()),
            Self::ReservedName => Some("rename it".into()),
        }
    }
}

/// A tensor as errors name it, with its GGUF dimensions.
fn described(tensor: &Tensor) -> String {
    let info = &tensor.info;
    format!(
        "tensor {:?} {:?} {}",
        info.name,
        info.dims(),
        info.ggml_type
    )
}

/// The whole layout of a model.
#[derive(Debug)]
pub struct Layout {
    model: ModelHeader,
    views: Vec<View>,
    pieces: Vec<Piece>,
    /// Base files in the order of [`Component::ALL`], then experts by layer and number.
    files: Vec<TensorFile>,
}

impl Layout {
    /// Lays out a model, and checks that every byte of every tensor is in exactly one file, once.
    pub fn new(model: ModelHeader) -> Result<(Self, Tree), LayoutError> {
        let mut layout = Self {
            model,
            views: Vec::new(),
            pieces: Vec::new(),
            files: Vec::new(),
        };
        let mut base = vec![true; layout.model.tensors.len()];
        let layers = experts::routed_experts(&layout.model, &mut base)?;
        layout.add_base_files(&base)?;
        for (layer, content) in layers {
            layout.add_experts(layer, content)?;
        }
        layout.views.shrink_to_fit();
        layout.pieces.shrink_to_fit();
        layout.files.shrink_to_fit();
        let tree = layout.tree();
        partition::check(&layout.model, &tree)?;
        Ok((layout, tree))
    }

    /// The content of the model's headers.
    pub fn model(&self) -> &ModelHeader {
        &self.model
    }

    /// The safetensors files: base files first, then experts by layer and number.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// The files of routed experts.
    pub fn experts(&self) -> &[TensorFile] {
        let first = self
            .files
            .partition_point(|file| matches!(file.kind, FileKind::Base(_)));
        &self.files[first..]
    }

    /// The file of an expert; `None` if the model does not have it.
    pub fn expert(&self, layer: u32, expert: u32) -> Option<&TensorFile> {
        let wanted = FileKind::Expert { layer, expert };
        let at = self
            .files
            .binary_search_by_key(&wanted, |file| file.kind)
            .ok()?;
        Some(&self.files[at])
    }

    /// The numbers of a layer's experts, in order.
    pub fn experts_of(&self, layer: u32) -> impl Iterator<Item = u32> + '_ {
        self.experts()
            .iter()
            .filter_map(move |file| match file.kind {
                FileKind::Expert { layer: of, expert } if of == layer => Some(expert),
                _ => None,
            })
    }

    /// The layers that have routed experts.
    pub fn moe_layers(&self) -> impl Iterator<Item = u32> + '_ {
        let mut last = None;
        self.experts()
            .iter()
            .filter_map(move |file| match file.kind {
                FileKind::Expert { layer, .. } if last != Some(layer) => {
                    last = Some(layer);
                    last
                }
                _ => None,
            })
    }

    /// The tensors of a file, in payload order.
    pub fn tensors<'a>(
        &'a self,
        file: &TensorFile,
    ) -> impl ExactSizeIterator<Item = TensorView<'a>> + Clone {
        self.pieces[file.pieces.start as usize..file.pieces.end as usize]
            .iter()
            .map(|piece| self.view(*piece))
    }

    fn view(&self, piece: Piece) -> TensorView<'_> {
        let view = &self.views[piece.view as usize];
        let tensor = &self.model.tensors[view.tensor as usize];
        TensorView {
            name: view.name.as_deref().unwrap_or(&tensor.info.name),
            shape: view.shape,
            ggml_type: tensor.info.ggml_type,
            bytes: view.bytes,
            gguf_name: &tensor.info.name,
            gguf_part: tensor.part,
            // The run lies inside the tensor, whose end fits into 64 bits.
            gguf_offset: tensor.info.offset + view.first + u64::from(piece.run) * view.stride,
        }
    }

    fn add_view(&mut self, view: View) -> u32 {
        self.views.push(view);
        self.views.len() as u32 - 1
    }

    fn add_base_files(&mut self, base: &[bool]) -> Result<(), LayoutError> {
        for component in Component::ALL {
            let first = self.pieces.len() as u32;
            for (index, tensor) in self.model.tensors.iter().enumerate() {
                let name = &tensor.info.name;
                if !base[index] || Component::of(name) != component {
                    continue;
                }
                if name == METADATA_KEY {
                    return Err(LayoutError::ReservedName);
                }
                self.pieces.push(Piece {
                    view: self.views.len() as u32,
                    run: 0,
                });
                self.views.push(View::whole(index as u32, tensor, None));
            }
            self.add_file(FileKind::Base(component), first)?;
        }
        Ok(())
    }

    fn add_experts(&mut self, layer: u32, mut content: experts::Layer) -> Result<(), LayoutError> {
        let first_stack = self.views.len() as u32;
        self.views.append(&mut content.stacks);
        let stacks = first_stack..self.views.len() as u32;
        let numbers: Vec<u32> = content.experts().collect();
        let tensors = self.pieces.len() + stacks.len() * content.stacked as usize;
        if tensors > MAX_EXPERT_TENSORS {
            return Err(LayoutError::TooManyExpertTensors { layer, tensors });
        }
        for expert in numbers {
            let first = self.pieces.len() as u32;
            if expert < content.stacked {
                let pieces = stacks.clone().map(|view| Piece { view, run: expert });
                self.pieces.extend(pieces);
            }
            for single in content.singles.remove(&expert).unwrap_or_default() {
                let view = self.add_view(single);
                self.pieces.push(Piece { view, run: 0 });
            }
            self.add_file(FileKind::Expert { layer, expert }, first)?;
        }
        Ok(())
    }

    /// Adds a file of the pieces from `first` on, if there are any.
    fn add_file(&mut self, kind: FileKind, first: u32) -> Result<(), LayoutError> {
        let range = first as usize..self.pieces.len();
        if range.is_empty() {
            return Ok(());
        }
        let mut pieces = self.pieces.split_off(range.start);
        self.order(&mut pieces);
        self.pieces.append(&mut pieces);

        let mut file = TensorFile {
            kind,
            pieces: first..self.pieces.len() as u32,
            header_bytes: 0,
            payload_bytes: self.pieces[range]
                .iter()
                .map(|piece| self.views[piece.view as usize].bytes)
                .sum(),
            incongruent_bytes: 0,
        };
        let mut json = CountingWriter::new(io::sink());
        self.write_json(&file, &mut json)
            .expect("counting bytes cannot fail");
        let (header_bytes, congruent_bytes) =
            self.choose_padding(&file, LENGTH_WORD_BYTES + json.bytes);
        if header_bytes - LENGTH_WORD_BYTES > safetensors::MAX_HEADER_BYTES {
            return Err(LayoutError::HeaderTooLarge {
                path: kind.path(),
                bytes: header_bytes - LENGTH_WORD_BYTES,
            });
        }
        file.header_bytes = header_bytes;
        file.incongruent_bytes = file.payload_bytes - congruent_bytes;
        self.files.push(file);
        Ok(())
    }

    /// Sorts pieces in the order of the model. If that leaves a tensor unaligned to its own dtype,
    /// the widest dtypes come first, which aligns all of them.
    fn order(&self, pieces: &mut [Piece]) {
        pieces.sort_by_cached_key(|piece| {
            let view = self.view(*piece);
            let table_place = self.views[piece.view as usize].tensor;
            (view.gguf_part, view.gguf_offset, table_place, piece.view)
        });
        let width = |piece: &Piece| Dtype::of(self.view(*piece).ggml_type).width();
        let mut offset = 0;
        let aligned = pieces.iter().all(|piece| {
            let start = offset;
            offset += self.views[piece.view as usize].bytes;
            start % width(piece) == 0
        });
        if !aligned {
            pieces.sort_by_key(|piece| std::cmp::Reverse(width(piece)));
        }
    }

    /// Chooses the padding, less than a page, that aligns the payload and makes the most of its
    /// bytes congruent with their place in the model: their whole pages are whole pages of the
    /// model. Of equals, the smallest. Returns the payload's start and the congruent bytes.
    fn choose_padding(&self, file: &TensorFile, unpadded: u64) -> (u64, u64) {
        // For each tensor, the payload start modulo a page that makes it congruent, and its bytes.
        let mut candidates: Vec<(u64, u64)> = Vec::with_capacity(file.pieces.len());
        let mut payload_offset = 0u64;
        for tensor in self.tensors(file) {
            let residue = tensor.gguf_offset.wrapping_sub(payload_offset) % PAGE_BYTES;
            if tensor.bytes > 0 && residue.is_multiple_of(PAYLOAD_ALIGNMENT) {
                candidates.push((residue, tensor.bytes));
            }
            payload_offset += tensor.bytes;
        }
        candidates.sort_unstable();
        let smallest = unpadded.next_multiple_of(PAYLOAD_ALIGNMENT);
        let mut best = (smallest, 0);
        for group in candidates.chunk_by(|a, b| a.0 == b.0) {
            let bytes: u64 = group.iter().map(|(_, bytes)| bytes).sum();
            let start = smallest + group[0].0.wrapping_sub(smallest) % PAGE_BYTES;
            if bytes > best.1 || (bytes == best.1 && start < best.0) {
                best = (start, bytes);
            }
        }
        best
    }

    fn write_json(&self, file: &TensorFile, out: &mut impl Write) -> io::Result<()> {
        let mut metadata = vec![("format", "pt"), ("odmoe.layout", LAYOUT_VERSION)];
        if let Some(architecture) = self.model.architecture() {
            metadata.push(("general.architecture", architecture));
        }
        let numbers;
        if let FileKind::Expert { layer, expert } = file.kind {
            numbers = (layer.to_string(), expert.to_string());
            metadata.push(("layer", &numbers.0));
            metadata.push(("expert", &numbers.1));
        }
        write_header_json(out, &metadata, self.tensors(file))
    }

    /// Writes everything before a file's payload.
    fn write_header(&self, file: &TensorFile, out: &mut impl Write) -> io::Result<()> {
        let length = file.header_bytes - LENGTH_WORD_BYTES;
        out.write_all(&length.to_le_bytes())?;
        let mut json = CountingWriter::new(&mut *out);
        self.write_json(file, &mut json)?;
        let padding = [b' '; PAGE_BYTES as usize];
        let padding = &padding[..(length - json.bytes) as usize];
        out.write_all(padding)
    }

    fn tree(&self) -> Tree {
        let mut base = self.document_files();
        let mut experts = vec![self.registry_file()];
        for (index, file) in self.files.iter().enumerate() {
            let header = Content::Made(Doc::Header(index as u32).id());
            let mut runs = Vec::with_capacity(1 + file.pieces.len());
            runs.push((file.header_bytes, header));
            runs.extend(self.tensors(file).map(|tensor| {
                let content = Content::Model {
                    part: tensor.gguf_part,
                    offset: tensor.gguf_offset,
                };
                (tensor.bytes, content)
            }));
            let new = NewFile {
                name: format!("{}.safetensors", file.kind.stem()),
                runs,
            };
            match file.kind {
                FileKind::Base(_) => base.push(new),
                FileKind::Expert { .. } => experts.push(new),
            }
        }
        Tree::new(vec![(BASE_DIRECTORY, base), (EXPERTS_DIRECTORY, experts)])
    }
}
