//! Why a model has no model directory.

use super::architectures;
use crate::explain::{Explain, Hint};
use crate::gguf::GgmlType;

/// Why a model directory cannot be shown.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case", prefix = "hf.")]
pub enum HfError {
    #[error("{} is no architecture whose model directory is known", described(.0))]
    Architecture(Option<String>),
    #[error("the key {0} is missing, which config.json needs")]
    MissingKey(String),
    #[error("the key {key} {problem}")]
    Key { key: String, problem: String },
    #[error("tensor {0:?} is missing")]
    MissingTensor(String),
    #[error("tensor {name:?} {dims:?} {ggml_type} does not fit: {problem}")]
    Tensor {
        name: String,
        /// In GGUF order.
        dims: Vec<u64>,
        ggml_type: &'static GgmlType,
        problem: String,
    },
    #[error(
        "the model directory has no name for {}{:?}",
        if .0.len() > 1 { format!("{} tensors, such as ", .0.len()) } else { "tensor ".to_owned() },
        .0.first().map_or("", String::as_str)
    )]
    NoName(Vec<String>),
    #[error(
        "the factors of tensor {0:?} are not those of any kind of scaling that config.json can express"
    )]
    RopeFactors(String),
    #[error("the directory would have {0} tensors, more than any real model")]
    TooManyTensors(u64),
    #[error(
        "{0} of a tensor's rows are in the directory twice or not at all: this is a bug in odmoe-fs"
    )]
    Partition(String),
}

fn described(architecture: &Option<String>) -> String {
    match architecture {
        Some(name) => format!("{name:?}"),
        None => "a model without general.architecture".to_owned(),
    }
}

/// For what older converters did not write: another download would be the same.
const CONVERT: &str = "convert the model again with a current llama.cpp, or leave hf out of --show";

impl Explain for HfError {
    fn code(&self) -> &'static str {
        self.into()
    }

    fn hint(&self) -> Option<Hint> {
        Some(match self {
            Self::Architecture(_) => {
                let known: Vec<_> = architectures::names().collect();
                let known = known.join(", ");
                format!("those of {known} are known; leave hf out of --show").into()
            }
            Self::MissingKey(_) | Self::MissingTensor(_) => CONVERT.into(),
            Self::Key { .. }
            | Self::Tensor { .. }
            | Self::NoName(_)
            | Self::RopeFactors(_)
            | Self::TooManyTensors(_) => {
                "leave hf out of --show; if yours is a published model, report it to odmoe-fs"
                    .into()
            }
            Self::Partition(_) => "please report it with the model's name".into(),
        })
    }
}
