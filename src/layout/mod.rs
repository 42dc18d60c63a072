//! The file and name of every tensor, and the content of each file.
//!
//! The problem: a GGUF stores one huge tensor for all experts of a layer. Loaders want one small
//! file per expert, and every other tensor in one of four base files. No byte may be lost.
//!
//! The plan: a [`View`] is a run of a tensor under a name of its own, repeated for every expert if
//! the tensor is a stack. A file is a list of [`Piece`]s, each one repetition of a view.
//! [`Layout::new`] sorts tensors into files (`names`, `experts`), chooses each header's padding,
//! and proves on the finished [`Tree`] that every tensor byte is in exactly one file, exactly once.

mod arranged;
mod costs;
mod counting;
mod directory;
mod documents;
mod error;
mod experts;
mod file;
mod names;
mod padding;
mod partition;
mod quantization;
mod recipes;
mod shown;
mod view;

use std::io::{self, Write};

pub(crate) use arranged::{Arranged, Stored};
pub use directory::HF_DIRECTORY;
pub use documents::{Doc, METADATA_GGUF_PATH, METADATA_PATH, Present, REGISTRY_PATH};
pub use error::LayoutError;
pub use file::{FileKind, Piece, Recipe, TensorFile, View};
pub use names::{Component, ExpertName, Holds, Matrix};
pub use partition::PartitionError;
pub use shown::JOINED_PATH;
pub use view::{ArrayView, TensorView};

use self::counting::CountingWriter;
use self::directory::Directory;
use self::error::check_types;
use self::view::write_tensors;
use crate::form::{Form, Shown};
use crate::gguf::{GgmlType, ModelHeader};
use crate::hf::Inputs;
use crate::safetensors::{self, InString, LENGTH_WORD_BYTES, METADATA_KEY, write_header_json};
use crate::show::Show;
use crate::tree::{Content, NewFile, RecipeId, Tree};

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
/// Offsets in files are signed 64-bit numbers; headers need some room.
const MAX_PAYLOAD_BYTES: u64 = i64::MAX as u64 - (1 << 50);
/// A tensor is shown as three arrays at most: weight, scales, biases.
const MAX_ARRAYS: u32 = 4;
/// Payloads start at multiples of this, the width of the widest dtype.
const PAYLOAD_ALIGNMENT: u64 = 8;

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
    /// Lays out a model in a form, and checks that every byte of every tensor is in exactly one file,
    /// once.
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

    /// Why no model directory can be shown in this form; `None` if one can.
    pub(crate) fn refuses_directory(&self, inputs: &Inputs) -> Option<LayoutError> {
        Directory::new(&self.model, self.form, inputs).err()
    }

    /// The form of quantised tensors.
    pub fn form(&self) -> Form {
        self.form
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

    /// The arrays of a file, in payload order.
    pub fn arrays<'a>(&'a self, file: &TensorFile) -> Vec<ArrayView<'a>> {
        let mut arrays = Vec::with_capacity(3 * file.pieces.len());
        for (piece, tensor) in file.pieces.clone().zip(self.tensors(file)) {
            let sizes = tensor.sizes().enumerate();
            arrays.extend(sizes.map(|(n, (width, bytes))| ArrayView {
                tensor,
                n,
                piece,
                width,
                bytes,
            }));
        }
        if file.widest_first {
            arrays.sort_by_key(|view| std::cmp::Reverse(view.width));
        }
        arrays
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
        };
        self.check_names(&file)?;
        let too_large = || LayoutError::TooLarge {
            form: self.form,
            path: kind.path(),
        };
        let arrays = self.arrays(&file);
        let bytes = arrays.iter().map(|view| u128::from(view.bytes));
        let bytes: u128 = bytes.sum();
        let total = bytes + u128::from(self.total_bytes);
        if total > u128::from(MAX_PAYLOAD_BYTES) {
            return Err(too_large());
        }
        file.payload_bytes = bytes as u64;
        let mut json = CountingWriter::new(io::sink());
        self.write_json(&file, &arrays, &mut json)
            .expect("counting bytes cannot fail");
        let header_bytes = self.choose_padding(&arrays, LENGTH_WORD_BYTES + json.bytes);
        if header_bytes - LENGTH_WORD_BYTES > safetensors::MAX_HEADER_BYTES {
            return Err(LayoutError::HeaderTooLarge {
                path: kind.path(),
                bytes: header_bytes - LENGTH_WORD_BYTES,
            });
        }
        file.header_bytes = header_bytes;
        self.total_bytes = total as u64;
        self.files.push(file);
        Ok(())
    }

    /// Sorts pieces in the order of the model, and returns true. If that leaves an array unaligned to
    /// its own dtype, sorts them by the width of their arrays, the widest first, and returns false:
    /// arrays in that order are all aligned.
    fn order(&self, pieces: &mut [Piece]) -> bool {
        pieces.sort_by_cached_key(|piece| {
            let view = self.view(*piece);
            let table_place = self.views[piece.view as usize].tensor;
            (view.gguf_part, view.gguf_offset, table_place, piece.view)
        });
        let mut offset = 0_u64;
        let aligned = pieces.iter().all(|piece| {
            self.view(*piece).sizes().all(|(width, bytes)| {
                let start = offset;
                offset = offset.saturating_add(bytes);
                start.is_multiple_of(width)
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
        let arrays = self.arrays(file).into_iter();
        let mut names: Vec<_> = arrays
            .map(|view| (view.array().name, view.tensor.gguf_name))
            .collect();
        names.sort_by(|a, b| a.0.cmp(&b.0));
        match names.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            None => Ok(()),
            Some(pair) => Err(LayoutError::SameName {
                name: pair[0].0.to_string(),
                first: format!("{:?}", pair[0].1),
                second: format!("{:?}", pair[1].1),
            }),
        }
    }

    fn write_json<W: Write>(
        &self,
        file: &TensorFile,
        arrays: &[ArrayView],
        out: &mut W,
    ) -> io::Result<()> {
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
        let arrays = arrays.iter().map(ArrayView::array);
        write_header_json(out, &metadata, "odmoe.tensors", tensors, arrays)
    }

    /// Writes everything before a file's payload.
    fn write_header(&self, file: &TensorFile, out: &mut impl Write) -> io::Result<()> {
        let length = file.header_bytes - LENGTH_WORD_BYTES;
        out.write_all(&length.to_le_bytes())?;
        let mut json = CountingWriter::new(&mut *out);
        self.write_json(file, &self.arrays(file), &mut json)?;
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
                (view.bytes, content)
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
}
