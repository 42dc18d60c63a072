//! MiniMax M2: rotary embeddings on a part of each head, norms of queries and keys over all heads.

use super::Constant::{Flag, Number, Text};
use super::Row::{Experts, Linear, Norm, Precise, WideNorm};
use super::Setting::{Count, Found, Is};
use super::{Architecture, BLOCK_SPARSE_EXPERTS, values};

pub static MINIMAX_M2: Architecture = Architecture {
    gguf: "minimax-m2",
    is: super::always,
    class: "MiniMaxM2ForCausalLM",
    model_type: "minimax_m2",
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
    moe_layer: &[
        Linear("ffn_gate_inp", "block_sparse_moe.gate"),
        Precise(
            "exp_probs_b.bias",
            "block_sparse_moe.e_score_correction_bias",
        ),
        Experts(BLOCK_SPARSE_EXPERTS),
    ],
    extra_layer: &[],
    config: &[
        ("intermediate_size", Found(values::expert_width)),
        ("head_dim", Found(values::head_dim)),
        ("rotary_dim", Count("rope.dimension_count")),
        ("use_qk_norm", Is(Flag(true))),
        ("qk_norm_type", Is(Text("per_layer"))),
        ("num_local_experts", Count("expert_count")),
        ("num_experts_per_tok", Found(values::experts_used)),
        ("shared_intermediate_size", Is(Number(0))),
        ("scoring_func", Found(values::sigmoid)),
        ("use_routing_bias", Is(Flag(true))),
    ],
};
