//! One line of a header's tensor table.

use super::types::GgmlType;

/// One tensor of one GGUF file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// 1 to 63 bytes of UTF-8 without NUL; otherwise any text, never to be used as a path.
    pub name: String,
    /// Dimensions in GGUF order (contiguous first); those not stored are 1.
    pub ne: [u64; 4],
    /// How many dimensions were stored, 0 (a scalar) to 4.
    pub n_dims: usize,
    pub ggml_type: &'static GgmlType,
    /// First byte of the data, counted from the start of the file.
    pub offset: u64,
    /// Bytes of data, without padding.
    pub bytes: u64,
}

impl TensorInfo {
    /// The stored dimensions, in GGUF order (contiguous first).
    pub fn dims(&self) -> &[u64] {
        &self.ne[..self.n_dims]
    }
}
