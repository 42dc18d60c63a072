//! Random models, written to disk and opened: the promises that hold for every one of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use odmoe_fs::codec::Float;
use odmoe_fs::form::Form;
use odmoe_fs::gguf::write::Writer;
use odmoe_fs::gguf::{GgmlType, Value};
use odmoe_fs::layout::{Doc, FileKind, LayoutError};
use odmoe_fs::model::{Model, ModelError};
use odmoe_fs::tree::Content;
use proptest::prelude::*;
use safetensors::SafeTensors;
use tempfile::TempDir;

/// A tensor to write: name, GGUF dimensions, type.
type Tensor = (String, Vec<u64>, &'static str);

/// Types of every block size, with row metadata, and of every dtype.
const TYPES: [&str; 12] = [
    "F32", "F16", "BF16", "I8", "F64", "I16", "Q4_0", "Q8_0", "MXFP4", "Q5_1", "Q8_KV", "IQ4_NL",
];
/// Types whose rows are whole for any length.
const PLAIN_TYPES: [&str; 6] = ["F32", "F16", "BF16", "I8", "F64", "I16"];

#[derive(Debug, Clone)]
enum Naming {
    Stacked,
    Fused,
    PerExpert,
    Reference,
}

#[derive(Debug, Clone)]
struct Layer {
    naming: Naming,
    experts: u64,
    /// Columns (in blocks of 32) and rows of the gate matrix.
    size: (u64, u64),
    types: [&'static str; 3],
    /// Suffixes beside `weight`, each with or without.
    bias: bool,
    scale: bool,
    without_gate: bool,
}

impl Layer {
    fn tensors(&self, number: usize) -> Vec<Tensor> {
        let (columns, rows) = (32 * self.size.0, self.size.1);
        let n = self.experts;
        let down_columns = 32 * rows;
        let blk = |rest: String| format!("blk.{number}.{rest}");
        let mut tensors = Vec::new();
        let mut add = |name: String, dims: &[u64], ggml_type| {
            tensors.push((name, dims.to_vec(), ggml_type));
        };
        let words = [("gate", "w1", 0), ("down", "w2", 1), ("up", "w3", 2)];
        let words = words.into_iter().skip(usize::from(self.without_gate));
        for (word, slot, index) in words {
            let dims = match word {
                "down" => [down_columns, columns],
                _ => [columns, down_columns],
            };
            let ggml_type = self.types[index];
            match self.naming {
                Naming::Fused if word == "gate" => {}
                Naming::Fused if word == "up" => {
                    let name = blk("ffn_gate_up_exps.weight".into());
                    add(name, &[dims[0], 2 * dims[1], n], ggml_type);
                    if self.bias {
                        let name = blk("ffn_gate_up_exps.bias".into());
                        add(name, &[2 * dims[1], n], "F32");
                    }
                    if self.scale {
                        add(blk("ffn_gate_up_exps.scale".into()), &[n], "F32");
                    }
                }
                Naming::Stacked | Naming::Fused => {
                    let name = |suffix| blk(format!("ffn_{word}_exps.{suffix}"));
                    add(name("weight"), &[dims[0], dims[1], n], ggml_type);
                    if self.bias {
                        add(name("bias"), &[dims[1], n], "F16");
                    }
                    if self.scale {
                        add(name("scale"), &[n], "F32");
                    }
                }
                // Some expert numbers are missing.
                Naming::PerExpert => {
                    for expert in (0..2 * n).step_by(2) {
                        let name = blk(format!("ffn_{word}.{expert}.weight"));
                        add(name, &dims, ggml_type);
                    }
                }
                Naming::Reference => {
                    for expert in 0..n {
                        let name = blk(format!("ffn.experts.{expert}.{slot}.weight"));
                        add(name, &dims, ggml_type);
                    }
                }
            }
        }
        tensors
    }

    fn expert_numbers(&self) -> Vec<u64> {
        match self.naming {
            Naming::PerExpert => (0..2 * self.experts).step_by(2).collect(),
            _ => (0..self.experts).collect(),
        }
    }
}

fn layer() -> impl Strategy<Value = Layer> {
    let naming = prop_oneof![
        Just(Naming::Stacked),
        Just(Naming::Fused),
        Just(Naming::PerExpert),
        Just(Naming::Reference)
    ];
    let one_type = || prop::sample::select(&TYPES[..]);
    (
        naming,
        1..5u64,
        (1..4u64, 1..3u64),
        [one_type(), one_type(), one_type()],
        any::<(bool, bool)>(),
        prop::bool::weighted(0.2),
    )
        .prop_map(
            |(naming, experts, size, types, (bias, scale), without_gate)| Layer {
                naming,
                experts,
                size,
                types,
                bias,
                scale,
                without_gate,
            },
        )
}

fn base_tensor() -> impl Strategy<Value = Tensor> {
    let name = prop_oneof![
        prop::sample::select(vec![
            "token_embd.weight",
            "output.weight",
            "output_norm.weight",
            "v.blk.0.ffn_gate_exps.weight",
            "blk.0.ffn_gate_chexps.weight",
            "blk.0.ffn_gate_inp.weight",
            "../../etc/passwd",
            "\u{1b}[31m\n\"quoted\\",
        ])
        .prop_map(String::from),
        "[a-z._\\PC]{1,15}",
    ];
    let dims = prop::collection::vec(0..9u64, 0..5);
    (name, dims, prop::sample::select(&PLAIN_TYPES[..]))
}

#[derive(Debug, Clone)]
struct RandomModel {
    tensors: Vec<Tensor>,
    layers: Vec<Layer>,
    parts: usize,
    alignment: u32,
}

fn random_model() -> impl Strategy<Value = RandomModel> {
    (
        prop::collection::vec(layer(), 0..4),
        prop::collection::vec(base_tensor(), 0..12),
        1..5usize,
        prop::sample::select(vec![1u32, 8, 32, 64, 4096]),
        any::<prop::sample::Index>(),
    )
        .prop_map(|(layers, base, parts, alignment, turn)| {
            let experts = (0..).zip(&layers).flat_map(|(n, layer)| layer.tensors(n));
            // Names are unique in a GGUF.
            let unique: BTreeMap<String, Tensor> = experts
                .chain(base)
                .filter(|(name, ..)| name.len() <= 63)
                .map(|tensor| (tensor.0.clone(), tensor))
                .collect();
            let mut tensors: Vec<Tensor> = unique.into_values().collect();
            if !tensors.is_empty() {
                let by = turn.index(tensors.len());
                tensors.rotate_left(by);
            }
            RandomModel {
                tensors,
                layers,
                parts,
                alignment,
            }
        })
}

impl RandomModel {
    /// Writes the parts, every byte of payload another one, and returns the first path and the
    /// bytes of each part.
    fn write(&self, folder: &TempDir) -> (PathBuf, Vec<Vec<u8>>) {
        let mut files = Vec::new();
        let chunk = self.tensors.len().div_ceil(self.parts).max(1);
        for part in 0..self.parts {
            let mut writer = Writer::new();
            writer.key_value("general.alignment", &Value::U32(self.alignment));
            if part == 0 {
                writer.key_value("general.architecture", &Value::String("random".into()));
            }
            if self.parts > 1 {
                writer.key_value("split.no", &Value::U16(part as u16));
                writer.key_value("split.count", &Value::U16(self.parts as u16));
                let tensors = Value::I32(self.tensors.len() as i32);
                writer.key_value("split.tensors.count", &tensors);
            }
            for (name, dims, ggml_type) in self.tensors.iter().skip(part * chunk).take(chunk) {
                writer.tensor(name, dims, GgmlType::from_name(ggml_type).unwrap());
            }
            let written = writer.header();
            let mut bytes = written.bytes;
            let mut state = part as u64 + 1;
            while (bytes.len() as u64) < written.file_bytes {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                bytes.push((state >> 56) as u8);
            }
            files.push(bytes);
        }
        let name = |part| match self.parts {
            1 => "model.gguf".to_owned(),
            count => format!("model-{:05}-of-{count:05}.gguf", part + 1),
        };
        for (part, bytes) in files.iter().enumerate() {
            fs::write(folder.path().join(name(part)), bytes).unwrap();
        }
        (folder.path().join(name(0)), files)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn every_model_keeps_the_promises(
        model in random_model(),
        ranges in prop::collection::vec((any::<prop::sample::Index>(), 0..9000usize), 8),
    ) {
        let folder = TempDir::new().unwrap();
        let (path, parts) = model.write(&folder);
        let opened = Model::open(&path).unwrap();
        rendered_lengths_are_sizes(&opened);
        reads_equal_the_naive_file(&opened, &parts, &ranges);
        every_tensor_byte_is_in_one_file_once(&opened, &parts);
        every_expert_has_a_file(&opened, &model);
        headers_parse_and_name_their_sources(&opened, &parts);
    }

    #[test]
    fn every_form_keeps_the_promises(
        model in random_model(),
        form in prop::sample::select(FORMS.to_vec()),
        ranges in prop::collection::vec((any::<prop::sample::Index>(), 0..9000usize), 8),
    ) {
        let folder = TempDir::new().unwrap();
        let (path, parts) = model.write(&folder);
        let opened = match Model::open_as(&path, form) {
            Err(ModelError::Layout { cause: LayoutError::UnknownTypes(types), .. }) => {
                assert_eq!(types.to_string().split(' ').next(), Some("Q8_KV"));
                return Ok(());
            }
            opened => opened.unwrap(),
        };
        rendered_lengths_are_sizes(&opened);
        reads_equal_the_naive_file(&opened, &parts, &ranges);
        every_expert_has_a_file(&opened, &model);
        arrays_parse_and_feed_from_their_tensors(&opened, &parts);
    }
}

const FORMS: [Form; 7] = [
    Form::Numbers(Float::F32),
    Form::Numbers(Float::F16),
    Form::Numbers(Float::Bf16),
    mlx(Float::F32, false),
    mlx(Float::F16, false),
    mlx(Float::Bf16, false),
    mlx(Float::F16, true),
];

const fn mlx(scales: Float, requant: bool) -> Form {
    Form::Mlx { scales, requant }
}

fn rendered_lengths_are_sizes(model: &Model) {
    let tree = model.tree();
    for extent in tree.files().flat_map(|ino| tree.extents(ino)) {
        if let Content::Made(doc) = extent.content {
            let mut bytes = Vec::new();
            model.layout().render(Doc::of_id(doc), &mut bytes).unwrap();
            assert_eq!(bytes.len() as u64, extent.len, "{doc:?}");
        }
    }
}

/// A file, put together from its extents without any arithmetic of ranges.
fn naive(model: &Model, ino: u64, parts: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for extent in model.tree().extents(ino) {
        match extent.content {
            Content::Made(doc) => model.layout().render(Doc::of_id(doc), &mut bytes).unwrap(),
            Content::Model { part, offset } => {
                let offset = offset as usize;
                let run = &parts[part as usize][offset..offset + extent.len as usize];
                bytes.extend_from_slice(run);
            }
            Content::Computed(id) => {
                let recipe = model.layout().recipe(id);
                let offset = recipe.offset as usize;
                let blocks = &parts[recipe.part as usize][offset..offset + recipe.len as usize];
                let start = bytes.len();
                bytes.resize(start + extent.len as usize, 0);
                recipe.codec.compute(blocks, &mut bytes[start..]);
            }
        }
    }
    bytes
}

fn reads_equal_the_naive_file(
    model: &Model,
    parts: &[Vec<u8>],
    ranges: &[(prop::sample::Index, usize)],
) {
    for ino in model.tree().files() {
        let whole = naive(model, ino, parts);
        assert_eq!(model.read(ino).unwrap(), whole);
        for (start, len) in ranges {
            let start = start.index(whole.len() + 2);
            let mut buffer = vec![0xee; *len];
            let read = model.read_at(ino, start as u64, &mut buffer).unwrap();
            let expected = &whole[start.min(whole.len())..(start + len).min(whole.len())];
            assert_eq!(&buffer[..read], expected);
        }
    }
}

fn every_tensor_byte_is_in_one_file_once(model: &Model, parts: &[Vec<u8>]) {
    let mut times: Vec<Vec<u8>> = parts.iter().map(|part| vec![0; part.len()]).collect();
    let tree = model.tree();
    for file in model.layout().files() {
        for extent in tree.extents(tree.find(&file.kind.path()).unwrap()) {
            if let Content::Model { part, offset } = extent.content {
                let range = offset as usize..(offset + extent.len) as usize;
                times[part as usize][range].iter_mut().for_each(|n| *n += 1);
            }
        }
    }
    let mut expected: Vec<Vec<u8>> = parts.iter().map(|part| vec![0; part.len()]).collect();
    for tensor in &model.layout().model().tensors {
        let info = &tensor.info;
        let range = info.offset as usize..(info.offset + info.bytes) as usize;
        expected[tensor.part as usize][range].fill(1);
    }
    assert_eq!(times, expected);
}

fn every_expert_has_a_file(model: &Model, random: &RandomModel) {
    let found: Vec<(u32, u32)> = model
        .layout()
        .experts()
        .iter()
        .filter_map(|file| match file.kind {
            FileKind::Expert { layer, expert } => Some((layer, expert)),
            FileKind::Base(_) => None,
        })
        .collect();
    let layers = (0..).zip(&random.layers);
    let expected: Vec<(u32, u32)> = layers
        .flat_map(|(n, layer)| {
            layer
                .expert_numbers()
                .into_iter()
                .map(move |e| (n, e as u32))
        })
        .collect();
    assert_eq!(found, expected);
}

fn headers_parse_and_name_their_sources(model: &Model, parts: &[Vec<u8>]) {
    let tree = model.tree();
    for file in model.layout().files() {
        let bytes = model.read(tree.find(&file.kind.path()).unwrap()).unwrap();
        assert_eq!(file.header_bytes % 8, 0);
        let parsed = SafeTensors::deserialize(&bytes).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let map = metadata.metadata().as_ref().unwrap();
        assert_eq!(map["format"], "pt");
        let sources: serde_json::Value = serde_json::from_str(&map["odmoe.tensors"]).unwrap();
        assert_eq!(sources.as_object().unwrap().len(), parsed.len());
        for (name, view) in parsed.tensors() {
            let source = &sources[&name];
            let part = source["gguf_part"].as_u64().unwrap() as usize;
            let offset = source["gguf_offset"].as_u64().unwrap() as usize;
            let run = &parts[part][offset..offset + view.data().len()];
            assert_eq!(view.data(), run, "{name}");
        }
    }
}

/// What safetensors reads of each file, compared with what `odmoe.tensors` says of it.
fn arrays_parse_and_feed_from_their_tensors(model: &Model, parts: &[Vec<u8>]) {
    let tree = model.tree();
    let mut fed = 0;
    for file in model.layout().files() {
        let bytes = model.read(tree.find(&file.kind.path()).unwrap()).unwrap();
        let parsed = SafeTensors::deserialize(&bytes).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let map = metadata.metadata().as_ref().unwrap();
        assert_eq!(map["odmoe.form"], model.layout().form().name());
        let sources: serde_json::Value = serde_json::from_str(&map["odmoe.tensors"]).unwrap();
        let mut arrays = 0;
        for (name, source) in sources.as_object().unwrap() {
            let shape = source["shape"].as_array().unwrap();
            let shape: Vec<usize> = shape.iter().map(|n| n.as_u64().unwrap() as usize).collect();
            let array = parsed.tensor(name).unwrap();
            let ggml_type = GgmlType::from_name(source["ggml_type"].as_str().unwrap()).unwrap();
            let mut ne = [1; 4];
            ne.iter_mut()
                .zip(shape.iter().rev())
                .for_each(|(ne, dim)| *ne = *dim as u64);
            let source_bytes = ggml_type.tensor_bytes(ne).unwrap() as usize;
            fed += source_bytes;
            arrays += 1;
            let form = &source["form"];
            if form.is_null() {
                let part = source["gguf_part"].as_u64().unwrap() as usize;
                let offset = source["gguf_offset"].as_u64().unwrap() as usize;
                assert_eq!(array.data(), &parts[part][offset..offset + source_bytes]);
                continue;
            }
            if let Some(dtype) = form["dtype"].as_str() {
                assert_eq!(format!("{:?}", array.dtype()), dtype);
                assert_eq!(array.shape(), shape);
                continue;
            }
            let (rows, row) = shape.split_at(shape.len() - 1);
            let whole = |last: usize| [rows, &[last]].concat();
            let number = |key: &str| form[key].as_u64().unwrap() as usize;
            assert_eq!(array.shape(), whole(row[0] * number("bits") / 32));
            let is_affine = form["mode"] == "affine";
            for suffix in ["scales", "biases"]
                .into_iter()
                .take(1 + usize::from(is_affine))
            {
                let name = name.replace(".weight", &format!(".{suffix}"));
                let small = parsed.tensor(&name).unwrap();
                assert_eq!(small.shape(), whole(row[0] / number("group_size")));
                assert_eq!(
                    format!("{:?}", small.dtype()),
                    form["scales"].as_str().unwrap()
                );
                arrays += 1;
            }
        }
        assert_eq!(arrays, parsed.len());
    }
    let tensors = &model.layout().model().tensors;
    assert_eq!(
        fed as u64,
        tensors.iter().map(|t| t.info.bytes).sum::<u64>()
    );
}
