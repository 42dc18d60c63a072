//! What mlx-lm's classes pass over, or cannot load, of what a directory holds. Those of transformers
//! can, so it is there, and whoever asks for the names of mlx-lm is warned.

use serde_json::{Map, Value as Json};

use super::HfError;
use super::facts::Facts;

/// Models whose rotary positions mlx-lm does not scale.
const UNSCALED: [&str; 5] = [
    "qwen2_moe",
    "qwen3_moe",
    "mixtral",
    "glm4_moe",
    "minimax_m2",
];
/// Models whose head mlx-lm never ties to the embeddings.
const UNTIED: [&str; 5] = [
    "qwen2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
];

/// Whether the class of a `model_type` needs `lm_head.weight`, also if it is that of the embeddings.
pub(super) fn needs_head(kind: &str) -> bool {
    UNTIED.contains(&kind)
}

/// What is to be said of a `model_type` with this config.json.
pub(super) fn warnings(
    facts: &Facts,
    kind: &str,
    config: &Map<String, Json>,
) -> Result<Vec<String>, HfError> {
    let is = |key: &str, flag: bool| config.get(key) == Some(&flag.into());
    let number = |key: &str| config.get(key).and_then(Json::as_u64);
    let heads = number("num_attention_heads").zip(number("head_dim"));
    let is_uncorrected = facts.has_experts() && facts.first("exp_probs_b.bias")?.is_none();
    let mut said: Vec<_> = scaling(kind, &config["rope_scaling"]).into_iter().collect();
    if config.get("clip_qkv").is_some_and(|clip| !clip.is_null()) {
        said.push(format!(
            "mlx-lm computes {kind} without the clip_qkv that config.json has"
        ));
    }
    for (fails, of_what) in [
        (
            kind == "mixtral"
                && heads.is_some_and(|(n, width)| number("hidden_size") != Some(n * width)),
            "whose heads are wider or narrower than hidden_size",
        ),
        (
            kind == "deepseek_v3" && is_uncorrected,
            "without e_score_correction_bias",
        ),
        (
            ["qwen3", "qwen3_moe"].contains(&kind) && is("attention_bias", true),
            "with biases of attention",
        ),
        (
            kind == "qwen2_moe" && is("qkv_bias", false),
            "without biases of attention",
        ),
    ] {
        if fails {
            said.push(format!("mlx-lm fails to load {kind} {of_what}"));
        }
    }
    Ok(said)
}

fn scaling(kind: &str, scaling: &Json) -> Option<String> {
    match (kind, scaling["type"].as_str()) {
        ("deepseek_v2", None) => Some(format!("mlx-lm fails to load {kind} without rope_scaling")),
        ("deepseek_v2", Some("linear")) => Some(format!(
            "mlx-lm takes the linear rope_scaling of {kind} for yarn, and computes something else"
        )),
        ("qwen2_moe", Some(other)) if other != "linear" => Some(format!(
            "mlx-lm fails to load {kind} with a rope_scaling of the type {other}"
        )),
        (_, Some(_)) if UNSCALED.contains(&kind) => Some(format!(
            "mlx-lm computes {kind} without the rope_scaling that config.json has"
        )),
        (_, Some(_)) if scaling.get("attention_factor").is_some() => Some(format!(
            "mlx-lm computes {kind} without the attention_factor of rope_scaling"
        )),
        _ => None,
    }
}
