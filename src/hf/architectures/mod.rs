//! What is particular to each architecture: the names of its tensors, and its configuration.
//!
//! One file per family, one table per architecture. A table reads like the model: what every layer
//! has, what a dense layer has, what a layer with experts has. On the left stands a tensor of the
//! GGUF without `blk.N.` and without `.weight` or `.bias`, on the right the module of the checkpoint
//! without `model.layers.N.`. The kind of a row says what must be done besides renaming, mostly
//! nothing.

mod deepseek;
mod glm;
mod gpt_oss;
mod llama;
mod minimax;
mod olmoe;
mod qwen;

use serde_json::Value as Json;

use super::HfError;
use super::facts::Facts;
use super::values;

/// One kind of model.
pub(super) struct Architecture {
    /// `general.architecture` of the GGUF.
    pub gguf: &'static str,
    /// Whether a GGUF of that architecture is of this kind, where it has several.
    pub is: fn(&Facts) -> bool,
    /// `architectures` of config.json: the class of transformers.
    pub class: &'static str,
    /// `model_type` of config.json.
    pub model_type: &'static str,
    pub every_layer: &'static [Row],
    pub dense_layer: &'static [Row],
    pub moe_layer: &'static [Row],
    /// What a layer that predicts further tokens (MTP) has besides.
    pub extra_layer: &'static [Row],
    pub config: &'static [(&'static str, Setting)],
}

impl Architecture {
    /// Whether the class has a bias there, always or as config.json says. The module is that of the
    /// GGUF.
    pub fn has_bias(&self, module: &str) -> bool {
        let is_of = |name: &&str| match module {
            "attn_qkv" => QKV.contains(name),
            module => *name == module,
        };
        let is_stated = self.config.iter().any(|(_, setting)| match setting {
            Setting::HasBiases(names) => names.iter().any(is_of),
            _ => false,
        });
        is_stated
            || self.rows().any(|row| match row {
                Row::Biased(name, _) => is_of(name),
                Row::Experts(experts) => experts.are_biased() && module.ends_with("_exps"),
                _ => false,
            })
    }

    /// Whether queries and keys are normalised over all heads at once.
    pub fn has_wide_norms(&self) -> bool {
        self.rows().any(|row| matches!(row, Row::WideNorm(..)))
    }

    fn rows(&self) -> impl Iterator<Item = &'static Row> {
        let rows = [self.every_layer, self.dense_layer, self.moe_layer];
        rows.into_iter().flatten()
    }
}

/// What one tensor of the GGUF, or a few that belong together, become.
pub(super) enum Row {
    /// The scale of a norm: one dimension.
    Norm(&'static str, &'static str),
    /// The same for queries or keys, over all heads at once rather than head by head.
    WideNorm(&'static str, &'static str),
    /// A matrix, and its bias if config.json says that it has one.
    Linear(&'static str, &'static str),
    /// A matrix that has a bias in every model of the architecture.
    Biased(&'static str, &'static str),
    /// The same, where some models of the architecture do without, in all layers.
    Maybe(&'static Row),
    /// A matrix of one row, whose GGUF may have forgotten that dimension.
    SingleLine(&'static str, &'static str),
    /// A matrix of queries or keys, and its bias, whose rows llama.cpp has put into another order:
    /// within each head, halves became alternating rows.
    Rotary(&'static str, &'static str, Heads),
    /// A matrix that loaders have as a parameter of their own rather than as a linear layer, so that
    /// it is never quantised.
    Router(&'static str, &'static str),
    /// A tensor of one dimension under exactly these names.
    Vector(&'static str, &'static str),
    /// The same, kept in F32 in every form, as the original has it.
    Precise(&'static str, &'static str),
    /// The three matrices of the routed experts.
    Experts(Experts),
    /// `kv_b_proj`, which llama.cpp splits in two, one of them transposed.
    KeyValueUp(InMlx),
}

impl Row {
    /// The tensor of the GGUF, or one of them, without the number of its layer.
    pub fn tensor(&self) -> String {
        match *self {
            Self::Maybe(row) => row.tensor(),
            Self::Vector(name, _) | Self::Precise(name, _) => name.to_owned(),
            Self::Norm(name, _)
            | Self::WideNorm(name, _)
            | Self::Linear(name, _)
            | Self::Biased(name, _)
            | Self::SingleLine(name, _)
            | Self::Rotary(name, ..)
            | Self::Router(name, _) => format!("{name}.weight"),
            Self::Experts(_) => "ffn_down_exps.weight".to_owned(),
            Self::KeyValueUp(_) => "attn_kv_b.weight".to_owned(),
        }
    }
}

/// What mlx-lm makes of `kv_b_proj`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum InMlx {
    Whole,
    /// `embed_q` and `unembed_out`, as llama.cpp has them.
    Split,
}

/// Which number of heads a matrix is divided by.
#[derive(Clone, Copy)]
pub(super) enum Heads {
    Query,
    KeyValue,
}

/// The names of routed experts.
#[derive(Clone, Copy)]
pub(super) struct Experts {
    pub checkpoint: InCheckpoint,
    /// The stacks in mlx-lm: this, and then `gate_proj`, `down_proj` and `up_proj`.
    pub mlx: &'static str,
}

impl Experts {
    /// Only gpt-oss has biases there.
    pub fn are_biased(&self) -> bool {
        matches!(self.checkpoint, InCheckpoint::Interleaved(_))
    }
}

/// Experts as the checkpoint has them.
#[derive(Clone, Copy)]
pub(super) enum InCheckpoint {
    /// A matrix each: the module, the number of the expert, and the names of gate, down and up.
    Each(&'static str, [&'static str; 3]),
    /// Stacks of transposed matrices, in which the columns of gate and up alternate.
    Interleaved(&'static str),
}

/// Where a value of config.json comes from.
pub(super) enum Setting {
    /// A key of the GGUF that must be there, a whole number above 0.
    Count(&'static str),
    /// Yes or no, or this if the key is missing.
    FlagOr(&'static str, bool),
    /// The same for every model of the architecture.
    Is(Constant),
    /// Whether a tensor of a layer is there.
    HasTensor(&'static str),
    /// Whether these matrices have biases: all of them, in all layers, or none.
    HasBiases(&'static [&'static str]),
    Found(fn(&Facts) -> Result<Json, HfError>),
}

pub(super) enum Constant {
    Flag(bool),
    Number(u64),
    Real(f64),
    Text(&'static str),
}

use Setting::{Count, Found, Is};

/// What config.json holds for every architecture.
pub(super) const COMMON: &[(&str, Setting)] = &[
    ("hidden_size", Count("embedding_length")),
    ("num_hidden_layers", Found(values::layers)),
    ("num_attention_heads", Count("attention.head_count")),
    ("num_key_value_heads", Found(values::key_value_heads)),
    ("max_position_embeddings", Count("context_length")),
    ("rms_norm_eps", Found(values::norm_epsilon)),
    ("rope_theta", Found(values::rope_theta)),
    ("rope_scaling", Found(values::rope_scaling)),
    ("vocab_size", Found(values::vocabulary)),
    ("tie_word_embeddings", Found(values::ties_embeddings)),
    ("hidden_act", Is(Constant::Text("silu"))),
];

/// All of them; of several kinds of one architecture, the first that applies is taken.
static ARCHITECTURES: &[&Architecture] = &[
    &llama::MIXTRAL,
    &llama::LLAMA,
    &qwen::QWEN2,
    &qwen::QWEN3,
    &qwen::QWEN2_MOE,
    &qwen::QWEN3_MOE,
    &deepseek::DEEPSEEK_V3,
    &deepseek::DEEPSEEK_V2,
    &glm::GLM4_MOE,
    &gpt_oss::GPT_OSS,
    &olmoe::OLMOE,
    &minimax::MINIMAX_M2,
];

/// The architectures that are known, by their names in GGUF.
pub fn names() -> impl Iterator<Item = &'static str> {
    let mut names: Vec<_> = ARCHITECTURES.iter().map(|known| known.gguf).collect();
    names.sort_unstable();
    names.dedup();
    names.into_iter()
}

/// The kind of a model.
pub(super) fn of(facts: &Facts) -> Option<&'static Architecture> {
    let of_name = |known: &&&Architecture| Some(known.gguf) == facts.model.architecture();
    ARCHITECTURES
        .iter()
        .filter(of_name)
        .find(|known| (known.is)(facts))
        .copied()
}

/// For architectures of a single kind.
fn always(_: &Facts) -> bool {
    true
}

const QKV: &[&str] = &["attn_q", "attn_k", "attn_v"];
const QKV_OUTPUT: &[&str] = &["attn_q", "attn_k", "attn_v", "attn_output"];

/// The dense feed-forward network of nearly all of them.
const MLP: &[Row] = &[
    Row::Linear("ffn_gate", "mlp.gate_proj"),
    Row::Linear("ffn_up", "mlp.up_proj"),
    Row::Linear("ffn_down", "mlp.down_proj"),
];

const GATE_DOWN_UP: [&str; 3] = ["gate_proj", "down_proj", "up_proj"];

/// Experts as most checkpoints name them.
const EXPERTS: Experts = Experts {
    checkpoint: InCheckpoint::Each("mlp.experts", GATE_DOWN_UP),
    mlx: "mlp.switch_mlp",
};

/// Experts as Mixtral's and MiniMax' checkpoints name them.
const BLOCK_SPARSE_EXPERTS: Experts = Experts {
    checkpoint: InCheckpoint::Each("block_sparse_moe.experts", ["w1", "w2", "w3"]),
    mlx: "block_sparse_moe.switch_mlp",
};
