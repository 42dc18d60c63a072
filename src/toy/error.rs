//! Why a toy cannot be written.

use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use crate::explain::{Explain, Hint};
use crate::gguf::{GgmlType, MAX_TENSORS};

/// Why a toy cannot be written. Nothing is left of it.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case", prefix = "toy.")]
pub enum ToyError {
    #[error("{0:?} exists already")]
    Exists(PathBuf),
    #[error("cannot write {path:?}: {cause}")]
    Io { path: PathBuf, cause: io::Error },
    #[error("{option} {value} is out of range")]
    OutOfRange {
        /// The option of the command line that sets the value.
        option: &'static str,
        value: u32,
        range: RangeInclusive<u32>,
    },
    #[error("the halves of a head are turned against each other, but --dim {0} is odd")]
    OddWidth(u32),
    #[error("{0} has no names like those of the reference converter")]
    ForeignNaming(&'static str),
    #[error("a toy cannot be made of {0}")]
    Type(&'static GgmlType),
    #[error(
        "{tensor}: a row of {elements} elements is not a whole number of {ggml_type} blocks of {}",
        ggml_type.block_size
    )]
    BrokenRow {
        tensor: String,
        elements: u64,
        ggml_type: &'static GgmlType,
        /// The option of the command line that sets the width of a row.
        option: &'static str,
    },
    #[error("cannot split {tensors} tensors into {parts} parts")]
    TooManyParts { tensors: usize, parts: usize },
    #[error("{0} tensors are more than a model may have ({MAX_TENSORS})")]
    TooManyTensors(usize),
    #[error("stopped, and nothing was kept")]
    Stopped,
}

impl Explain for ToyError {
    fn code(&self) -> &'static str {
        self.into()
    }

    fn hint(&self) -> Option<Hint> {
        Some(match self {
            Self::Exists(_) => "remove it, or write to another name".into(),
            Self::Io { cause, .. } => return cause.hint(),
            Self::OutOfRange { range, .. } => {
                format!("choose from {} to {}", range.start(), range.end()).into()
            }
            Self::OddWidth(_) => "make --dim a multiple of 2".into(),
            Self::ForeignNaming(_) => "choose another --naming, or leave out --arch".into(),
            Self::Type(_) => "choose a type that `odmoe-fs toy --help` lists".into(),
            Self::BrokenRow {
                ggml_type, option, ..
            } => format!("make {option} a multiple of {}", ggml_type.block_size).into(),
            Self::TooManyParts { tensors, .. } => format!("use --split {tensors} or less").into(),
            Self::TooManyTensors(_) => "use fewer --layers or --experts".into(),
            Self::Stopped => return None,
        })
    }
}
