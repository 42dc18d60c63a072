//! How much of a header is believed, and how much of it is kept.
//!
//! The ceilings are far above any published model (Kimi-K2.5: 6.85 MB, 1,096 tensors). Anything
//! above them is an attack or a broken file, and would cost memory before it is found out.

pub(super) const MAX_HEADER_BYTES: u64 = 1 << 28;
/// Tensors of a model, in all of its parts together.
pub const MAX_TENSORS: u64 = 1 << 20;
/// `split.count` is a u16.
pub(super) const MAX_PARTS: u64 = 65_535;
/// Offsets in files are signed 64-bit numbers, and headers in front of the tensors need some room.
pub(super) const MAX_MODEL_BYTES: u64 = i64::MAX as u64 - (1 << 50);
pub(super) const MAX_KEY_VALUES: u64 = 1 << 20;
/// `docs/gguf.md`: keys are at most 65535 bytes long.
pub(super) const MAX_KEY_BYTES: u64 = 65_535;
/// llama.cpp: `GGML_MAX_NAME` is 64 with the terminating NUL.
pub(super) const MAX_NAME_BYTES: u64 = 63;
/// Longer strings are skipped; only their length is kept.
pub(super) const MAX_KEPT_STRING_BYTES: u64 = 64 << 10;
/// Longer arrays are skipped; only their type and length are kept.
pub(super) const MAX_KEPT_ITEMS: u64 = 64;
/// How deeply arrays may be nested (huggingface.js draws the same line).
pub(super) const MAX_ARRAY_DEPTH: u32 = 4;
/// The smallest key/value: a key of one byte (8 + 1), type (4), a value of one byte.
pub(super) const MIN_KEY_VALUE_BYTES: u64 = 14;
/// The smallest tensor info: name (8 + 1), n_dims (4), type (4), offset (8).
pub(super) const MIN_TENSOR_INFO_BYTES: u64 = 25;
