//! config.json.

use serde_json::{Map, Value as Json};

use super::HfError;
use super::architectures::{Architecture, COMMON, Constant, Setting};
use super::facts::Facts;

/// What config.json says, but for the dtype and what else depends on the form of the tensors.
pub(super) fn of(facts: &Facts, architecture: &Architecture) -> Result<Map<String, Json>, HfError> {
    let mut config = Map::new();
    let mut set = |name: &str, value: Json| config.insert(name.to_owned(), value);
    set("architectures", vec![architecture.class].into());
    set("model_type", architecture.model_type.into());
    for (name, setting) in COMMON.iter().chain(architecture.config) {
        set(name, value(facts, setting)?);
    }
    check_heads(facts, &config)?;
    Ok(config)
}

fn value(facts: &Facts, setting: &Setting) -> Result<Json, HfError> {
    let keys = &facts.keys;
    Ok(match *setting {
        Setting::Count(key) => keys.count(key)?.into(),
        Setting::FlagOr(key, default) => keys.flag(key)?.unwrap_or(default).into(),
        Setting::Is(Constant::Flag(flag)) => flag.into(),
        Setting::Is(Constant::Number(number)) => number.into(),
        Setting::Is(Constant::Real(number)) => number.into(),
        Setting::Is(Constant::Text(text)) => text.into(),
        Setting::HasTensor(name) => facts.first(name)?.is_some().into(),
        Setting::HasBias(name) => {
            let mut layers = facts.layer_numbers()?;
            let has_bias = |layer| facts.of_matrix(layer, name, "bias").is_some();
            layers.any(has_bias).into()
        }
        Setting::Found(find) => find(facts)?,
    })
}

/// Loaders derive the shapes of queries and keys from these numbers, so they must be right.
fn check_heads(facts: &Facts, config: &Map<String, Json>) -> Result<(), HfError> {
    if facts.has_latent_attention() {
        return Ok(());
    }
    let width = facts.head_width()?;
    let hidden = facts.keys.count("embedding_length")?;
    let (queries, others) = (facts.query_heads()?, facts.key_value_head_count()?);
    let heads = [
        ("attn_q.weight", "attention.head_count", queries),
        ("attn_k.weight", "attention.head_count_kv", others),
        ("attn_v.weight", "attention.head_count_kv", others),
    ];
    for (name, key, heads) in heads {
        if let Some(found) = facts.of_layer(0, name)
            && found.info.ne[1] != heads * width
        {
            let key = facts.keys.full(key);
            return Err(found.wrong(format!("{key} is {heads}, and heads are {width} wide")));
        }
    }
    // Without it, loaders divide the width of the model by the number of heads.
    if !config.contains_key("head_dim") && facts.query_heads()? * width != hidden {
        let problem = format!("is {width}, which config.json cannot express");
        return Err(facts.keys.wrong("attention.key_length", problem));
    }
    let is_partly_rotary = ["partial_rotary_factor", "rotary_dim"];
    let rotary = facts.keys.number("rope.dimension_count")?;
    if !is_partly_rotary
        .iter()
        .any(|name| config.contains_key(*name))
        && let Some(rotary) = rotary.filter(|&rotary| rotary != width)
    {
        let problem = format!("is {rotary}, but heads are {width} wide");
        return Err(facts.keys.wrong("rope.dimension_count", problem));
    }
    Ok(())
}
