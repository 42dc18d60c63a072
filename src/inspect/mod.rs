//! What is in a model, in numbers, and what mounting it would show.
//!
//! [`Report`] describes the model, [`ExpertReport`] one expert. Both serialise as the JSON that
//! `docs/JSON.md` describes.

mod expert;
mod forms;
mod memory;

use std::collections::BTreeMap;

use serde::Serialize;

pub use self::expert::{ArrayReport, ExpertReport, ExpertTensor};
pub use self::forms::{FormReport, FormsReport};
pub use self::memory::Memory;
use crate::layout::{FileKind, HF_DIRECTORY, Layout, LayoutError};
use crate::model::Model;
use crate::safetensors::{Dtype, Shape};
use crate::tree::Extent;

/// What is in a model. Bytes are payload, what tensors hold without headers, unless it says
/// otherwise.
#[derive(Debug, Clone, Serialize)]
pub struct Report<'a> {
    /// The form that the sizes of components, experts, layers and of the tree are in.
    pub form: &'static str,
    pub architecture: Option<&'a str>,
    /// `ARCHITECTURE.block_count`: layers, those without experts included.
    pub block_count: Option<u64>,
    /// `ARCHITECTURE.embedding_length`: the width of the model.
    pub embedding_length: Option<u64>,
    /// Tokens, by the model's key, its tokenizer or its embeddings.
    pub vocab_size: Option<u64>,
    /// The most experts that a layer has.
    pub expert_count: u64,
    pub gguf_version: u32,
    pub parts: Vec<PartReport<'a>>,
    /// Bytes of all parts.
    pub bytes: u64,
    pub tensor_count: usize,
    pub ggml_types: BTreeMap<&'static str, Amount>,
    pub components: BTreeMap<&'static str, Amount>,
    pub experts: ExpertsReport,
    /// Every layer that has a tensor.
    pub layers: Vec<LayerReport>,
    pub active: ActiveReport,
    #[serde(flatten)]
    pub forms: FormsReport,
    /// `None` where the system does not tell.
    pub memory: Option<Memory>,
    pub tree: TreeReport,
    pub hf: DirectoryReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tensors: Option<Vec<TensorReport<'a>>>,
}

/// One file of the model.
#[derive(Debug, Clone, Serialize)]
pub struct PartReport<'a> {
    pub path: std::borrow::Cow<'a, str>,
    /// Of the file.
    pub bytes: u64,
    pub alignment: u32,
    /// The offset of the tensors' data.
    pub data_start: u64,
    pub tensors: usize,
}

/// A number of tensors and their bytes.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Amount {
    pub tensors: usize,
    pub bytes: u64,
}

/// The routed experts.
#[derive(Debug, Clone, Serialize)]
pub struct ExpertsReport {
    pub files: usize,
    /// Payload bytes of all experts.
    pub bytes: u64,
    pub used_per_token: Option<u64>,
    pub layers: Vec<ExpertLayerReport>,
    /// Those that lack one of the three matrices.
    pub incomplete: Vec<IncompleteReport>,
}

/// The routed experts of a layer.
#[derive(Debug, Clone, Serialize)]
pub struct ExpertLayerReport {
    pub layer: u32,
    pub experts: usize,
    /// Payload bytes of its experts.
    pub bytes: u64,
}

/// A layer, whether it has experts or not.
#[derive(Debug, Clone, Serialize)]
pub struct LayerReport {
    pub layer: u32,
    /// `moe` if it has routed experts, else `dense`.
    pub kind: &'static str,
    /// Payload bytes of all its tensors but the routed experts.
    pub base_bytes: u64,
    pub experts: usize,
    /// Payload bytes of all its experts.
    pub expert_bytes: u64,
}

/// Experts that lack a matrix.
#[derive(Debug, Clone, Serialize)]
pub struct IncompleteReport {
    /// Of `w1.weight` (gate), `w2.weight` (down) and `w3.weight` (up).
    pub missing: Vec<&'static str>,
    pub experts: usize,
    /// The first of them: layer and number.
    pub first: (u32, u32),
}

/// What one token needs.
#[derive(Debug, Clone, Serialize)]
pub struct ActiveReport {
    /// Experts used in each layer; `None` where the model does not say.
    pub experts_per_layer: Option<u64>,
    /// Payload bytes of so many experts of average size in each layer that has experts.
    pub expert_bytes: Option<u64>,
    /// Payload bytes of `base_model/`.
    pub base_bytes: u64,
    /// Both together.
    pub bytes: Option<u64>,
}

/// What a mount shows.
#[derive(Debug, Clone, Serialize)]
pub struct TreeReport {
    /// What it shows, as `--show` takes it.
    pub show: String,
    pub files: usize,
    /// How many of them are in `hf/`.
    pub hf_files: usize,
    /// Of all files, headers and documents included.
    pub bytes: u64,
    /// Payload bytes that are computed, or at another place modulo 4096 than in the model: a file
    /// system that shares blocks has to copy them.
    pub incongruent_bytes: u64,
    pub incongruent_expert_bytes: u64,
    /// Bytes of whole blocks that such a file system can share with the model; 0 if that is
    /// elsewhere.
    pub sharable_bytes: u64,
}

impl TreeReport {
    fn new(model: &Model) -> Self {
        let (tree, layout) = (model.tree(), model.layout());
        let incongruent = |ino| tree.incongruent_bytes(ino);
        let experts = layout.experts().iter();
        let experts = experts.filter_map(|file| tree.find(&file.kind.path()));
        let extents = tree.files().flat_map(|ino| tree.extents(ino));
        let sharable_bytes = extents.map(Extent::sharable_bytes).sum();
        Self {
            show: layout.show().to_string(),
            files: tree.files().count(),
            hf_files: hf_files(model),
            bytes: tree.total_size(),
            incongruent_bytes: tree.files().map(incongruent).sum(),
            incongruent_expert_bytes: experts.map(incongruent).sum(),
            sharable_bytes: match model.source().is_remote() {
                true => 0,
                false => sharable_bytes,
            },
        }
    }
}

/// Whether `hf/` can be shown.
#[derive(Debug, Clone, Serialize)]
pub struct DirectoryReport {
    pub possible: bool,
    /// `None` if it is possible.
    pub reason: Option<String>,
}

impl DirectoryReport {
    fn new(model: &Model) -> Self {
        let reason = match model.refuses_directory() {
            // The report says what cannot be shown.
            Ok(Some(LayoutError::Hf(cause))) => Some(cause.to_string()),
            Ok(refusal) => refusal.map(|cause| cause.to_string()),
            Err(cause) => Some(cause.to_string()),
        };
        Self {
            possible: reason.is_none(),
            reason,
        }
    }
}

fn hf_files(model: &Model) -> usize {
    let tree = model.tree();
    let directory = tree.find(HF_DIRECTORY).and_then(|hf| tree.children(hf));
    directory.map_or(0, |files| files.count())
}

/// One tensor of the model.
#[derive(Debug, Clone, Serialize)]
pub struct TensorReport<'a> {
    pub name: &'a str,
    /// 0-based.
    pub part: u32,
    pub ggml_type: &'static str,
    /// Row-major, in elements.
    pub shape: Vec<u64>,
    /// In safetensors; `U8` for GGML blocks.
    pub dtype: &'static str,
    /// In the part's file.
    pub offset: u64,
    pub bytes: u64,
}

impl<'a> Report<'a> {
    /// Describes a model, without its single tensors.
    pub fn new(model: &'a Model) -> Self {
        let layout = model.layout();
        let header = layout.model();
        let mut ggml_types: BTreeMap<_, Amount> = BTreeMap::new();
        let mut per_part = vec![0; header.parts.len()];
        for tensor in &header.tensors {
            let amount = ggml_types.entry(tensor.info.ggml_type.name).or_default();
            amount.tensors += 1;
            amount.bytes += tensor.info.bytes;
            per_part[tensor.part as usize] += 1;
        }
        let parts = model.source().paths().zip(&header.parts).zip(per_part);
        let parts = parts.map(|((path, part), tensors)| PartReport {
            path: path.to_string_lossy(),
            bytes: part.file_bytes,
            alignment: part.alignment,
            data_start: part.data_start,
            tensors,
        });
        let number = |key| header.get_of_architecture(key)?.value.as_u64();
        let payloads: Vec<u64> = layout.files().iter().map(|f| f.payload_bytes).collect();
        let expert_layers = expert_layers(layout, &payloads);
        Self {
            form: layout.form().name(),
            layers: layers(layout, &expert_layers),
            active: ActiveReport::new(layout, &payloads, &expert_layers),
            forms: FormsReport::new(model),
            memory: Memory::of_this_machine(),
            architecture: header.architecture(),
            block_count: number("block_count"),
            embedding_length: number("embedding_length"),
            vocab_size: layout.vocab_size(),
            expert_count: layout.expert_count(),
            gguf_version: header.version,
            parts: parts.collect(),
            bytes: header.parts.iter().map(|part| part.file_bytes).sum(),
            tensor_count: header.tensors.len(),
            ggml_types,
            components: components(layout),
            experts: ExpertsReport {
                files: layout.experts().len(),
                bytes: layout.experts().iter().map(|f| f.payload_bytes).sum(),
                used_per_token: used_per_token(layout),
                incomplete: incomplete(layout),
                layers: expert_layers,
            },
            tree: TreeReport::new(model),
            hf: DirectoryReport::new(model),
            tensors: None,
        }
    }

    /// The same, with every tensor of the model.
    pub fn with_tensors(self, model: &'a Model) -> Self {
        Self {
            tensors: Some(tensor_reports(model.layout())),
            ..self
        }
    }
}

fn components(layout: &Layout) -> BTreeMap<&'static str, Amount> {
    let files = layout.files().iter().filter_map(|file| match file.kind {
        FileKind::Base(component) => Some((component, file)),
        FileKind::Expert { .. } => None,
    });
    let amounts = files.map(|(component, file)| {
        let amount = Amount {
            tensors: layout.tensors(file).len(),
            bytes: file.payload_bytes,
        };
        (component.name(), amount)
    });
    amounts.collect()
}

fn used_per_token(layout: &Layout) -> Option<u64> {
    layout.expert_used_count()?.as_u64()
}

/// The experts of each layer, with the payload bytes of all files in some form.
fn expert_layers(layout: &Layout, payloads: &[u64]) -> Vec<ExpertLayerReport> {
    let mut layers: Vec<ExpertLayerReport> = Vec::new();
    for (file, bytes) in layout.files().iter().zip(payloads) {
        let FileKind::Expert { layer, .. } = file.kind else {
            continue;
        };
        match layers.last_mut().filter(|last| last.layer == layer) {
            Some(last) => {
                last.experts += 1;
                last.bytes += bytes;
            }
            None => layers.push(ExpertLayerReport {
                layer,
                experts: 1,
                bytes: *bytes,
            }),
        }
    }
    layers
}

fn tensor_reports(layout: &Layout) -> Vec<TensorReport<'_>> {
    let tensors = layout.model().tensors.iter();
    let reports = tensors.map(|tensor| TensorReport {
        name: &tensor.info.name,
        part: tensor.part,
        ggml_type: tensor.info.ggml_type.name,
        shape: Shape::of_dims(tensor.info.dims()).dims().to_vec(),
        dtype: Dtype::of(tensor.info.ggml_type).name(),
        offset: tensor.info.offset,
        bytes: tensor.info.bytes,
    });
    reports.collect()
}

fn layers(layout: &Layout, experts: &[ExpertLayerReport]) -> Vec<LayerReport> {
    let mut base_bytes: BTreeMap<u32, u64> = BTreeMap::new();
    for layer in experts {
        base_bytes.insert(layer.layer, 0);
    }
    let base = layout.files().len() - layout.experts().len();
    for tensor in layout.files()[..base]
        .iter()
        .flat_map(|file| layout.tensors(file))
    {
        let layer = tensor.gguf_name.strip_prefix("blk.");
        let layer = layer.and_then(|rest| rest.split('.').next()?.parse().ok());
        if let Some(layer) = layer {
            *base_bytes.entry(layer).or_default() += tensor.shown_bytes();
        }
    }
    let report = |(layer, base_bytes)| {
        let experts = experts.iter().find(|experts| experts.layer == layer);
        LayerReport {
            layer,
            kind: if experts.is_some() { "moe" } else { "dense" },
            base_bytes,
            experts: experts.map_or(0, |experts| experts.experts),
            expert_bytes: experts.map_or(0, |experts| experts.bytes),
        }
    };
    base_bytes.into_iter().map(report).collect()
}

impl ActiveReport {
    /// What one token needs of files with these payloads.
    fn new(layout: &Layout, payloads: &[u64], layers: &[ExpertLayerReport]) -> Self {
        let used = used_per_token(layout);
        let base = payloads.len() - layout.experts().len();
        let base_bytes = payloads[..base].iter().sum();
        let of_layer = |layer: &ExpertLayerReport, used: u64| {
            let experts = layer.experts as u64;
            // In 128 bits, since a model may claim to use any number.
            (u128::from(layer.bytes) * u128::from(used.min(experts)) / u128::from(experts)) as u64
        };
        let expert_bytes = used.map(|used| layers.iter().map(|l| of_layer(l, used)).sum());
        Self {
            experts_per_layer: used,
            expert_bytes,
            base_bytes,
            bytes: expert_bytes.map(|bytes: u64| bytes.saturating_add(base_bytes)),
        }
    }
}

/// The matrices of an expert, and what they are.
pub const MATRICES: [(&str, &str); 3] = [
    ("w1.weight", "gate"),
    ("w2.weight", "down"),
    ("w3.weight", "up"),
];

fn incomplete(layout: &Layout) -> Vec<IncompleteReport> {
    let mut found: Vec<IncompleteReport> = Vec::new();
    for file in layout.experts() {
        let FileKind::Expert { layer, expert } = file.kind else {
            continue;
        };
        let has = |name: &str| layout.tensors(file).any(|tensor| tensor.name == name);
        let missing = MATRICES.iter().map(|(name, _)| *name);
        let missing: Vec<_> = missing.filter(|name| !has(name)).collect();
        if missing.is_empty() {
            continue;
        }
        match found.iter_mut().find(|report| report.missing == missing) {
            Some(report) => report.experts += 1,
            None => found.push(IncompleteReport {
                missing,
                experts: 1,
                first: (layer, expert),
            }),
        }
    }
    found
}
