//! A split set as one GGUF: what `llama-gguf-split --merge` writes from the same parts.
//!
//! The problem: most programs read a single file, and a merged copy takes as much room again as the
//! model.
//!
//! The plan: such a copy is the key/values of the first part, a new tensor table, and the tensors of
//! all parts one after another. So it is a list of runs: ranges of the parts, and a few bytes that
//! are made ([`Made`]). Merging follows `gguf-split.cpp` and `gguf.cpp` of llama.cpp (2026-10):
//! `split.count` becomes zero and moves behind the other keys, trailing dimensions of 1 go, and every
//! tensor is padded with zeros.
//!
//! Where that program would write a file that cannot be read, this is the file that it should write:
//! tensors lie at multiples of `general.alignment`, where it uses 32 whatever that key says, and
//! texts that contain NUL are whole.

use std::io::{self, Read as _, Write};

use super::split::ModelHeader;
use super::tensor::TensorInfo;
use super::value::{KeyValue, ValueType};
use super::{FIXED_HEADER_BYTES, MAGIC};

/// `GGUF_VERSION` of llama.cpp.
const VERSION: u32 = 3;
const SPLIT_COUNT: &str = "split.count";

/// Bytes that are in no part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// Magic, version and counts.
    Fixed,
    /// The new `split.count`, and the tensor table with the padding after it.
    Table,
    /// So many zeros, fewer than the alignment.
    Zeros(u32),
}

/// Where a run of a merged file comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Made(Made),
    /// Bytes of a part, from an offset in its file.
    Part {
        /// 0-based.
        part: u32,
        offset: u64,
    },
}

/// All parts of a model as one file.
#[derive(Debug)]
pub struct Merged {
    /// Bytes of each run and where they come from, in the order of the file.
    pub runs: Vec<(u64, Origin)>,
    /// Bytes before the first tensor.
    pub header_bytes: u64,
}

impl Merged {
    /// Lays out the file. A model of one part is that part.
    pub fn new(model: &ModelHeader) -> Self {
        if let [part] = &model.parts[..] {
            let origin = Origin::Part { part: 0, offset: 0 };
            return Self {
                runs: vec![(part.file_bytes, origin)],
                header_bytes: part.data_start,
            };
        }
        let mut runs = Runs::default();
        runs.add(FIXED_HEADER_BYTES, Origin::Made(Made::Fixed));
        let all = &model.key_value_range;
        let keys = |start, end: u64| {
            let origin = Origin::Part {
                part: 0,
                offset: start,
            };
            (end - start, origin)
        };
        let kept = match split_count(model) {
            Some(kv) => vec![keys(all.start, start_of(kv)), keys(kv.range.end, all.end)],
            None => vec![keys(all.start, all.end)],
        };
        for (bytes, origin) in kept {
            runs.add(bytes, origin);
        }
        runs.add(table_bytes(model), Origin::Made(Made::Table));
        let header_bytes = runs.bytes;
        let alignment = u64::from(alignment(model));
        for tensor in &model.tensors {
            let TensorInfo { offset, bytes, .. } = tensor.info;
            let part = tensor.part;
            runs.add(bytes, Origin::Part { part, offset });
            let padding = bytes.next_multiple_of(alignment) - bytes;
            runs.add(padding, Origin::Made(Made::Zeros(padding as u32)));
        }
        Self {
            runs: runs.list,
            header_bytes,
        }
    }
}

impl Made {
    /// Writes the bytes.
    pub fn render(self, model: &ModelHeader, out: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Fixed => {
                out.write_all(&MAGIC)?;
                out.write_all(&VERSION.to_le_bytes())?;
                out.write_all(&(model.tensors.len() as u64).to_le_bytes())?;
                out.write_all(&(model.key_values.len() as u64).to_le_bytes())
            }
            Self::Table => write_table(model, out),
            Self::Zeros(count) => io::copy(&mut io::repeat(0).take(count.into()), out).map(drop),
        }
    }
}

/// A list of runs; empty ones are left out, and those that follow each other in a part are joined.
#[derive(Default)]
struct Runs {
    list: Vec<(u64, Origin)>,
    bytes: u64,
}

impl Runs {
    fn add(&mut self, bytes: u64, origin: Origin) {
        if bytes == 0 {
            return;
        }
        self.bytes += bytes;
        if let (Some((last_bytes, last)), Origin::Part { part, offset }) =
            (self.list.last_mut(), origin)
            && *last
                == (Origin::Part {
                    part,
                    offset: offset.wrapping_sub(*last_bytes),
                })
        {
            *last_bytes += bytes;
            return;
        }
        self.list.push((bytes, origin));
    }
}

fn split_count(model: &ModelHeader) -> Option<&KeyValue> {
    model.get(SPLIT_COUNT)
}

/// Where the entry of a key starts: its length, its text, the type of its value, and the value.
fn start_of(kv: &KeyValue) -> u64 {
    kv.range.start - 4 - kv.key.len() as u64 - 8
}

fn alignment(model: &ModelHeader) -> u32 {
    model.parts[0].alignment
}

/// Bytes in front of the table.
fn bytes_before(model: &ModelHeader) -> u64 {
    let keys = model.key_value_range.end - model.key_value_range.start;
    let removed = split_count(model).map_or(0, |kv| kv.range.end - start_of(kv));
    FIXED_HEADER_BYTES + keys - removed
}

fn table_bytes(model: &ModelHeader) -> u64 {
    let infos = model.tensors.iter().map(|tensor| {
        // Length and text of the name, number of dimensions, dimensions, type, offset.
        8 + tensor.info.name.len() + 4 + 8 * stored_dims(&tensor.info).len() + 4 + 8
    });
    let infos = infos.sum::<usize>() as u64;
    let count = match split_count(model) {
        Some(kv) => 8 + kv.key.len() as u64 + 4 + 2,
        None => 0,
    };
    let before = bytes_before(model);
    (before + count + infos).next_multiple_of(alignment(model).into()) - before
}

fn write_table(model: &ModelHeader, out: &mut impl Write) -> io::Result<()> {
    let mut bytes = Vec::new();
    if let Some(kv) = split_count(model) {
        put_string(&mut bytes, &kv.key);
        bytes.extend((ValueType::U16 as u32).to_le_bytes());
        bytes.extend(0u16.to_le_bytes());
    }
    let alignment = u64::from(alignment(model));
    let mut offset = 0u64;
    for tensor in &model.tensors {
        let info = &tensor.info;
        let dims = stored_dims(info);
        put_string(&mut bytes, &info.name);
        bytes.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
        bytes.extend(info.ggml_type.id.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        offset += info.bytes.next_multiple_of(alignment);
    }
    bytes.resize(table_bytes(model) as usize, 0);
    out.write_all(&bytes)
}

/// The dimensions without the last ones that are 1, but at least one, as `ggml_n_dims` counts them.
fn stored_dims(info: &TensorInfo) -> &[u64] {
    let last = info.ne.iter().rposition(|&n| n > 1);
    &info.ne[..last.unwrap_or(0) + 1]
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
