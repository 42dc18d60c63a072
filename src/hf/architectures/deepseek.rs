//! DeepSeek V2 and V3 (R1, Kimi K2 and the text model of K2.5): attention with latent keys and
//! values (MLA).

use super::Constant::{Number, Text};
use super::Row::{Experts, KeyValueUp, Linear, Maybe, Norm, Precise, Router};
use super::Setting::{Count, FlagOr, Found, HasBiases, Is};
use super::{Architecture, EXPERTS, InMlx, MLP, Row, values};

/// What has a bias if `attention_bias` is set.
const BIASED: &[&str] = &["attn_q_a", "attn_kv_a_mqa", "attn_output"];

const V2_LAYER: &[Row] = &layer(InMlx::Whole);
const V3_LAYER: &[Row] = &layer(InMlx::Split);

const fn layer(in_mlx: InMlx) -> [Row; 10] {
    [
        Norm("attn_norm", "input_layernorm"),
        // Either one matrix for the queries, or two with a norm between them.
        Maybe(&Linear("attn_q", "self_attn.q_proj")),
        Maybe(&Linear("attn_q_a", "self_attn.q_a_proj")),
        Maybe(&Norm("attn_q_a_norm", "self_attn.q_a_layernorm")),
        Maybe(&Linear("attn_q_b", "self_attn.q_b_proj")),
        Linear("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
        Norm("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
        KeyValueUp(in_mlx),
        Linear("attn_output", "self_attn.o_proj"),
        Norm("ffn_norm", "post_attention_layernorm"),
    ]
}

const V2_EXPERTS: &[Row] = &[
    Router("ffn_gate_inp", "mlp.gate"),
    Experts(EXPERTS),
    Maybe(&Linear("ffn_gate_shexp", "mlp.shared_experts.gate_proj")),
    Maybe(&Linear("ffn_up_shexp", "mlp.shared_experts.up_proj")),
    Maybe(&Linear("ffn_down_shexp", "mlp.shared_experts.down_proj")),
];

const V3_EXPERTS: &[Row] = &[
    Router("ffn_gate_inp", "mlp.gate"),
    Maybe(&Precise(
        "exp_probs_b.bias",
        "mlp.gate.e_score_correction_bias",
    )),
    Experts(EXPERTS),
    Maybe(&Linear("ffn_gate_shexp", "mlp.shared_experts.gate_proj")),
    Maybe(&Linear("ffn_up_shexp", "mlp.shared_experts.up_proj")),
    Maybe(&Linear("ffn_down_shexp", "mlp.shared_experts.down_proj")),
];

pub static DEEPSEEK_V2: Architecture = Architecture {
    gguf: "deepseek2",
    is: super::always,
    class: "DeepseekV2ForCausalLM",
    model_type: "deepseek_v2",
    every_layer: V2_LAYER,
    dense_layer: MLP,
    moe_layer: V2_EXPERTS,
    extra_layer: &[],
    config: &[
        ("intermediate_size", Found(values::dense_width)),
        ("q_lora_rank", Found(values::query_rank)),
        ("kv_lora_rank", Count("attention.kv_lora_rank")),
        ("qk_rope_head_dim", Count("rope.dimension_count")),
        ("qk_nope_head_dim", Found(values::plain_head_dim)),
        ("v_head_dim", Found(values::value_head_dim)),
        ("attention_bias", HasBiases(BIASED)),
        ("n_routed_experts", Count("expert_count")),
        ("num_experts_per_tok", Found(values::experts_used)),
        ("moe_intermediate_size", Found(values::expert_width)),
        ("n_shared_experts", Found(values::shared_experts)),
        ("first_k_dense_replace", Found(values::leading_dense_layers)),
        ("moe_layer_freq", Is(Number(1))),
        ("routed_scaling_factor", Found(values::routed_scale)),
        ("norm_topk_prob", Found(values::weights_as_they_are)),
        ("scoring_func", Found(values::softmax)),
        ("topk_method", Found(values::softmax_choice)),
        ("n_group", Found(values::groups)),
        ("topk_group", Found(values::groups_used)),
    ],
};

pub static DEEPSEEK_V3: Architecture = Architecture {
    gguf: "deepseek2",
    is: |facts| facts.scores_by_sigmoid(),
    class: "DeepseekV3ForCausalLM",
    model_type: "deepseek_v3",
    every_layer: V3_LAYER,
    dense_layer: MLP,
    moe_layer: V3_EXPERTS,
    extra_layer: super::glm::PREDICTS_FURTHER,
    config: &[
        ("intermediate_size", Found(values::dense_width)),
        ("q_lora_rank", Found(values::query_rank)),
        ("kv_lora_rank", Count("attention.kv_lora_rank")),
        ("qk_rope_head_dim", Count("rope.dimension_count")),
        ("qk_nope_head_dim", Found(values::plain_head_dim)),
        ("v_head_dim", Found(values::value_head_dim)),
        ("attention_bias", HasBiases(BIASED)),
        ("n_routed_experts", Count("expert_count")),
        ("num_experts_per_tok", Found(values::experts_used)),
        ("moe_intermediate_size", Found(values::expert_width)),
        ("n_shared_experts", Found(values::shared_experts)),
        ("first_k_dense_replace", Found(values::leading_dense_layers)),
        ("moe_layer_freq", Is(Number(1))),
        ("routed_scaling_factor", Found(values::routed_scale)),
        ("norm_topk_prob", FlagOr("expert_weights_norm", false)),
        ("scoring_func", Found(values::sigmoid)),
        ("topk_method", Is(Text("noaux_tc"))),
        ("n_group", Found(values::groups)),
        ("topk_group", Found(values::groups_used)),
        ("num_nextn_predict_layers", Found(values::extra_layers)),
    ],
};
