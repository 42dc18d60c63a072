//! The small GGUF writer behind `toy` and the tests: a header, and where each tensor's data goes.

use super::types::GgmlType;
use super::value::{Value, ValueType};
use super::{DEFAULT_ALIGNMENT, MAGIC};

/// Collects key/values and tensors, then lays out one GGUF file (version 3, little-endian).
#[derive(Debug, Default)]
pub struct Writer {
    n_key_values: u64,
    key_values: Vec<u8>,
    tensors: Vec<Entry>,
    alignment: Option<u32>,
}

#[derive(Debug)]
struct Entry {
    name: String,
    dims: Vec<u64>,
    ggml_type: &'static GgmlType,
}

/// A laid-out file: the bytes in front of the data, and where the data goes.
#[derive(Debug)]
pub struct Written {
    /// Header and padding; tensor data starts right after it.
    pub bytes: Vec<u8>,
    /// Per tensor, in order: `(offset in the file, bytes)`.
    pub data: Vec<(u64, u64)>,
    /// Size of the whole file, with the padding after the last tensor.
    pub file_bytes: u64,
}

impl Writer {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a key/value pair. `general.alignment`, a power of two, takes effect.
    ///
    /// # Panics
    /// On a value that cannot be written back: a skipped array or a string that was not kept.
    pub fn key_value(&mut self, key: &str, value: &Value) {
        if let ("general.alignment", &Value::U32(alignment)) = (key, value) {
            self.alignment = Some(alignment);
        }
        self.n_key_values += 1;
        put_string(&mut self.key_values, key);
        put_u32(&mut self.key_values, value.value_type() as u32);
        put_value(&mut self.key_values, value);
    }

    /// Adds a tensor with dimensions in GGUF order (contiguous first).
    pub fn tensor(&mut self, name: &str, dims: &[u64], ggml_type: &'static GgmlType) {
        self.tensors.push(Entry {
            name: name.to_owned(),
            dims: dims.to_vec(),
            ggml_type,
        });
    }

    /// Lays the file out.
    ///
    /// # Panics
    /// If a tensor has more than four dimensions, rows that are not a whole number of
    /// blocks, or a size beyond 64 bits.
    pub fn header(&self) -> Written {
        let alignment = u64::from(self.alignment.unwrap_or(DEFAULT_ALIGNMENT)).max(1);
        let mut bytes = MAGIC.to_vec();
        put_u32(&mut bytes, 3);
        put_u64(&mut bytes, self.tensors.len() as u64);
        put_u64(&mut bytes, self.n_key_values);
        bytes.extend_from_slice(&self.key_values);
        let mut data = Vec::with_capacity(self.tensors.len());
        let mut end = 0u64;
        for tensor in &self.tensors {
            put_string(&mut bytes, &tensor.name);
            put_u32(&mut bytes, tensor.dims.len() as u32);
            let mut ne = [1; 4];
            ne[..tensor.dims.len()].copy_from_slice(&tensor.dims);
            for dim in &tensor.dims {
                put_u64(&mut bytes, *dim);
            }
            put_u32(&mut bytes, tensor.ggml_type.id);
            put_u64(&mut bytes, end);
            let size = tensor
                .ggml_type
                .tensor_bytes(ne)
                .expect("the tensor has a size");
            data.push((end, size));
            end = (end + size).next_multiple_of(alignment);
        }
        if !self.tensors.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(alignment as usize), 0);
        }
        let data_start = bytes.len() as u64;
        for (offset, _) in &mut data {
            *offset += data_start;
        }
        Written {
            bytes,
            data,
            file_bytes: data_start + end,
        }
    }
}

fn put_u32(out: &mut Vec<u8>, n: u32) {
    out.extend_from_slice(&n.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, n: u64) {
    out.extend_from_slice(&n.to_le_bytes());
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    put_u64(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(n) => out.push(*n),
        Value::I8(n) => out.extend_from_slice(&n.to_le_bytes()),
        Value::U16(n) => out.extend_from_slice(&n.to_le_bytes()),
        Value::I16(n) => out.extend_from_slice(&n.to_le_bytes()),
        Value::U32(n) => put_u32(out, *n),
        Value::I32(n) => out.extend_from_slice(&n.to_le_bytes()),
        Value::F32(n) => out.extend_from_slice(&n.to_le_bytes()),
        Value::Bool(b) => out.push((*b).into()),
        Value::U64(n) => put_u64(out, *n),
        Value::I64(n) => out.extend_from_slice(&n.to_le_bytes()),
        Value::F64(n) => out.extend_from_slice(&n.to_le_bytes()),
        Value::String(text) => put_string(out, text),
        Value::Array {
            of,
            items: Some(items),
            ..
        } => {
            put_u32(out, *of as u32);
            put_u64(out, items.len() as u64);
            for item in items {
                assert_eq!(item.value_type(), *of, "an array holds one type");
                put_value(out, item);
            }
        }
        Value::Array { items: None, .. } | Value::LongString(_) => {
            panic!("a value that was skipped when read cannot be written")
        }
    }
}

impl Value {
    /// An array of `of` with these items.
    pub fn array(of: ValueType, items: Vec<Value>) -> Self {
        Self::Array {
            of,
            len: items.len() as u64,
            items: Some(items),
        }
    }
}
