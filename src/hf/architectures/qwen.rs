//! Qwen2 and Qwen3, with and without experts.

use super::Constant::{Flag, Number};
use super::Row::{Biased, Experts, Linear, Norm, SingleLine};
use super::Setting::{Count, Found, HasBiases, Is};
use super::{Architecture, EXPERTS, MLP, QKV, QKV_OUTPUT, Row, values};

/// Queries, keys and values have biases.
const QWEN2_LAYER: &[Row] = &[
    Norm("attn_norm", "input_layernorm"),
    Biased("attn_q", "self_attn.q_proj"),
    Biased("attn_k", "self_attn.k_proj"),
    Biased("attn_v", "self_attn.v_proj"),
    Linear("attn_output", "self_attn.o_proj"),
    Norm("ffn_norm", "post_attention_layernorm"),
];

const QWEN2_MOE_LAYER: &[Row] = &[
    Norm("attn_norm", "input_layernorm"),
    Linear("attn_q", "self_attn.q_proj"),
    Linear("attn_k", "self_attn.k_proj"),
    Linear("attn_v", "self_attn.v_proj"),
    Linear("attn_output", "self_attn.o_proj"),
    Norm("ffn_norm", "post_attention_layernorm"),
];

/// Queries and keys are normalised head by head.
const QWEN3_LAYER: &[Row] = &[
    Norm("attn_norm", "input_layernorm"),
    Linear("attn_q", "self_attn.q_proj"),
    Linear("attn_k", "self_attn.k_proj"),
    Linear("attn_v", "self_attn.v_proj"),
    Linear("attn_output", "self_attn.o_proj"),
    Norm("attn_q_norm", "self_attn.q_norm"),
    Norm("attn_k_norm", "self_attn.k_norm"),
    Norm("ffn_norm", "post_attention_layernorm"),
];

pub static QWEN2: Architecture = Architecture {
    gguf: "qwen2",
    is: super::always,
    class: "Qwen2ForCausalLM",
    model_type: "qwen2",
    every_layer: QWEN2_LAYER,
    dense_layer: MLP,
    moe_layer: &[],
    extra_layer: &[],
    config: &[
        ("intermediate_size", Found(values::dense_width)),
        ("use_sliding_window", Is(Flag(false))),
    ],
};

pub static QWEN3: Architecture = Architecture {
    gguf: "qwen3",
    is: super::always,
    class: "Qwen3ForCausalLM",
    model_type: "qwen3",
    every_layer: QWEN3_LAYER,
    dense_layer: MLP,
    moe_layer: &[],
    extra_layer: &[],
    config: &[
        ("intermediate_size", Found(values::dense_width)),
        ("head_dim", Found(values::head_dim)),
        ("attention_bias", HasBiases(QKV_OUTPUT)),
        ("use_sliding_window", Is(Flag(false))),
    ],
};

pub static QWEN2_MOE: Architecture = Architecture {
    gguf: "qwen2moe",
    is: super::always,
    class: "Qwen2MoeForCausalLM",
    model_type: "qwen2_moe",
    every_layer: QWEN2_MOE_LAYER,
    dense_layer: MLP,
    moe_layer: &[
        Linear("ffn_gate_inp", "mlp.gate"),
        Experts(EXPERTS),
        Linear("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
        Linear("ffn_up_shexp", "mlp.shared_expert.up_proj"),
        Linear("ffn_down_shexp", "mlp.shared_expert.down_proj"),
        SingleLine("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
    ],
    extra_layer: &[],
    config: &[
        ("intermediate_size", Found(values::dense_width)),
        ("num_experts", Count("expert_count")),
        ("num_experts_per_tok", Found(values::experts_used)),
        ("moe_intermediate_size", Found(values::expert_width)),
        (
            "shared_expert_intermediate_size",
            Found(values::shared_width),
        ),
        ("norm_topk_prob", Is(Flag(false))),
        ("qkv_bias", HasBiases(QKV)),
        ("decoder_sparse_step", Is(Number(1))),
        ("mlp_only_layers", Found(values::dense_layers)),
        ("use_sliding_window", Is(Flag(false))),
    ],
};

pub static QWEN3_MOE: Architecture = Architecture {
    gguf: "qwen3moe",
    is: super::always,
    class: "Qwen3MoeForCausalLM",
    model_type: "qwen3_moe",
    every_layer: QWEN3_LAYER,
    dense_layer: MLP,
    moe_layer: &[Linear("ffn_gate_inp", "mlp.gate"), Experts(EXPERTS)],
    extra_layer: &[],
    config: &[
        ("intermediate_size", Found(values::dense_width)),
        ("head_dim", Found(values::head_dim)),
        ("num_experts", Count("expert_count")),
        ("num_experts_per_tok", Found(values::experts_used)),
        ("moe_intermediate_size", Found(values::expert_width)),
        ("norm_topk_prob", Is(Flag(true))),
        ("attention_bias", HasBiases(QKV_OUTPUT)),
        ("decoder_sparse_step", Is(Number(1))),
        ("mlp_only_layers", Found(values::dense_layers)),
        ("use_sliding_window", Is(Flag(false))),
    ],
};
