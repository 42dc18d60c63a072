//! Reads the fields of a header, one after another.
//!
//! Every length is compared with what is left of the file before anything is read, skipped or
//! allocated.

use std::collections::HashSet;
use std::fmt::Display;
use std::io::{BufRead, Seek, SeekFrom};

use super::error::{HeaderError, Problem};
use super::foreign;
use super::limits::*;
use super::tensor::TensorInfo;
use super::types::{self, GgmlType, OLLAMA_MXFP4};
use super::value::{KeyValue, Value, ValueType};
use super::{MAGIC, OLLAMA_GPT_OSS};

impl KeyValue {
    /// Reads the whole value, including all that reading the header skipped. The reader must be of
    /// the same file, which has `file_bytes` bytes, and may be at any position.
    pub fn read_whole<R: BufRead + Seek>(
        &self,
        mut reader: R,
        file_bytes: u64,
    ) -> Result<Value, HeaderError> {
        let field = format_args!("key {:?}, value", self.key);
        let position = self.range.start;
        let sought = reader.seek(SeekFrom::Start(position));
        let mut cursor = Cursor {
            reader,
            position,
            file_bytes,
            keep: Keep::Everything,
        };
        sought.map_err(|e| cursor.fail(field, e.into()))?;
        cursor.value(self.value.value_type(), 0, &field)
    }
}

/// Which values a reader keeps in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// Scalars, and strings and arrays up to [`MAX_KEPT_STRING_BYTES`] and [`MAX_KEPT_ITEMS`].
    Short,
    Everything,
}

pub(super) struct Cursor<R> {
    pub(super) reader: R,
    pub(super) position: u64,
    pub(super) file_bytes: u64,
    pub(super) keep: Keep,
}

impl<R: BufRead + Seek> Cursor<R> {
    fn left(&self) -> u64 {
        self.file_bytes.saturating_sub(self.position)
    }

    fn fail(&self, field: impl Display, problem: Problem) -> HeaderError {
        HeaderError {
            offset: self.position,
            field: field.to_string(),
            problem,
        }
    }

    /// Checks that `needed` more bytes exist.
    fn need(&self, needed: u64, field: &impl Display) -> Result<(), HeaderError> {
        let left = self.left();
        if needed > left {
            return Err(self.fail(field, Problem::Truncated { needed, left }));
        }
        if self.position + needed > MAX_HEADER_BYTES {
            return Err(self.fail(field, Problem::HeaderTooLarge));
        }
        Ok(())
    }

    fn bytes<const N: usize>(&mut self, field: &impl Display) -> Result<[u8; N], HeaderError> {
        self.need(N as u64, field)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes, field)?;
        Ok(bytes)
    }

    fn u32(&mut self, field: &impl Display) -> Result<u32, HeaderError> {
        Ok(u32::from_le_bytes(self.bytes(field)?))
    }

    fn u64(&mut self, field: &impl Display) -> Result<u64, HeaderError> {
        Ok(u64::from_le_bytes(self.bytes(field)?))
    }

    fn skip(&mut self, count: u64, field: &impl Display) -> Result<(), HeaderError> {
        self.need(count, field)?;
        // `need` keeps `count` below MAX_HEADER_BYTES, so it fits an i64.
        self.reader
            .seek_relative(count as i64)
            .map_err(|e| self.fail(field, e.into()))?;
        self.position += count;
        Ok(())
    }

    pub(super) fn fixed_header(&mut self) -> Result<u32, HeaderError> {
        let head = self.reader.fill_buf();
        let head = head.map(|head| foreign::recognise(head, self.file_bytes));
        match head {
            Err(e) => return Err(self.fail("the magic", e.into())),
            Ok(Some(problem)) => return Err(self.fail("the magic", problem)),
            Ok(None) => {}
        }
        let magic = self.bytes::<4>(&"the magic")?;
        if magic != MAGIC {
            self.position = 0;
            let found = magic.escape_ascii().to_string();
            return Err(self.fail("the magic", Problem::Magic(found)));
        }
        let version = self.u32(&"the version")?;
        let problem = match version {
            2 | 3 => return Ok(version),
            // The magic is the same in both byte orders; a version that is zero in its low half
            // can only be a swapped one.
            v if v != 0 && v & 0xffff == 0 => Problem::BigEndian,
            v => Problem::Version(v),
        };
        self.position -= 4;
        Err(self.fail("the version", problem))
    }

    /// A number of records, each at least `min_bytes` long.
    pub(super) fn count(
        &mut self,
        field: &str,
        min_bytes: u64,
        limit: u64,
    ) -> Result<u64, HeaderError> {
        let count = self.u64(&field)?;
        let left = self.left();
        let problem = if count > left / min_bytes {
            Problem::Count { count, left }
        } else if count > limit {
            Problem::AboveLimit { count, limit }
        } else {
            return Ok(count);
        };
        self.position -= 8;
        Err(self.fail(field, problem))
    }

    /// A string that must be a usable name: not empty, UTF-8, without NUL.
    fn name(&mut self, limit: u64, field: &impl Display) -> Result<String, HeaderError> {
        let start = self.position;
        let count = self.u64(field)?;
        self.need(count, field)?;
        let fail = |problem| HeaderError {
            offset: start,
            field: field.to_string(),
            problem,
        };
        if count == 0 {
            return Err(fail(Problem::Empty));
        }
        if count > limit {
            return Err(fail(match limit {
                MAX_NAME_BYTES => Problem::LongName {
                    bytes: count,
                    limit,
                },
                _ => Problem::AboveLimit { count, limit },
            }));
        }
        let bytes = self.vec(count, field)?;
        if bytes.contains(&0) {
            return Err(fail(Problem::Nul));
        }
        String::from_utf8(bytes).map_err(|_| fail(Problem::Utf8))
    }

    fn vec(&mut self, count: u64, field: &impl Display) -> Result<Vec<u8>, HeaderError> {
        self.need(count, field)?;
        let mut bytes = vec![0; count as usize];
        self.fill(&mut bytes, field)?;
        Ok(bytes)
    }

    /// Reads bytes that `need` has found to exist.
    fn fill(&mut self, bytes: &mut [u8], field: &impl Display) -> Result<(), HeaderError> {
        self.reader
            .read_exact(bytes)
            .map_err(|e| self.fail(field, e.into()))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    pub(super) fn key_values(&mut self, count: u64) -> Result<Vec<KeyValue>, HeaderError> {
        // No room for `count` is made at once: in a sparse file it is only a claim.
        let mut key_values: Vec<KeyValue> = Vec::new();
        let mut seen = HashSet::new();
        for index in 0..count {
            let start = self.position;
            let key = self.name(MAX_KEY_BYTES, &format_args!("key {index}"))?;
            if !seen.insert(key.clone()) {
                self.position = start;
                return Err(self.fail(format_args!("key {index} {key:?}"), Problem::Duplicate));
            }
            let field = format_args!("key {index} {key:?}, value");
            let value_type = self.value_type(&field)?;
            let value_start = self.position;
            let value = self.value(value_type, 0, &field)?;
            key_values.push(KeyValue {
                value,
                range: value_start..self.position,
                key,
            });
        }
        Ok(key_values)
    }

    fn value_type(&mut self, field: &impl Display) -> Result<ValueType, HeaderError> {
        let id = self.u32(field)?;
        ValueType::from_id(id).ok_or_else(|| HeaderError {
            offset: self.position - 4,
            field: field.to_string(),
            problem: Problem::ValueType(id),
        })
    }

    fn value(
        &mut self,
        value_type: ValueType,
        depth: u32,
        field: &impl Display,
    ) -> Result<Value, HeaderError> {
        Ok(match value_type {
            ValueType::U8 => Value::U8(u8::from_le_bytes(self.bytes(field)?)),
            ValueType::I8 => Value::I8(i8::from_le_bytes(self.bytes(field)?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(self.bytes(field)?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(self.bytes(field)?)),
            ValueType::U32 => Value::U32(self.u32(field)?),
            ValueType::I32 => Value::I32(i32::from_le_bytes(self.bytes(field)?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(self.bytes(field)?)),
            // llama.cpp takes any byte but 0 for true.
            ValueType::Bool => Value::Bool(self.bytes::<1>(field)? != [0]),
            ValueType::U64 => Value::U64(self.u64(field)?),
            ValueType::I64 => Value::I64(i64::from_le_bytes(self.bytes(field)?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.bytes(field)?)),
            ValueType::String => self.string(field)?,
            ValueType::Array => self.array(depth, field)?,
        })
    }

    fn string(&mut self, field: &impl Display) -> Result<Value, HeaderError> {
        let count = self.u64(field)?;
        if count > MAX_KEPT_STRING_BYTES && self.keep == Keep::Short {
            self.skip(count, field)?;
            return Ok(Value::LongString(count));
        }
        let bytes = self.vec(count, field)?;
        Ok(Value::String(match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(e) => String::from_utf8_lossy(e.as_bytes()).into_owned(),
        }))
    }

    fn array(&mut self, depth: u32, field: &impl Display) -> Result<Value, HeaderError> {
        if depth >= MAX_ARRAY_DEPTH {
            return Err(self.fail(field, Problem::Nesting));
        }
        let of = self.value_type(field)?;
        let len = self.u64(field)?;
        // A string is at least its length word, an array its type and its length.
        let min_bytes = of.fixed_bytes().unwrap_or(match of {
            ValueType::String => 8,
            _ => 12,
        });
        let left = self.left();
        if len > left / min_bytes {
            self.position -= 8;
            return Err(self.fail(field, Problem::Count { count: len, left }));
        }
        let short = len <= MAX_KEPT_ITEMS && of != ValueType::Array;
        let keep = short || self.keep == Keep::Everything;
        // An item takes more memory than its bytes in the file, so room is made as they come.
        let mut items = keep.then(|| Vec::with_capacity(len.min(MAX_KEPT_ITEMS) as usize));
        match (of, of.fixed_bytes()) {
            (_, Some(bytes)) if !keep => self.skip(len * bytes, field)?,
            (ValueType::String, _) if !keep => {
                for _ in 0..len {
                    let count = self.u64(field)?;
                    self.skip(count, field)?;
                }
            }
            _ => {
                for _ in 0..len {
                    let item = self.value(of, depth + 1, field)?;
                    if let Some(items) = &mut items {
                        items.push(item);
                    }
                }
            }
        }
        Ok(Value::Array { of, len, items })
    }

    /// The tensor table. With each tensor comes the file offset of its offset field, for messages.
    pub(super) fn tensor_infos(
        &mut self,
        count: u64,
        architecture: Option<&str>,
    ) -> Result<Vec<(TensorInfo, u64)>, HeaderError> {
        let mut infos = Vec::new();
        let mut seen = HashSet::new();
        for index in 0..count {
            let start = self.position;
            let name = self.name(MAX_NAME_BYTES, &format_args!("tensor {index}, name"))?;
            if !seen.insert(name.clone()) {
                self.position = start;
                return Err(self.fail(format_args!("tensor {index} {name:?}"), Problem::Duplicate));
            }
            infos.push(self.tensor_info(index, name, architecture)?);
        }
        Ok(infos)
    }

    fn tensor_info(
        &mut self,
        index: u64,
        name: String,
        architecture: Option<&str>,
    ) -> Result<(TensorInfo, u64), HeaderError> {
        let field = |what: &str| format!("tensor {index} {name:?}, {what}");
        let at = self.position;
        let fail = |offset, what: &str, problem| HeaderError {
            offset,
            field: field(what),
            problem,
        };

        let n_dims = self.u32(&field("number of dimensions"))?;
        if n_dims > 4 {
            return Err(fail(at, "shape", Problem::Dimensions(n_dims)));
        }
        let n_dims = n_dims as usize;
        let mut ne = [1u64; 4];
        let mut elements = 1i64;
        for dim in 0..n_dims {
            let signed = i64::from_le_bytes(self.bytes(&field("shape"))?);
            ne[dim] = u64::try_from(signed)
                .map_err(|_| fail(at, "shape", Problem::NegativeDimension(signed)))?;
            // As in llama.cpp, a dimension of 0 does not excuse the others.
            elements = elements
                .checked_mul(signed.max(1))
                .ok_or_else(|| fail(at, "shape", Problem::Elements(ne[..n_dims].to_vec())))?;
        }

        let type_at = self.position;
        let id = self.u32(&field("type"))?;
        let ggml_type = GgmlType::from_id(id).ok_or_else(|| {
            let problem = match types::retired(id) {
                Some(_) if id == OLLAMA_MXFP4 && architecture == Some(OLLAMA_GPT_OSS) => {
                    Problem::OllamaMxfp4
                }
                Some((name, advice)) => Problem::RetiredType { id, name, advice },
                None => Problem::UnknownType(id),
            };
            fail(type_at, "type", problem)
        })?;
        if !ne[0].is_multiple_of(u64::from(ggml_type.block_size)) {
            let problem = Problem::Blocks {
                ne0: ne[0],
                ggml_type,
            };
            return Err(fail(at, "shape", problem));
        }
        let bytes = ggml_type.tensor_bytes(ne).ok_or_else(|| {
            let dims = ne[..n_dims].to_vec();
            fail(at, "shape", Problem::Bytes { dims, ggml_type })
        })?;
        let offset_at = self.position;
        let offset = self.u64(&field("offset"))?;
        let info = TensorInfo {
            name,
            ne,
            n_dims,
            ggml_type,
            offset,
            bytes,
        };
        Ok((info, offset_at))
    }
}
