//! A strict, bounded reader of GGUF headers, and the small writer behind `toy`.
//!
//! The problem: a GGUF comes from strangers and is larger than memory. The header says where
//! every tensor lies; it must be believed only as far as the file's real size bears it out.
//!
//! The plan: [`Header::read`] reads one part's header (never its payload), checks every count,
//! length and offset before using it, and skips long arrays instead of storing them.
//! [`ModelHeader::join`] checks that the parts of a split set belong together.
//!
//! Format: `docs/gguf.md` of ggml-org/ggml; where that is silent, what `gguf.cpp` and the model
//! loader of llama.cpp accept.

mod cursor;
mod error;
mod foreign;
mod header;
mod joined;
mod limits;
pub mod merged;
mod split;
mod tensor;
mod types;
mod value;
pub mod write;

pub(crate) use error::LLAMA_CPP_GPT_OSS;
pub use error::{HeaderError, Problem};
pub use foreign::Foreign;
pub use header::Header;
pub use joined::Joined;
pub use limits::MAX_TENSORS;
pub use split::{ModelHeader, Part, PartName, SplitError, SplitKeys, Tensor, looks_like_raw_cut};
pub use tensor::TensorInfo;
pub use types::{GGML_TYPES, GgmlType, OLLAMA_MXFP4};
pub use value::{KeyValue, Value, ValueType};

/// The first four bytes of every GGUF.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// `general.architecture` of gpt-oss as Ollama writes it, with another order of rows and nibbles.
/// In llama.cpp it is `gpt-oss`.
pub const OLLAMA_GPT_OSS: &str = "gptoss";
/// Bytes before the first key/value: magic, version, number of tensors, number of key/values.
pub const FIXED_HEADER_BYTES: u64 = 24;
/// The alignment of tensor data where `general.alignment` is absent, in bytes.
pub const DEFAULT_ALIGNMENT: u32 = 32;
