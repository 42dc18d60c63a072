//! What mlx-lm's classes pass over, or cannot load, of what config.json says. Those of transformers
//! read it, so it is there, and whoever asks for the names of mlx-lm is warned.

use serde_json::{Map, Value as Json};

/// Models whose rotary positions mlx-lm does not scale.
const UNSCALED: [&str; 5] = [
    "qwen2_moe",
    "qwen3_moe",
    "mixtral",
    "glm4_moe",
    "minimax_m2",
];

/// What is to be said of a `model_type` with this config.json.
pub(super) fn warnings(kind: &str, config: &Map<String, Json>) -> Vec<String> {
    scaling(kind, &config["rope_scaling"]).into_iter().collect()
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
        _ => None,
    }
}
