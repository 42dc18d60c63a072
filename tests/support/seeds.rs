//! Seeds for the fuzzers: the malformed files, small models of every naming, the headers of real
//! models, and blocks of every type. `cargo run --example seeds -- FOLDER` writes them as one
//! corpus per target.

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use odmoe_fs::codec::{Codec, Float, Output};
use odmoe_fs::gguf::write::Writer;
use odmoe_fs::gguf::{GGML_TYPES, GgmlType, Header, Value, ValueType};

#[allow(dead_code)] // for the example, not where this is a module
fn main() -> std::io::Result<()> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from);
    let folder = folder.expect("usage: seeds FOLDER");
    let slices = vec![vec![3, 10, 0, 7, 20, 1, 3, 5, 2, 50, 0, 255, 9, 40]];
    let targets = [
        ("gguf", gguf()),
        ("model", model()),
        ("slices", slices),
        ("codec", codec()),
    ];
    for (target, seeds) in targets {
        let corpus = folder.join(target);
        fs::create_dir_all(&corpus)?;
        for (number, seed) in seeds.iter().enumerate() {
            fs::write(corpus.join(format!("seed-{number:03}")), seed)?;
        }
    }
    Ok(())
}

/// Whole files, headers without their payload, joined parts, files of other kinds, and file names.
pub fn gguf() -> Vec<Vec<u8>> {
    let (hostile, made, real) = (hostile(), made(), real());
    hostile
        .into_iter()
        .chain(made.into_iter().flatten())
        .chain(real)
        .chain(joined())
        .chain(FOREIGN.iter().map(|bytes| bytes.to_vec()))
        .collect()
}

/// Beginnings of files that are not GGUF, and names of parts and pieces.
const FOREIGN: &[&[u8]] = &[
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7c\nsize 7516192768\n",
    b"/annex/objects/SHA256E-s7--00.gguf\n",
    b"<!DOCTYPE html><html><title>Log in</title></html>",
    b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>",
    b"{\"error\":\"Access to model a/b is restricted.\"}",
    b"{\"layers\":[{\"mediaType\":\"application/vnd.ollama.image.model\",\"digest\":\"sha256:00ff\"}]}",
    b"FROM ./model.gguf\n",
    b"\x02\0\0\0\0\0\0\0{}",
    b"PK\x03\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0archive/data.pkl",
    b"MZqFpD='\n",
    b"\x05\0\0\0\x15\0\0\0blk.0.attn_k.weight",
    b"\xff\xfeE\0n\0t\0r\0y\0",
    b"xxxxGGUF\x03\0\0\0",
    b"m-00001-of-00002.gguf",
    b"m.gguf.part-1of2",
    b"mod\xe8le.gguf.ab",
];

/// The parts of sets in one file, with a payload of zeros.
fn joined() -> Vec<Vec<u8>> {
    let sets = made().into_iter().filter(|parts| parts.len() > 1);
    let whole = |part: Vec<u8>| {
        let header = Header::read(Cursor::new(&part), u64::MAX >> 1).expect("it was just made");
        let mut part = part;
        part.resize(header.data_end().next_multiple_of(32) as usize, 0);
        part
    };
    sets.map(|parts| parts.into_iter().flat_map(whole).collect())
        .collect()
}

/// Models in the form that the target takes: parts, each with a hole in place of its payload.
pub fn model() -> Vec<Vec<u8>> {
    let single = hostile().into_iter().map(|bytes| packed(&[bytes], 0));
    let made = made().into_iter().map(|parts| packed(&parts, 20));
    let real = real().into_iter().map(|bytes| packed(&[bytes], 43));
    single.chain(made).chain(real).collect()
}

/// Three blocks of each type that has numbers, for each output, in the form that the target takes.
/// Their bytes count up, so that scales are finite and codes differ.
pub fn codec() -> Vec<Vec<u8>> {
    let seed = |(ggml_type, output): (usize, u8)| {
        let bytes = 3 * GGML_TYPES[ggml_type].block_bytes as usize;
        let mut seed = vec![ggml_type as u8, output, 1, 2];
        seed.extend((0..bytes).map(|at| (at % 120) as u8));
        seed
    };
    let numbers = Output::Numbers(Float::F32);
    (0..GGML_TYPES.len())
        .filter(|ggml_type| Codec::of(&GGML_TYPES[*ggml_type], numbers).is_some())
        .flat_map(|ggml_type| (0..24).map(move |output| (ggml_type, output)))
        .map(seed)
        .collect()
}

/// Puts parts together as `checks::model` takes them apart.
fn packed(parts: &[Vec<u8>], hole: u8) -> Vec<u8> {
    let mut bytes = vec![parts.len() as u8 - 1];
    for (index, part) in parts.iter().enumerate() {
        bytes.push(hole);
        if index + 1 < parts.len() {
            let length = u16::try_from(part.len()).expect("parts are small");
            bytes.extend(length.to_le_bytes());
        }
        bytes.extend(part);
    }
    bytes
}

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

/// The files of a folder with this extension, sorted by name.
fn files(folder: &str, extension: &str) -> Vec<Vec<u8>> {
    let entries = data().join(folder).read_dir().expect("the folder is there");
    let paths = entries.map(|entry| entry.expect("it can be listed").path());
    let mut paths: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    paths.sort();
    paths
        .iter()
        .map(|path| fs::read(path).expect("it can be read"))
        .collect()
}

fn hostile() -> Vec<Vec<u8>> {
    files("hostile", "gguf")
}

/// The tables of real models as headers.
fn real() -> Vec<Vec<u8>> {
    let tables = files("models", "json").into_iter();
    tables
        .map(|table| header_of(&serde_json::from_slice(&table).expect("it is JSON")))
        .collect()
}

fn header_of(table: &serde_json::Value) -> Vec<u8> {
    let mut writer = Writer::new();
    for (key, value) in table["kv"].as_object().expect("a table has keys") {
        let value = match value {
            serde_json::Value::String(text) => Value::String(text.clone()),
            serde_json::Value::Bool(bool) => Value::Bool(*bool),
            number => match number.as_u64().and_then(|n| u32::try_from(n).ok()) {
                Some(n) => Value::U32(n),
                None => Value::F32(number.as_f64().unwrap_or(0.0) as f32),
            },
        };
        writer.key_value(key, &value);
    }
    for tensor in table["tensors"].as_array().expect("a table has tensors") {
        let dims: Vec<u64> = tensor[1]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|d| d.as_u64())
            .collect();
        let ggml_type = tensor[2]
            .as_str()
            .and_then(GgmlType::from_name)
            .expect("the type is known");
        writer.tensor(
            tensor[0].as_str().expect("a tensor has a name"),
            &dims,
            ggml_type,
        );
    }
    writer.header().bytes
}

type Tensor<'a> = (&'a str, &'a [u64], &'a str);

/// Small models: each naming, each kind of value, two and three parts.
fn made() -> Vec<Vec<Vec<u8>>> {
    let stacked: &[Tensor] = &[
        ("token_embd.weight", &[32, 10], "F32"),
        ("blk.0.ffn_gate_exps.weight", &[32, 8, 2], "Q4_0"),
        ("blk.0.ffn_down_exps.weight", &[32, 32, 2], "Q8_0"),
        ("blk.0.ffn_up_exps.weight", &[32, 8, 2], "F16"),
        ("blk.0.ffn_up_exps.bias", &[8, 2], "F32"),
        ("blk.0.ffn_up_exps.scale", &[2], "F32"),
        ("blk.0.attn_norm.weight", &[32], "F32"),
        ("output.weight", &[32, 10], "BF16"),
    ];
    let fused: &[Tensor] = &[
        ("blk.3.ffn_gate_up_exps.weight", &[32, 8, 3], "MXFP4"),
        ("blk.3.ffn_down_exps.weight", &[32, 32, 3], "IQ4_NL"),
        ("blk.3.ffn_gate_up_exps.bias", &[8, 3], "F32"),
    ];
    let single: &[Tensor] = &[
        ("blk.1.ffn_gate.0.weight", &[32, 8], "F32"),
        ("blk.1.ffn_gate.7.weight", &[32, 8], "F32"),
        ("blk.2.ffn.experts.3.w2.weight", &[8, 8], "I8"),
    ];
    let one_byte: &[Tensor] = &[("blk.0.ffn_up_exps.weight", &[1, 1, 65_536], "I8")];
    let mut models: Vec<Vec<Vec<u8>>> = [stacked, fused, single, one_byte]
        .into_iter()
        .map(|tensors| vec![part(tensors, None)])
        .collect();
    for count in [2, 3] {
        let tensors: Vec<&[Tensor]> = stacked.chunks(stacked.len().div_ceil(count)).collect();
        let part = |(no, some): (usize, &&[Tensor])| part(some, Some((no, count, stacked.len())));
        models.push(tensors.iter().enumerate().map(part).collect());
    }
    models
}

fn part(tensors: &[Tensor], split: Option<(usize, usize, usize)>) -> Vec<u8> {
    let mut writer = Writer::new();
    writer.key_value("general.architecture", &Value::String("moe".into()));
    for (key, value) in values() {
        writer.key_value(key, &value);
    }
    if let Some((no, count, all)) = split {
        writer.key_value("split.no", &Value::U16(no as u16));
        writer.key_value("split.count", &Value::U16(count as u16));
        writer.key_value("split.tensors.count", &Value::I32(all as i32));
    }
    for (name, dims, ggml_type) in tensors {
        writer.tensor(
            name,
            dims,
            GgmlType::from_name(ggml_type).expect("the type is known"),
        );
    }
    writer.header().bytes
}

/// A value of every type.
fn values() -> BTreeMap<&'static str, Value> {
    let words = ["../../x", "a\nb", "\u{1b}[2J", "\""].map(|word| Value::String(word.into()));
    BTreeMap::from([
        ("moe.expert_used_count", Value::U32(2)),
        ("a.u8", Value::U8(1)),
        ("a.i8", Value::I8(-1)),
        ("a.u16", Value::U16(2)),
        ("a.i16", Value::I16(-2)),
        ("a.i32", Value::I32(-3)),
        ("a.f32", Value::F32(0.1)),
        ("a.bool", Value::Bool(true)),
        ("a.u64", Value::U64(1 << 60)),
        ("a.i64", Value::I64(i64::MIN)),
        ("a.f64", Value::F64(f64::NAN)),
        (
            "tokenizer.ggml.tokens",
            Value::array(ValueType::String, words.to_vec()),
        ),
    ])
}
