//! Why a model has no layout, and what to do about it.

use super::PartitionError;
use crate::codec::{Codec, Float, Output};
use crate::explain::{Explain, Hint};
use crate::form::{Form, UnknownTypes};
use crate::gguf::{LLAMA_CPP_GPT_OSS, ModelHeader, Tensor};
use crate::safetensors::{Dtype, METADATA_KEY};

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
            Self::UnknownTypes(_) => Some("use --as raw, which shows their blocks".into()),
            Self::SameName { .. } => Some("use another form, or --as raw".into()),
            Self::TooLarge { .. } => Some("use --as raw".into()),
        }
    }
}

/// A tensor as errors name it, with its GGUF dimensions.
pub(super) fn described(tensor: &Tensor) -> String {
    let info = &tensor.info;
    format!(
        "tensor {:?} {:?} {}",
        info.name,
        info.dims(),
        info.ggml_type
    )
}

/// Fails if a form needs numbers of types that nobody here knows.
pub(super) fn check_types(model: &ModelHeader, form: Form) -> Result<(), LayoutError> {
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
