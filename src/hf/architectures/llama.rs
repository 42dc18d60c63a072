//! Llama and Mixtral, which share an architecture in GGUF.

use super::Row::{Experts, Linear, Norm, Rotary};
use super::Setting::{Count, Found, HasBiases};
use super::{Architecture, BLOCK_SPARSE_EXPERTS, Heads, MLP, QKV_OUTPUT, Row, values};

const EVERY_LAYER: &[Row] = &[
    Norm("attn_norm", "input_layernorm"),
    Rotary("attn_q", "self_attn.q_proj", Heads::Query),
    Rotary("attn_k", "self_attn.k_proj", Heads::KeyValue),
    Linear("attn_v", "self_attn.v_proj"),
    Linear("attn_output", "self_attn.o_proj"),
    Norm("ffn_norm", "post_attention_layernorm"),
];

pub static LLAMA: Architecture = Architecture {
    gguf: "llama",
    is: super::always,
    class: "LlamaForCausalLM",
    model_type: "llama",
    every_layer: EVERY_LAYER,
    dense_layer: MLP,
    moe_layer: &[],
    extra_layer: &[],
    config: &[
        ("intermediate_size", Found(values::dense_width)),
        ("head_dim", Found(values::head_dim)),
        ("attention_bias", HasBiases(QKV_OUTPUT)),
        ("mlp_bias", HasBiases(&["ffn_gate", "ffn_up", "ffn_down"])),
    ],
};

pub static MIXTRAL: Architecture = Architecture {
    gguf: "llama",
    is: |facts| facts.has_experts(),
    class: "MixtralForCausalLM",
    model_type: "mixtral",
    every_layer: EVERY_LAYER,
    dense_layer: &[],
    moe_layer: &[
        Linear("ffn_gate_inp", "block_sparse_moe.gate"),
        Experts(BLOCK_SPARSE_EXPERTS),
    ],
    extra_layer: &[],
    config: &[
        ("intermediate_size", Found(values::expert_width)),
        ("head_dim", Found(values::head_dim)),
        ("num_local_experts", Count("expert_count")),
        ("num_experts_per_tok", Found(values::experts_used)),
    ],
};
