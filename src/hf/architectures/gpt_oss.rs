//! gpt-oss: sliding and full attention in turn, learned sinks, biases everywhere.

use super::Constant::{Flag, Real};
use super::Row::{Biased, Experts, Norm, Vector};
use super::Setting::{Count, Found, Is};
use super::{Architecture, Experts as Names, InCheckpoint, values};

pub static GPT_OSS: Architecture = Architecture {
    gguf: "gpt-oss",
    is: super::always,
    class: "GptOssForCausalLM",
    model_type: "gpt_oss",
    every_layer: &[
        Norm("attn_norm", "input_layernorm"),
        Biased("attn_q", "self_attn.q_proj"),
        Biased("attn_k", "self_attn.k_proj"),
        Biased("attn_v", "self_attn.v_proj"),
        Biased("attn_output", "self_attn.o_proj"),
        Vector("attn_sinks.weight", "self_attn.sinks"),
        Norm("post_attention_norm", "post_attention_layernorm"),
    ],
    dense_layer: &[],
    moe_layer: &[
        Biased("ffn_gate_inp", "mlp.router"),
        Experts(Names {
            checkpoint: InCheckpoint::Interleaved("mlp.experts"),
            mlx: "mlp.experts",
        }),
    ],
    extra_layer: &[],
    config: &[
        ("intermediate_size", Found(values::expert_width)),
        ("head_dim", Found(values::head_dim)),
        ("attention_bias", Is(Flag(true))),
        ("sliding_window", Count("attention.sliding_window")),
        ("layer_types", Found(values::alternating_layers)),
        ("num_local_experts", Count("expert_count")),
        ("num_experts_per_tok", Found(values::experts_used)),
        ("swiglu_limit", Is(Real(7.0))),
    ],
};
