//! `toy`: a small MoE model with made-up weights, to try things on.
//!
//! The plan: [`Plan`] lists keys and tensors as a converter would write them, with llama.cpp's
//! names or the reference converter's; [`write_toy`] deals the tensors out to the parts and
//! streams each tensor's data from a random sequence of its own. So the bytes of a tensor depend
//! on the seed, its name and its type, and on nothing else.

use std::ffi::{OsStr, OsString};
use std::fs::{self, Permissions};
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, FromArgMatches};
use odmoe_fs::gguf::write::{Writer, Written};
use odmoe_fs::gguf::{GGML_TYPES, GgmlType, PartName, Value, ValueType};
use tempfile::TempPath;

use super::{print, text};

/// Write a small Mixture-of-Experts GGUF with made-up weights
///
/// It is a model for trying things out: its tensors have the names, shapes and types of a real
/// one, its numbers mean nothing. The same options always give the same bytes.
#[derive(Debug, Clone, Args)]
pub struct ToyArgs {
    /// The file to write; the parts of a split set get its name and their number
    #[arg(value_name = "OUT.gguf")]
    pub out: PathBuf,
    // The most layers and experts are llama.cpp's own limits; the other limits only keep a slip
    // of the finger from filling a disk.
    /// Layers, each with experts
    #[arg(long, value_name = "N", default_value_t = 2)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=512))]
    pub layers: u32,
    /// Experts per layer
    #[arg(long, value_name = "N", default_value_t = 4)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub experts: u32,
    /// Width of the model (embedding length)
    #[arg(long, value_name = "N", default_value_t = 512)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=16_384))]
    pub dim: u32,
    /// Width inside an expert (feed-forward length)
    #[arg(long, value_name = "N", default_value_t = 1024)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub ffn_dim: u32,
    /// Tokens in the vocabulary
    #[arg(long, value_name = "N", default_value_t = 1000)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub vocab: u32,
    /// GGML type of the matrices; norms and routers are always F32
    #[arg(
        long = "type",
        value_name = "TYPE",
        default_value = "F32",
        ignore_case = true
    )]
    #[arg(value_parser = type_parser())]
    pub ggml_type: &'static GgmlType,
    /// How the experts' tensors are named and cut
    #[arg(long, value_enum, default_value_t = Naming::Stacked)]
    pub naming: Naming,
    /// Parts of about equal size to split the model into
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    pub split: u16,
    /// Other seeds give other weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

/// How the tensors of experts are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Naming {
    /// One tensor per layer and matrix: blk.L.ffn_gate_exps, ffn_down_exps, ffn_up_exps
    Stacked,
    /// As stacked, with gate and up in one: blk.L.ffn_gate_up_exps, ffn_down_exps
    Fused,
    /// One tensor per expert and matrix: blk.L.ffn_gate.E, ffn_down.E, ffn_up.E
    PerExpert,
    /// The toy of mlx-od-moe's converter: blk.L.ffn.experts.E.w1, w2, w3, shapes reversed
    Reference,
}

impl ToyArgs {
    /// The arguments of `toy OUT.gguf`, without any option.
    pub fn new(out: &Path) -> Self {
        let command = Self::augment_args(clap::Command::new("toy").no_binary_name(true));
        command
            .try_get_matches_from([OsStr::new("--"), out.as_os_str()])
            .and_then(|matches| Self::from_arg_matches(&matches))
            .expect("no option is required")
    }
}

/// Takes the names of the types that a toy can be made of, in any case.
fn type_parser() -> impl TypedValueParser<Value = &'static GgmlType> {
    let types = GGML_TYPES.iter().filter(|t| Elements::of(t).is_some());
    PossibleValuesParser::new(types.map(|t| t.name))
        .map(|name| GgmlType::from_name(&name).expect("the name is one of the table"))
}

pub fn run(args: &ToyArgs) -> anyhow::Result<()> {
    let files = write_toy(args)?;
    let mut bytes = 0;
    for file in &files {
        bytes += fs::metadata(file)?.len();
    }
    let first = text::path(&files[0]);
    let last = match &files[1..] {
        [] => String::new(),
        [.., last] => format!(" to {}", text::path(last)),
    };
    print(&format!(
        "wrote {first}{last}, {}\nmount it with: odmoe-fs mount {first} DIR\n",
        text::size(bytes)
    ))
}

/// Writes the model and returns its files, in the order of the parts.
///
/// Either all of them appear, or none; no existing file is overwritten.
pub fn write_toy(args: &ToyArgs) -> anyhow::Result<Vec<PathBuf>> {
    let plan = Plan::new(args)?;
    let count = usize::from(args.split);
    let tensors = plan.tensors.len();
    ensure!(
        count <= tensors,
        "cannot split {tensors} tensors into {count} parts; use --split {tensors} or less"
    );
    let paths = part_paths(&args.out, args.split);
    for path in &paths {
        if path.symlink_metadata().is_ok() {
            return Err(already_exists(path));
        }
    }
    let mut written = Vec::with_capacity(count);
    for ((no, range), path) in (0..).zip(plan.parts(count)).zip(&paths) {
        let part = plan
            .write_part(no, args.split, range, args.seed, path)
            .with_context(|| format!("cannot write {path:?}"))?;
        written.push(part);
    }
    for (at, (file, path)) in written.into_iter().zip(&paths).enumerate() {
        if let Err(e) = file.persist_noclobber(path) {
            for path in &paths[..at] {
                let _ = fs::remove_file(path); // the error that matters is the first one
            }
            return Err(match e.error.kind() {
                io::ErrorKind::AlreadyExists => already_exists(path),
                _ => anyhow::Error::new(e.error).context(format!("cannot create {path:?}")),
            });
        }
    }
    Ok(paths)
}

fn already_exists(path: &Path) -> anyhow::Error {
    anyhow::anyhow!("{path:?} exists already; remove it, or write to another name")
}

/// The file itself, or the parts that are named after it.
fn part_paths(out: &Path, count: u16) -> Vec<PathBuf> {
    if count == 1 {
        return vec![out.to_owned()];
    }
    let prefix = match out.extension() {
        Some(extension) if extension == "gguf" => out.with_extension(""),
        _ => out.to_owned(),
    };
    let name = PartName {
        prefix: String::new(), // a path, which may be no UTF-8, goes in front
        number: 1,
        count: count.into(),
    };
    let path = |number| {
        let mut path = OsString::from(&prefix);
        path.push(name.sibling(number));
        path.into()
    };
    (1..=count.into()).map(path).collect()
}

/// What the model holds.
struct Plan {
    key_values: Vec<(String, Value)>,
    tensors: Vec<Tensor>,
}

struct Tensor {
    name: String,
    /// In GGUF order (contiguous first).
    dims: Vec<u64>,
    ggml_type: &'static GgmlType,
}

/// A width of the model, and the option that sets it.
#[derive(Clone, Copy)]
struct Width(u64, &'static str);

impl Plan {
    fn new(args: &ToyArgs) -> anyhow::Result<Self> {
        let mut tensors = Tensors {
            args,
            list: Vec::new(),
        };
        match args.naming {
            Naming::Stacked => tensors.llama(Tensors::stacked),
            Naming::Fused => tensors.llama(Tensors::fused),
            Naming::PerExpert => tensors.llama(Tensors::per_expert),
            Naming::Reference => tensors.reference(),
        }?;
        Ok(Self {
            key_values: match args.naming {
                Naming::Reference => reference_key_values(args),
                _ => llama_key_values(args),
            },
            tensors: tensors.list,
        })
    }

    /// Deals the tensors out, in their order, to parts of about equal size, none of them empty.
    fn parts(&self, count: usize) -> Vec<Range<usize>> {
        let total: u64 = self.tensors.iter().map(Tensor::bytes).sum();
        let (mut end, mut bytes) = (0, 0);
        let part = |number| {
            let goal = total / count as u64 * number as u64;
            let start = end;
            // One tensor is left for each part to come.
            while end < self.tensors.len() - (count - number) {
                let next = self.tensors[end].bytes();
                if end > start && number < count && bytes + next / 2 > goal {
                    break;
                }
                bytes += next;
                end += 1;
            }
            start..end
        };
        (1..=count).map(part).collect()
    }

    /// Writes part `no` (0-based) of `count` into a temporary file beside `path`.
    fn write_part(
        &self,
        no: u16,
        count: u16,
        tensors: Range<usize>,
        seed: u64,
        path: &Path,
    ) -> anyhow::Result<TempPath> {
        let tensors = &self.tensors[tensors];
        let header = self.header(no, count, tensors);
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let file = tempfile::Builder::new()
            .prefix(".toy-")
            .permissions(Permissions::from_mode(0o666)) // less the umask, as for any new file
            .tempfile_in(folder)?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        out.write_all(&header.bytes)?;
        let mut at = header.bytes.len() as u64;
        for (tensor, &(offset, bytes)) in tensors.iter().zip(&header.data) {
            pad(&mut out, offset - at)?;
            tensor.write_data(seed, &mut out)?;
            at = offset + bytes;
        }
        pad(&mut out, header.file_bytes - at)?;
        let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        Ok(file.into_temp_path()) // closed: there may be more parts than descriptors
    }

    fn header(&self, no: u16, count: u16, tensors: &[Tensor]) -> Written {
        let mut writer = Writer::new();
        if no == 0 {
            for (key, value) in &self.key_values {
                writer.key_value(key, value);
            }
        }
        if count > 1 {
            writer.key_value("split.no", &Value::U16(no));
            writer.key_value("split.count", &Value::U16(count));
            let total = Value::I32(self.tensors.len() as i32);
            writer.key_value("split.tensors.count", &total);
        }
        for tensor in tensors {
            writer.tensor(&tensor.name, &tensor.dims, tensor.ggml_type);
        }
        writer.header()
    }
}

fn pad(out: &mut impl Write, bytes: u64) -> io::Result<u64> {
    io::copy(&mut io::Read::take(io::repeat(0), bytes), out)
}

/// The tensors of a model, as they are listed.
struct Tensors<'a> {
    args: &'a ToyArgs,
    list: Vec<Tensor>,
}

impl Tensors<'_> {
    fn dim(&self) -> Width {
        Width(self.args.dim.into(), "--dim")
    }

    fn ffn(&self) -> Width {
        Width(self.args.ffn_dim.into(), "--ffn-dim")
    }

    fn vocab(&self) -> Width {
        Width(self.args.vocab.into(), "--vocab")
    }

    fn experts(&self) -> u64 {
        self.args.experts.into()
    }

    /// Adds a matrix of the chosen type: rows of `row` elements, and the other dimensions.
    fn matrix(&mut self, name: &str, row: Width, others: &[u64]) -> anyhow::Result<()> {
        let Width(elements, option) = row;
        let ggml_type = self.args.ggml_type;
        if ggml_type.row_bytes(elements).is_none() {
            let block = ggml_type.block_size;
            bail!(
                "{name}.weight: a row of {elements} elements is no whole number of {ggml_type} blocks of \
                 {block}; make {option} a multiple of {block}"
            );
        }
        self.add(name, &[&[elements], others].concat(), ggml_type);
        Ok(())
    }

    /// Adds a norm or a router.
    fn f32(&mut self, name: &str, dims: &[u64]) {
        let f32 = GgmlType::from_name("F32").expect("F32 is a type");
        self.add(name, dims, f32);
    }

    fn add(&mut self, name: &str, dims: &[u64], ggml_type: &'static GgmlType) {
        self.list.push(Tensor {
            name: format!("{name}.weight"),
            dims: dims.to_vec(),
            ggml_type,
        });
    }

    /// A model with llama.cpp's names and shapes; `experts` adds those of a layer.
    fn llama(&mut self, experts: fn(&mut Self, u32) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let (dim, vocab) = (self.dim(), self.vocab());
        self.matrix("token_embd", dim, &[vocab.0])?;
        self.f32("output_norm", &[dim.0]);
        self.matrix("output", dim, &[vocab.0])?;
        for layer in 0..self.args.layers {
            self.attention(layer)?;
            self.f32(&format!("blk.{layer}.ffn_norm"), &[dim.0]);
            let router = [dim.0, self.experts()];
            self.f32(&format!("blk.{layer}.ffn_gate_inp"), &router);
            experts(self, layer)?;
        }
        Ok(())
    }

    fn stacked(&mut self, layer: u32) -> anyhow::Result<()> {
        let (dim, ffn, experts) = (self.dim(), self.ffn(), self.experts());
        let blk = format!("blk.{layer}.ffn");
        self.matrix(&format!("{blk}_gate_exps"), dim, &[ffn.0, experts])?;
        self.matrix(&format!("{blk}_down_exps"), ffn, &[dim.0, experts])?;
        self.matrix(&format!("{blk}_up_exps"), dim, &[ffn.0, experts])
    }

    fn fused(&mut self, layer: u32) -> anyhow::Result<()> {
        let (dim, ffn, experts) = (self.dim(), self.ffn(), self.experts());
        let blk = format!("blk.{layer}.ffn");
        self.matrix(&format!("{blk}_gate_up_exps"), dim, &[2 * ffn.0, experts])?;
        self.matrix(&format!("{blk}_down_exps"), ffn, &[dim.0, experts])
    }

    fn per_expert(&mut self, layer: u32) -> anyhow::Result<()> {
        let (dim, ffn) = (self.dim(), self.ffn());
        let blk = format!("blk.{layer}.ffn");
        for expert in 0..self.experts() {
            self.matrix(&format!("{blk}_gate.{expert}"), dim, &[ffn.0])?;
            self.matrix(&format!("{blk}_down.{expert}"), ffn, &[dim.0])?;
            self.matrix(&format!("{blk}_up.{expert}"), dim, &[ffn.0])?;
        }
        Ok(())
    }

    /// What `create_toy_model.py` of mlx-od-moe writes. Its numpy arrays are (in, out), so the
    /// dimensions of all but the embeddings are the other way round than llama.cpp's.
    fn reference(&mut self) -> anyhow::Result<()> {
        let (dim, ffn, vocab, experts) = (self.dim(), self.ffn(), self.vocab(), self.experts());
        self.matrix("token_embd", dim, &[vocab.0])?;
        self.matrix("output", vocab, &[dim.0])?;
        for layer in 0..self.args.layers {
            self.attention(layer)?;
            self.f32(&format!("blk.{layer}.ffn_norm"), &[dim.0]);
            self.f32(&format!("blk.{layer}.ffn.gate"), &[experts, dim.0]);
            for expert in 0..experts {
                let blk = format!("blk.{layer}.ffn.experts.{expert}");
                self.matrix(&format!("{blk}.w1"), ffn, &[dim.0])?;
                self.matrix(&format!("{blk}.w2"), dim, &[ffn.0])?;
                self.matrix(&format!("{blk}.w3"), ffn, &[dim.0])?;
            }
        }
        Ok(())
    }

    fn attention(&mut self, layer: u32) -> anyhow::Result<()> {
        let dim = self.dim();
        self.f32(&format!("blk.{layer}.attn_norm"), &[dim.0]);
        for matrix in ["q", "k", "v", "output"] {
            self.matrix(&format!("blk.{layer}.attn_{matrix}"), dim, &[dim.0])?;
        }
        Ok(())
    }
}

const CONTEXT_LENGTH: u32 = 4096;

impl ToyArgs {
    fn experts_used(&self) -> u32 {
        self.experts.min(2)
    }

    /// Eight, or as many as divide the width.
    fn heads(&self) -> u32 {
        1 << self.dim.trailing_zeros().min(3)
    }
}

fn llama_key_values(args: &ToyArgs) -> Vec<(String, Value)> {
    let string = |text: &str| Value::String(text.to_owned());
    let general = [
        ("general.architecture", string("toy-moe")),
        ("general.name", string("Toy MoE")),
        ("general.quantization_version", Value::U32(2)), // GGML_QNT_VERSION
    ];
    let architecture = [
        ("toy-moe.block_count", args.layers),
        ("toy-moe.context_length", CONTEXT_LENGTH),
        ("toy-moe.embedding_length", args.dim),
        ("toy-moe.feed_forward_length", args.ffn_dim),
        ("toy-moe.expert_feed_forward_length", args.ffn_dim),
        ("toy-moe.expert_count", args.experts),
        ("toy-moe.expert_used_count", args.experts_used()),
        ("toy-moe.attention.head_count", args.heads()),
        ("toy-moe.vocab_size", args.vocab),
    ];
    let tokens = (0..args.vocab).map(|n| string(&format!("token_{n}")));
    let scores = (0..args.vocab).map(|n| Value::F32(-(n as f32)));
    let tokenizer = [
        ("tokenizer.ggml.model", string("llama")),
        (
            "tokenizer.ggml.tokens",
            Value::array(ValueType::String, tokens.collect()),
        ),
        (
            "tokenizer.ggml.scores",
            Value::array(ValueType::F32, scores.collect()),
        ),
    ];
    let architecture = architecture.map(|(key, n)| (key, Value::U32(n)));
    let pairs = general.into_iter().chain(architecture).chain(tokenizer);
    pairs.map(|(key, value)| (key.to_owned(), value)).collect()
}

fn reference_key_values(args: &ToyArgs) -> Vec<(String, Value)> {
    let mut pairs = vec![(
        "general.architecture".to_owned(),
        Value::String("kimi-moe".to_owned()),
    )];
    let numbers = [
        ("kimi-moe.block_count", args.layers),
        ("kimi-moe.context_length", CONTEXT_LENGTH),
        ("kimi-moe.embedding_length", args.dim),
        ("kimi-moe.attention.head_count", args.heads()),
        ("kimi-moe.feed_forward_length", args.ffn_dim),
        ("kimi.num_experts_per_layer", args.experts),
        ("kimi.num_active_experts", args.experts_used()),
    ];
    pairs.extend(numbers.map(|(key, n)| (key.to_owned(), Value::U32(n))));
    pairs
}

impl Tensor {
    fn bytes(&self) -> u64 {
        let rows: u64 = self.dims[1..].iter().product();
        let row_bytes = self.ggml_type.row_bytes(self.dims[0]);
        row_bytes.expect("rows are whole blocks") * rows
    }

    fn write_data(&self, seed: u64, out: &mut impl Write) -> io::Result<()> {
        let elements = Elements::of(self.ggml_type).expect("a toy is made of such types");
        // Norms scale what passes through them, so they are about 1.
        let mean = if self.name.contains("norm") { 1.0 } else { 0.0 };
        let mut random = SplitMix64::of_tensor(seed, &self.name);
        let mut block = vec![0; self.ggml_type.block_bytes as usize];
        for _ in 0..self.bytes() / block.len() as u64 {
            elements.fill(&mut block, mean, &mut random);
            out.write_all(&block)?;
        }
        Ok(())
    }
}

/// What a block of a type is filled with.
enum Elements {
    F32,
    F16,
    Bf16,
    F64,
    /// Integers from -8 to 7.
    Integer,
    /// Random bits, but for the scales of the block, each at its byte in the block. So all
    /// numbers that come out are finite, and none is above 0.2.
    Quantised(&'static [(usize, Scale)]),
}

/// A floating-point number in a block that multiplies (or, as a minimum, is added to) its integers.
#[derive(Clone, Copy)]
enum Scale {
    /// An f16, from this number to its double.
    F16(f32),
    /// The same, but in the top four bits of four u16, lowest bits first (IQ1_M).
    F16InNibbles(f32),
    /// An exponent byte: this one or the next.
    E8m0(u8),
    /// Four unsigned floats of four exponent and three mantissa bits: these exponent bits.
    Ue4m3s(u8),
}

impl Elements {
    /// The types that gguf-py 0.19 knows and that are stored in files, with the places of their
    /// scales by the `block_*` structs of `ggml-common.h` (2026-08).
    fn of(ggml_type: &GgmlType) -> Option<Self> {
        use Scale::*;
        Some(match ggml_type.name {
            "F32" => Self::F32,
            "F16" => Self::F16,
            "BF16" => Self::Bf16,
            "F64" => Self::F64,
            "I8" | "I16" | "I32" | "I64" => Self::Integer,
            "Q1_0" => Self::Quantised(&[(0, F16(0.02))]),
            "Q4_0" => Self::Quantised(&[(0, F16(0.005))]),
            "Q4_1" => Self::Quantised(&[(0, F16(0.005)), (2, F16(-0.04))]),
            "Q5_0" => Self::Quantised(&[(0, F16(0.002))]),
            "Q5_1" => Self::Quantised(&[(0, F16(0.002)), (2, F16(-0.03))]),
            "Q8_0" => Self::Quantised(&[(0, F16(0.0003))]),
            "Q2_K" => Self::Quantised(&[(80, F16(0.002)), (82, F16(0.003))]),
            "Q3_K" => Self::Quantised(&[(108, F16(0.0004))]),
            "Q4_K" => Self::Quantised(&[(0, F16(5e-5)), (2, F16(4e-4))]),
            "Q5_K" => Self::Quantised(&[(0, F16(3e-5)), (2, F16(5e-4))]),
            "Q6_K" => Self::Quantised(&[(208, F16(1e-5))]),
            "IQ1_S" => Self::Quantised(&[(0, F16(0.003))]),
            "IQ1_M" => Self::Quantised(&[(48, F16InNibbles(0.003))]),
            "IQ2_XXS" | "IQ2_XS" | "IQ2_S" => Self::Quantised(&[(0, F16(0.0003))]),
            "IQ3_XXS" | "IQ3_S" => Self::Quantised(&[(0, F16(0.0001))]),
            "IQ4_NL" => Self::Quantised(&[(0, F16(0.0003))]),
            "IQ4_XS" => Self::Quantised(&[(0, F16(1e-5))]),
            "TQ1_0" => Self::Quantised(&[(52, F16(0.02))]),
            "TQ2_0" => Self::Quantised(&[(64, F16(0.02))]),
            "MXFP4" => Self::Quantised(&[(0, E8m0(119))]),
            "NVFP4" => Self::Quantised(&[(0, Ue4m3s(1))]),
            _ => return None,
        })
    }

    fn fill(&self, block: &mut [u8], mean: f64, random: &mut SplitMix64) {
        match self {
            Self::F32 => block.copy_from_slice(&((mean + random.weight()) as f32).to_le_bytes()),
            Self::F16 => {
                block.copy_from_slice(&f16_bits((mean + random.weight()) as f32).to_le_bytes());
            }
            Self::Bf16 => {
                // The upper half of an f32.
                block.copy_from_slice(&((mean + random.weight()) as f32).to_le_bytes()[2..]);
            }
            Self::F64 => block.copy_from_slice(&(mean + random.weight()).to_le_bytes()),
            Self::Integer => {
                let n = random.next() as i64 >> 60;
                block.copy_from_slice(&n.to_le_bytes()[..block.len()]);
            }
            Self::Quantised(scales) => {
                for bytes in block.chunks_mut(8) {
                    bytes.copy_from_slice(&random.next().to_le_bytes()[..bytes.len()]);
                }
                for &(at, scale) in *scales {
                    scale.put(&mut block[at..], random);
                }
            }
        }
    }
}

impl Scale {
    fn put(self, field: &mut [u8], random: &mut SplitMix64) {
        match self {
            Self::F16(least) => {
                let bits = f16_bits(least * (1.0 + random.fraction()));
                field[..2].copy_from_slice(&bits.to_le_bytes());
            }
            Self::F16InNibbles(least) => {
                let bits = f16_bits(least * (1.0 + random.fraction()));
                for (n, word) in field[..8].chunks_mut(2).enumerate() {
                    let nibble = (bits >> (4 * n)) as u8 & 0x0f;
                    word[1] = nibble << 4 | word[1] & 0x0f;
                }
            }
            Self::E8m0(exponent) => field[0] = exponent + (random.next() & 1) as u8,
            Self::Ue4m3s(exponent) => {
                for byte in &mut field[..4] {
                    *byte = exponent << 3 | *byte & 7;
                }
            }
        }
    }
}

/// The f16 next to `x`, on the side of zero. The magnitude must be below 65,536.
fn f16_bits(x: f32) -> u16 {
    const LEAST_NORMAL: f32 = 1.0 / (1 << 14) as f32;
    const STEP_BELOW: f32 = 1.0 / (1 << 24) as f32;
    let magnitude = if x.abs() < LEAST_NORMAL {
        (x.abs() / STEP_BELOW) as u32
    } else {
        // The exponent is biased by 127 in an f32 and by 15 in an f16.
        (x.abs().to_bits() - ((127 - 15) << 23)) >> 13
    };
    let sign = x.to_bits() >> 31 << 15;
    (sign | magnitude) as u16
}

/// The random number generator SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
/// number generators", 2014): a counter in steps of the golden ratio, each value mixed.
struct SplitMix64(u64);

impl SplitMix64 {
    /// The sequence of one tensor: its start is the seed and the name, mixed byte by byte.
    fn of_tensor(seed: u64, name: &str) -> Self {
        let mix = |state: u64, byte: u8| Self(state ^ u64::from(byte)).next();
        Self(name.bytes().fold(Self(seed).next(), mix))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = self.0;
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below 1.
    fn fraction(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }

    /// Nearly normal: mean 0, deviation 0.02, never beyond 0.07. It is the sum of four uniform
    /// 16-bit numbers (deviation 37,837) and one product, hence the same on every machine.
    fn weight(&mut self) -> f64 {
        let word = self.next();
        let sum: i32 = (0..4).map(|n| i32::from((word >> (16 * n)) as u16)).sum();
        f64::from(sum - 2 * 65_535) * (0.02 / 37_837.0)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::BufReader;

    use odmoe_fs::gguf::{Header, ModelHeader};

    use super::*;

    /// A toy of a few hundred kilobytes at most.
    fn tiny(folder: &Path) -> ToyArgs {
        ToyArgs {
            layers: 1,
            experts: 2,
            dim: 256,
            ffn_dim: 256,
            vocab: 256,
            ggml_type: GgmlType::from_name("Q4_0").unwrap(),
            ..ToyArgs::new(&folder.join("toy.gguf"))
        }
    }

    fn header(path: &Path) -> (Header, u64) {
        let bytes = fs::metadata(path).unwrap().len();
        let file = BufReader::new(File::open(path).unwrap());
        (Header::read(file, bytes).unwrap(), bytes)
    }

    fn data_of(paths: &[PathBuf], tensor: &str) -> Vec<u8> {
        let found = paths.iter().find_map(|path| {
            let (header, _) = header(path);
            let info = header.tensors.iter().find(|t| t.name == tensor)?;
            let start = info.offset as usize;
            Some(fs::read(path).unwrap()[start..start + info.bytes as usize].to_vec())
        });
        found.unwrap()
    }

    fn listing(folder: &Path) -> Vec<OsString> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|e| e.unwrap().file_name()).collect()
    }

    #[test]
    fn the_reference_naming_is_that_of_the_reference_converter() {
        let plan = Plan::new(&ToyArgs {
            naming: Naming::Reference,
            ..ToyArgs::new(Path::new("toy.gguf"))
        })
        .unwrap();
        let tensors: Vec<_> = plan.tensors.iter().map(|t| (&*t.name, &*t.dims)).collect();
        assert_eq!(tensors.len(), 40);
        for (at, name, dims) in [
            (0, "token_embd.weight", &[512, 1000][..]),
            (1, "output.weight", &[1000, 512]),
            (2, "blk.0.attn_norm.weight", &[512]),
            (6, "blk.0.attn_output.weight", &[512, 512]),
            (7, "blk.0.ffn_norm.weight", &[512]),
            (8, "blk.0.ffn.gate.weight", &[4, 512]),
            (9, "blk.0.ffn.experts.0.w1.weight", &[1024, 512]),
            (10, "blk.0.ffn.experts.0.w2.weight", &[512, 1024]),
            (21, "blk.1.attn_norm.weight", &[512]),
            (39, "blk.1.ffn.experts.3.w3.weight", &[1024, 512]),
        ] {
            assert_eq!(tensors[at], (name, dims));
        }
        let bytes: u64 = plan.tensors.iter().map(Tensor::bytes).sum();
        assert_eq!(bytes, 62_840_832);
        let keys: Vec<_> = plan.key_values.iter().map(|(key, _)| &**key).collect();
        assert_eq!(keys.len(), 8);
        assert_eq!(keys[0], "general.architecture");
        assert_eq!(keys[7], "kimi.num_active_experts");
    }

    #[test]
    fn every_naming_and_type_reads_back_as_planned() {
        let types = GGML_TYPES.iter().filter(|t| Elements::of(t).is_some());
        let stacked = types.map(|t| (t, Naming::Stacked));
        let q8_0 = GgmlType::from_name("Q8_0").unwrap();
        let namings = [Naming::Fused, Naming::PerExpert, Naming::Reference].map(|n| (q8_0, n));
        for (ggml_type, naming) in stacked.chain(namings) {
            let folder = tempfile::tempdir().unwrap();
            let args = ToyArgs {
                ggml_type,
                naming,
                ..tiny(folder.path())
            };
            let files = write_toy(&args).unwrap();
            assert_eq!(files, std::slice::from_ref(&args.out));
            let (header, bytes) = header(&args.out);
            let plan = Plan::new(&args).unwrap();
            assert_eq!(header.key_values.len(), plan.key_values.len());
            assert_eq!(header.tensors.len(), plan.tensors.len());
            for (read, planned) in header.tensors.iter().zip(&plan.tensors) {
                assert_eq!(read.name, planned.name);
                assert_eq!(read.dims(), planned.dims);
                assert_eq!(read.ggml_type, planned.ggml_type);
            }
            let last = header.tensors.last().unwrap();
            assert_eq!((last.offset + last.bytes).next_multiple_of(32), bytes);
        }
    }

    #[test]
    fn the_types_of_a_toy_are_those_of_gguf_py_that_files_hold() {
        let (toys, others): (Vec<_>, Vec<_>) =
            GGML_TYPES.iter().partition(|t| Elements::of(t).is_some());
        assert_eq!(toys.len(), 32);
        let gguf_py = others.iter().filter(|t| t.id <= 41).map(|t| t.name);
        assert_eq!(gguf_py.collect::<Vec<_>>(), ["Q8_1", "Q8_K"]);
    }

    #[test]
    fn the_bytes_depend_on_seed_and_tensor_and_not_on_the_split() {
        let folders = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let args = tiny(folders[0].path());
        let one = write_toy(&args).unwrap();
        let split = write_toy(&ToyArgs {
            split: 3,
            ..tiny(folders[1].path())
        })
        .unwrap();
        let other_seed = write_toy(&ToyArgs {
            seed: 1,
            ..tiny(folders[2].path())
        })
        .unwrap();
        let mut seen = std::collections::HashSet::new();
        for tensor in Plan::new(&args).unwrap().tensors {
            let data = data_of(&one, &tensor.name);
            assert_eq!(data, data_of(&split, &tensor.name), "{}", tensor.name);
            assert_ne!(data, data_of(&other_seed, &tensor.name), "{}", tensor.name);
            assert!(seen.insert(data), "{} repeats another tensor", tensor.name);
        }
    }

    #[test]
    fn parts_have_the_right_names_and_make_a_model() {
        let folder = tempfile::tempdir().unwrap();
        let args = tiny(folder.path());
        let tensors = Plan::new(&args).unwrap().tensors.len() as u16;
        for split in [2, 3, tensors] {
            let args = ToyArgs {
                split,
                ..args.clone()
            };
            let files = write_toy(&args).unwrap();
            assert_eq!(files.len(), usize::from(split));
            let name = format!("toy-00002-of-{split:05}.gguf");
            assert_eq!(files[1], folder.path().join(name));
            let headers: Vec<_> = files.iter().map(|path| header(path)).collect();
            assert!(headers.iter().all(|(h, _)| !h.tensors.is_empty()));
            assert!(headers[1..].iter().all(|(h, _)| h.key_values.len() == 3));
            let model = ModelHeader::join(headers).unwrap();
            assert_eq!(model.tensors.len(), usize::from(tensors));
        }
        let too_many = ToyArgs {
            split: tensors + 1,
            ..args
        };
        let error = write_toy(&too_many).unwrap_err().to_string();
        assert!(error.contains(&format!("--split {tensors}")), "{error}");
    }

    #[test]
    fn parts_are_of_about_equal_size() {
        let plan = Plan::new(&ToyArgs::new(Path::new("toy.gguf"))).unwrap();
        for range in plan.parts(3) {
            let bytes: u64 = plan.tensors[range].iter().map(Tensor::bytes).sum();
            assert!((16_000_000..26_000_000).contains(&bytes), "{bytes}");
        }
    }

    #[test]
    fn rows_of_broken_blocks_are_refused_with_the_tensor_and_the_option() {
        for (args, words) in [
            (
                ToyArgs {
                    dim: 100,
                    ..tiny(Path::new(""))
                },
                ["token_embd.weight", "--dim"],
            ),
            (
                ToyArgs {
                    ffn_dim: 100,
                    ..tiny(Path::new(""))
                },
                ["blk.0.ffn_down_exps.weight", "--ffn-dim"],
            ),
            (
                ToyArgs {
                    vocab: 100,
                    naming: Naming::Reference,
                    ..tiny(Path::new(""))
                },
                ["output.weight", "--vocab"],
            ),
        ] {
            let error = write_toy(&args).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
            assert!(error.contains("Q4_0 blocks of 32"), "{error}");
        }
    }

    #[test]
    fn no_file_is_overwritten_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let args = ToyArgs {
            split: 3,
            ..tiny(folder.path())
        };
        let mine = folder.path().join("toy-00002-of-00003.gguf");
        fs::write(&mine, "mine").unwrap();
        let error = write_toy(&args).unwrap_err().to_string();
        assert!(error.contains("toy-00002-of-00003.gguf"), "{error}");
        assert_eq!(fs::read(&mine).unwrap(), b"mine");
        assert_eq!(listing(folder.path()), ["toy-00002-of-00003.gguf"]);
    }

    #[test]
    fn the_generator_is_splitmix64() {
        let mut random = SplitMix64(1_234_567);
        assert_eq!(random.next(), 6_457_827_717_110_365_317);
        assert_eq!(random.next(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn f16_is_cut_from_f32() {
        for (x, bits) in [
            (1.0, 0x3c00),
            (-2.5, 0xc100),
            (0.1, 0x2e66),
            (0.0, 0),
            (6.2e-5, 0x0410),
            (-6.0e-5, 0x83ee),
        ] {
            assert_eq!(f16_bits(x), bits, "{x}");
        }
    }
}
