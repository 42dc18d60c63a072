//! The content of a toy: keys and tensors as a converter would write them, dealt out to parts.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::TempPath;

use super::weights::{Elements, SplitMix64};
use super::{Arch, Naming, Toy, ToyError, qwen3moe};
use crate::gguf::write::{Writer, Written};
use crate::gguf::{GgmlType, Value, ValueType};
use crate::work::Progress;

/// How many bytes are written between two reports of progress.
const PROGRESS_BYTES: u64 = 1 << 20;

/// What the model holds.
pub(super) struct Plan {
    pub(super) key_values: Vec<(String, Value)>,
    pub(super) tensors: Vec<Tensor>,
}

pub(super) struct Tensor {
    pub(super) name: String,
    /// In GGUF order (contiguous first).
    pub(super) dims: Vec<u64>,
    pub(super) ggml_type: &'static GgmlType,
}

/// Why the writing of a part ends early.
#[derive(Debug, thiserror::Error)]
pub(super) enum Halt {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("stopped")]
    Stopped,
}

/// A width of the model, and the option that sets it.
#[derive(Clone, Copy)]
struct Width(u64, &'static str);

impl Plan {
    pub(super) fn new(toy: &Toy) -> Result<Self, ToyError> {
        let mut tensors = Tensors {
            toy,
            list: Vec::new(),
        };
        match toy.naming {
            Naming::Stacked => tensors.llama(Tensors::stacked),
            Naming::Fused => tensors.llama(Tensors::fused),
            Naming::PerExpert => tensors.llama(Tensors::per_expert),
            Naming::Reference => tensors.reference(),
        }?;
        Ok(Self {
            key_values: match (toy.arch, toy.naming) {
                (Arch::Qwen3Moe, _) => qwen3moe::key_values(toy),
                (Arch::Toy, Naming::Reference) => reference_key_values(toy),
                (Arch::Toy, _) => llama_key_values(toy),
            },
            tensors: tensors.list,
        })
    }

    /// Bytes of all tensors.
    pub(super) fn bytes(&self) -> u64 {
        self.tensors.iter().map(Tensor::bytes).sum()
    }

    /// Deals the tensors out, in their order, to parts of about equal size, none of them empty.
    pub(super) fn parts(&self, count: usize) -> Vec<Range<usize>> {
        let total = self.bytes();
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

    /// Part `no` (0-based) of `count`, which holds some of the tensors.
    pub(super) fn part(&self, no: u16, count: u16, tensors: Range<usize>) -> Part<'_> {
        let tensors = &self.tensors[tensors];
        Part {
            tensors,
            header: self.header(no, count, tensors),
        }
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

/// One file of the model.
pub(super) struct Part<'a> {
    tensors: &'a [Tensor],
    header: Written,
}

impl Part<'_> {
    /// Writes it into a temporary file beside `path`.
    pub(super) fn write(
        &self,
        seed: u64,
        path: &Path,
        stop: &AtomicBool,
        progress: &dyn Fn(Progress),
    ) -> Result<TempPath, Halt> {
        let header = &self.header;
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        // With the rights of any new file, and errors that do not tell its name.
        let (file, unnamed) = tempfile::Builder::new()
            .prefix(".toy-")
            .make_in(folder, |path| File::create_new(path))?
            .into_parts();
        let mut out = BufWriter::with_capacity(1 << 20, file);
        out.write_all(&header.bytes)?;
        let mut at = header.bytes.len() as u64;
        for (tensor, &(offset, bytes)) in self.tensors.iter().zip(&header.data) {
            pad(&mut out, offset - at)?;
            tensor.write_data(seed, &mut out, stop, progress)?;
            at = offset + bytes;
        }
        pad(&mut out, header.file_bytes - at)?;
        out.flush()?;
        Ok(unnamed) // and closed: there may be more parts than descriptors
    }
}

fn pad(out: &mut impl Write, bytes: u64) -> io::Result<u64> {
    io::copy(&mut io::Read::take(io::repeat(0), bytes), out)
}

/// The tensors of a model, as they are listed.
struct Tensors<'a> {
    toy: &'a Toy,
    list: Vec<Tensor>,
}

impl Tensors<'_> {
    fn dim(&self) -> Width {
        Width(self.toy.dim.into(), "--dim")
    }

    fn ffn(&self) -> Width {
        Width(self.toy.ffn_dim.into(), "--ffn-dim")
    }

    fn vocab(&self) -> Width {
        Width(self.toy.vocab.into(), "--vocab")
    }

    fn experts(&self) -> u64 {
        self.toy.experts.into()
    }

    /// Adds a matrix of the chosen type: rows of `row` elements, and the other dimensions.
    fn matrix(&mut self, name: &str, row: Width, others: &[u64]) -> Result<(), ToyError> {
        let Width(elements, option) = row;
        let ggml_type = self.toy.ggml_type;
        if ggml_type.row_bytes(elements).is_none() {
            return Err(ToyError::BrokenRow {
                tensor: format!("{name}.weight"),
                elements,
                ggml_type,
                option,
            });
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
    fn llama(
        &mut self,
        experts: fn(&mut Self, u32) -> Result<(), ToyError>,
    ) -> Result<(), ToyError> {
        let (dim, vocab) = (self.dim(), self.vocab());
        self.matrix("token_embd", dim, &[vocab.0])?;
        self.f32("output_norm", &[dim.0]);
        self.matrix("output", dim, &[vocab.0])?;
        for layer in 0..self.toy.layers {
            match self.toy.arch {
                Arch::Toy => self.attention(layer)?,
                Arch::Qwen3Moe => self.grouped_attention(layer)?,
            }
            self.f32(&format!("blk.{layer}.ffn_norm"), &[dim.0]);
            let router = [dim.0, self.experts()];
            self.f32(&format!("blk.{layer}.ffn_gate_inp"), &router);
            experts(self, layer)?;
        }
        Ok(())
    }

    fn stacked(&mut self, layer: u32) -> Result<(), ToyError> {
        let (dim, ffn, experts) = (self.dim(), self.ffn(), self.experts());
        let blk = format!("blk.{layer}.ffn");
        self.matrix(&format!("{blk}_gate_exps"), dim, &[ffn.0, experts])?;
        self.matrix(&format!("{blk}_down_exps"), ffn, &[dim.0, experts])?;
        self.matrix(&format!("{blk}_up_exps"), dim, &[ffn.0, experts])
    }

    fn fused(&mut self, layer: u32) -> Result<(), ToyError> {
        let (dim, ffn, experts) = (self.dim(), self.ffn(), self.experts());
        let blk = format!("blk.{layer}.ffn");
        self.matrix(&format!("{blk}_gate_up_exps"), dim, &[2 * ffn.0, experts])?;
        self.matrix(&format!("{blk}_down_exps"), ffn, &[dim.0, experts])
    }

    fn per_expert(&mut self, layer: u32) -> Result<(), ToyError> {
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
    fn reference(&mut self) -> Result<(), ToyError> {
        let (dim, ffn, vocab, experts) = (self.dim(), self.ffn(), self.vocab(), self.experts());
        self.matrix("token_embd", dim, &[vocab.0])?;
        self.matrix("output", vocab, &[dim.0])?;
        for layer in 0..self.toy.layers {
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

    /// Several heads of queries share one of keys and values, and each head is normalised.
    fn grouped_attention(&mut self, layer: u32) -> Result<(), ToyError> {
        let dim = self.dim();
        let heads = qwen3moe::Heads::of(self.toy);
        let at = format!("blk.{layer}.attn");
        self.f32(&format!("{at}_norm"), &[dim.0]);
        self.matrix(&format!("{at}_q"), dim, &[heads.width * heads.queries])?;
        for matrix in ["k", "v"] {
            let rows = heads.width * heads.keys;
            self.matrix(&format!("{at}_{matrix}"), dim, &[rows])?;
        }
        let row = Width(heads.width * heads.queries, "--dim");
        self.matrix(&format!("{at}_output"), row, &[dim.0])?;
        self.f32(&format!("{at}_q_norm"), &[heads.width]);
        self.f32(&format!("{at}_k_norm"), &[heads.width]);
        Ok(())
    }

    fn attention(&mut self, layer: u32) -> Result<(), ToyError> {
        let dim = self.dim();
        self.f32(&format!("blk.{layer}.attn_norm"), &[dim.0]);
        for matrix in ["q", "k", "v", "output"] {
            self.matrix(&format!("blk.{layer}.attn_{matrix}"), dim, &[dim.0])?;
        }
        Ok(())
    }
}

pub(super) const CONTEXT_LENGTH: u32 = 4096;

impl Toy {
    pub(super) fn experts_used(&self) -> u32 {
        self.experts.min(2)
    }

    /// Eight, or as many as divide the width.
    fn heads(&self) -> u32 {
        1 << self.dim.trailing_zeros().min(3)
    }
}

fn llama_key_values(toy: &Toy) -> Vec<(String, Value)> {
    let string = |text: &str| Value::String(text.to_owned());
    let general = [
        ("general.architecture", string("toy-moe")),
        ("general.name", string("Toy MoE")),
        ("general.quantization_version", Value::U32(2)), // GGML_QNT_VERSION
    ];
    let architecture = [
        ("toy-moe.block_count", toy.layers),
        ("toy-moe.context_length", CONTEXT_LENGTH),
        ("toy-moe.embedding_length", toy.dim),
        ("toy-moe.feed_forward_length", toy.ffn_dim),
        ("toy-moe.expert_feed_forward_length", toy.ffn_dim),
        ("toy-moe.expert_count", toy.experts),
        ("toy-moe.expert_used_count", toy.experts_used()),
        ("toy-moe.attention.head_count", toy.heads()),
        ("toy-moe.vocab_size", toy.vocab),
    ];
    let tokens = (0..toy.vocab).map(|n| string(&format!("token_{n}")));
    let scores = (0..toy.vocab).map(|n| Value::F32(-(n as f32)));
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

fn reference_key_values(toy: &Toy) -> Vec<(String, Value)> {
    let mut pairs = vec![(
        "general.architecture".to_owned(),
        Value::String("kimi-moe".to_owned()),
    )];
    let numbers = [
        ("kimi-moe.block_count", toy.layers),
        ("kimi-moe.context_length", CONTEXT_LENGTH),
        ("kimi-moe.embedding_length", toy.dim),
        ("kimi-moe.attention.head_count", toy.heads()),
        ("kimi-moe.feed_forward_length", toy.ffn_dim),
        ("kimi.num_experts_per_layer", toy.experts),
        ("kimi.num_active_experts", toy.experts_used()),
    ];
    pairs.extend(numbers.map(|(key, n)| (key.to_owned(), Value::U32(n))));
    pairs
}

impl Tensor {
    pub(super) fn bytes(&self) -> u64 {
        let rows: u64 = self.dims[1..].iter().product();
        let row_bytes = self.ggml_type.row_bytes(self.dims[0]);
        row_bytes.expect("rows are whole blocks") * rows
    }

    fn write_data(
        &self,
        seed: u64,
        out: &mut impl Write,
        stop: &AtomicBool,
        progress: &dyn Fn(Progress),
    ) -> Result<(), Halt> {
        let elements = Elements::of(self.ggml_type).expect("a toy is made of such types");
        // Norms scale what passes through them, so they are about 1.
        let mean = if self.name.contains("norm") { 1.0 } else { 0.0 };
        let mut random = SplitMix64::of_tensor(seed, &self.name);
        let mut block = vec![0; self.ggml_type.block_bytes as usize];
        let mut reported = 0;
        for n in 1..=self.bytes() / block.len() as u64 {
            if stop.load(Ordering::Relaxed) {
                return Err(Halt::Stopped);
            }
            elements.fill(&mut block, mean, &mut random);
            out.write_all(&block)?;
            let bytes = n * block.len() as u64;
            if bytes - reported >= PROGRESS_BYTES || bytes == self.bytes() {
                progress(Progress {
                    bytes: bytes - reported,
                    files: 0,
                });
                reported = bytes;
            }
        }
        Ok(())
    }
}
