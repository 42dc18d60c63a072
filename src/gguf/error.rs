//! Why a header is refused: the field, the place, what is wrong there, and what to do about it.
//!
//! A wrong piece of advice costs a user a download of hundreds of gigabytes. So each problem says
//! what its commonest cause calls for, and a checksum is mentioned only where damage is likely.

use std::io;

use super::OLLAMA_GPT_OSS;
use super::foreign::Foreign;
use super::limits::{MAX_ARRAY_DEPTH, MAX_HEADER_BYTES};
use super::types::GgmlType;
use super::value::ValueType;
use crate::explain::{Explain, Hint};

/// Why a header was refused, and where.
#[derive(Debug, thiserror::Error)]
#[error("{field}, at byte {offset}: {problem}")]
pub struct HeaderError {
    /// The byte of the file at which the field starts.
    pub offset: u64,
    /// The field, in words.
    pub field: String,
    pub problem: Problem,
}

/// What can be wrong with a field of a header.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case", prefix = "gguf.")]
pub enum Problem {
    #[error("found \"{0}\" instead of \"GGUF\", so this is not a GGUF file")]
    Magic(String),
    /// The same, of a file whose kind is known.
    #[error("this is {}", .0.what)]
    #[strum(serialize = "magic")]
    Foreign(Foreign),
    #[error("this is an empty file")]
    #[strum(serialize = "magic")]
    EmptyFile,
    #[error("this is a file that begins with {0} zeros")]
    #[strum(serialize = "magic")]
    Zeros(usize),
    #[error("this is a big-endian GGUF")]
    BigEndian,
    #[error("version {0} is not supported (only 2 and 3 are)")]
    Version(u32),
    #[error("needs {needed} bytes, but the file has only {left} more")]
    Truncated { needed: u64, left: u64 },
    #[error("the header goes beyond {MAX_HEADER_BYTES} bytes, which no real model has")]
    HeaderTooLarge,
    #[error("{count} is more than the {left} bytes left in the file can hold")]
    Count { count: u64, left: u64 },
    #[error("{count} is above the limit of {limit}")]
    AboveLimit { count: u64, limit: u64 },
    #[error("has {bytes} bytes, but GGML allows only {limit}")]
    LongName { bytes: u64, limit: u64 },
    #[error("is empty")]
    Empty,
    #[error("holds a NUL byte")]
    Nul,
    #[error("is not valid UTF-8")]
    Utf8,
    #[error("occurs a second time")]
    Duplicate,
    #[error("value type {0} does not exist")]
    ValueType(u32),
    #[error("arrays are nested deeper than {MAX_ARRAY_DEPTH} levels")]
    Nesting,
    #[error("must be of type u32, but is {}", .0.name())]
    AlignmentType(ValueType),
    #[error("{0} is not a power of two")]
    AlignmentValue(u32),
    #[error("{0} dimensions are more than GGML's 4")]
    Dimensions(u32),
    #[error("dimension {0} is negative")]
    NegativeDimension(i64),
    #[error("the product of the dimensions {0:?} is too large")]
    Elements(Vec<u64>),
    #[error("type {id} is {name}, which is not supported")]
    RetiredType {
        id: u32,
        name: &'static str,
        advice: &'static str,
    },
    #[error(
        "type 4 is Ollama's own MXFP4 here (general.architecture is {OLLAMA_GPT_OSS:?}), which has its nibbles in another order"
    )]
    OllamaMxfp4,
    #[error("type {0} is unknown, so the size of the tensor cannot be known")]
    UnknownType(u32),
    #[error(
        "rows of {ne0} elements are not a whole number of {ggml_type} blocks of {}",
        ggml_type.block_size
    )]
    Blocks {
        ne0: u64,
        ggml_type: &'static GgmlType,
    },
    #[error("the size in bytes of {dims:?} {ggml_type} does not fit into 64 bits")]
    Bytes {
        dims: Vec<u64>,
        ggml_type: &'static GgmlType,
    },
    #[error("is {found}, but the tensors before it end at {expected}")]
    Offset { found: u64, expected: u64 },
    #[error(
        "the tensors end at byte {end}, but the file has only {file_bytes} bytes ({} %)",
        percent(*file_bytes, *end)
    )]
    BeyondEnd {
        /// The end of the last tensor.
        end: u64,
        file_bytes: u64,
    },
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// Numbers and types that no program writes.
const DAMAGED: &str = "no program writes this, so the file is probably damaged: compare its checksum with the published one";
/// Lengths beyond the end of the file.
const CUT_OFF: &str =
    "the file is cut off or damaged: compare its size and its checksum with the published ones";
/// What gguf.cpp of llama.cpp refuses as well, and what a converter may write all the same.
const CONVERT: &str = "llama.cpp refuses it, too: convert the model again with a current llama.cpp";
/// What llama.cpp may accept.
const NAMES: &str =
    "the program that wrote the file must give its keys and tensors names that are text";
/// What to do about gpt-oss as Ollama writes it.
pub(crate) const LLAMA_CPP_GPT_OSS: &str =
    "take llama.cpp's file of the model, whose general.architecture is \"gpt-oss\"";
const NEWER: &str = "look for a newer odmoe-fs that knows it";

impl Explain for HeaderError {
    fn code(&self) -> &'static str {
        self.problem.code()
    }

    fn hint(&self) -> Option<Hint> {
        self.problem.hint()
    }
}

impl Explain for Problem {
    fn code(&self) -> &'static str {
        self.into()
    }

    fn hint(&self) -> Option<Hint> {
        let hint = match self {
            Self::Magic(_) => "check which file this is: a GGUF begins with these four letters",
            Self::Foreign(foreign) => return Some(foreign.advice.clone()),
            Self::EmptyFile => "download it again, nothing of it was written",
            Self::Zeros(_) => {
                "wait for its download or copy to end, or start it again: so far, only room was reserved"
            }
            Self::BigEndian => {
                "take the little-endian file, or convert a copy with gguf-py's `gguf-convert-endian COPY little`"
            }
            Self::Version(0) => DAMAGED,
            Self::Version(1) => "convert the model again with a current llama.cpp",
            Self::Version(_) | Self::UnknownType(_) => NEWER,
            Self::Truncated { .. } | Self::Count { .. } => CUT_OFF,
            Self::HeaderTooLarge
            | Self::AboveLimit { .. }
            | Self::ValueType(_)
            | Self::NegativeDimension(_)
            | Self::Elements(_)
            | Self::Bytes { .. } => DAMAGED,
            Self::Empty | Self::Nul | Self::Utf8 => NAMES,
            Self::LongName { .. }
            | Self::Duplicate
            | Self::Nesting
            | Self::AlignmentType(_)
            | Self::AlignmentValue(_)
            | Self::Dimensions(_)
            | Self::Blocks { .. }
            | Self::Offset { .. } => CONVERT,
            Self::RetiredType { advice, .. } => advice,
            Self::OllamaMxfp4 => LLAMA_CPP_GPT_OSS,
            Self::BeyondEnd { .. } => {
                "the file is not complete: continue its download, or fetch it again"
            }
            Self::Io(cause) => return cause.hint(),
        };
        Some(Hint::Borrowed(hint))
    }
}

fn percent(part: u64, whole: u64) -> u64 {
    (u128::from(part) * 100 / u128::from(whole.max(1))) as u64
}
