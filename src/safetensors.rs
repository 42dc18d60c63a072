//! The safetensors format: dtypes, shapes and the header.
//!
//! A file is a little-endian u64 `N`, `N` bytes of JSON (padded with spaces) and the payload.
//! Format and limits: the reference crate `safetensors` 0.8 of Hugging Face.

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
    F16,
    Bf16,
    I16,
    I8,
    /// The raw bytes of GGML blocks.
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
            Self::F32 | Self::I32 => 4,
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
        let mut stored = self;
        if Dtype::of(ggml_type) == Dtype::U8
            && let Some(last) = stored.dims[..stored.len].last_mut()
        {
            *last = ggml_type.row_bytes(*last).unwrap_or(0);
        }
        stored
    }

    /// The dimensions, row-major.
    pub fn dims(&self) -> &[u64] {
        &self.dims[..self.len]
    }

    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        write_json(out, self.dims())
    }
}

/// One tensor of a file, as its header describes it.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// The name in the file.
    pub name: &'a str,
    /// The logical shape, row-major.
    pub shape: Shape,
    pub ggml_type: &'static GgmlType,
    /// Bytes of payload.
    pub bytes: u64,
    /// Where the bytes come from: the tensor's name in the model, …
    pub gguf_name: &'a str,
    /// … the part (0-based), …
    pub gguf_part: u32,
    /// … and the first byte in that part's file.
    pub gguf_offset: u64,
}

/// Writes the JSON of a header, without length word and padding: `__metadata__` with the pairs
/// given and `odmoe.tensors`, then the tensors in payload order, without gaps.
pub fn write_header_json<'a>(
    out: &mut impl Write,
    metadata: &[(&str, &str)],
    tensors: impl Iterator<Item = TensorView<'a>> + Clone,
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
    out.write_all(b"\"odmoe.tensors\":\"")?;
    write_sources(&mut InString(out), tensors.clone())?;
    out.write_all(b"\"}")?;
    let mut begin = 0u64;
    for tensor in tensors {
        out.write_all(b",")?;
        write_json(out, tensor.name)?;
        out.write_all(b":{\"dtype\":")?;
        write_json(out, Dtype::of(tensor.ggml_type).name())?;
        out.write_all(b",\"shape\":")?;
        tensor.shape.stored(tensor.ggml_type).write(out)?;
        out.write_all(b",\"data_offsets\":")?;
        let end = begin + tensor.bytes;
        write_json(out, &[begin, end])?;
        out.write_all(b"}")?;
        begin = end;
    }
    out.write_all(b"}")
}

/// The JSON object of `odmoe.tensors`: what each tensor is in the model.
fn write_sources<'a>(
    out: &mut impl Write,
    tensors: impl Iterator<Item = TensorView<'a>>,
) -> io::Result<()> {
    let mut comma = "{";
    for tensor in tensors {
        out.write_all(comma.as_bytes())?;
        write_json(out, tensor.name)?;
        out.write_all(b":{\"ggml_type\":")?;
        write_json(out, tensor.ggml_type.name)?;
        out.write_all(b",\"shape\":")?;
        tensor.shape.write(out)?;
        out.write_all(b",\"gguf_name\":")?;
        write_json(out, tensor.gguf_name)?;
        out.write_all(b",\"gguf_part\":")?;
        write_json(out, &tensor.gguf_part)?;
        out.write_all(b",\"gguf_offset\":")?;
        write_json(out, &tensor.gguf_offset)?;
        out.write_all(b"}")?;
        comma = ",";
    }
    // A file without tensors does not exist, but its header would still be valid.
    out.write_all(if comma == "{" { b"{}" } else { b"}" })
}

/// Writes one value. Not with `write!`, which is slower: a mount waits for the lengths of tens of
/// thousands of headers.
fn write_json<T: Serialize + ?Sized>(out: &mut impl Write, value: &T) -> io::Result<()> {
    serde_json::to_writer(out, value).map_err(io::Error::from)
}

/// Passes JSON on as the inside of a JSON string. JSON itself holds no control characters, so
/// quotes and backslashes are all that needs escaping.
struct InString<'a, W>(&'a mut W);

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

#[cfg(test)]
mod tests {
    use super::*;

    fn view<'a>(name: &'a str, ne: &[u64], ggml_type: &str) -> TensorView<'a> {
        let ggml_type = GgmlType::from_name(ggml_type).unwrap();
        let mut whole = [1; 4];
        whole[..ne.len()].copy_from_slice(ne);
        TensorView {
            name,
            shape: Shape::of_dims(ne),
            ggml_type,
            bytes: ggml_type.tensor_bytes(whole).unwrap(),
            gguf_name: name,
            gguf_part: 0,
            gguf_offset: 123,
        }
    }

    #[test]
    fn the_reference_crate_reads_a_header_with_hostile_names() {
        let names = ["a\"b\\c", "../../x\n\u{1b}[31m", "", "模型"];
        let tensors = names.map(|name| view(name, &[256, 3], "Q4_K"));
        let mut json = Vec::new();
        write_header_json(&mut json, &[("format", "pt")], tensors.into_iter()).unwrap();
        let mut file = (json.len() as u64).to_le_bytes().to_vec();
        file.extend(&json);
        file.resize(file.len() + 4 * 3 * 144, 0);
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&file).unwrap();
        let parsed = safetensors::SafeTensors::deserialize(&file).unwrap();
        for name in names {
            assert_eq!(parsed.tensor(name).unwrap().shape(), [3, 144]);
        }
        let sources = &metadata.metadata().as_ref().unwrap()["odmoe.tensors"];
        let sources: serde_json::Value = serde_json::from_str(sources).unwrap();
        assert_eq!(sources[names[0]]["shape"], serde_json::json!([3, 256]));
        assert_eq!(sources[names[1]]["gguf_name"], names[1]);
    }

    #[test]
    fn scalars_and_empty_tensors_keep_their_shape() {
        assert_eq!(view("s", &[], "F32").shape.dims(), [0u64; 0]);
        assert_eq!(view("e", &[0], "F32").bytes, 0);
        let row = view("r", &[512], "IQ4_KS");
        assert_eq!(row.shape.stored(row.ggml_type).dims(), [2 * 136 + 4]);
    }
}
