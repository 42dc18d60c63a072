//! OLMoE: queries and keys are normalised over all heads at once.

use super::Constant::Flag;
use super::Row::{Experts, Linear, Norm, WideNorm};
use super::Setting::{Count, Found, HasBiases, Is};
use super::{Architecture, EXPERTS, QKV_OUTPUT, values};

pub static OLMOE: Architecture = Architecture {
    gguf: "olmoe",
    is: super::always,
    class: "OlmoeForCausalLM",
    model_type: "olmoe",
    every_layer: &[
        Norm("attn_norm", "input_layernorm"),
        Linear("attn_q", "self_attn.q_proj"),
        Linear("attn_k", "self_attn.k_proj"),
        Linear("attn_v", "self_attn.v_proj"),
        Linear("attn_output", "self_attn.o_proj"),
        WideNorm("attn_q_norm", "self_attn.q_norm"),
        WideNorm("attn_k_norm", "self_attn.k_norm"),
        Norm("ffn_norm", "post_attention_layernorm"),
    ],
    dense_layer: &[],
    moe_layer: &[Linear("ffn_gate_inp", "mlp.gate"), Experts(EXPERTS)],
    extra_layer: &[],
    config: &[
        ("intermediate_size", Found(values::expert_width)),
        ("attention_bias", HasBiases(QKV_OUTPUT)),
        ("clip_qkv", Found(values::clamp)),
        ("num_experts", Count("expert_count")),
        ("num_experts_per_tok", Found(values::experts_used)),
        ("norm_topk_prob", Is(Flag(false))),
    ],
};
