//! The safetensors format: dtypes, shapes and the header.
//!
//! A file is a little-endian u64 `N`, `N` bytes of JSON (padded with spaces) and the payload.
//! Format and limits: the reference crate `safetensors` 0.8 of Hugging Face.

use std::borrow::Cow;
use std::io::{self, Write};

use serde::Serialize;

use crate::gguf::GgmlType;

/// The reference reader refuses longer headers (JSON and padding, without the length word).
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes of the length word.
pub const LENGTH_WORD_BYTES: u64 = 8;
/// The key of the string map; a tensor cannot have this name.
pub const METADATA_KEY: &str = "__metadata__";

/// The safetensors dtypes that GGML types map to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    F64,
    I64,
    F32,
    I32,
    /// The packed codes of MLX.
    U32,
    F16,
    Bf16,
    I16,
    I8,
    /// The raw bytes of GGML blocks, and MLX's scales of FP4 codes.
    U8,
}

impl Dtype {
    /// The dtype of the same meaning; block types are bytes.
    pub fn of(ggml_type: &GgmlType) -> Self {
        match ggml_type.name {
            "F64" => Self::F64,
            "I64" => Self::I64,
            "F32" => Self::F32,
            "I32" => Self::I32,
            "F16" => Self::F16,
            "BF16" => Self::Bf16,
            "I16" => Self::I16,
            "I8" => Self::I8,
            _ => Self::U8,
        }
    }

    /// The name in a header.
    pub fn name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::I64 => "I64",
            Self::F32 => "F32",
            Self::I32 => "I32",
            Self::U32 => "U32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::I16 => "I16",
            Self::I8 => "I8",
            Self::U8 => "U8",
        }
    }

    /// Bytes of one element, which is also its alignment.
    pub fn width(self) -> u64 {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 => 2,
            Self::I8 | Self::U8 => 1,
        }
    }
}

/// A shape of at most four dimensions, row-major (contiguous last).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    dims: [u64; 4],
    len: usize,
}

impl Shape {
    /// The logical shape of a tensor: its GGUF dimensions (contiguous first) reversed.
    pub fn of_dims(ne: &[u64]) -> Self {
        let mut dims = [0; 4];
        for (dim, n) in dims.iter_mut().zip(ne.iter().rev()) {
            *dim = *n;
        }
        Self {
            dims,
            len: ne.len(),
        }
    }

    /// The shape in elements of the dtype: block types count bytes in the last dimension, as
    /// gguf-py's `quant_shape_to_byte_shape` does. The rows must be whole blocks.
    pub fn stored(self, ggml_type: &GgmlType) -> Self {
        match Dtype::of(ggml_type) {
            Dtype::U8 => self.with_last(|row| ggml_type.row_bytes(row).unwrap_or(0)),
            _ => self,
        }
    }

    /// The same with another last dimension, made from that by `change`; a scalar has none.
    pub fn with_last(mut self, change: impl FnOnce(u64) -> u64) -> Self {
        if let Some(last) = self.dims[..self.len].last_mut() {
            *last = change(*last);
        }
        self
    }

    /// The number of elements; `u64::MAX` stands for all that do not fit 64 bits.
    pub fn elements(&self) -> u64 {
        let dims = self.dims().iter();
        dims.fold(1, |product: u64, &n| product.saturating_mul(n))
    }

    /// Bytes of an array of this shape; `u64::MAX` stands for all that do not fit 64 bits.
    pub fn bytes(&self, dtype: Dtype) -> u64 {
        self.elements().saturating_mul(dtype.width())
    }

    /// The dimensions, row-major.
    pub fn dims(&self) -> &[u64] {
        &self.dims[..self.len]
    }
}

/// One array of a file, as its header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array<'a> {
    pub name: Cow<'a, str>,
    pub dtype: Dtype,
    /// In elements of the dtype, row-major.
    pub shape: Shape,
    /// Bytes of payload.
    pub bytes: u64,
}

/// Writes the JSON of a header, without length word and padding: `__metadata__` with the pairs
/// given and one whose value is a text of JSON, then the arrays in payload order, side by side.
pub fn write_header_json<'a, W: Write>(
    out: &mut W,
    metadata: &[(&str, &str)],
    json_key: &str,
    json_value: impl FnOnce(&mut InString<W>) -> io::Result<()>,
    arrays: impl Iterator<Item = Array<'a>>,
) -> io::Result<()> {
    out.write_all(b"{")?;
    write_json(out, METADATA_KEY)?;
    out.write_all(b":{")?;
    for (key, value) in metadata {
        write_json(out, key)?;
        out.write_all(b":")?;
        write_json(out, value)?;
        out.write_all(b",")?;
    }
    write_json(out, json_key)?;
    out.write_all(b":\"")?;
    json_value(&mut InString(out))?;
    out.write_all(b"\"}")?;
    let mut begin = 0u64;
    for array in arrays {
        out.write_all(b",")?;
        write_json(out, &*array.name)?;
        out.write_all(b":{\"dtype\":")?;
        write_json(out, array.dtype.name())?;
        out.write_all(b",\"shape\":")?;
        write_json(out, array.shape.dims())?;
        out.write_all(b",\"data_offsets\":")?;
        let end = begin + array.bytes;
        write_json(out, &[begin, end])?;
        out.write_all(b"}")?;
        begin = end;
    }
    out.write_all(b"}")
}

/// Writes one value. Not with `write!`, which is slower: a mount waits for the lengths of tens of
/// thousands of headers.
pub(crate) fn write_json<T: Serialize + ?Sized>(out: &mut impl Write, value: &T) -> io::Result<()> {
    serde_json::to_writer(out, value).map_err(io::Error::from)
}

/// Passes JSON on as the inside of a JSON string. JSON itself holds no control characters, so
/// quotes and backslashes are all that needs escaping.
pub struct InString<'a, W>(&'a mut W);

impl<W: Write> Write for InString<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for run in bytes.split_inclusive(|b| matches!(b, b'"' | b'\\')) {
            match run.split_last() {
                Some((special @ (b'"' | b'\\'), plain)) => {
                    self.0.write_all(plain)?;
                    self.0.write_all(&[b'\\', *special])?;
                }
                _ => self.0.write_all(run)?,
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
