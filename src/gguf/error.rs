//! Why a header is refused: the field, the place, and what is wrong there.

use std::io;

use super::limits::{MAX_ARRAY_DEPTH, MAX_HEADER_BYTES};
use super::types::GgmlType;
use super::value::ValueType;
use crate::explain::{DOWNLOAD_AGAIN, Explain, Hint, written};

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
    #[error(
        "found \"{0}\" instead of \"GGUF\", so this is no GGUF file; give a model in the GGUF format"
    )]
    Magic(String),
    #[error("this is a big-endian GGUF; convert it with gguf-py's gguf_convert_endian.py")]
    BigEndian,
    #[error(
        "version {0} is not supported (only 2 and 3 are); convert the model again with a current llama.cpp"
    )]
    Version(u32),
    #[error(
        "needs {needed} bytes, but the file has only {left} more; download it again, it is truncated or corrupt"
    )]
    Truncated { needed: u64, left: u64 },
    #[error("the header goes beyond {MAX_HEADER_BYTES} bytes, which no real model has")]
    HeaderTooLarge,
    #[error(
        "{count} is more than the {left} bytes left in the file can hold; download it again, it is truncated or corrupt"
    )]
    Count { count: u64, left: u64 },
    #[error("{count} is above the limit of {limit}")]
    AboveLimit { count: u64, limit: u64 },
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
    #[error("type {id} is {name}, which is not supported; {advice}")]
    RetiredType {
        id: u32,
        name: &'static str,
        advice: &'static str,
    },
    #[error(
        "type {0} is unknown, so the size of the tensor cannot be known; look for a newer odmoe-fs that knows it"
    )]
    UnknownType(u32),
    #[error("rows of {ne0} elements are no whole number of {ggml_type} blocks of {}", ggml_type.block_size)]
    Blocks {
        ne0: u64,
        ggml_type: &'static GgmlType,
    },
    #[error("the size in bytes of {dims:?} {ggml_type} does not fit 64 bits")]
    Bytes {
        dims: Vec<u64>,
        ggml_type: &'static GgmlType,
    },
    #[error(
        "is {found}, but the tensors before it end at {expected}; download it again, it is corrupt"
    )]
    Offset { found: u64, expected: u64 },
    #[error(
        "the data ends at byte {end}, but the file has only {file_bytes} bytes; download it again, it is truncated"
    )]
    BeyondEnd { end: u64, file_bytes: u64 },
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
}

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
        match self {
            Self::Io(cause) => cause.hint(),
            _ => written(self).or(Some(DOWNLOAD_AGAIN)),
        }
    }
}
