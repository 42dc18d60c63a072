//! Writes the tests' models: a tensor table of `tests/data/models` becomes a GGUF of full size
//! whose payload is a hole, so that a model of hundreds of gigabytes takes no room.
//!
//! A table is a JSON object: `kv`, the keys and values, and `tensors`, a list of
//! `[name, [ne0, ne1, ...], type]` in GGUF order (contiguous first). A value is plain JSON, whose
//! GGUF type is guessed ([`guess`]), or `{"@type": "u8", "value": 200}`.

use std::fmt;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use odmoe_fs::gguf::write::Writer;
use odmoe_fs::gguf::{GgmlType, PartName, Value, ValueType};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value as Json;

/// Write a tensor table as a GGUF of full size whose payload is a hole
#[derive(Parser)]
struct Cli {
    table: PathBuf,
    /// The file to write; without .gguf, the prefix of the parts' names
    out: PathBuf,
    /// Write exactly N parts of about equal size
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    splits: Option<u16>,
    /// Of the parts, the first holds only keys and values
    #[arg(long, requires = "splits")]
    first_empty: bool,
    /// Write one part per tensor, behind a first one that holds only keys and values
    #[arg(long, conflicts_with = "splits")]
    one_per_part: bool,
    /// Write a tokenizer as large as the model's
    #[arg(long)]
    tokenizer: bool,
    /// Fill the payload: each aligned 8-byte word is splitmix64(part << 48 | file offset)
    #[arg(long)]
    fill_words: bool,
    /// Leave the layers from N on out
    #[arg(long, value_name = "N")]
    keep_layers: Option<u64>,
    /// Leave the experts from N on out
    #[arg(long, value_name = "N")]
    keep_experts: Option<u64>,
    /// Write general.alignment, and align to it
    #[arg(long, value_name = "A", value_parser = alignment)]
    alignment: Option<u32>,
}

fn alignment(text: &str) -> Result<u32, String> {
    let parsed = text.parse().ok().filter(|n: &u32| n.is_power_of_two());
    parsed.ok_or_else(|| "it must be a power of two".to_owned())
}

#[derive(Deserialize)]
struct Table {
    kv: Pairs,
    tensors: Vec<(String, Vec<u64>, String)>,
}

/// A JSON object in the order of its text, which `serde_json::Map` forgets.
struct Pairs(Vec<(String, Json)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let next = || map.next_entry().transpose();
                std::iter::from_fn(next)
                    .collect::<Result<_, _>>()
                    .map(Pairs)
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

struct Tensor {
    name: String,
    dims: Vec<u64>,
    ggml_type: &'static GgmlType,
    bytes: u64,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let text = std::fs::read(&cli.table).with_context(|| format!("{:?}", cli.table))?;
    let table: Table = serde_json::from_slice(&text)?;
    let key_values = key_values(table.kv, &cli)?;
    let tensors = tensors(table.tensors, &cli)?;
    let parts = parts(&tensors, &cli)?;
    let split = cli.splits.is_some() || cli.one_per_part;
    let alignment = cli.alignment.map(Value::U32);
    let alignment = alignment.map(|value| ("general.alignment".to_owned(), value));
    for (no, part) in parts.iter().enumerate() {
        let mut writer = Writer::new();
        // Each part has an alignment of its own; all else is said in the first.
        let others = if no == 0 { &key_values[..] } else { &[] };
        for (key, value) in alignment.iter().chain(others) {
            writer.key_value(key, value);
        }
        if split {
            writer.key_value("split.no", &Value::U16(no as u16));
            writer.key_value("split.count", &Value::U16(parts.len() as u16));
            writer.key_value("split.tensors.count", &Value::I32(tensors.len() as i32));
        }
        for tensor in &tensors[part.clone()] {
            writer.tensor(&tensor.name, &tensor.dims, tensor.ggml_type);
        }
        let path = if split {
            part_path(&cli.out, no + 1, parts.len())?
        } else {
            cli.out.clone()
        };
        let header = writer.header();
        let mut file = File::create(&path).with_context(|| format!("{path:?}"))?;
        file.write_all(&header.bytes)?;
        if cli.fill_words {
            let payload = header.bytes.len() as u64..header.file_bytes;
            fill_words(&file, no as u64, payload)?;
        }
        file.set_len(header.file_bytes)?;
        println!("{}, {} bytes", path.display(), header.file_bytes);
    }
    Ok(())
}

fn part_path(out: &Path, number: usize, count: usize) -> anyhow::Result<PathBuf> {
    let name = match out.extension() {
        Some(extension) if extension == "gguf" => out.file_stem(),
        _ => out.file_name(),
    };
    let part = PartName {
        prefix: name.context("OUT has no name")?.to_owned(),
        number: number as u64,
        count: count as u64,
    };
    Ok(out.with_file_name(part.sibling(part.number)))
}

/// Writes the words of a payload; one at either end may be cut.
fn fill_words(file: &File, part: u64, payload: Range<u64>) -> std::io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, file);
    for at in (payload.start / 8 * 8..payload.end).step_by(8) {
        let word = splitmix64(part << 48 | at).to_le_bytes();
        let first = payload.start.saturating_sub(at) as usize;
        let end = (payload.end - at).min(8) as usize;
        out.write_all(&word[first..end])?;
    }
    out.flush()
}

/// The first output of the generator SplitMix64 for a seed.
fn splitmix64(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The tensors of each part, in their order.
fn parts(tensors: &[Tensor], cli: &Cli) -> anyhow::Result<Vec<Range<usize>>> {
    if cli.one_per_part {
        let each = (0..tensors.len()).map(|n| n..n + 1);
        return Ok(std::iter::once(0..0).chain(each).collect());
    }
    let mut parts = Vec::new();
    if cli.first_empty {
        parts.push(0..0);
    }
    let count = usize::from(cli.splits.unwrap_or(1))
        .checked_sub(parts.len())
        .filter(|&count| count > 0)
        .context("--first-empty needs two parts at least")?;
    ensure!(
        count <= tensors.len() || count == 1,
        "cannot make {count} parts of {} tensors",
        tensors.len()
    );
    let total: u64 = tensors.iter().map(|tensor| tensor.bytes).sum();
    let (mut end, mut bytes) = (0, 0);
    for number in 1..=count {
        let goal = total / count as u64 * number as u64;
        let start = end;
        // One tensor is left for each part to come.
        while end < tensors.len() - (count - number) {
            let next = tensors[end].bytes;
            if end > start && number < count && bytes + next / 2 > goal {
                break;
            }
            bytes += next;
            end += 1;
        }
        parts.push(start..end);
    }
    Ok(parts)
}

fn tensors(table: Vec<(String, Vec<u64>, String)>, cli: &Cli) -> anyhow::Result<Vec<Tensor>> {
    let mut tensors = Vec::with_capacity(table.len());
    for (name, mut dims, type_name) in table {
        if !keep(&name, &mut dims, cli) {
            continue;
        }
        let ggml_type = GgmlType::from_name(&type_name)
            .with_context(|| format!("{name}: the type {type_name} is unknown"))?;
        let mut ne = [1; 4];
        ensure!(dims.len() <= 4, "{name} has more than four dimensions");
        ne[..dims.len()].copy_from_slice(&dims);
        let bytes = ggml_type.tensor_bytes(ne);
        tensors.push(Tensor {
            bytes: bytes
                .with_context(|| format!("{name}: no {type_name} has the shape {dims:?}"))?,
            name,
            dims,
            ggml_type,
        });
    }
    Ok(tensors)
}

/// Whether a tensor stays; its expert dimension is cut.
fn keep(name: &str, dims: &mut [u64], cli: &Cli) -> bool {
    let block = name.strip_prefix("blk.").and_then(|s| s.split_once('.'));
    let Some((layer, rest)) = block else {
        return true;
    };
    let below = |limit: Option<u64>, number: &str| match (limit, number.parse::<u64>()) {
        (Some(limit), Ok(number)) => number < limit,
        _ => true,
    };
    let words: Vec<_> = rest.split('.').collect();
    // blk.L.ffn_gate.E.weight, and the reference converter's blk.L.ffn.experts.E.w1.weight
    let stays = match words[..] {
        ["ffn_gate" | "ffn_up" | "ffn_down", expert, _] => below(cli.keep_experts, expert),
        ["ffn", "experts", expert, ..] => below(cli.keep_experts, expert),
        _ => true,
    };
    let experts = match words[..] {
        ["ffn", "gate", "weight"] => dims.first_mut(), // the reference's router is transposed
        ["ffn_gate_inp", "weight" | "bias"] | ["exp_probs_b", ..] => dims.last_mut(),
        [stack, _] if stack != "ffn_norm_exps" && stack.ends_with("exps") => dims.last_mut(),
        _ => None,
    };
    if let (Some(experts), Some(limit)) = (experts, cli.keep_experts) {
        *experts = limit.min(*experts);
    }
    stays && below(cli.keep_layers, layer)
}

fn key_values(pairs: Pairs, cli: &Cli) -> anyhow::Result<Vec<(String, Value)>> {
    let mut out = Vec::with_capacity(pairs.0.len());
    for (key, value) in pairs.0 {
        if key == "@tokenizer.vocab" {
            if cli.tokenizer {
                out.extend(tokenizer(value.as_u64().context(key)?));
            }
            continue;
        }
        let limit = if key.ends_with(".block_count") {
            cli.keep_layers
        } else if key.ends_with(".expert_count") || key == "kimi.num_experts_per_layer" {
            cli.keep_experts
        } else {
            None
        };
        let value = match (limit, value.as_u64()) {
            (Some(limit), Some(count)) => limit.min(count).into(),
            _ => value,
        };
        let value = guess(&value).with_context(|| key.clone())?;
        out.push((key, value));
    }
    Ok(out)
}

/// As many tokens, types and merges as a model with so large a vocabulary has, of usual lengths:
/// 6.8 MB for Kimi's 163,840 tokens.
fn tokenizer(vocab: u64) -> [(String, Value); 4] {
    let strings = |count, text: fn(u64) -> String| {
        let items = (0..count).map(|n| Value::String(text(n)));
        Value::array(ValueType::String, items.collect())
    };
    let tokens = strings(vocab, |n| format!("token_{n:05x}"));
    let types = vec![Value::I32(1); vocab as usize]; // 1: a normal token
    let merges = vocab.saturating_sub(512); // less the bytes and the special tokens
    let merges = strings(merges, |n| format!("{n:05x} {:04x}", n % 65_521));
    let template =
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}";
    [
        ("ggml.tokens", tokens),
        ("ggml.token_type", Value::array(ValueType::I32, types)),
        ("ggml.merges", merges),
        ("chat_template", Value::String(template.to_owned())),
    ]
    .map(|(key, value)| (format!("tokenizer.{key}"), value))
}

/// The value that a converter would write: integers as the first of u32, i32, u64 and i64 that
/// holds them, other numbers as f32, lists by what is in them (i32 if integers).
fn guess(value: &Json) -> anyhow::Result<Value> {
    let of = match value {
        Json::Bool(_) => "bool",
        Json::String(_) => "str",
        Json::Number(n) if n.is_f64() => "f32",
        Json::Number(n) => match (n.as_u64(), n.as_i64()) {
            (Some(0..=0xffff_ffff), _) => "u32",
            (Some(_), _) => "u64",
            (None, Some(-0x8000_0000..)) => "i32",
            (None, _) => "i64",
        },
        Json::Array(items) if items.iter().all(Json::is_string) => "arr_str",
        Json::Array(items) if items.iter().any(Json::is_f64) => "arr_f32",
        Json::Array(_) => "arr_i32",
        Json::Object(object) => {
            let of = object.get("@type").and_then(Json::as_str);
            let value = object.get("value").context("there is no value")?;
            return typed(of.context("there is no @type")?, value);
        }
        Json::Null => bail!("null has no type"),
    };
    typed(of, value)
}

/// A value of the type `u8`, ..., `arr_u8`, ..., or `arr_arr_u8`, ...
fn typed(of: &str, value: &Json) -> anyhow::Result<Value> {
    fn read<'de, T: Deserialize<'de>>(value: &'de Json) -> serde_json::Result<T> {
        T::deserialize(value)
    }
    Ok(match of {
        "u8" => Value::U8(read(value)?),
        "i8" => Value::I8(read(value)?),
        "u16" => Value::U16(read(value)?),
        "i16" => Value::I16(read(value)?),
        "u32" => Value::U32(read(value)?),
        "i32" => Value::I32(read(value)?),
        "u64" => Value::U64(read(value)?),
        "i64" => Value::I64(read(value)?),
        "f32" => Value::F32(read(value)?),
        "f64" => Value::F64(read(value)?),
        "bool" => Value::Bool(read(value)?),
        "str" => Value::String(read(value)?),
        _ => {
            let of = of.strip_prefix("arr_").context("@type is no type")?;
            let items = value.as_array().context("this is no list")?;
            let items = items.iter().map(|item| typed(of, item));
            let items = items.collect::<anyhow::Result<Vec<_>>>()?;
            // `str` begins `string`, and all other names are whole; what is left is a list of lists.
            let mut types = (0..).map_while(ValueType::from_id);
            let of = types.find(|t| t.name().starts_with(of));
            Value::array(of.unwrap_or(ValueType::Array), items)
        }
    })
}
