//! GLM-4.5 and its successors of the same shape.

use super::Constant::Text;
use super::Row::{Experts, Linear, Maybe, Norm, Precise, Router};
use super::Setting::{Count, FlagOr, Found, HasBiases, HasTensor, Is};
use super::{Architecture, EXPERTS, MLP, QKV, Row, values};

/// A layer that predicts the token after the next one (MTP).
pub(super) const PREDICTS_FURTHER: &[Row] = &[
    Linear("nextn.eh_proj", "eh_proj"),
    Norm("nextn.enorm", "enorm"),
    Norm("nextn.hnorm", "hnorm"),
    Maybe(&Linear("nextn.embed_tokens", "embed_tokens")),
    Maybe(&Linear("nextn.shared_head_head", "shared_head.head")),
    Maybe(&Norm("nextn.shared_head_norm", "shared_head.norm")),
];

pub static GLM4_MOE: Architecture = Architecture {
    gguf: "glm4moe",
    is: super::always,
    class: "Glm4MoeForCausalLM",
    model_type: "glm4_moe",
    every_layer: &[
        Norm("attn_norm", "input_layernorm"),
        Linear("attn_q", "self_attn.q_proj"),
        Linear("attn_k", "self_attn.k_proj"),
        Linear("attn_v", "self_attn.v_proj"),
        Linear("attn_output", "self_attn.o_proj"),
        Maybe(&Norm("attn_q_norm", "self_attn.q_norm")),
        Maybe(&Norm("attn_k_norm", "self_attn.k_norm")),
        Norm("post_attention_norm", "post_attention_layernorm"),
    ],
    dense_layer: MLP,
    moe_layer: &[
        Router("ffn_gate_inp", "mlp.gate"),
        Precise("exp_probs_b.bias", "mlp.gate.e_score_correction_bias"),
        Experts(EXPERTS),
        Maybe(&Linear("ffn_gate_shexp", "mlp.shared_experts.gate_proj")),
        Maybe(&Linear("ffn_up_shexp", "mlp.shared_experts.up_proj")),
        Maybe(&Linear("ffn_down_shexp", "mlp.shared_experts.down_proj")),
    ],
    extra_layer: PREDICTS_FURTHER,
    config: &[
        ("intermediate_size", Found(values::dense_width)),
        ("head_dim", Found(values::head_dim)),
        ("partial_rotary_factor", Found(values::rotary_share)),
        ("attention_bias", HasBiases(QKV)),
        ("use_qk_norm", HasTensor("attn_q_norm.weight")),
        ("n_routed_experts", Count("expert_count")),
        ("num_experts_per_tok", Found(values::experts_used)),
        ("moe_intermediate_size", Found(values::expert_width)),
        ("n_shared_experts", Found(values::shared_experts)),
        ("first_k_dense_replace", Found(values::leading_dense_layers)),
        ("routed_scaling_factor", Found(values::routed_scale)),
        ("norm_topk_prob", FlagOr("expert_weights_norm", false)),
        ("scoring_func", Found(values::sigmoid)),
        ("topk_method", Is(Text("noaux_tc"))),
        ("n_group", Found(values::groups)),
        ("topk_group", Found(values::groups_used)),
        ("num_nextn_predict_layers", Found(values::extra_layers)),
    ],
};
