//! The documents: `registry.json`, `metadata.json`, `metadata.gguf`, and the headers of files.
//!
//! Each is a function that renders into a `Write`; its length is the same function into a
//! counter. JSON has an indent of two spaces, as the reference converter writes it.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use serde_json::value::RawValue;

use super::counting::CountingWriter;
use super::{BASE_DIRECTORY, Component, EXPERTS_DIRECTORY, FileKind, Layout, TensorFile};
use crate::gguf::{FIXED_HEADER_BYTES, KeyValue, MAGIC, Value};
use crate::tree::{Content, DocId, NewFile};

/// The path of the list of experts below the root.
pub const REGISTRY_PATH: &str = "experts/registry.json";
/// The path of the description of the model below the root.
pub const METADATA_PATH: &str = "base_model/metadata.json";
/// The path of the key/values as a GGUF without tensors below the root.
pub const METADATA_GGUF_PATH: &str = "base_model/metadata.gguf";

/// A run of bytes that we make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doc {
    /// `experts/registry.json`
    Registry,
    /// `base_model/metadata.json`
    Metadata,
    /// The fixed part of `base_model/metadata.gguf`
    GgufHeader,
    /// The value of `split.count` in `base_model/metadata.gguf`: zero, since it is one file.
    SplitCount,
    /// Everything in front of the payload of the file with this index in [`Layout::files`]
    Header(u32),
}

const FIRST_HEADER: u32 = 4;

impl Doc {
    /// The number that stands for the document in a tree.
    pub fn id(self) -> DocId {
        DocId(match self {
            Self::Registry => 0,
            Self::Metadata => 1,
            Self::GgufHeader => 2,
            Self::SplitCount => 3,
            Self::Header(index) => FIRST_HEADER + index,
        })
    }

    /// The document that the number stands for.
    pub fn of_id(id: DocId) -> Self {
        match id.0 {
            0 => Self::Registry,
            1 => Self::Metadata,
            2 => Self::GgufHeader,
            3 => Self::SplitCount,
            n => Self::Header(n - FIRST_HEADER),
        }
    }
}

/// Says of a file whether the documents shall list it.
pub type Present<'a> = &'a dyn Fn(&TensorFile) -> bool;

impl Layout {
    /// Renders a document of the whole tree.
    pub fn render(&self, doc: Doc, out: &mut impl Write) -> io::Result<()> {
        match doc {
            Doc::Registry => self.render_registry(&|_| true, out),
            Doc::Metadata => self.render_metadata(&|_| true, out),
            Doc::GgufHeader => self.render_gguf_header(out),
            Doc::SplitCount => out.write_all(&vec![0; self.split_count_bytes() as usize]),
            Doc::Header(index) => self.write_header(&self.files[index as usize], out),
        }
    }

    /// Renders `registry.json` of the experts that are present.
    pub fn render_registry(&self, present: Present, out: &mut impl Write) -> io::Result<()> {
        let registry = Registry {
            layout: self,
            present,
        };
        Ok(serde_json::to_writer_pretty(out, &registry)?)
    }

    /// Renders `metadata.json`: the model as it is, components and MoE layers as far as present.
    pub fn render_metadata(&self, present: Present, out: &mut impl Write) -> io::Result<()> {
        Ok(serde_json::to_writer_pretty(
            out,
            &Metadata::new(self, present),
        )?)
    }

    /// The header of `metadata.gguf`: the model's version and number of keys, no tensors.
    fn render_gguf_header(&self, out: &mut impl Write) -> io::Result<()> {
        out.write_all(&MAGIC)?;
        out.write_all(&self.model.version.to_le_bytes())?;
        out.write_all(&0u64.to_le_bytes())?;
        out.write_all(&(self.model.key_values.len() as u64).to_le_bytes())
    }

    /// `split.count` of a split model, which `metadata.gguf` must not repeat.
    fn split_count(&self) -> Option<&KeyValue> {
        (self.model.parts.len() > 1)
            .then(|| self.model.get("split.count"))
            .flatten()
    }

    fn split_count_bytes(&self) -> u64 {
        self.split_count()
            .map_or(0, |kv| kv.range.end - kv.range.start)
    }

    pub(super) fn registry_file(&self) -> NewFile {
        let length = self.length(Doc::Registry);
        new_file(
            REGISTRY_PATH,
            vec![(length, Content::Made(Doc::Registry.id()))],
        )
    }

    pub(super) fn document_files(&self) -> Vec<NewFile> {
        let made = |doc: Doc| Content::Made(doc.id());
        let metadata = vec![(self.length(Doc::Metadata), made(Doc::Metadata))];

        let original = |start, end| {
            let content = Content::Model {
                part: 0,
                offset: start,
            };
            (end - start, content)
        };
        let all = &self.model.key_value_range;
        let mut gguf = vec![(FIXED_HEADER_BYTES, made(Doc::GgufHeader))];
        match self.split_count() {
            Some(kv) => gguf.extend([
                original(all.start, kv.range.start),
                (self.split_count_bytes(), made(Doc::SplitCount)),
                original(kv.range.end, all.end),
            ]),
            None => gguf.push(original(all.start, all.end)),
        }
        vec![
            new_file(METADATA_PATH, metadata),
            new_file(METADATA_GGUF_PATH, gguf),
        ]
    }

    fn length(&self, doc: Doc) -> u64 {
        let mut counted = CountingWriter::new(io::sink());
        self.render(doc, &mut counted)
            .expect("counting bytes cannot fail");
        counted.bytes
    }
}

fn new_file(path: &str, runs: Vec<(u64, Content)>) -> NewFile {
    let name = path.rsplit('/').next().unwrap_or(path).to_owned();
    debug_assert!(path.starts_with(BASE_DIRECTORY) || path.starts_with(EXPERTS_DIRECTORY));
    NewFile { name, runs }
}

struct Registry<'a> {
    layout: &'a Layout,
    present: Present<'a>,
}

/// The reference converter's schema.
#[derive(Serialize)]
struct RegistryEntry<'a> {
    path: String,
    size: u64,
    layer: u32,
    expert_id: u32,
    tensors: Vec<&'a str>,
}

impl Serialize for Registry<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for file in self.layout.experts() {
            let FileKind::Expert { layer, expert } = file.kind else {
                continue;
            };
            if !(self.present)(file) {
                continue;
            }
            let mut tensors: Vec<&str> = self.layout.tensors(file).map(|t| t.name).collect();
            tensors.sort_unstable();
            let entry = RegistryEntry {
                path: file.kind.path(),
                size: file.bytes(),
                layer,
                expert_id: expert,
                tensors,
            };
            map.serialize_entry(&file.kind.stem(), &entry)?;
        }
        map.end()
    }
}

#[derive(Serialize)]
struct Metadata<'a> {
    extracted: bool,
    components: Components,
    architecture: Option<&'a str>,
    block_count: Option<Json<'a>>,
    embedding_length: Option<Json<'a>>,
    vocab_size: Option<u64>,
    expert_count: u64,
    expert_used_count: Option<Json<'a>>,
    moe_layers: Vec<u32>,
    ggml_types: Map<Vec<(&'static str, TypeUse)>>,
    parts: Vec<u64>,
    weight_map: Map<Vec<(&'a str, String)>>,
    gguf: Map<Vec<(&'a str, Json<'a>)>>,
}

/// Number of tensors per base file.
#[derive(Serialize, Default)]
struct Components {
    embeddings: usize,
    attention_layers: usize,
    norms: usize,
    lm_head: usize,
}

#[derive(Serialize, Default)]
struct TypeUse {
    count: u64,
    bytes: u64,
}

impl<'a> Metadata<'a> {
    fn new(layout: &'a Layout, present: Present) -> Self {
        let model = &layout.model;
        let mut components = Components::default();
        let mut weight_map = Vec::new();
        let mut moe_layers = Vec::new();
        for file in layout.files.iter().filter(|file| present(file)) {
            match file.kind {
                FileKind::Base(component) => {
                    let tensors = layout.tensors(file);
                    *match component {
                        Component::Embeddings => &mut components.embeddings,
                        Component::AttentionLayers => &mut components.attention_layers,
                        Component::Norms => &mut components.norms,
                        Component::LmHead => &mut components.lm_head,
                    } = tensors.len();
                    let name = format!("{}.safetensors", file.kind.stem());
                    weight_map.extend(tensors.map(|t| (t.name, name.clone())));
                }
                FileKind::Expert { layer, .. } => {
                    if moe_layers.last() != Some(&layer) {
                        moe_layers.push(layer);
                    }
                }
            }
        }
        let mut types: BTreeMap<u32, (&'static str, TypeUse)> = BTreeMap::new();
        for tensor in &model.tensors {
            let ggml_type = tensor.info.ggml_type;
            let (_, used) = types
                .entry(ggml_type.id)
                .or_insert((ggml_type.name, TypeUse::default()));
            used.count += 1;
            used.bytes += tensor.info.bytes;
        }
        let key = |name| Some(Json(&model.get_of_architecture(name)?.value));
        Self {
            extracted: true,
            components,
            architecture: model.architecture(),
            block_count: key("block_count"),
            embedding_length: key("embedding_length"),
            vocab_size: layout.vocab_size(),
            expert_count: layout.expert_count(),
            expert_used_count: layout.expert_used_count().map(Json),
            moe_layers,
            ggml_types: Map(types.into_values().collect()),
            parts: model.parts.iter().map(|part| part.file_bytes).collect(),
            weight_map: Map(weight_map),
            gguf: Map(model
                .key_values
                .iter()
                .map(|kv| (kv.key.as_str(), Json(&kv.value)))
                .collect()),
        }
    }
}

impl Layout {
    /// The number of tokens: from the key, the tokenizer, or the rows of the token embedding.
    pub fn vocab_size(&self) -> Option<u64> {
        let model = &self.model;
        let tokens = || match model.get("tokenizer.ggml.tokens")?.value {
            Value::Array { len, .. } => Some(len),
            _ => None,
        };
        let rows = || {
            let mut tensors = model.tensors.iter();
            let embedding = tensors.find(|t| t.info.name == "token_embd.weight")?;
            Some(embedding.info.ne[1])
        };
        model
            .get_of_architecture("vocab_size")
            .and_then(|kv| kv.value.as_u64())
            .or_else(tokens)
            .or_else(rows)
    }

    /// The most experts that a layer has, as the tensors tell; keys of models are not always right.
    pub fn expert_count(&self) -> u64 {
        let numbers = self.experts().iter().map(|file| match file.kind {
            FileKind::Expert { expert, .. } => u64::from(expert) + 1,
            FileKind::Base(_) => 0,
        });
        numbers.max().unwrap_or(0)
    }

    /// The experts used per token: a number, or one per layer.
    pub fn expert_used_count(&self) -> Option<&Value> {
        self.model
            .get_of_architecture("expert_used_count")
            // The key of the reference converter's toy models.
            .or_else(|| self.model.get("kimi.num_active_experts"))
            .map(|kv| &kv.value)
    }
}

/// Pairs as a JSON object, in their order.
struct Map<T>(T);

impl<K: Serialize, V: Serialize> Serialize for Map<Vec<(K, V)>> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

/// A GGUF value as JSON: floats as the shortest text of their width, what JSON has no number for
/// as a string, what was skipped as its type and length.
struct Json<'a>(&'a Value);

impl Serialize for Json<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Value::U8(n) => serializer.serialize_u8(*n),
            Value::I8(n) => serializer.serialize_i8(*n),
            Value::U16(n) => serializer.serialize_u16(*n),
            Value::I16(n) => serializer.serialize_i16(*n),
            Value::U32(n) => serializer.serialize_u32(*n),
            Value::I32(n) => serializer.serialize_i32(*n),
            Value::U64(n) => serializer.serialize_u64(*n),
            Value::I64(n) => serializer.serialize_i64(*n),
            Value::Bool(b) => serializer.serialize_bool(*b),
            Value::F32(n) if n.is_finite() => verbatim(format!("{n:?}"), serializer),
            Value::F64(n) if n.is_finite() => verbatim(format!("{n:?}"), serializer),
            Value::F32(n) => serializer.serialize_str(not_finite((*n).into())),
            Value::F64(n) => serializer.serialize_str(not_finite(*n)),
            Value::String(text) => serializer.serialize_str(text),
            Value::LongString(length) => {
                let mut map = serializer.serialize_map(Some(2))?;
                map.serialize_entry("type", "string")?;
                map.serialize_entry("length", length)?;
                map.end()
            }
            Value::Array {
                items: Some(items), ..
            } => serializer.collect_seq(items.iter().map(Json)),
            Value::Array {
                of,
                len,
                items: None,
            } => {
                let mut map = serializer.serialize_map(Some(3))?;
                map.serialize_entry("type", "array")?;
                map.serialize_entry("of", of.name())?;
                map.serialize_entry("length", len)?;
                map.end()
            }
        }
    }
}

/// A float as std prints it, which does not change from version to version as the choice of
/// digits and exponents in a JSON library may.
fn verbatim<S: Serializer>(text: String, serializer: S) -> Result<S::Ok, S::Error> {
    RawValue::from_string(text)
        .map_err(serde::ser::Error::custom)?
        .serialize(serializer)
}

/// The names that Python's `float` takes, too.
fn not_finite(n: f64) -> &'static str {
    if n.is_nan() {
        "NaN"
    } else if n > 0.0 {
        "Infinity"
    } else {
        "-Infinity"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_the_shortest_text_of_their_own_width() {
        let text = |value: Value| serde_json::to_string(&Json(&value)).unwrap();
        for (n, expected) in [
            (0.1, "0.1"),
            (1e-6, "1e-6"),
            (10_000.0, "10000.0"),
            (5e6, "5000000.0"),
            (3.0e38, "3e38"),
            (-0.0, "-0.0"),
            (f32::NAN, "\"NaN\""),
            (f32::NEG_INFINITY, "\"-Infinity\""),
        ] {
            assert_eq!(text(Value::F32(n)), expected);
        }
        assert_eq!(text(Value::F64(0.1)), "0.1");
        assert_eq!(text(Value::F64(f64::INFINITY)), "\"Infinity\"");
        assert_eq!(text(Value::U64(u64::MAX)), "18446744073709551615");
    }
}
