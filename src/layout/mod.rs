//! Which file and name every tensor gets, and what each file holds.
//!
//! The problem: a GGUF stores one huge tensor for all experts of a layer; loaders want one small
//! file per expert, and every other tensor in one of four base files. No byte may be lost.
//!
//! The plan: a [`View`] is a run of a tensor under a name of its own, repeated for every expert
//! where the tensor is a stack; a file is a list of [`Piece`]s, each one repetition of a view.
//! [`Layout::new`] sorts tensors into files (`names`, `experts`), chooses each header's
//! padding, and proves on the finished [`Tree`] that every tensor byte is in one file, once.

mod costs;
mod counting;
mod directory;
mod documents;
mod experts;
mod names;
mod partition;
mod view;

use std::io::{self, Write};
use std::ops::Range;

pub(crate) use directory::Arranged;
pub use directory::HF_DIRECTORY;
pub use documents::{Doc, METADATA_GGUF_PATH, METADATA_PATH, Present, REGISTRY_PATH};
pub use names::{Component, ExpertName, Holds, Matrix};
pub use partition::PartitionError;
pub use view::{ArrayView, TensorView};

use self::counting::CountingWriter;
use self::directory::Directory;
use self::view::write_tensors;
use crate::codec::{Codec, Float, Output};
use crate::computed::{Job, Small};
use crate::explain::{Explain, Hint};
use crate::form::{Form, Shown, UnknownTypes};
use crate::gguf::merged::{Merged, Origin};
use crate::gguf::{GgmlType, LLAMA_CPP_GPT_OSS, ModelHeader, Tensor};
use crate::hf::{HfError, Inputs};
use crate::safetensors::{
    self, Dtype, InString, LENGTH_WORD_BYTES, METADATA_KEY, Shape, write_header_json,
};
use crate::show::Show;
use crate::tree::{Content, NewFile, RecipeId, Tree};

/// The version of the mapping from models to trees, `odmoe.layout`: the same parts give the same
/// bytes under the same number.
pub const LAYOUT_VERSION: &str = "2";
/// The folder of the always-resident tensors.
pub const BASE_DIRECTORY: &str = "base_model";
/// The folder of the routed experts.
pub const EXPERTS_DIRECTORY: &str = "experts";
/// All parts of the model in one file, below the root.
pub const JOINED_PATH: &str = "model.gguf";
/// With larger gaps between tensors, several parts are not shown as one file: no program writes
/// such files.
const MAX_JOINED_ALIGNMENT: u32 = 1 << 20;

/// The page size that payloads are aligned to: the block size of file systems that share blocks.
const PAGE_BYTES: u64 = 4096;
/// Tensors of all expert files together: 15 times those of Kimi-K2.5. Each costs memory and time,
/// so a hostile model must not multiply experts and suffixes.
const MAX_EXPERT_TENSORS: usize = 1 << 20;
/// Offsets in files are signed 64-bit numbers; headers need some room.
const MAX_PAYLOAD_BYTES: u64 = i64::MAX as u64 - (1 << 50);
/// A tensor is shown as three arrays at most: weight, scales, biases.
const MAX_ARRAYS: u32 = 4;
/// Payloads start at multiples of this, the widest dtype.
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
    /// Where the first run starts in the tensor, in bytes.
    pub first: u64,
    /// Bytes of one run.
    pub bytes: u64,
    /// From the start of one run to that of the next, in bytes; 0 if there is only one run.
    pub stride: u64,
    /// What each run is shown as.
    pub shown: Shown,
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
            shown: Shown::Stored,
        }
    }
}

/// How an array is computed: from which bytes of the model, and by what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recipe {
    /// 0-based.
    pub part: u32,
    /// First byte of the blocks in the part's file.
    pub offset: u64,
    /// Bytes of blocks.
    pub len: u64,
    pub codec: Codec,
}

/// One run of a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Index of the view.
    view: u32,
    /// The number of the run.
    run: u32,
}

/// What a safetensors file is for.
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
    /// Whether arrays lie in the order of their widths, so that each is aligned to its own. Else they
    /// lie in the order of the model.
    widest_first: bool,
    /// Bytes in front of the payload: length word, JSON and padding.
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
    #[error("the numbers of these types are not known: {0}")]
    UnknownTypes(UnknownTypes),
    #[error("{first} and {second} would both be shown as {name}")]
    SameName {
        name: String,
        first: String,
        second: String,
    },
    #[error("shown as {form}, {path} would be larger than any file system can hold")]
    TooLarge { form: Form, path: String },
    #[error(
        "tensors are aligned to {0} bytes, which is too much for {JOINED_PATH} (at most {MAX_JOINED_ALIGNMENT})"
    )]
    JoinedAlignment(u32),
    #[error("no model directory (hf) can be shown: {0}")]
    Hf(#[from] HfError),
    #[error(transparent)]
    Partition(#[from] PartitionError),
}

/// For what a converter wrote: another download would be the same.
const CONVERT: &str = "the model was written so: convert it again, or tell its publisher";
/// For limits of this program, or of the format that it writes.
const REPORT: &str = "if yours is a real model, report it to odmoe-fs";

impl Explain for LayoutError {
    fn code(&self) -> &'static str {
        self.into()
    }

    fn hint(&self) -> Option<Hint> {
        match self {
            Self::Partition(cause) => cause.hint(),
            Self::Hf(cause) => cause.hint(),
            Self::JoinedAlignment(_) => Some("leave joined out of --show".into()),
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
            Self::UnknownTypes(_) => Some("use --as raw, which shows their blocks".into()),
            Self::SameName { .. } => Some("use another form, or --as raw".into()),
            Self::TooLarge { .. } => Some("use --as raw".into()),
        }
    }
}

/// A tensor as messages name it, with its GGUF dimensions.
fn described(tensor: &Tensor) -> String {
    let info = &tensor.info;
    format!(
        "tensor {:?} {:?} {}",
        info.name,
        info.dims(),
        info.ggml_type
    )
}

/// Fails if a form needs numbers of types that nobody here knows.
fn check_types(model: &ModelHeader, form: Form) -> Result<(), LayoutError> {
    if form == Form::Raw {
        return Ok(());
    }
    let mut unknown: Vec<(&'static str, usize)> = Vec::new();
    for tensor in &model.tensors {
        let ggml_type = tensor.info.ggml_type;
        let is_known = Dtype::of(ggml_type) != Dtype::U8
            || Codec::of(ggml_type, Output::Numbers(Float::F32)).is_some();
        if is_known {
            continue;
        }
        match unknown.iter_mut().find(|(name, _)| *name == ggml_type.name) {
            Some((_, count)) => *count += 1,
            None => unknown.push((ggml_type.name, 1)),
        }
    }
    match unknown.is_empty() {
        true => Ok(()),
        false => Err(LayoutError::UnknownTypes(UnknownTypes(unknown))),
    }
}

/// The whole layout of a model.
#[derive(Debug)]
pub struct Layout {
    model: ModelHeader,
    form: Form,
    show: Show,
    views: Vec<View>,
    pieces: Vec<Piece>,
    /// Base files in the order of [`Component::ALL`], then experts by layer and number.
    files: Vec<TensorFile>,
    /// Payload bytes of all files.
    total_bytes: u64,
    /// `hf/`, if it is shown.
    directory: Option<Directory>,
}

impl Layout {
    /// Lays a model out in a form, and checks that every byte of every tensor is in one file, once.
    pub fn new(model: ModelHeader, form: Form) -> Result<(Self, Tree), LayoutError> {
        Self::shown(model, form, Show::default(), &Inputs::default())
    }

    /// The same, with the choice of what the tree shows. What a model directory needs of the model
    /// beyond its header is in `inputs`.
    pub fn shown(
        model: ModelHeader,
        form: Form,
        show: Show,
        inputs: &Inputs,
    ) -> Result<(Self, Tree), LayoutError> {
        check_types(&model, form)?;
        let mut layout = Self {
            model,
            form,
            show,
            directory: None,
            views: Vec::new(),
            pieces: Vec::new(),
            files: Vec::new(),
            total_bytes: 0,
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
        let mut directory = match show.hf {
            true => Some(Directory::new(&layout.model, form, inputs)?),
            false => None,
        };
        let files = directory.as_mut().map(|hf| hf.new_files(&layout));
        layout.directory = directory;
        let tree = layout.tree(files)?;
        partition::check(&layout, &tree)?;
        Ok((layout, tree))
    }

    /// What quantised tensors are shown as.
    pub fn form(&self) -> Form {
        self.form
    }

    /// What the tree shows.
    pub fn show(&self) -> Show {
        self.show
    }

    /// Whether the tree shows files of this kind.
    pub fn shows(&self, kind: FileKind) -> bool {
        match kind {
            FileKind::Base(_) => self.show.base,
            FileKind::Expert { .. } => self.show.experts,
        }
    }

    /// The plan of the model directory, if one is shown.
    pub fn hf(&self) -> Option<&crate::hf::Directory> {
        self.directory.as_ref().map(Directory::plan)
    }

    /// Bytes in front of the first tensor of `model.gguf`.
    pub fn joined_header_bytes(&self) -> u64 {
        Merged::new(&self.model).header_bytes
    }

    fn directory(&self) -> &Directory {
        let directory = self.directory.as_ref();
        directory.expect("only a directory that is shown has documents")
    }

    /// How an array is made that does not have the order of the model.
    pub(crate) fn arranged(&self, id: RecipeId) -> Option<Arranged> {
        self.directory.as_ref()?.arranged(id, &self.model)
    }

    /// What the model's headers say.
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

    /// The arrays of a file, in payload order.
    pub fn arrays<'a>(&'a self, file: &TensorFile) -> Vec<ArrayView<'a>> {
        let mut arrays = Vec::with_capacity(3 * file.pieces.len());
        for (piece, tensor) in file.pieces.clone().zip(self.tensors(file)) {
            arrays.extend((0..tensor.shown.arrays()).map(|n| ArrayView {
                array: tensor.array(n),
                tensor,
                n,
                piece,
            }));
        }
        if file.widest_first {
            arrays.sort_by_key(|view| std::cmp::Reverse(view.array.dtype.width()));
        }
        arrays
    }

    /// How an array of the tree is computed.
    pub fn recipe(&self, id: RecipeId) -> Recipe {
        let of_directory = self.directory.as_ref();
        if let Some(recipe) = of_directory.and_then(|hf| hf.recipe(id, &self.model)) {
            return recipe;
        }
        let (piece, n) = (id.0 / MAX_ARRAYS, id.0 % MAX_ARRAYS);
        let tensor = self.view(self.pieces[piece as usize]);
        let codec = tensor.shown.codec(n as usize, tensor.ggml_type);
        Recipe {
            part: tensor.gguf_part,
            offset: tensor.gguf_offset,
            len: tensor.bytes,
            codec: codec.expect("only computed arrays have recipes"),
        }
    }

    /// What the computation of an array needs to know.
    pub(crate) fn job(&self, id: RecipeId) -> Job {
        let of_directory = self.directory.as_ref();
        if let Some(job) = of_directory.and_then(|hf| hf.job(id, &self.model)) {
            return job;
        }
        let (piece, array) = (id.0 / MAX_ARRAYS, (id.0 % MAX_ARRAYS) as usize);
        let tensor = self.view(self.pieces[piece as usize]);
        let codec = |n| tensor.shown.codec(n, tensor.ggml_type);
        let small = |n| {
            let codec = (n < tensor.shown.arrays()).then(|| codec(n))??;
            let unit = codec.unit();
            let bytes = tensor.bytes / unit.blocks as u64 * unit.out as u64;
            Some(Small { codec, bytes })
        };
        Job {
            tensor: piece,
            array,
            codec: codec(array).expect("only computed arrays have recipes"),
            small: [small(1), small(2)],
        }
    }

    /// Bytes of the model that are read for an array and for no array before it.
    pub(crate) fn source_bytes(&self, id: RecipeId) -> u64 {
        let of_directory = self.directory.as_ref();
        if let Some(bytes) = of_directory.and_then(|hf| hf.source_bytes(id, &self.model)) {
            return bytes;
        }
        match self.array_of(id) {
            (0, _) => self.recipe(id).len,
            _ => 0,
        }
    }

    /// Which of its tensor's arrays a computed array is, and how many there are.
    fn array_of(&self, id: RecipeId) -> (usize, usize) {
        let tensor = self.view(self.pieces[(id.0 / MAX_ARRAYS) as usize]);
        ((id.0 % MAX_ARRAYS) as usize, tensor.shown.arrays())
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
            shown: view.shown,
        }
    }

    /// The type of a view's tensor, and the name of the view in its file.
    fn type_and_name<'a>(&'a self, view: &'a View) -> (&'static GgmlType, &'a str) {
        let info = &self.model.tensors[view.tensor as usize].info;
        let name = view.name.as_deref().unwrap_or(&info.name);
        (info.ggml_type, name)
    }

    fn add_view(&mut self, mut view: View) -> u32 {
        let (ggml_type, name) = self.type_and_name(&view);
        let shown = Shown::of(self.form, ggml_type, name, &view.shape);
        view.shown = shown.expect("types without numbers are refused before");
        self.views.push(view);
        self.views.len() as u32 - 1
    }

    fn add_base_files(&mut self, base: &[bool]) -> Result<(), LayoutError> {
        for component in Component::ALL {
            let first = self.pieces.len() as u32;
            for (index, is_base) in base.iter().enumerate() {
                let tensor = &self.model.tensors[index];
                let name = &tensor.info.name;
                if !is_base || Component::of(name) != component {
                    continue;
                }
                if name == METADATA_KEY {
                    return Err(LayoutError::ReservedName);
                }
                let whole = View::whole(index as u32, tensor, None);
                let view = self.add_view(whole);
                self.pieces.push(Piece { view, run: 0 });
            }
            self.add_file(FileKind::Base(component), first)?;
        }
        Ok(())
    }

    fn add_experts(&mut self, layer: u32, mut content: experts::Layer) -> Result<(), LayoutError> {
        let first_stack = self.views.len() as u32;
        for stack in std::mem::take(&mut content.stacks) {
            self.add_view(stack);
        }
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
        let widest_first = !self.order(&mut pieces);
        self.pieces.append(&mut pieces);

        let mut file = TensorFile {
            kind,
            pieces: first..self.pieces.len() as u32,
            widest_first,
            header_bytes: 0,
            payload_bytes: 0,
            incongruent_bytes: 0,
        };
        self.check_names(&file)?;
        let too_large = || LayoutError::TooLarge {
            form: self.form,
            path: kind.path(),
        };
        let arrays = self.arrays(&file);
        let bytes = arrays.iter().map(|view| u128::from(view.array.bytes));
        let bytes: u128 = bytes.sum();
        let total = bytes + u128::from(self.total_bytes);
        if total > u128::from(MAX_PAYLOAD_BYTES) {
            return Err(too_large());
        }
        file.payload_bytes = bytes as u64;
        let mut json = CountingWriter::new(io::sink());
        self.write_json(&file, &mut json)
            .expect("counting bytes cannot fail");
        let (header_bytes, congruent_bytes) =
            self.choose_padding(&arrays, LENGTH_WORD_BYTES + json.bytes);
        if header_bytes - LENGTH_WORD_BYTES > safetensors::MAX_HEADER_BYTES {
            return Err(LayoutError::HeaderTooLarge {
                path: kind.path(),
                bytes: header_bytes - LENGTH_WORD_BYTES,
            });
        }
        file.header_bytes = header_bytes;
        file.incongruent_bytes = file.payload_bytes - congruent_bytes;
        self.total_bytes = total as u64;
        self.files.push(file);
        Ok(())
    }

    /// Puts pieces into the order of the model. If that would leave an array unaligned to its own
    /// dtype, puts them by the width of their arrays, widest first, and returns false: then arrays
    /// are to be ordered so, too, which aligns all of them.
    fn order(&self, pieces: &mut [Piece]) -> bool {
        pieces.sort_by_cached_key(|piece| {
            let view = self.view(*piece);
            let table_place = self.views[piece.view as usize].tensor;
            (view.gguf_part, view.gguf_offset, table_place, piece.view)
        });
        let mut offset = 0_u64;
        let aligned = pieces.iter().all(|piece| {
            self.view(*piece).arrays().all(|array| {
                let start = offset;
                offset = offset.saturating_add(array.bytes);
                start.is_multiple_of(array.dtype.width())
            })
        });
        if !aligned {
            pieces.sort_by_key(|piece| std::cmp::Reverse(self.view(*piece).width()));
        }
        aligned
    }

    /// Fails if two arrays of a file would have one name: a tensor of the model, and an array of
    /// another one.
    fn check_names(&self, file: &TensorFile) -> Result<(), LayoutError> {
        let has_suffix = |name: &str| name.ends_with(".scales") || name.ends_with(".biases");
        if self.form == Form::Raw || !self.tensors(file).any(|tensor| has_suffix(tensor.name)) {
            return Ok(());
        }
        let mut arrays = self.arrays(file);
        arrays.sort_by(|a, b| a.array.name.cmp(&b.array.name));
        let same = |pair: &&[ArrayView]| pair[0].array.name == pair[1].array.name;
        match arrays.windows(2).find(same) {
            None => Ok(()),
            Some(pair) => Err(LayoutError::SameName {
                name: pair[0].array.name.to_string(),
                first: format!("{:?}", pair[0].tensor.gguf_name),
                second: format!("{:?}", pair[1].tensor.gguf_name),
            }),
        }
    }

    /// Where the payload starts, and how many of its bytes are congruent with their place in the
    /// model, so that whole pages of the file are whole pages of the model.
    ///
    /// With computed arrays that is a page boundary. Else, of the paddings below a page that align
    /// the payload start, it is the one that makes the most bytes congruent; the smallest of equals.
    fn choose_padding(&self, arrays: &[ArrayView], unpadded: u64) -> (u64, u64) {
        // The payload start modulo a page at which each tensor becomes congruent, and its bytes.
        let mut wishes: Vec<(u64, u64)> = Vec::with_capacity(arrays.len());
        let mut payload_offset = 0u64;
        let mut is_computed = false;
        for view in arrays {
            let bytes = view.array.bytes;
            let residue = view.tensor.gguf_offset.wrapping_sub(payload_offset) % PAGE_BYTES;
            if view.tensor.shown.is_computed() {
                is_computed = true;
            } else if bytes > 0 && residue.is_multiple_of(PAYLOAD_ALIGNMENT) {
                wishes.push((residue, bytes));
            }
            payload_offset += bytes;
        }
        if is_computed {
            let start = unpadded.next_multiple_of(PAGE_BYTES);
            let congruent = wishes.iter().filter(|(residue, _)| *residue == 0);
            return (start, congruent.map(|(_, bytes)| bytes).sum());
        }
        wishes.sort_unstable();
        let smallest = unpadded.next_multiple_of(PAYLOAD_ALIGNMENT);
        let mut best = (smallest, 0);
        for group in wishes.chunk_by(|a, b| a.0 == b.0) {
            let bytes: u64 = group.iter().map(|(_, bytes)| bytes).sum();
            let start = smallest + group[0].0.wrapping_sub(smallest) % PAGE_BYTES;
            if bytes > best.1 || (bytes == best.1 && start < best.0) {
                best = (start, bytes);
            }
        }
        best
    }

    fn write_json<W: Write>(&self, file: &TensorFile, out: &mut W) -> io::Result<()> {
        let mut metadata = vec![("format", "pt"), ("odmoe.layout", LAYOUT_VERSION)];
        if self.form != Form::Raw {
            metadata.push(("odmoe.form", self.form.name()));
        }
        if let Some(architecture) = self.model.architecture() {
            metadata.push(("general.architecture", architecture));
        }
        let numbers;
        if let FileKind::Expert { layer, expert } = file.kind {
            numbers = (layer.to_string(), expert.to_string());
            metadata.push(("layer", &numbers.0));
            metadata.push(("expert", &numbers.1));
        }
        let tensors = |out: &mut InString<'_, W>| write_tensors(out, self.tensors(file));
        let arrays = self.arrays(file).into_iter().map(|view| view.array);
        write_header_json(out, &metadata, "odmoe.tensors", tensors, arrays)
    }

    /// Writes everything in front of a file's payload.
    fn write_header(&self, file: &TensorFile, out: &mut impl Write) -> io::Result<()> {
        let length = file.header_bytes - LENGTH_WORD_BYTES;
        out.write_all(&length.to_le_bytes())?;
        let mut json = CountingWriter::new(&mut *out);
        self.write_json(file, &mut json)?;
        let padding = [b' '; PAGE_BYTES as usize];
        let padding = &padding[..(length - json.bytes) as usize];
        out.write_all(padding)
    }

    /// The tree; `directory` are the files of `hf/`.
    fn tree(&self, directory: Option<Vec<NewFile>>) -> Result<Tree, LayoutError> {
        let mut base = self.document_files();
        let mut experts = vec![self.registry_file()];
        let shown = self.files.iter().enumerate();
        for (index, file) in shown.filter(|(_, file)| self.shows(file.kind)) {
            let header = Content::Made(Doc::Header(index as u32).id());
            let arrays = self.arrays(file);
            let mut runs = Vec::with_capacity(1 + arrays.len());
            runs.push((file.header_bytes, header));
            runs.extend(arrays.iter().map(|view| {
                let content = match view.tensor.shown {
                    Shown::Stored => Content::Model {
                        part: view.tensor.gguf_part,
                        offset: view.tensor.gguf_offset,
                    },
                    _ => Content::Computed(RecipeId(view.piece * MAX_ARRAYS + view.n as u32)),
                };
                (view.array.bytes, content)
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
        let mut directories = Vec::new();
        if self.show.base {
            directories.push((BASE_DIRECTORY, base));
        }
        if self.show.experts {
            directories.push((EXPERTS_DIRECTORY, experts));
        }
        if let Some(files) = directory {
            directories.push((HF_DIRECTORY, files));
        }
        let mut beside = Vec::new();
        if self.show.joined {
            beside.push(self.joined()?);
        }
        Ok(Tree::with_files(directories, beside))
    }

    /// All parts as one file.
    fn joined(&self) -> Result<NewFile, LayoutError> {
        let alignment = self.model.parts[0].alignment;
        if self.model.parts.len() > 1 && alignment > MAX_JOINED_ALIGNMENT {
            return Err(LayoutError::JoinedAlignment(alignment));
        }
        let runs = Merged::new(&self.model).runs.into_iter();
        let runs = runs.map(|(bytes, origin)| {
            let content = match origin {
                Origin::Made(made) => Content::Made(Doc::Joined(made).id()),
                Origin::Part { part, offset } => Content::Model { part, offset },
            };
            (bytes, content)
        });
        Ok(NewFile {
            name: JOINED_PATH.to_owned(),
            runs: runs.collect(),
        })
    }
}
