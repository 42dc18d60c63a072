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
        set(name, value(facts, name, setting)?);
    }
    check_heads(facts, &config)?;
    Ok(config)
}

fn value(facts: &Facts, name: &str, setting: &Setting) -> Result<Json, HfError> {
    let keys = &facts.keys;
    Ok(match *setting {
        Setting::Count(key) => keys.count(key)?.into(),
        Setting::FlagOr(key, default) => keys.flag(key)?.unwrap_or(default).into(),
        Setting::Is(Constant::Flag(flag)) => flag.into(),
        Setting::Is(Constant::Number(number)) => number.into(),
        Setting::Is(Constant::Real(number)) => number.into(),
        Setting::Is(Constant::Text(text)) => text.into(),
        Setting::HasTensor(tensor) => facts.first(tensor)?.is_some().into(),
        Setting::HasBiases(modules) => has_biases(facts, name, modules)?.into(),
        Setting::Found(find) => find(facts)?,
    })
}

/// Whether the matrices have biases, of which config.json says one thing for all.
fn has_biases(facts: &Facts, name: &str, modules: &[&str]) -> Result<bool, HfError> {
    let (mut with, mut without) = (None, None);
    for layer in facts.layer_numbers()? {
        for module in modules {
            let weight = facts.of_matrix(layer, module, "weight");
            match facts.of_matrix(layer, module, "bias") {
                Some(bias) => with = with.or(Some(bias)),
                None => without = without.or(weight),
            }
        }
    }
    match (with, without) {
        (Some(bias), Some(weight)) => Err(weight.wrong(format!(
            "it has no bias, but there is {:?}, and {name} of config.json stands for both",
            bias.info.name
        ))),
        (with, _) => Ok(with.is_some()),
    }
}

/// Loaders divide the width of the model into heads, and turn all of a head.
fn check_heads(facts: &Facts, config: &Map<String, Json>) -> Result<(), HfError> {
    if facts.has_latent_attention() {
        return Ok(());
    }
    let width = facts.head_width()?;
    let hidden = facts.keys.count("embedding_length")?;
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
